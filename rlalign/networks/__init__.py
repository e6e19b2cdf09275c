"""Live torch modules that are no policy, and how they are loaded, placed and made cheaper.

pipelines/           folders in diffusers' format: found, loaded, checked
random_models/       such folders of random weights, by family, at a small or the published size
towers.py            open_clip models with a text and a picture tower: what CLIP-like rewards are
pickles.py           published pickles as safetensors, by the reader of tensors alone
critic.py            a value network on latents
noisy_classifier.py  a classifier of noisy latents, for guidance
lora.py              adapters: attached, merged, switched off
sharding.py          a network spread over processes; lockstep.py: asked unequally by them
shares.py            what one process holds of a tensor that is spread
precision.py         in which precision a network computes, and kernels that repeat
devices.py           which torch devices this machine has

May import core, diffusion and data. Heavy libraries are imported inside functions.
"""
