"""Choice by a fitted reward: features add up to the score, votes move the weights, rules choose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rlalign.ballots.records import picture_uid
from rlalign.core.clips import read_clip
from rlalign.core.registry import build
from rlalign.data.shapes import draw, random_scene
from rlalign.voting.choice import FittedChoice, make_rules, posterior_mode
from rlalign.voting.pictures import PictureFile
from tests.votes import Voted
from tests.voting.test_queue import settings


def drawn(number: int) -> PictureFile:
    """A picture of shapes under the caption of another one, or of its own where it is even."""
    from rlalign.data.pairs.ranking import encode

    rng = np.random.default_rng(number)
    scene, other = random_scene(rng, "train"), random_scene(rng, "train")
    content = encode(draw(scene, rng).transpose(2, 0, 1))
    return PictureFile.of(content, caption=(other if number % 2 else scene).caption)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> FittedChoice:
    voted = Voted(tmp_path_factory.mktemp("choice") / "votes.db", campaign="q")
    rules = make_rules(settings(rule="gap"), voted.store)
    return rules.watch.__self__  # type: ignore[attr-defined]


def test_features_add_up_to_the_score(fitted: FittedChoice) -> None:
    reward = build("rewards", {"name": "bradley_terry"}).load("cpu")  # type: ignore[attr-defined]
    for number in range(3):
        made = drawn(number)
        fitted.watch([made])
        media = torch.from_numpy(read_clip(made.content)[None]).float() / 255
        with torch.no_grad():
            score = float(reward(media, [made.caption])[0])
        features_D = fitted._features[made.picture.uid]
        assert features_D.sum() == pytest.approx(score, abs=1e-4)


def test_the_posterior_is_where_its_slope_is_zero() -> None:
    from scipy import optimize

    rng = np.random.default_rng(0)
    difference_ND = rng.normal(size=(40, 3))
    label_N = rng.choice([0.0, 0.5, 1.0], size=40)

    def negative(weights_D: np.ndarray) -> float:
        logit_N = difference_ND @ weights_D
        likelihood = (label_N * logit_N - np.logaddexp(0, logit_N)).sum()
        return float(0.5 * 4.0 * ((weights_D - 1) ** 2).sum() - likelihood)

    found = posterior_mode(difference_ND, label_N, 4.0)
    theirs = optimize.minimize(negative, np.zeros(3), tol=1e-12).x
    assert found == pytest.approx(theirs, abs=1e-5)
    # nothing said: as it was fitted
    assert posterior_mode(np.zeros((1, 3)), np.array([0.5])) == pytest.approx(np.ones(3))


def test_the_widest_gap_is_chosen_and_its_propensity_is_known(fitted: FittedChoice) -> None:
    group = [drawn(n) for n in range(4)]
    caption = group[0].caption
    group = [PictureFile.of(made.content, caption=caption) for made in group]
    fitted._features.clear()
    fitted.watch(group)
    score = {m.picture.uid: fitted._features[m.picture.uid] @ fitted.weights_D for m in group}
    ordered = sorted(group, key=lambda m: score[m.picture.uid])
    chosen = []
    for seed in range(200):
        choice = fitted.pick(group, np.random.default_rng(seed))
        chosen.append({group[choice.first].content, group[choice.second].content})
        share = fitted.random_share
        widest = chosen[-1] == {ordered[0].content, ordered[-1].content}
        assert choice.propensity == pytest.approx(share / 6 + (1 - share) * widest)
    # a quarter at random, of which a sixth is the widest: 0.79, with a standard error of 0.029
    widest = {ordered[0].content, ordered[-1].content}
    assert np.mean([one == widest for one in chosen]) == pytest.approx(0.79, abs=0.12)


def test_votes_move_the_weights(tmp_path: Path) -> None:
    from rlalign.ballots.records import Picture

    voted = Voted(tmp_path / "votes.db", campaign="q")
    rules = make_rules(settings(rule="uncertain"), voted.store)
    fitted: FittedChoice = rules.watch.__self__  # type: ignore[attr-defined]
    before = fitted.weights_D.copy()
    anna = voted.person()
    pictures = [drawn(n) for n in range(0, 40, 2)]
    agreed = []
    for first, second in zip(pictures[::2], pictures[1::2], strict=True):
        contents = (first.content, second.content)
        uids = tuple(picture_uid(content) for content in contents)
        for uid, content in zip(uids, contents, strict=True):
            voted.store.add_picture(Picture(uid=uid, caption=first.caption), content)
        agreed.append((first.caption, uids))
        for _ in range(2):
            item = voted.add(first.caption, [1, 2], annotator=anna, uids=uids)
            ballot = voted.ask(anna)
            assert ballot.item.id == item.id
            # everybody prefers what the reward thinks is worse
            choice = "left" if ballot.shown[0] == uids[1] else "right"
            voted.answer(anna, ballot, 0, choice=choice)
    rules.refresh()
    assert not np.allclose(fitted.weights_D, before)

    def wins(weights_D: np.ndarray) -> float:
        logits = []
        for caption, (uid_0, uid_1) in agreed:
            one, other = (fitted._known(caption, uid) for uid in (uid_0, uid_1))
            logits.append((one - other) @ weights_D)
        return float(np.mean(logits))

    assert wins(fitted.weights_D) < wins(before) - 0.5
