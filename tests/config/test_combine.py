"""How a run file combines rewards, and for which algorithms that is refused."""

from __future__ import annotations

import pytest

from rlalign.config import dump, identity_of, load_run, parse_run, resolved
from tests.config.test_config import least, refused

TWO = "rewards=[{name: shapes}, {name: jpeg, label: bytes}]"


def test_what_is_not_said_changes_no_identity():
    """Checkpoints of before there were such settings are still the run's own."""
    assert identity_of(load_run("configs/quickstart.yaml")) == "c4c621d302faa380"
    assert identity_of(least("combine=sum", "rewards.0.at_least=null")) == identity_of(least())
    others = {
        identity_of(least(*one))
        for one in ([], ["combine=normalised"], ["combine=product"], ["rewards.0.at_least=0.5"])
    }
    assert len(others) == 4


def test_settings_come_back_from_their_yaml(tmp_path):
    run = least(TWO, "combine=normalised", "rewards.1.at_least=-0.5")
    (tmp_path / "run.yaml").write_text(dump(run))
    assert load_run(tmp_path / "run.yaml") == run == parse_run(resolved(run))


@pytest.mark.parametrize(
    "algorithm",
    [
        "{name: ddpo}",
        "{name: ddpo, advantage: global}",
        "{name: dpok}",
        "{name: grpo}",
        "{name: diffusion_nft}",
    ],
)
def test_algorithms_that_divide_by_a_spread_may_normalise(algorithm):
    assert least(TWO, "combine=normalised", f"algorithm={algorithm}").algorithm.normalises


@pytest.mark.parametrize(
    "algorithm",
    [
        "{name: ddpo, advantage: centred}",
        "{name: reinforce}",
        "{name: rwr}",
        "{name: d3po}",
        "{name: diffusion_dpo}",
        "{name: reward_backprop}",
    ],
)
def test_others_are_refused(algorithm):
    once = "learner.updates_per_round=1"  # as reinforce has it
    said = refused(TWO, "combine=normalised", once, f"algorithm={algorithm}")
    assert said.startswith("combine must be sum or product for ")
    assert "got 'normalised'" in said and "grpo" in said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["combine=product", "algorithm={name: reward_backprop}"],
            "combine must be sum where rounds of scored samples are learned from, and this run of"
            " reward_backprop makes none; leave it out",
        ),
        (
            ["rewards.0.at_least=0.5", "algorithm={name: reward_backprop}"],
            "at_least is for runs in which rounds of scored samples are learned from, and this run"
            " of reward_backprop makes none; leave it out",
        ),
        (
            ["combine=product", "rewards.0.weight=-1"],
            "rewards.shapes.weight must be >= 0 under combine: product, where it is a power; leave"
            " it out, or take combine: sum",
        ),
        (
            ["evaluate.rewards=[{name: jpeg, at_least: 1}]"],
            "evaluate.rewards.jpeg.at_least is for rewards that a run is trained on, got 1; leave"
            " it out here",
        ),
        (["combine=mean"], "combine must be 'sum', 'normalised' or 'product', got 'mean'"),
        (
            ["rewards.0.at_least=often"],
            "rewards.0.at_least must be a valid number, unable to parse string as a number, got"
            " 'often'",
        ),
    ],
)
def test_what_cannot_be_is_refused(overrides, said):
    assert refused(*overrides) == said
