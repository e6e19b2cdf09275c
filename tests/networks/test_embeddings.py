"""Words in a file: what comes back, that it is mapped, and what is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlalign.core.registry import UserError
from rlalign.networks.embeddings import EmbeddingsFile, Row, key_of, row_bytes, write_embeddings

MODEL = {"pipeline class": "FluxPipeline", "policy.text_tokens": "5", "text_encoder": "0" * 32}
TEXTS = ["", "a red circle", "größer"]


def row_of(text: str, length: int = 5) -> Row:
    """Three tensors of three types, of other numbers for each text."""
    drawn = torch.Generator().manual_seed(len(text))
    return {
        "mask_BL": torch.arange(length)[None] < len(text),
        "pooled_BD": torch.randn(1, 3, generator=drawn).bfloat16(),
        "embeds_BLD": torch.randn(1, length, 4, generator=drawn),
    }


def write(file: Path, model: dict[str, str] = MODEL) -> Path:
    write_embeddings(file, model, {key_of(model, t): partial(row_of, t) for t in TEXTS})
    return file


def test_it_gives_back_what_was_written(tmp_path: Path) -> None:
    found = EmbeddingsFile(write(tmp_path / "words.safetensors"), MODEL)
    assert len(list(found.keys)) == 3
    for text in reversed(TEXTS):
        row = found(text)
        for name, tensor in row_of(text).items():
            assert row[name].dtype == tensor.dtype
            assert torch.equal(row[name], tensor)


def test_a_row_holds_no_other_rows(tmp_path: Path) -> None:
    """The file is mapped, and what is kept of it is a row's own memory."""
    found = EmbeddingsFile(write(tmp_path / "words.safetensors"), MODEL)(TEXTS[1])
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in found.values())


def test_it_is_a_file_of_safetensors(tmp_path: Path) -> None:
    """As the library itself reads it: a row for each text."""
    tensors = load_file(write(tmp_path / "words.safetensors"))
    assert tensors["embeds_BLD"].shape == (3, 5, 4)
    assert torch.equal(tensors["pooled_BD"][1:2], row_of(TEXTS[1])["pooled_BD"])


def test_the_same_words_are_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write(tmp_path / f"{n}.safetensors") for n in (1, 2))
    assert first.read_bytes() == second.read_bytes()
    assert row_bytes(row_of("")) == 5 + 3 * 2 + 20 * 4


def test_it_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = write(tmp_path / "words.safetensors")
    before = file.read_bytes()
    rows = {"a": partial(row_of, "a"), "b": partial(row_of, "b", 6)}
    with pytest.raises(AssertionError, match="one shape"):
        write_embeddings(file, MODEL, rows)
    assert file.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == [file.name]


def test_a_prompt_that_is_not_there_is_named_with_the_way_out(tmp_path: Path) -> None:
    file = write(tmp_path / "words.safetensors")
    with pytest.raises(UserError) as caught:
        EmbeddingsFile(file, MODEL)("two circles")
    message = str(caught.value)
    assert "no words of the prompt 'two circles'" in message
    assert f"rlalign encode CONFIG {file}" in message


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"policy.text_tokens": "7"}, "another policy.text_tokens: 5, and not 7"),
        ({"text_encoder": "1" * 32}, "another text_encoder;"),
        ({"text_encoder_2": "1" * 32}, "another text_encoder_2;"),
    ],
)
def test_another_models_file_is_refused(tmp_path: Path, changed: dict[str, str], said: str) -> None:
    file = write(tmp_path / "words.safetensors")
    with pytest.raises(UserError, match=said):
        EmbeddingsFile(file, {**MODEL, **changed})


def test_weights_that_are_not_on_this_machine_are_not_compared(tmp_path: Path) -> None:
    file = write(tmp_path / "words.safetensors")
    assert EmbeddingsFile(file, {**MODEL, "text_encoder": ""})("")


def test_what_is_no_file_of_embeddings_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "words.safetensors"
    with pytest.raises(UserError, match="cannot be read"):
        EmbeddingsFile(file, MODEL)
    file.write_text("none")
    with pytest.raises(UserError, match="cannot be read"):
        EmbeddingsFile(file, MODEL)
    save_file({"embeds_BLD": torch.zeros(1, 2, 3)}, file)
    with pytest.raises(UserError, match="is no file of embeddings"):
        EmbeddingsFile(file, MODEL)
