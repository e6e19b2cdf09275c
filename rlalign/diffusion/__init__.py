"""The maths of denoising, without checkpoints: a step is a Gaussian, and every step rule works on
every noise path.

paths.py        x = alpha * clean + sigma * noise: variance-preserving and rectified flow, and their
grids of levels predictions.py  what a network outputs, brought to the one currency (clean, noise),
once, at the door steps.py        one denoising step as a Gaussian: sample, log-prob, KL; ddim,
ddpm, flow_ode, flow_sde, flow_dance, flow_cps
noise.py        noise that depends on its key alone: (seed, stream, round, prompt, sample, step)
rollout.py      trajectories of a unit, and their log-probs again under other weights

May import core; knows no policy, reward or algorithm. To add a step rule: write one function in
steps.py, name the paper and the equation in its docstring, put it into RULES (and into
``StepRuleName`` in records.py), and hold it to a closed form or to diffusers in
tests/diffusion/test_steps.py.
"""
