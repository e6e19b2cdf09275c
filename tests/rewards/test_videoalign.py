"""VideoAlign's reward on a small random Qwen2-VL of the same class, against transformers' own
forward pass of it with transformers' own processor, with peft's own LoRA."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlalign.cli import main
from rlalign.core.registry import UserError, build
from rlalign.rewards._videoalign_network import LEAST_PIXELS, TOKENS, sample_frames
from rlalign.rewards.base import score
from tests.rewards.small_qwen2_vl import build_model, old_names, save_base

INSTRUCTION = (
    "\nJudge the clip.\nVisual: <|VQ_reward|>\nMotion: <|MQ_reward|>\n"
    "Textual prompt - {text_prompt}\nFit: <|TA_reward|>\nEND\n"
)
PROMPTS = ["a red circle moves right", "two squares", "a {braces} <|MQ_reward|> b"]
NORM = {
    "VQ_mean": 3.6757,
    "VQ_std": 2.2476,
    "MQ_mean": 1.1646,
    "MQ_std": 1.3811,
    "TA_mean": 2.8105,
    "TA_std": 2.5121,
}
SAID = {
    "data_config": {"fps": 2.0, "max_frame_pixels": 200704},
    "peft_lora_config": {"lora_enable": True, "lora_r": 4, "lora_alpha": 8},
    "inference_config": NORM,
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(settings, the model with its LoRA, its head): the base's folder, a checkpoint as peft names
    it and rlalign convert writes it, model_config.json, and the authors' string in a Python
    file."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("videoalign")
    model = build_model(save_base(folder / "base", LEAST_PIXELS), len(TOKENS))
    head_KD = torch.randn(3, 32) / 4
    old = {name: t for name, t in old_names(model).items() if name != "lm_head.weight"}
    targets = ["q_proj", "down_proj", "qkv"]
    lora = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets)).eval()
    for name, tensor in lora.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(tensor, std=0.2)

    # the names that peft gives, in the older layout
    named = {n: t for n, t in old_names(lora).items() if "lm_head" not in n}
    pickle = folder / "checkpoint-1" / "model.pth"
    pickle.parent.mkdir()
    torch.save({**named, "base_model.model.rm_head.weight": head_KD}, pickle)
    assert len(named) > len(old)
    weights = folder / "model.safetensors"
    assert main(["convert", str(pickle), str(weights)]) == 0
    (folder / "model_config.json").write_text(json.dumps(SAID))
    text = f"raise RuntimeError('run')\nDETAILED_PROMPT_WITH_SPECIAL_TOKEN = {INSTRUCTION!r}\n"
    (folder / "prompt_template.py").write_text(text)
    settings = {
        "name": "videoalign",
        "weights": str(weights),
        "config": str(folder / "model_config.json"),
        "base": str(folder / "base"),
        "instruction": str(folder / "prompt_template.py"),
        "precision": "float32",
        "batch": 2,
    }
    return settings, lora, head_KD


@pytest.fixture(scope="module")
def media():
    """Clips of 5 frames that are seen as they are, at 336 x 336; the last is blank."""
    made = np.random.default_rng(0).integers(0, 256, (3, 5, 3, 336, 336), dtype=np.uint8)
    made[2] = 255
    return made


def reference(published, media, prompts):
    """(B, 3) scores as the head gives them, by transformers' own processor and classes."""
    from transformers import AutoProcessor

    settings, lora, head_KD = published
    processor = AutoProcessor.from_pretrained(settings["base"])
    processor.tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS)})
    rows = []
    for clip, prompt in zip(media, prompts, strict=True):
        text = INSTRUCTION.replace("{text_prompt}", prompt)
        content = [{"type": "video"}, {"type": "text", "text": text}]
        chat = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        batch = processor(
            text=[chat],
            videos=[torch.from_numpy(clip[[0, 1, 3, 4]])],
            return_tensors="pt",
            do_resize=False,
        )
        places = torch.arange(batch.input_ids.shape[1]).expand(3, 1, -1)
        with torch.no_grad():
            hidden = lora.base_model.model.model(**batch, position_ids=places).last_hidden_state[0]
        ids = processor.tokenizer.convert_tokens_to_ids(list(TOKENS))
        here = torch.isin(batch.input_ids[0], torch.tensor(ids))
        rows.append((hidden[here] @ head_KD.T).diagonal())
    return torch.stack(rows)


def made_of(published, **more):
    made = build("rewards", {**published[0], **more})
    return made, made.load("cpu")


def test_it_is_transformers_own_forward_pass_with_pefts_lora_and_the_head(published, media):
    prompts = PROMPTS[:2]
    raw_B3 = reference(published, media[:2], prompts)
    assert float((raw_B3[0] - raw_B3[1]).abs().min()) > 1e-3
    for number, name in enumerate(("VQ", "MQ", "TA")):
        found = score(*made_of(published, score=name, normalise=False), media[:2], prompts)
        np.testing.assert_allclose(found, raw_B3[:, number], atol=5e-5)
    mean_3, std_3 = (
        torch.tensor([NORM[f"{n}_{what}"] for n in ("VQ", "MQ", "TA")]) for what in ("mean", "std")
    )
    normed_B3 = (raw_B3 - mean_3) / std_3
    found = score(*made_of(published), media[:2], prompts)
    np.testing.assert_allclose(found, normed_B3.sum(1), atol=5e-5)
    found = score(*made_of(published, score="MQ"), media[:2], prompts)
    np.testing.assert_allclose(found, normed_B3[:, 1], atol=5e-5)


def test_alone_among_others_and_in_which_order(published, media):
    """Captions of different lengths, the last with a token of the network's own in it."""
    made, scorer = made_of(published)
    together = score(made, scorer, media, PROMPTS)
    alone = [score(made, scorer, media[i : i + 1], PROMPTS[i : i + 1])[0] for i in range(3)]
    np.testing.assert_allclose(together, alone, atol=5e-5)
    assert np.isfinite(together).all()
    backwards = score(made, scorer, media[:1, ::-1].copy(), PROMPTS[:1])
    assert abs(backwards[0] - together[0]) > 1e-3


@pytest.mark.parametrize(
    ("frames", "rate", "wanted"),
    [
        (2, 8.0, [0, 1]),
        (3, 8.0, [0, 2]),
        (9, 8.0, [0, 3, 5, 8]),
        (49, 8.0, [0, 4, 9, 13, 17, 22, 26, 31, 35, 39, 44, 48]),
        (81, 16.0, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),
        (4, 1.0, [0, 1, 2, 3]),
    ],
)
def test_frames_are_sampled_by_the_rate(frames, rate, wanted):
    assert sample_frames(frames, rate, 2.0) == wanted


def test_clips_of_other_sizes_are_resized_and_gradients_reach_them(published):
    made, scorer = made_of(published)
    for shape in ((2, 3, 32, 48), (9, 3, 700, 500)):
        media = torch.rand(1, *shape).requires_grad_()
        scorer(media, PROMPTS[:1]).sum().backward()
        touched = media.grad.flatten(2).abs().amax(2)[0]
        seen = sample_frames(shape[0], made.rate, 2.0)
        assert [n for n, most in enumerate(touched) if most > 0] == seen


def test_a_picture_is_refused(published):
    _, scorer = made_of(published)
    with pytest.raises(UserError, match=r"videoalign needs clips of 2 frames or more, got 1"):
        scorer(torch.zeros(1, 1, 3, 32, 32), PROMPTS[:1])


def test_a_merged_checkpoint_and_a_text_of_ones_own_give_the_same(published, media, tmp_path):
    """A head of one number for all three tokens, too."""
    _, lora, head_KD = published
    plain = old_names(lora.merge_and_unload())
    plain = {name: t for name, t in plain.items() if "lm_head" not in name}
    raw = score(*made_of(published, score="VQ"), media[:1], PROMPTS[:1])
    save_file({**plain, "rm_head.weight": head_KD[:1].contiguous()}, tmp_path / "one.safetensors")
    (tmp_path / "own.txt").write_text(INSTRUCTION)
    own = {"weights": str(tmp_path / "one.safetensors"), "instruction": str(tmp_path / "own.txt")}
    same = score(*made_of(published, score="VQ", **own), media[:1], PROMPTS[:1])
    np.testing.assert_allclose(same, raw, atol=5e-5)


def test_what_does_not_fit_is_refused(published, tmp_path):
    tensors = load_file(published[0]["weights"])
    held = {n: t for n, t in tensors.items() if "rm_head" not in n}
    save_file(held, tmp_path / "none.safetensors")
    save_file({**held, "rm_head.weight": torch.zeros(4, 32)}, tmp_path / "four.safetensors")
    (tmp_path / "bare.json").write_text(json.dumps({**SAID, "inference_config": None}))
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "other.py").write_text("x = 1")
    (tmp_path / "short.txt").write_text("{text_prompt} <|VQ_reward|>")
    for settings, said in (
        ({"weights": "none.safetensors"}, r"weights: .* another model: it has no 'rm_head"),
        ({"weights": "four.safetensors"}, r"its rm_head gives 4 numbers a token, and must give 1"),
        ({"weights": "gone.safetensors"}, r"weights must name an existing \.safetensors file"),
        ({"config": "bare.json"}, r"normalise must be false where .* no inference_config"),
        ({"config": "other.json"}, r"config: .* must be a model_config\.json .* 'data_config'"),
        ({"instruction": "other.py"}, r"must hold the string DETAILED_PROMPT_WITH_SPECIAL_TOKEN"),
        ({"instruction": "short.txt"}, r"<\|TA_reward\|> once each, .* the scores are read"),
    ):
        with pytest.raises(UserError, match=said):
            made_of(published, **{name: str(tmp_path / file) for name, file in settings.items()})
    made_of(published, config=str(tmp_path / "bare.json"), normalise=False)
