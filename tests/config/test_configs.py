"""Every file in configs/: it loads, it is short, and it passes the schema."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from rlalign.config import dump, load_run, load_settings, parse_run, schema
from rlalign.fitting.denoiser import Pretrain
from rlalign.fitting.reward import FitReward
from rlalign.sampling import Sample, load_sample
from rlalign.sampling.settings import parse_sample
from rlalign.voting.settings import Vote, load_vote

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
OTHERS = {
    "pretrain_": ("pretrain", Pretrain),
    "fit_": ("fit-reward", FitReward),
    "sample_": ("sample", Sample),
    "vote_": ("vote", Vote),
}
"""How a file's name begins -> the command that takes it, and its settings; any other file is a
run."""
RUNS = [path for path in FILES if not path.name.startswith(tuple(OTHERS))]
SAMPLES = [path for path in FILES if path.name.startswith("sample_")]
VOTES = [path for path in FILES if path.name.startswith("vote_")]


def test_there_are_some():
    assert {"quickstart", "tiny_compressibility", "pretrain_tiny"} <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_it_is_sparse_and_says_how_to_start_it(path):
    lines = path.read_text().splitlines()
    # a published recipe says line by line what differs
    assert len(lines) <= (60 if path.parent.name == "published" else 30)
    command = next(
        (command for prefix, (command, _) in OTHERS.items() if path.name.startswith(prefix)),
        "train",
    )
    assert f"# rlalign {command} configs/{path.relative_to(CONFIGS)}" in lines


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_a_run_file_loads_and_is_named_after_itself(path):
    run = load_run(path)
    assert run.name == path.stem
    assert parse_run(yaml.safe_load(dump(run))) == run


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(schema())


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_a_run_file_passes_the_schema(path, validator):
    validator.validate(yaml.safe_load(path.read_text()))
    validator.validate(yaml.safe_load(dump(load_run(path))))


@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: p.stem)
def test_a_sample_file_loads_and_is_named_after_itself(path):
    made = load_sample(path)
    assert made.name == path.stem
    assert parse_sample(yaml.safe_load(yaml.safe_dump(made.model_dump(mode="json")))) == made


@pytest.mark.parametrize("path", VOTES, ids=lambda p: p.stem)
def test_a_vote_file_loads_and_is_named_after_itself(path):
    vote = load_vote(path)
    assert f"vote_{vote.name}" == path.stem
    assert not vote.server.with_token, "on loopback the page asks for no token"


@pytest.mark.parametrize(
    "path", sorted(set(FILES) - set(RUNS) - set(SAMPLES) - set(VOTES)), ids=lambda p: p.stem
)
def test_a_file_of_another_command_loads_and_writes_to_a_folder_of_its_name(path):
    settings = next(cls for prefix, (_, cls) in OTHERS.items() if path.name.startswith(prefix))
    assert load_settings(settings, path).out == Path("runs") / path.stem


def test_quickstart_is_the_contracts_example():
    run = load_run(CONFIGS / "quickstart.yaml")
    assert (run.policy.name, run.prompts.name, run.algorithm.name) == ("tiny", "shapes", "ddpo")
    assert "shapes" in [reward.title for reward in run.rewards]


def test_the_compressibility_run_holds_the_captions_out():
    run = load_run(CONFIGS / "tiny_compressibility.yaml")
    assert [reward.title for reward in run.rewards] == ["jpeg"]
    assert [reward.title for reward in run.evaluate.rewards] == ["shapes"]
