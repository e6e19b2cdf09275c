"""Every training config in configs/: two rounds in one process and on Ray actors, bitwise equal.

By default the actors of all runs are the same processes, which take up one run after the other, and
the learner is the test's own process: what a run computes is all there, and only the driver is not,
whose starting would take most of the time. The slow test has it: a Ray, a driver and a Ray Train
for each config.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlalign.alignment.loop import train_local
from rlalign.config import Run, load_run
from rlalign.runtime import train_on_ray
from rlalign.runtime.actors import RESTART
from rlalign.runtime.roles import ROLLOUT, reward_role
from rlalign.runtime.training.coordinator import Coordinator
from rlalign.runtime.training.fleet import policy_source
from rlalign.runtime.training.train import learn
from rlalign.runtime.workers import PolicyWorker, RewardWorker
from tests.runs import CONFIGS, assert_same_run, final_tensors, metrics, quiet

pytestmark = pytest.mark.ray

NAMES = sorted(
    p.stem
    for p in CONFIGS.glob("*.yaml")
    if not p.name.startswith(("pretrain_", "fit_", "sample_", "vote_"))
)
SMALL = (
    "rounds=2",
    # with fewer no shape is recognised: every reward would be 0, and nothing learned
    "plan.steps=5",
    "prompts.per_round=2",
    "prompts.samples_per_prompt=4",
    "prompts.per_unit=1",
    "learner.shards=2",
    "evaluate.prompts=2",
    "evaluate.every=0",
    "evaluate.grid=2",
    "checkpoint.every=2",
    "runtime.rollout.workers=2",
)
REFITTED = ["refit=null", "rewards=[{name: bradley_terry}]", "evaluate.rewards=[]"]
"""tests/end_to_end/test_people.py has a run with votes; the actors serve three rewards at most."""


def small(name: str, pairs: Path) -> Run:
    """The config, cut down; where it learns from a set of preferences, from one of ``pairs``."""
    whole = load_run(CONFIGS / f"{name}.yaml")
    more = [f"plan.window={min(whole.plan.window, 2)}"]
    run = load_run(CONFIGS / f"{name}.yaml", [*SMALL, *more, "learner.updates_per_round=1"])
    more += [
        f"learner.updates_per_round={min(whole.learner.updates_per_round, 2)}",
        f"learner.epochs={min(whole.learner.epochs, 2)}",
    ]
    more += ["algorithm.draws=2"] if "draws" in type(run.algorithm).model_fields else []
    if run.preferences is not None:
        kind = "clips" if run.plan.frames > 1 else "pictures"
        more += [
            "preferences.ballots=null",
            f"preferences.path={pairs / kind}.parquet",
            "preferences.pairs_per_round=8",
            "preferences.pairs_per_pass=4",
        ]
    more += REFITTED if run.refit is not None else []
    return load_run(CONFIGS / f"{name}.yaml", [*SMALL, *more])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sixteen drawn pairs, each caption's picture against another's, and of four pairs
    of clips."""
    from rlalign.core.clips import encode_clip
    from rlalign.data import motion, shapes
    from rlalign.data.pairs.columns import write_pairs
    from rlalign.data.pairs.ranking import encode
    from rlalign.diffusion.noise import generator

    def rows_of(count: int, scene_of: Any, draw: Any) -> list[dict[str, Any]]:
        rows = []
        for number in range(count):
            rng = generator("drawn pairs", number)
            scene, other = scene_of(rng), scene_of(rng)
            first, second = draw(scene, rng), draw(other, rng)
            labels = {"label_0": 1.0, "label_1": 0.0}
            rows.append({"caption": scene.caption, "jpg_0": first, "jpg_1": second, **labels})
        return rows

    def picture(scene: shapes.Scene, rng: Any) -> bytes:
        return encode(shapes.draw(scene, rng).transpose(2, 0, 1))

    def clip(scene: motion.Scene, rng: Any) -> bytes:
        return encode_clip(motion.draw(scene, rng).transpose(0, 3, 1, 2))[0]

    folder = tmp_path_factory.mktemp("pairs")
    pictures = rows_of(16, lambda rng: shapes.random_scene(rng, "train"), picture)
    write_pairs(folder / "pictures.parquet", pictures)
    write_pairs(folder / "clips.parquet", rows_of(4, motion.random_scene, clip))
    return folder


class Renewed(Coordinator):
    """A coordinator that takes up another run."""

    async def renew(self, run: Run) -> None:
        """As new."""
        self.__init__(run)


class Actors:
    """A coordinator, two rollout workers and three reward workers, which take up one run after the
    other."""

    def __init__(self, first: Run) -> None:
        import ray

        def started(cls: Any, *arguments: Any, **settings: Any) -> Any:
            return ray.remote(num_cpus=0, **RESTART, **settings)(cls).remote(*arguments)

        self._coordinator = started(Renewed, first, max_concurrency=1000)
        self._rollouts = [
            started(PolicyWorker, policy_source(first), f"{ROLLOUT} {i}") for i in range(2)
        ]
        self._rewards = [
            started(RewardWorker, first.rewards[0], "cpu", 1, f"reward {i}") for i in range(3)
        ]

    def train(self, run: Run, folder: Path) -> None:
        """A run from its beginning to its end, the learner in this process."""
        import ray

        coordinator, rewards = self._coordinator, run.rewards_for("evaluate")
        serving = list(zip(rewards, self._rewards, strict=False))
        assert len(serving) == len(rewards) and run.runtime.rollout.workers == len(self._rollouts)
        again = [
            a.apply.remote(PolicyWorker.__init__, policy_source(run), f"{ROLLOUT} {i}")
            for i, a in enumerate(self._rollouts)
        ]
        again += [
            a.apply.remote(RewardWorker.__init__, r, "cpu", 1, str(reward_role(r.title)))
            for r, a in serving
        ]
        ray.get([*again, coordinator.renew.remote(run)])
        pools = {
            ROLLOUT: dict(enumerate(self._rollouts)),
            **{reward_role(r.title): {0: a} for r, a in serving},
        }
        ray.get(coordinator.adopt.remote(pools, None))
        told = {"run": run, "place": str(folder), "owner": "", "coordinator": coordinator}
        assert learn(told) is None


@pytest.fixture(scope="module")
def actors(ray_cluster: None, pairs: Path) -> Actors:
    return Actors(
        small("quickstart", pairs)
    )  # they start while the first run is done in this process


def assert_learned(folder: Path) -> None:
    """Two rounds, of which one at least moved the weights; the ratio was 1 before the first
    update."""
    lines = metrics(folder)
    assert [line["round"] for line in lines] == [1, 2]
    assert max(line["grad_norm"] for line in lines) > 0
    assert lines[0].get("ratio/first_update", 0.0) == 0.0


PROMISED = (
    "points",
    "quickstart",
    "tiny_dpo_offline",
    "tiny_draft",
    "tiny_flow_grpo",
    "tiny_ocr",
    "tiny_video_grpo",
)
"""One of each kind but plans: points, the embedded models, given pairs, gradients through the
reward, engines that are no torch, clips. The others are slow tests."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.promise if name in PROMISED else pytest.mark.slow)
        for name in NAMES
    ],
)
def test_it_trains_on_actors_as_it_does_in_one_process(
    name: str, actors: Actors, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # reads what is compared, and takes a quarter of the time
    monkeypatch.setattr("rlalign.report.write_report", quiet)
    run = small(name, pairs)
    train_local(run, tmp_path / "local", resume=False, on_record=quiet)
    actors.train(run, tmp_path / "ray")
    assert_same_run(tmp_path / "ray", tmp_path / "local")
    assert_learned(tmp_path / "local")
    before = run.policy.load("cpu").weights()
    after = final_tensors(tmp_path / "ray")
    assert any(not torch.equal(after[f"policy/{name}"], weight) for name, weight in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_trains_with_a_driver_and_ray_train_too(name: str, pairs: Path, tmp_path: Path) -> None:
    run = small(name, pairs)
    train_local(run, tmp_path / "local", resume=False, on_record=quiet)
    train_on_ray(run, tmp_path / "ray", resume=False, on_record=quiet)
    assert_same_run(tmp_path / "ray", tmp_path / "local")


def test_there_is_a_config_for_every_algorithm(pairs: Path) -> None:
    from rlalign.core.registry import names

    assert set(PROMISED) <= set(NAMES)
    assert {small(name, pairs).algorithm.name for name in NAMES} == set(names("algorithms"))
