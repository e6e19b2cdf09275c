"""rlalign encode: what it writes, a run on it, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rlalign.alignment.encode import prompts_of
from rlalign.alignment.loop import train_local
from rlalign.cli import main
from rlalign.config import dump, load_run
from rlalign.data.pairs.columns import write_pairs
from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.runtime.reservation import run_bundles
from rlalign.runtime.roles import ENCODER
from tests.policies.family_runs import run_of
from tests.runs import assert_same_run, quiet
from tests.votes import Voted

Call = Callable[..., tuple[int, str, str]]
PLAN = {"rule": "flow_sde", "eta": 0.7}


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    write_pipeline(folder, FAMILIES["flux"], seed=1)
    return folder


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    """A run file: two rounds of GRPO on FLUX, whose evaluation asks for the same prompts."""
    policy = {"name": "flux", "path": str(model), "text_tokens": 16}
    file = tmp_path / "run.yaml"
    file.write_text(dump(run_of(policy, PLAN, {"name": "grpo"})))
    return file


@pytest.mark.promise
def test_a_run_on_the_file_is_the_run_with_text_encoders(
    call: Call, config: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, and it reads no weights of text encoders: they are gone."""
    monkeypatch.setattr("rlalign.report.write_report", quiet)
    file = tmp_path / "new" / "words.safetensors"
    code, out, err = call("encode", config, file)
    assert code == 0
    assert out.startswith(f"{file}: 4 texts, 4 of them new, ")
    assert out.endswith(f"a run reads it with policy.embeddings={file}\n")
    assert err.splitlines()[-1] == "4 of 4 texts"

    train_local(load_run(config), tmp_path / "encoders", resume=False, on_record=quiet)
    lost = sorted(model.glob("text_encoder*/model.safetensors"))
    assert len(lost) == 2
    kept = [one.read_bytes() for one in lost]
    for one in lost:
        one.unlink()
    try:
        run = load_run(config, [f"policy.embeddings={file}"])
        train_local(run, tmp_path / "file", resume=False, on_record=quiet)
    finally:
        for one, content in zip(lost, kept, strict=True):
            one.write_bytes(content)
    assert_same_run(tmp_path / "encoders", tmp_path / "file")

    # what comes out has no need of the words
    file.rename(tmp_path / "kept.safetensors")
    assert call("export", tmp_path / "file", tmp_path / "exported")[0] == 0
    (tmp_path / "kept.safetensors").rename(file)

    # where the words come from may change where a run goes on
    more = load_run(config, ["rounds=3"])
    train_local(more, tmp_path / "file", resume=True, on_record=quiet)
    train_local(more, tmp_path / "encoders", resume=True, on_record=quiet)
    assert_same_run(tmp_path / "encoders", tmp_path / "file")


def test_what_the_file_has_is_kept(call: Call, config: Path, tmp_path: Path) -> None:
    """Other prompts are added to it; the file is the setting's where none is named."""
    file = tmp_path / "words.safetensors"
    setting = f"policy.embeddings={file}"
    assert call("encode", config, setting)[0] == 0
    first = file.read_bytes()
    assert ": 4 texts, 0 of them new" in call("encode", config, file)[1]
    assert file.read_bytes() == first
    prompts = "prompts.prompts=[blue, a yellow circle]"
    assert ": 3 texts, 1 of them new" in call("encode", config, file, prompts)[1]
    assert ": 4 texts, 0 of them new" in call("encode", config, file)[1]


def test_a_sample_file_is_read_too(call: Call, config: Path, tmp_path: Path) -> None:
    data = yaml.safe_load(config.read_text())
    own = {"policy": data["policy"], "prompts": data["prompts"], "rewards": data["rewards"]}
    sample = tmp_path / "sample.yaml"
    rest = {"name": "some", "pictures": 2, "sampler": {"name": "plain"}}
    sample.write_text(yaml.safe_dump({**own, **rest}))
    code, out, _ = call("encode", sample, tmp_path / "words.safetensors")
    assert code == 0
    assert ": 3 texts, 3 of them new" in out


def test_mistakes_are_one_message(call: Call, config: Path, tmp_path: Path) -> None:
    """No file, two of them, one of another kind, and one that is there and none of ours."""
    for arguments, said in (
        ((), "encode needs one file to write"),
        (("a.safetensors", "b.safetensors"), "encode needs one file to write"),
        (("words.pt",), "FILE must end in .safetensors, got 'words.pt'"),
    ):
        code, out, err = call("encode", config, *arguments)
        assert (code, out) == (2, "")
        assert said in err
    file = tmp_path / "words.safetensors"
    file.write_bytes(b"none")
    code, _, err = call("encode", config, file)
    assert code == 2
    assert f"{file} is there already, and cannot be read" in err
    assert file.read_bytes() == b"none"


def test_another_models_file_is_not_added_to(call: Call, config: Path, tmp_path: Path) -> None:
    file = tmp_path / "words.safetensors"
    assert call("encode", config, file)[0] == 0
    code, _, err = call("encode", config, file, "policy.text_tokens=12")
    assert code == 2
    assert "was written with another policy.text_tokens: 16, and not 12; name another file" in err


def test_captions_of_a_set_are_prompts_too(config: Path, tmp_path: Path) -> None:
    """Those of the usable pairs, once each, beside the source's and the evaluation's."""
    captions = ["two squares", "blue", "two squares"]
    rest = {"jpg_0": b"unread", "jpg_1": b"unread", "label_0": 1.0, "label_1": 0.0}
    write_pairs(tmp_path / "pairs.parquet", [{"caption": c, **rest} for c in captions])
    settings = [f"preferences={{path: {tmp_path / 'pairs.parquet'}, pairs_per_round: 2}}"]
    settings += ["preferences.pairs_per_pass=1", "algorithm={name: diffusion_dpo}"]
    own = ["a red circle", "blue", "a green square above two circles"]
    assert prompts_of(load_run(config, settings)) == [*own, "two squares"]

    # of votes, those that there are now
    voted = Voted(tmp_path / "votes.db")
    voted.vote(voted.person(), "three circles", [1, 2])
    settings[0] = f"preferences={{ballots: {tmp_path / 'votes.db'}, pairs_per_round: 2}}"
    assert prompts_of(load_run(config, settings)) == [*own, "three circles"]


def test_one_encoder_is_reserved_for(config: Path) -> None:
    """Where the policy asks for it, and nowhere else."""
    settings = ["policy.embeddings=actor", "runtime.encoder.cpus=2"]
    (found,) = [b for b in run_bundles(load_run(config, settings)) if b.role == ENCODER]
    assert dict(found.needs) == {"CPU": 2.0}
    assert not [b for b in run_bundles(load_run(config)) if b.role == ENCODER]
