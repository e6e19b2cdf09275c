"""HPSv3 on a small random Qwen2-VL of the same class, against transformers' own forward pass of it
with transformers' own processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rlalign.core.registry import UserError, build
from rlalign.rewards._hpsv3_network import PIXELS, TOKEN
from rlalign.rewards.base import score
from tests.rewards.small_qwen2_vl import build_model, old_names, save_base

INSTRUCTION = "\nRate it from 0 to 10.\nTextual prompt - {text_prompt}\n\n\n"
ENDING = f"\nThe rating of this picture: {TOKEN}\n\nEND\n"
PROMPTS = ["a red circle", "two blue squares", "a {braces} <|Reward|> b"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(settings, the whole model, its head): the base's folder, a checkpoint with the published
    names, and the authors' two strings in a Python file."""
    folder = tmp_path_factory.mktemp("hpsv3")
    config = save_base(folder / "base", PIXELS)
    # as it was fine-tuned: a token more, and a head
    model = build_model(config, 1)
    head = torch.nn.Sequential(
        torch.nn.Linear(32, 24),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.05),
        torch.nn.Linear(24, 16),
        torch.nn.ReLU(),
        torch.nn.Linear(16, 2),
    ).eval()
    for tensor in head.parameters():
        torch.nn.init.normal_(tensor, std=0.3)
    old = old_names(model)
    old |= {f"rm_head.{n}": t.contiguous() for n, t in head.state_dict().items()}
    save_file(old, folder / "HPSv3.safetensors")
    said = "import os\nraise RuntimeError('it was run')\n"
    said += f"INSTRUCTION = {INSTRUCTION!r}\nprompt_with_special_token = {ENDING!r}\n"
    (folder / "data_collator_qwen.py").write_text(said)
    settings = {
        "name": "hpsv3",
        "weights": str(folder / "HPSv3.safetensors"),
        "base": str(folder / "base"),
        "instruction": str(folder / "data_collator_qwen.py"),
        "precision": "float32",
        "batch": 2,
    }
    return settings, model, head


@pytest.fixture(scope="module")
def media():
    """28-pixel multiples of the size at which a picture is seen, so that nothing is resized; the
    last is blank."""
    side = round(PIXELS**0.5)
    made = np.random.default_rng(0).integers(0, 256, (3, 1, 3, side, side), dtype=np.uint8)
    made[2] = 255
    return made


def reference(published, media, prompts):
    """(mean, log spread) by transformers' own processor and classes."""
    from transformers import AutoProcessor

    settings, model, head = published
    processor = AutoProcessor.from_pretrained(settings["base"])
    processor.tokenizer.add_special_tokens({"additional_special_tokens": [TOKEN]})
    rows = []
    for picture, prompt in zip(media[:, 0], prompts, strict=True):
        text = INSTRUCTION.replace("{text_prompt}", prompt) + ENDING
        content = [{"type": "image"}, {"type": "text", "text": text}]
        chat = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        image = Image.fromarray(picture.transpose(1, 2, 0))
        batch = processor(text=[chat], images=[image], return_tensors="pt")
        places = torch.arange(batch.input_ids.shape[1]).expand(3, 1, -1)
        with torch.no_grad():
            hidden = model.model(**batch, position_ids=places).last_hidden_state[0]
        here = batch.input_ids[0] == processor.tokenizer.convert_tokens_to_ids(TOKEN)
        rows.append(head(hidden[here][-1]).detach())
    return torch.stack(rows)


def test_it_is_transformers_own_forward_pass_and_the_head(published, media):
    settings = published[0]
    prompts = PROMPTS[:2]
    expected = reference(published, media[:2], prompts)
    assert float((expected[0] - expected[1]).abs().max()) > 0.1
    made = build("rewards", settings)
    found = score(made, made.load("cpu"), media[:2], prompts)
    np.testing.assert_allclose(found, expected[:, 0], atol=2e-5)
    cautious = build("rewards", {**settings, "spread_weight": -2.0})
    found = score(cautious, cautious.load("cpu"), media[:2], prompts)
    np.testing.assert_allclose(found, expected[:, 0] - 2 * expected[:, 1].exp(), atol=5e-5)


def test_alone_among_others_and_as_a_clip(published, media):
    """Captions of different lengths, the last with a token of the network's own in it."""
    made = build("rewards", published[0])
    scorer = made.load("cpu")
    together = score(made, scorer, media, PROMPTS)
    alone = [score(made, scorer, media[i : i + 1], PROMPTS[i : i + 1])[0] for i in range(3)]
    np.testing.assert_allclose(together, alone, atol=2e-5)
    frames = [score(made, scorer, media[i : i + 1], PROMPTS[:1])[0] for i in range(3)]
    clip = score(made, scorer, media[:, 0][None], PROMPTS[:1])
    np.testing.assert_allclose(clip, [np.mean(frames)], atol=2e-5)
    assert np.isfinite(together).all()


@pytest.mark.parametrize("shape", [(32, 32), (60, 200)])
def test_pictures_of_other_sizes_are_resized_and_gradients_reach_them(published, shape):
    """Against transformers' resizing, which rounds to bytes on the way."""
    picture = np.random.default_rng(1).integers(0, 256, (1, 1, 3, *shape), dtype=np.uint8)
    made = build("rewards", published[0])
    scorer = made.load("cpu")
    expected = reference(published, picture, PROMPTS[:1])[0, 0]
    np.testing.assert_allclose(score(made, scorer, picture, PROMPTS[:1]), [expected], atol=0.05)
    media = torch.from_numpy(picture).float().div(255).requires_grad_()
    scorer(media, PROMPTS[:1]).sum().backward()
    assert float(media.grad.abs().max()) > 0


def test_bfloat16_is_near(published, media):
    made = build("rewards", {**published[0], "precision": "bfloat16"})
    full = build("rewards", published[0])
    near = score(made, made.load("cpu"), media[:1], PROMPTS[:1])
    np.testing.assert_allclose(
        near, score(full, full.load("cpu"), media[:1], PROMPTS[:1]), atol=0.2
    )


def test_a_text_of_ones_own_is_taken(published, media, tmp_path):
    file = tmp_path / "own.txt"
    file.write_text(INSTRUCTION + ENDING)
    made = build("rewards", {**published[0], "instruction": str(file)})
    same = build("rewards", published[0])
    np.testing.assert_array_equal(
        score(made, made.load("cpu"), media[:1], PROMPTS[:1]),
        score(same, same.load("cpu"), media[:1], PROMPTS[:1]),
    )


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("no place", "own.txt", r"must hold \{text_prompt\} and <\|Reward\|> once each"),
        ("x = 1", "own.py", "must hold the strings INSTRUCTION and prompt_with_special_token"),
        ("(", "own.py", "cannot read"),
    ],
)
def test_an_instruction_that_is_none_is_refused(published, tmp_path, text, name, said):
    (tmp_path / name).write_text(text)
    made = build("rewards", {**published[0], "instruction": str(tmp_path / name)})
    with pytest.raises(UserError, match=rf"rewards\.hpsv3\.instruction: .*{said}"):
        made.load("cpu")


def test_weights_of_another_model_are_refused(published, tmp_path):
    tensors = load_file(published[0]["weights"])
    kinds = {
        "rm_head": {n: t for n, t in tensors.items() if not n.startswith("rm_head")},
        "language_model.norm.weight": {
            n: t for n, t in tensors.items() if n != "model.norm.weight"
        },
    }
    for missing, kept in kinds.items():
        file = tmp_path / "other.safetensors"
        save_file(kept, file)
        made = build("rewards", {**published[0], "weights": str(file)})
        with pytest.raises(UserError, match=rf"weights: .* another model: it has no .*{missing}"):
            made.load("cpu")
    with pytest.raises(UserError, match=r"rewards\.hpsv3\.base: cannot load"):
        build("rewards", {**published[0], "base": str(tmp_path)}).load("cpu")
