"""The one policy around every family: what is counted, what is copied, how often a family asks, and
how a recipe puts it together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from rlalign.core.records import Plan
from rlalign.core.registry import UserError, load_class, names
from rlalign.policies.base import Condition, Family, Policy, PolicyRecipe
from tests.toy import ToyFamily, ToyPolicy

PROMPTS = ("a", "b", "c")


class ThriceFamily(ToyFamily):
    """Looks with three calls: what it is guided by has two parts."""

    @classmethod
    def calls_per_look(cls, plan: Plan) -> int:
        return 3

    def look(self, ask, x, timestep_B, condition, guidance):  # type: ignore[no-untyped-def]
        caption = ask(x, timestep_B, condition.caption)
        empty = ask(torch.cat([x, x]), timestep_B.repeat(2), condition.empty.repeat(2))
        first, second = empty.chunk(2)
        return self.combine(caption, (first + second) / 2, guidance)


class Thrice(PolicyRecipe):
    """Its recipe. Source: none, a test's own."""

    family = ThriceFamily

    def build(self, device: str) -> ThriceFamily:
        return ThriceFamily()


class Bare(ToyFamily):
    lora_targets: Sequence[str] = ()


class BareRecipe(PolicyRecipe):
    """A family without layers to adapt. Source: none, a test's own."""

    family = Bare

    def build(self, device: str) -> Bare:
        return Bare()


def denoise(policy: Policy, guidance: float = 1.0, **changes: bool) -> torch.Tensor:
    kind = next(policy.network.parameters()).dtype
    x = torch.linspace(-1, 1, 6, dtype=kind).reshape(3, 2, 1, 1).requires_grad_(**changes)
    condition: Condition = policy.encode(PROMPTS).to(dtype=kind)
    return policy.denoise(x, torch.tensor(400.0), condition, guidance)[1]


@pytest.mark.parametrize(("guidance", "calls"), [(0.5, 3), (1.0, 3), (3.0, 6)])
def test_what_is_asked_is_counted_by_rows(guidance: float, calls: int) -> None:
    policy = ToyPolicy()
    denoise(policy, guidance, requires_grad=False)
    assert (policy.meter.calls, policy.meter.backward_calls) == (calls, 0)
    denoise(policy, guidance, requires_grad=True)
    assert (policy.meter.calls, policy.meter.backward_calls) == (2 * calls, calls)
    assert calls == 3 * policy.family.calls_per_look(Plan(guidance=guidance))


def test_a_family_may_ask_three_times() -> None:
    """It says so before anything is loaded, and what is announced is what is counted; the guided
    answer is that of two calls here."""
    recipe = Thrice()
    policy = recipe.load("cpu")
    plain = ToyPolicy()
    found = denoise(policy, 2.0)
    assert policy.meter.calls == 3 * recipe.calls_per_look(Plan(guidance=2.0)) == 9
    torch.testing.assert_close(found, denoise(plain, 2.0), atol=1e-6, rtol=1e-6)


def test_replicas_count_for_themselves_and_copies_for_their_owner() -> None:
    policy = ToyPolicy()
    twin = policy.replica()
    exact = policy.in_precision(torch.float64)
    assert policy.in_precision(torch.float64) is exact
    assert policy.in_precision(torch.float32) is policy
    found = denoise(exact)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), denoise(policy), atol=1e-5, rtol=1e-5)
    denoise(twin)
    assert (policy.meter.calls, twin.meter.calls) == (6, 3)


def test_new_weights_reach_a_copy_in_another_precision() -> None:
    policy = ToyPolicy()
    before = denoise(policy.in_precision(torch.float64))
    policy.set_weights({n: t + 0.1 for n, t in policy.weights().items()})
    after = denoise(policy.in_precision(torch.float64))
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after.float(), denoise(policy), atol=1e-5, rtol=1e-5)


def test_weights_that_come_in_rows_are_those_that_come_whole() -> None:
    """In any order, and every row once."""
    whole, parts = ToyPolicy(), ToyPolicy()
    denoise(parts.in_precision(torch.float64))
    weights = {n: torch.randn_like(t) for n, t in whole.weights().items()}
    whole.set_weights(weights)
    rows = [(n, t[at : at + 3], at) for n, t in weights.items() for at in range(0, len(t), 3)]
    parts.set_rows(reversed(rows))
    assert all(torch.equal(t, weights[n]) for n, t in parts.weights().items())
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(denoise(parts.in_precision(dtype)), denoise(whole.in_precision(dtype)))
    for wrong in (rows[1:], [*rows, rows[0]]):
        with pytest.raises(AssertionError, match="rows are missing, or came twice"):
            parts.set_rows(wrong)


def test_a_family_is_shared_but_for_its_network() -> None:
    """Nothing that a policy changes lies on its family."""
    policy = ToyPolicy()
    before = dict(vars(policy.family))
    denoise(policy)
    policy.interpolation = 0.5
    denoise(policy)
    policy.set_weights(policy.weights())
    assert vars(policy.family) == before
    twin = policy.replica().family
    assert {n for n, value in vars(twin).items() if value is not before[n]} == {"network"}


def test_no_adapter_where_no_layer_takes_one() -> None:
    with pytest.raises(UserError, match=r"policy\.lora_rank must be 0 for .*, which takes no"):
        BareRecipe(lora_rank=2).load("cpu")
    with pytest.raises(UserError, match=r"policy\.adapter must be empty for .*, which takes none"):
        BareRecipe(adapter="some/folder").load("cpu")


def test_every_policy_says_its_family_before_it_is_loaded() -> None:
    """And each class of pipelines has one policy that reads its folders."""
    readers: dict[str, str] = {}
    for name in names("policies"):
        recipe = load_class("policies", name)
        assert issubclass(recipe.family, Family)  # type: ignore[attr-defined]
        if recipe.by_folder:  # type: ignore[attr-defined]
            for pipeline in recipe.family.pipeline_classes:  # type: ignore[attr-defined]
                assert readers.setdefault(pipeline, name) == name
    assert readers["StableDiffusionPipeline"] == "stable_diffusion"
    assert readers["StableDiffusion3Pipeline"] == "sd3"
    assert readers["StableDiffusionXLPipeline"] == "sdxl"
    assert readers["FluxPipeline"] == "flux"


def test_a_trained_adapter_of_points_is_in_what_is_saved(tmp_path: Path) -> None:
    from rlalign.policies.points import Points

    policy = Points(lora_rank=2).load("cpu")
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.3)
    policy.save(tmp_path)
    again = Points(path=str(tmp_path)).load("cpu")
    x = torch.randn(3, 2, 1, 1)
    words = policy.encode(["left", "up", "down"]).caption
    timestep_B = torch.tensor([100, 500, 900])
    with torch.no_grad():
        found = again.answer(x, timestep_B, words)
        torch.testing.assert_close(found, policy.answer(x, timestep_B, words), atol=1e-5, rtol=0)
