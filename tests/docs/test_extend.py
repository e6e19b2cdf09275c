"""docs/extend.md is run: its files in an empty folder, its commands in order."""

from __future__ import annotations

import json
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlalign.cli import main
from rlalign.core.registry import SHELVES, load_class
from tests.docs.pages import ROOT, commands, read, write_files

PAGE = ROOT / "docs" / "extend.md"
COMMANDS = commands(read(PAGE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The page's files, importable."""
    folder = tmp_path_factory.mktemp("extend")
    names = [Path(name).stem for name in write_files(PAGE, folder) if name.endswith(".py")]
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in names:
        sys.modules.pop(name, None)


def test_every_shelf_has_its_example(folder: Path) -> None:
    """One file for each, whose class is found by its name."""
    found = {
        "algorithms": "raft:Raft",
        "limits": "spread:Spread",
        "optimizers": "momentum:Momentum",
        "policies": "pixels:Pixels",
        "prompts": "phrases:Phrases",
        "rewards": "contrast:Contrast",
        "samplers": "mirrored:Mirrored",
        "sinks": "tables:Tables",
    }
    assert found.keys() == SHELVES.keys()
    for shelf, name in found.items():
        assert load_class(shelf, name).__doc__


@pytest.mark.promise
@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page_work(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(folder)
    program, verb, *rest = shlex.split(command)
    if program == "python":
        runpy.run_path(verb, run_name="__main__")
        return
    config = rest[0]
    assert program == "rlalign"
    assert main([verb, *rest]) == 0, capsys.readouterr().err
    run = folder / "runs" / Path(config).stem
    assert (run / "report.html").is_file()
    if verb == "train":
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["round"] for line in lines] == [1, 2]
        assert all(line["grad_norm"] > 0 for line in lines)


def test_the_page_has_commands_for_its_files() -> None:
    assert [line.split()[0] for line in COMMANDS].count("rlalign") == 8


def test_the_reward_of_the_page_is_what_it_says(folder: Path) -> None:
    """Half black, half white: 0.5 (the unbiased estimate for 64 pixels is slightly above, and
    clipped); grey: 0."""
    import rlalign

    media = torch.zeros(2, 1, 3, 8, 8)
    media[0, ..., :4] = 1.0
    score = rlalign.load_reward("contrast:Contrast")
    assert score(media, ["a", "b"]).tolist() == pytest.approx([0.5, 0.0])


def test_the_sampler_of_the_page_keeps_the_better(folder: Path) -> None:
    """Against both candidates, rolled out by hand."""
    import numpy as np

    import rlalign
    from rlalign.engine.local import LiveRewards, LocalEngine
    from rlalign.sampling import load_sample

    settings = load_sample(folder / "mirrored.yaml")
    policy = rlalign.load_policy("points")
    engine = LocalEngine(policy, [LiveRewards(settings.rewards)], rows=4)
    unit = settings.unit
    found = settings.sampler.sample(engine, unit).latents
    start = engine.begin(unit)
    score = rlalign.load_reward("centroid")
    ends = [
        policy.sample(unit.prompts, steps=5, latents=sign * start, output="latents")
        for sign in (1.0, -1.0)
    ]
    scores_2B = torch.stack(
        [score((policy.decode(x) * 255.0).round().to(torch.uint8), unit.prompts) for x in ends]
    )
    wanted = torch.stack(
        [ends[int(i)][b] for b, i in enumerate(np.asarray(scores_2B.argmax(dim=0)))]
    )
    assert torch.allclose(found, wanted, atol=1e-5)
    assert len({int(i) for i in scores_2B.argmax(dim=0)}) == 2, "both signs should win somewhere"


def test_the_family_of_the_page_draws_what_diffusers_draws(folder: Path) -> None:
    """Eight steps of diffusers' own DDIM on the same network and noise: pixels within 1e-5."""
    import diffusers

    import rlalign

    random_pixels = folder / "random_pixels.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runpy.run_path(str(random_pixels), run_name="__main__")
    checkpoint = folder / "checkpoint"
    pipeline = diffusers.DDPMPipeline.from_pretrained(checkpoint)
    scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(8)
    start = torch.randn(2, 3, 16, 16)
    x = start.clone()
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            x = scheduler.step(pipeline.unet(x, timestep).sample, timestep, x).prev_sample
    policy = rlalign.load_policy("pixels:Pixels", path=str(checkpoint))
    found = policy.sample(["a", "b"], steps=8, latents=start, output="latents")
    assert (found - x).abs().max() < 1e-5 * max(1.0, x.abs().max().item())
    assert policy.sample(["a"], steps=2).shape == (1, 1, 3, 16, 16)
