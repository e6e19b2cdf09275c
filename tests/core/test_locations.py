"""Settings that name files: absolute from the folder of the command, and refused where there is
nothing."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel

from rlalign.alignment import loop
from rlalign.alignment.loop import train_local
from rlalign.config import Run, dump, identity_of, load_run, locate_run, resolved
from rlalign.core.locations import NamesFile, locate
from rlalign.core.registry import SHELVES, UserError, build, load_class, names
from rlalign.fitting.denoiser import Pretrain, pretrain
from rlalign.fitting.reward import FitReward, fit_reward
from rlalign.learning import checkpoint
from rlalign.sampling import Sample
from rlalign.sampling.settings import parse_sample
from tests.runs import CONFIGS, final_tensors, metrics


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the command, with a file and a folder in it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prompts.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


CHOICES: dict[str, dict[str, Any]] = {
    "local": {"name": "file", "shelf": "prompts", "key": "path"},
    "hub": {"name": "stable_diffusion", "shelf": "policies", "key": "path"},
    "architecture": {"name": "clip", "shelf": "rewards", "key": "architecture"},
    "tokenizer": {"name": "pickscore", "shelf": "rewards", "key": "tokenizer"},
    "classifier": {"name": "classifier_guidance", "shelf": "samplers", "key": "classifier"},
    "pictures": {"name": "edict", "shelf": "samplers", "key": "source"},
}


def located(kind: str, value: Any, *, here: bool = True) -> Any:
    choice = CHOICES[kind]
    more = {"source_prompt": ["a", "b"]} if kind == "pictures" else {}
    recipe = build(choice["shelf"], {"name": choice["name"], choice["key"]: value, **more})
    return getattr(locate(recipe, "x", here=here), choice["key"])


@pytest.mark.parametrize("kind", ["local", "hub", "tokenizer", "classifier"])
@pytest.mark.parametrize(
    "text", ["data/prompts.txt", "./data/prompts.txt", "data/../data/prompts.txt", "owner/model"]
)
def test_what_is_there_becomes_absolute(kind: str, text: str, folder: Path) -> None:
    found = located(kind, text)
    assert Path(found).is_absolute() and Path(found).samefile(folder / text)
    assert located(kind, found) == found


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("hub", "other-owner/model.v1"),
        ("tokenizer", "bert-base-uncased"),
        ("tokenizer", "google-bert/bert-base-uncased"),
        ("architecture", "ViT-B-32"),
        ("architecture", "data"),
        ("classifier", "lab.judges:facts"),
        ("classifier", ""),
    ],
)
def test_what_is_no_path_stays(kind: str, text: str, folder: Path) -> None:
    assert located(kind, text) == text
    assert located(kind, text, here=False) == text


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("local", "prompts.txt"),
        ("local", "owner/other"),
        ("hub", "model"),
        ("hub", "./model"),
        ("hub", "../model"),
        ("hub", "~/model"),
        ("hub", "deep/down/model"),
        ("hub", "owner/weights.safetensors"),
        ("architecture", "vit.json"),
        ("tokenizer", "a/b/c"),
        ("classifier", "judge"),
    ],
)
def test_what_is_not_there_is_refused_with_the_place_that_was_looked_at(
    kind: str, text: str, folder: Path
) -> None:
    key = CHOICES[kind]["key"]
    for here in (True, False):
        with pytest.raises(UserError) as refused:
            located(kind, text, here=here)
        message = str(refused.value)
        rule = f"x.{key} must name a file or folder that is there"
        assert message.startswith(f"{rule}, got {text!r}: there is nothing at {folder / text}")
        assert ("named by its absolute path" in message) is not here


def test_an_absolute_path_may_be_of_another_machine(folder: Path) -> None:
    assert located("local", "/nowhere/prompts.txt", here=False) == "/nowhere/prompts.txt"
    with pytest.raises(
        UserError,
        match=(
            r"x\.path .* that is there, got '/nowhere/prompts.txt': there is nothing at"
            r" /nowhere/prompts.txt$"
        ),
    ):
        located("local", "/nowhere/prompts.txt")


def test_lists_of_files_and_patterns(folder: Path) -> None:
    (folder / "data" / "[odd]").mkdir()
    assert located("pictures", ["data/prompts.txt", folder / "data"]) == (
        folder / "data/prompts.txt",
        folder / "data",
    )
    with pytest.raises(
        UserError, match=r"x\.source\.1 must name a file or folder that is there, got 'none.png'"
    ):
        located("pictures", ["data/prompts.txt", "none.png"])
    fit = FitReward.model_validate({"preferences": {"path": "data/*.parquet"}})
    assert locate(fit).preferences.path == f"{folder}/data/*.parquet"


def test_a_pattern_is_of_the_files_and_not_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlalign.data.pairs.columns import pair_files

    odd = tmp_path / "run [1]"
    odd.mkdir()
    (odd / "a.parquet").write_bytes(b"")
    monkeypatch.chdir(odd)
    found = locate(
        FitReward.model_validate({"preferences": {"path": "*.parquet"}})
    ).preferences.path
    assert pair_files(found) == [odd / "a.parquet"]


def marked(model: type[BaseModel]) -> set[str]:
    return {
        n
        for n, f in model.model_fields.items()
        if any(isinstance(m, NamesFile) for m in f.metadata)
    }


def models_of(model: type[BaseModel], known: set[type[BaseModel]]) -> set[type[BaseModel]]:
    """A settings model and all that its fields are made of."""
    if model in known:
        return known
    known.add(model)

    def visit(kind: Any) -> None:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            models_of(kind, known)
        for part in get_args(kind):
            visit(part)

    for field in model.model_fields.values():
        visit(field.annotation)
    return known


WORDS = (
    "path",
    "folder",
    "file",
    "weights",
    "tokenizer",
    "architecture",
    "head",
    "pretrained",
    "source",
    "classifier",
)
NO_FILES = {"Points.path"}
"""The noise path."""


def test_every_setting_that_names_files_says_so() -> None:
    """By its name or its description: a new one that is forgotten shows here."""
    everything: set[type[BaseModel]] = set()
    for model in (Run, Sample, FitReward, Pretrain):
        models_of(model, everything)
    for shelf in SHELVES:
        for name in names(shelf):
            models_of(load_class(shelf, name), everything)
    suspects = {
        f"{model.__name__}.{name}"
        for model in everything
        for name, field in model.model_fields.items()
        if field.annotation in (str, Path, tuple[Path, ...])
        and name not in marked(model)
        and (
            name in WORDS
            or name.endswith(("path", "file", "folder"))
            or "older" in (field.description or "")
        )
        and name not in ("name", "out")
    }
    assert suspects - NO_FILES == set()
    assert sum(len(marked(model)) for model in everything) > 20


# --- runs ----------------------------------------------------------------------------------------


FILED = (
    "prompts={name: file, path: data/prompts.txt, per_round: 2, samples_per_prompt: 4, per_unit: 1}"
)
FEW = (
    "rounds=1",
    "plan.steps=3",
    "learner.epochs=1",
    "evaluate.every=0",
    "evaluate.prompts=2",
    "evaluate.grid=2",
)


def quiet(_: object) -> None:
    """No screen."""


def run_of_a_file(*more: str) -> Run:
    """Seconds of work on prompts of a file."""
    return load_run(CONFIGS / "points.yaml", [FILED, *FEW, *more])


def assert_same_end(run: Path, whole: Path) -> None:
    mine, theirs = final_tensors(run), final_tensors(whole)
    assert mine.keys() == theirs.keys() and all(
        torch.equal(mine[name], theirs[name]) for name in mine
    )
    assert metrics(run) == metrics(whole)


@pytest.mark.promise
def test_a_run_goes_on_from_another_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_local(run_of_a_file("rounds=2"), folder / "whole", resume=False, on_record=quiet)
    train_local(run_of_a_file(), folder / "run", resume=False, on_record=quiet)
    assert load_run("run/config.yaml").prompts.path == str(folder / "data/prompts.txt")  # type: ignore[attr-defined]
    monkeypatch.chdir("/")
    train_local(
        load_run(folder / "run/config.yaml", ["rounds=2"]),
        folder / "run",
        resume=True,
        on_record=quiet,
    )
    assert_same_end(folder / "run", folder / "whole")


@pytest.mark.promise
def test_a_run_folder_with_relative_paths_goes_on_as_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As written by hand, or by a version that kept them: its checkpoints name it by them."""
    with monkeypatch.context() as older:
        older.setattr(loop, "locate_run", lambda run, **_: run)
        train_local(run_of_a_file(), folder / "run", resume=False, on_record=quiet)
    before = load_run("run/config.yaml")
    assert before.prompts.path == "data/prompts.txt"  # type: ignore[attr-defined]
    located = pickle.loads(pickle.dumps(locate_run(before, begun=True)))
    assert located.prompts.path == str(folder / "data/prompts.txt")
    assert (dump(located), identity_of(located)) == (dump(before), identity_of(before))
    assert identity_of(locate_run(before, begun=False)) != identity_of(before)

    train_local(
        load_run("run/config.yaml", ["rounds=2"]), folder / "run", resume=True, on_record=quiet
    )
    assert resolved(load_run("run/config.yaml"))["prompts"]["path"] == "data/prompts.txt"
    assert checkpoint.latest(folder / "run", run_identity=identity_of(before)) is not None
    train_local(run_of_a_file("rounds=2"), folder / "whole", resume=False, on_record=quiet)
    assert_same_end(folder / "run", folder / "whole")

    monkeypatch.chdir("/")
    with pytest.raises(
        UserError,
        match=(
            "there is nothing at /data/prompts.txt; .* goes on from the folder in which it was"
            " started"
        ),
    ):
        train_local(
            load_run(folder / "run/config.yaml"), folder / "run", resume=True, on_record=quiet
        )


MISSING = [
    ("policy={name: stable_diffusion, path: models/sd/v1}", "policy.path"),
    ("prompts={name: file, path: none.txt}", "prompts.path"),
    ("rewards=[{name: bradley_terry, path: none}]", "rewards.0.path"),
    (
        "evaluate.rewards=[{name: http, url: 'https://a.b', ca_file: none.pem}]",
        "evaluate.rewards.0.ca_file",
    ),
]


@pytest.mark.parametrize(("override", "place"), MISSING)
@pytest.mark.parametrize("how", ["local", "ray"])
def test_a_path_that_is_not_there_begins_nothing(
    override: str, place: str, how: str, folder: Path
) -> None:
    from rlalign.runtime import train_on_ray

    train = train_local if how == "local" else train_on_ray
    run = load_run(CONFIGS / "quickstart.yaml", ["prompts.per_round=4", override])
    with pytest.raises(
        UserError, match=rf"^{place} must name a file or folder .*: there is nothing at {folder}/"
    ):
        train(run, folder / "run", resume=False, on_record=quiet)
    assert not (folder / "run").exists()


def test_fitting_and_pretraining_refuse_it_too(folder: Path) -> None:
    with pytest.raises(
        UserError,
        match=rf"^preferences\.path must name .*: there is nothing at {folder}/none\.parquet",
    ):
        fit_reward(
            FitReward.model_validate({"preferences": {"path": "none.parquet"}, "out": "fit"})
        )
    with pytest.raises(
        UserError, match=rf"^autoencoder\.source must name .*: there is nothing at {folder}/none"
    ):
        pretrain(Pretrain.model_validate({"autoencoder": {"source": "none"}, "out": "pretrain"}))
    assert not (folder / "fit").exists() and not (folder / "pretrain").exists()


def test_a_sample_file_names_a_folder_or_a_policy(folder: Path) -> None:
    settings = {
        "name": "x",
        "prompts": {"name": "shapes"},
        "rewards": [{"name": "jpeg"}],
        "sampler": {"name": "plain"},
    }
    assert locate(parse_sample({**settings, "policy": "tiny"})).policy == "tiny"
    (folder / "tiny").mkdir()
    assert locate(parse_sample({**settings, "policy": "tiny"})).policy == str(folder / "tiny")
    sample = parse_sample({**settings, "policy": {"name": "tiny", "path": "owner/model"}})
    assert sample.model.recipe.path == "owner/model"  # type: ignore[attr-defined]
    assert locate(sample).model.recipe.path == str(folder / "owner/model")  # type: ignore[attr-defined]
    with pytest.raises(
        UserError,
        match=(
            "policy must name a file or folder that is there, got 'runs/none': there is nothing at"
        ),
    ):
        locate(parse_sample({**settings, "policy": "runs/none"}))
