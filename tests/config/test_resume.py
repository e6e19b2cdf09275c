"""What may change where a run goes on, and the reason where it may not."""

from __future__ import annotations

import pytest

from rlalign.config import RuntimeSettings, identity_of, load_run, refuse_changes, refuse_fixed
from rlalign.config.resume import FREE, paths_of
from rlalign.core.registry import UserError
from tests.runs import CONFIGS

QUICKSTART = CONFIGS / "quickstart.yaml"
GUARDED = (
    "guard.limits=[{name: held_out, reward: jpeg}]",
    "evaluate.rewards=[{name: jpeg}]",
)
REFIT = ("rewards=[{name: bradley_terry}]", "refit.preferences.ballots={store: v.db}")
STALE = ("runtime.max_staleness=1",)


def change(before: tuple[str, ...], *changes: str) -> None:
    refuse_changes(load_run(QUICKSTART, before), load_run(QUICKSTART, [*before, *changes]))


@pytest.mark.parametrize(
    ("before", "changes"),
    [
        (
            (),
            [
                "rounds=99",
                "name=other",
                "write_pairs=all",
                "checkpoint.keep=7",
                "checkpoint.every=2",
            ],
        ),
        ((), ["evaluate.every=1", "evaluate.grid=3"]),
        ((), ["runtime.rollout.workers=5", "runtime.reward.workers=3", "runtime.reward.spares=1"]),
        (
            (),
            [
                "runtime.rollout.max_workers=9",
                "runtime.max_attempts=1",
                "runtime.start_seconds=3",
            ],
        ),
        (
            (),
            [
                "runtime.rollout.cpus=2",
                "runtime.rollout.labels={zone: b}",
                "runtime.learner.resources={a: 1}",
            ],
        ),
        (("learner.shards=4",), ["runtime.learner.workers=4"]),
        (("policy={name: flux, path: some/flux, lora_rank: 2}",), ["learner.shard=base"]),
        (("policy={name: flux, path: some/flux}",), ["learner.shard=all"]),
        ((), ["runtime={rollout: {workers: 3}}"]),
        ((), ["runtime={rollout_workers: 3}"]),
        ((), ["runtime.rollout_workers=3", "runtime.rollout_labels={zone: b}"]),
        ((), ["seed=0", "policy.name=tiny"]),
        ((), ["runtime.reward.gpus=1"]),
        (
            ("runtime.device=cuda:1", "runtime.reward.gpus=1"),
            ["runtime.device=cuda", "runtime.reward.gpus=0.5"],
        ),
        (REFIT, ["refit.preferences.ballots={store: v.db, patience_seconds: 9}"]),
        ((), ["runtime.recovery_seconds=3"]),
        (REFIT, ["refit.preferences.workers=3"]),  # which decides nothing any more
        (STALE, ["checkpoint.keep=5", "runtime.rollout.workers=4"]),
        (GUARDED, ["checkpoint.every=1", "evaluate.grid=2"]),
    ],
)
def test_what_changes_no_number_may_change(before, changes):
    change(before, *changes)
    assert identity_of(load_run(QUICKSTART, [*before, *changes])) == identity_of(
        load_run(QUICKSTART, before)
    )
    refuse_fixed(
        [c for c in changes if c not in ("seed=0", "policy.name=tiny", "runtime.device=cuda")]
    )


@pytest.mark.parametrize(
    ("before", "changed", "said"),
    [
        ((), "seed=1", "seed must stay 0, got 1: its numbers would be others"),
        ((), "rewards.0.weight=2", "rewards.0.weight must stay 1.0, got 2.0: its numbers"),
        ((), "learner.shards=3", "learner.shards must stay 2, got 3: its numbers"),
        ((), "guard.patience=3", "guard.patience must stay 2, got 3"),
        (
            (),
            "runtime.max_staleness=1",
            "must stay 0, got 1: rounds would be made under weights of another age",
        ),
        (
            (),
            "runtime.rollout.threads=2",
            "must stay 1, got 2: another number of threads adds in another order",
        ),
        (
            (),
            "runtime.learner.threads=2",
            "must stay 1, got 2: another number of threads adds in another order",
        ),
        ((), "runtime.device=cuda", "must stay 'cpu', got 'cuda': another device rounds otherwise"),
        ((), "evaluate.prompts=8", "evaluations before and after would measure different things"),
        ((), "evaluate.seed=8", "evaluations before and after would measure different things"),
        (
            GUARDED[1:],
            "evaluate.rewards.0.label=other",
            "label must stay '', got 'other': the evaluations before and",
        ),
        (
            ("runtime.device=cuda",),
            "runtime.reward.gpus=1",
            "must stay 0.0, got 1.0: rewards would compute on cuda",
        ),
        (
            STALE,
            "checkpoint.every=2",
            "with runtime.max_staleness no round is ordered ahead across a checkpoint",
        ),
        (GUARDED, "evaluate.every=2", "the guard counts evaluations"),
    ],
)
def test_what_changes_a_number_is_refused_with_the_reason(before, changed, said):
    with pytest.raises(UserError) as caught:
        change(before, changed)
    message = str(caught.value)
    assert message.startswith("--resume: ")
    assert said in message
    assert "What may change: name, rounds, write_pairs, checkpoint.every" in message
    assert "runtime rollout.workers, rollout.cpus" in message


def test_every_setting_of_the_runtime_may_change_but_four():
    fixed = {"device", "rollout.threads", "learner.threads", "max_staleness"}
    free = {path.removeprefix("runtime.") for path in FREE if path.startswith("runtime.")}
    assert free == set(paths_of(RuntimeSettings)) - fixed
    assert "rollout.workers" in free and "reward.spares" in free


@pytest.mark.parametrize(
    "fixed",
    ["seed=1", "runtime.max_staleness=0", "runtime.device=cpu", "evaluate.rewards=[]", "run"],
)
def test_what_never_may_change_is_refused_without_the_runs_own_settings(fixed):
    with pytest.raises(UserError, match="must stay as it is, got .*What may change: name, rounds"):
        refuse_fixed(["rounds=9", fixed])
