"""What a denoiser is trained on: shares of spoilt pictures, and captions as tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from rlalign.data import words
from rlalign.data.shapes import draw, random_scene
from rlalign.fitting.denoiser import Pretrain, pretrain
from rlalign.fitting.denoiser.corpus import faded, pictures
from rlalign.fitting.denoiser.pipeline import caption_tokenizer
from rlalign.rewards.shapes import detect, facts

WORDS = {
    "task": "words",
    "images": 8,
    "autoencoder": {"updates": 1, "batch": 2, "channels": (8, 8)},
    "denoiser": {
        "family": "transformer",
        "updates": 1,
        "batch": 2,
        "width": 16,
        "layers": 2,
        "text_width": 16,
    },
}


def test_a_faded_picture_is_one_whose_facts_a_viewer_no_longer_sees() -> None:
    """Contrast falls to 0.2 - 0.45 of what it was; below 0.4 the verifier finds next to nothing
    (100 pictures, seed 0)."""
    rng = np.random.default_rng(0)
    before, after = [], []
    for _ in range(100):
        scene = random_scene(rng, "train")
        picture = draw(scene, rng)
        pale = faded(picture, rng)
        ground = np.median(picture.reshape(-1, 3), axis=0)
        share = np.abs(pale - ground).max() / np.abs(picture - ground).max()
        assert 0.19 < share < 0.46
        before.append(np.mean(list(facts(scene, detect(picture)).values())))
        after.append(np.mean(list(facts(scene, detect(pale)).values())))
    assert np.mean(before) == 1.0
    assert np.mean(after) < 0.3


def test_the_share_of_faded_pictures_is_what_was_asked_for() -> None:
    """200 pictures at 0.35: within 3 standard errors (0.1) of it; at 0 none differs from the drawn
    one."""
    plain, captions = pictures(Pretrain(images=200))
    mixed, same_captions = pictures(Pretrain(images=200, faded=0.35))
    assert captions == same_captions
    changed = (plain != mixed).flatten(1).any(1).double().mean()
    assert abs(float(changed) - 0.35) < 0.1


def test_the_share_of_misspelt_words_is_what_was_asked_for() -> None:
    """200 pictures at 0.35, as above; the captions say the right words, all of the train split."""
    plain, captions = pictures(Pretrain(task="words", images=200))
    mixed, same_captions = pictures(Pretrain(task="words", images=200, misspelt=0.35))
    assert captions == same_captions
    assert set(captions) <= {words.caption(word) for word in words.words("train")}
    changed = (plain != mixed).flatten(1).any(1).double().mean()
    # of those that are spelt right, the draws after the question are the same
    assert abs(float(changed) - 0.35) < 0.1


def test_letters_of_a_caption_are_tokens_in_their_order() -> None:
    tokenizer = caption_tokenizer("words")
    ids = tokenizer(words.caption("TANE")).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("<|startoftext|>", "the</w>", "word</w>", '"</w>'),
        *("t", "a", "n", "e</w>", '"</w>', "<|endoftext|>"),
    ]


def test_a_model_of_words_is_a_pipeline_that_draws_words(tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    folder = pretrain(Pretrain.model_validate({**WORDS, "out": tmp_path}))
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        folder, text_encoder_3=None, tokenizer_3=None
    )
    pipeline.set_progress_bar_config(disable=True)
    told = {"num_inference_steps": 1, "max_sequence_length": 0, "output_type": "np"}
    assert pipeline(words.caption("CAT"), **told).images.shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"misspelt": 0.1}, "misspelt has no meaning where the task is shapes"),
        (
            {"autoencoder": {"still_updates": 1}},
            "autoencoder.still_updates has no meaning where the task is shapes",
        ),
        (
            {"task": "words", "autoencoder": {"source": "tiny"}, "classifier": {}},
            "classifier must be trained on shapes, whose facts it tells, got task words",
        ),
    ],
)
def test_settings_of_another_task_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Pretrain.model_validate(wrong)
