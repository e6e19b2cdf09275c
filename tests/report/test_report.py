"""The report: equal files give an equal page, it needs nothing from outside, and it copes with half
a run."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from rlalign.core.pictures import write_grid
from rlalign.learning.changes import changes_file
from rlalign.learning.evaluate import write_json
from rlalign.report import write_report
from rlalign.report.charts import charts
from rlalign.report.curves import Series, line_chart, smooth, stacked_bars
from rlalign.report.files import read_run
from rlalign.report.numbers import clock, cost, headline, number, paired_interval, signed
from rlalign.report.rewards import reward_table

EVIL = 'a <script>alert("x")</script> & a "cat"'
CONFIG = {
    "name": "trial",
    "seed": 3,
    "rounds": 6,
    "policy": {"name": "tiny"},
    "rewards": [{"name": "shapes", "weight": 1.0}],
    "algorithm": {"name": "ddpo", "clip_range": 0.001},
    "learner": {"max_grad_norm": 1.0},
}


def round_record(r: int) -> dict[str, float | None]:
    line = {
        "round": r,
        "policy_version": 2 * r,
        "samples": 64 * r,
        "denoiser_calls": 640 * r,
        "reward_queries": 64 * r,
    }
    for title in ("total", "shapes"):
        line |= {
            f"reward/{title}/mean": None if r == 4 else 0.5 + 0.01 * r,
            f"reward/{title}/std": 0.1,
        }
    line |= {
        "ratio/max_deviation": 0.01 * r,
        "ratio/clip_fraction": 0.1,
        "grad_norm": 1.0 / r,
        "kl/per_step_gaussian": 0.001 * r,
    }
    line |= {
        "restarts/rollout": r // 5,
        "restarts/reward": 0,
        "staleness/max": 0,
        "samples_dropped": 0,
    }
    return (
        line
        | {f"seconds/{p}": 0.5 for p in ("rollout", "reward", "update", "sync")}
        | {"seconds/round": 2.0, "seconds/reward/jpeg": 0.1, "seconds/reward/shapes": 0.4}
    )


def evaluation_record(r: int) -> dict[str, float]:
    scores = {f"reward/{t}/mean": 0.61 + 0.13 * r / 6 for t in ("total", "shapes")}
    return {
        "round": r,
        **scores,
        "held_out/clip/mean": 0.3,
        "diversity/pixel_rms": 0.12 - 0.001 * r,
        "seconds": 1.5,
    }


def make_run(
    folder: Path, *, done: int = 6, caption: str = "a red circle", config: dict | None = None
) -> Path:
    """A run folder that came as far as round ``done`` of six, evaluated every other round."""
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config or CONFIG, sort_keys=False))
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(round_record(r)) + "\n" for r in range(1, done + 1))
    )
    seen = range(0, done + 1, 2)
    (folder / "evaluations.jsonl").write_text(
        "".join(json.dumps(evaluation_record(r)) + "\n" for r in seen)
    )
    for r in seen:
        media = np.random.default_rng(r).integers(0, 256, (3, 1, 3, 16, 16), dtype=np.uint8)
        write_grid(
            folder / "samples" / f"round-{r:05d}.png",
            media,
            [caption] * 3,
            [0.5, float("nan"), 0.1 * r],
        )
    if done == 6:
        before, after = (
            {k: v for k, v in evaluation_record(r).items() if k not in ("round", "seconds")}
            for r in (0, 6)
        )
        sides = [
            {
                "base": {"total": 0.5, "shapes": 0.5},
                "aligned": {"total": 0.5 + g, "shapes": 0.5 + g},
            }
            for g in (0.1, 0.2) * 8
        ]
        final = {
            "round": 6,
            "prompts": 16,
            "base": before,
            "aligned": after,
            "samples": [{"prompt": caption, **s} for s in sides],
        }
        win_rate = {"total": 0.71, "shapes": 0.71, "clip": 0.5}
        write_json(
            folder / "evaluation.json",
            final | {"win_rate": win_rate, "kl/per_step_gaussian": 0.0123},
        )
    return folder


class Page(HTMLParser):
    """Collects tags with attributes, and checks that they nest."""

    VOID = frozenset({"meta", "img", "br", "path", "use", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(folder: Path) -> tuple[str, Page]:
    path = write_report(folder)
    assert path == folder / "report.html"
    assert not list(folder.glob(".*"))
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run's folder, and its page as text and as tags."""
    folder = make_run(tmp_path_factory.mktemp("whole") / "run")
    return folder, *page_of(folder)


def test_the_whole_story_of_a_run(whole):
    folder, _, page = whole
    words = " ".join(page.words.split())
    assert (
        "Mean shapes reward on 16 held-out prompts: 0.610 → 0.740 (+0.130); wins 71 % of pairs"
        in words
    )
    assert "6 of 6 rounds" in words and "has not come to its end" not in words
    for said in (
        "Before and after",
        "Through the run",
        "What it cost",
        "384",
        "3,840",
        "12.0 s",
        "1 rollout",
        "0.012 nats",
    ):
        assert said in words, said
    assert (
        "rlalign train run/config.yaml --out run-again" in words and "max_grad_norm: 1.0" in words
    )
    assert len(page.all("img")) == 3 * 2 + 3 * 4
    titles = [c.title for c in charts(read_run(folder))]
    assert titles == [
        "shapes reward",
        "clip (held out)",
        "Ratio: largest |ratio − 1|",
        "Clipped share",
        "Gradient norm",
        "KL: per step gaussian",
        "Diversity",
        "Time",
    ]


def test_equal_files_give_equal_bytes(whole, tmp_path):
    folder, text, _ = whole
    assert write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8") == text
    assert write_report(folder).read_text(encoding="utf-8") == text


def test_the_page_needs_nothing_from_outside(whole):
    _, text, page = whole
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    for _, attributes in page.tags:
        for key in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert (attributes.get(key) or "#").startswith(("data:image/", "#")), attributes
        assert not any(k.startswith("on") for k in attributes)
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_every_reference_inside_the_drawings_has_its_target(whole):
    _, text, _ = whole
    ids = re.findall(r' id="([^"]*)"', text)
    used = set(re.findall(r"url\(#([^)]*)\)", text)) | set(re.findall(r'href="#([^"]*)"', text))
    assert used <= set(ids)
    assert len(re.findall("<style", text)) == 1  # a drawing's own style would reach the whole page


def test_words_of_others_are_escaped(tmp_path):
    config = CONFIG | {
        "name": EVIL,
        "rewards": [{"name": "shapes", "weight": 1.0, "label": "</pre><script>"}],
    }
    text, page = page_of(make_run(tmp_path / "run", caption=EVIL, config=config))
    assert "<script" not in text
    assert EVIL in page.words
    assert {i["alt"] for i in page.all("img")} >= {f"before: {EVIL}"}


def test_a_reward_s_title_is_escaped_in_the_drawings(tmp_path):
    drawing = line_chart('<b>"&', "note", [Series(label="x", x=[1, 2], y=[1.0, 2.0])])
    assert "<b>" not in drawing.svg and drawing.svg.startswith("<svg role=")


def test_a_run_that_was_stopped(tmp_path):
    _, page = page_of(make_run(tmp_path / "run", done=3))
    words = " ".join(page.words.split())
    assert "3 of 6 rounds are done" in words and "rlalign train --resume run" in words
    assert "Mean shapes reward on held-out prompts until round 2: 0.610 → 0.653 (+0.043)" in words
    assert "wins" not in words
    assert len(page.all("img")) == 6  # two evaluations: before and after, and no film strip


def test_an_extended_run_does_not_show_its_old_end(tmp_path):
    folder = make_run(tmp_path / "run", config=CONFIG | {"rounds": 9})
    with (folder / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps(round_record(7)) + "\n")
    assert read_run(folder).final is None
    assert "until round 6" in headline(read_run(folder)).what


@pytest.mark.promise
@pytest.mark.parametrize(
    ("missing", "note"),
    [
        (["config.yaml"], "config.yaml is missing"),
        (["evaluation.json"], "The final comparison (evaluation.json) is missing"),
        (["samples"], "Fewer than two evaluations have pictures"),
        (["evaluations.jsonl"], "Fewer than two evaluations have pictures"),
        (["metrics.jsonl"], "No round is finished yet"),
        (
            ["evaluation.json", "evaluations.jsonl"],
            "in training, round 1 to 6: 0.510 → 0.560 (+0.050)",
        ),
        (
            ["evaluation.json", "evaluations.jsonl", "metrics.jsonl", "config.yaml", "samples"],
            "No two rounds to compare yet",
        ),
    ],
)
def test_missing_pieces_leave_a_note(tmp_path, missing, note):
    folder = make_run(tmp_path / "run")
    for name in missing:
        path = folder / name
        for file in [*path.glob("*")] if path.is_dir() else [path]:
            file.unlink()
    _, page = page_of(folder)
    assert note in " ".join(page.words.split())


def test_a_reward_with_a_weight_is_told_by_the_total(tmp_path):
    rewards = [{"name": "shapes", "weight": 0.5}]
    _, page = page_of(make_run(tmp_path / "run", config=CONFIG | {"rewards": rewards}))
    assert (
        "Mean total reward on 16 held-out prompts" in page.words
        and "trained on, weight 0.5" in page.words
    )


def test_paired_interval_is_the_textbook_s():
    pairs = [(0.5, 0.6), (0.5, 0.7)] * 8
    interval = paired_interval(pairs)
    assert interval is not None
    half = 1.96 * np.std([0.1, 0.2] * 8, ddof=1) / math.sqrt(16)
    assert interval == pytest.approx((0.15 - half, 0.15 + half), abs=1e-12)
    assert paired_interval(pairs[:7]) is None
    assert paired_interval([*pairs, (None, 1.0)]) == interval


def test_smoothing_is_a_centred_mean_of_what_is_known():
    assert smooth([1.0, 2.0, 6.0, None, 4.0], 3) == [1.5, 3.0, 4.0, 5.0, 4.0]
    assert math.isnan(smooth([None], 1)[0])


def test_many_rounds_are_averaged_into_bars():
    x = list(range(1, 201))
    chart = stacked_bars("Time", "Seconds.", [Series(label="rollout", x=x, y=[1.0] * 200)])
    assert "mean of 4 rounds" in chart.note and chart.svg.count("<path") < 80


@pytest.mark.parametrize(
    "values", [[None, None], [0.0, 0.0], [float("nan"), 1.0], [1.0, 1.0], [-1.0, 5.0]]
)
def test_odd_values_are_drawn(values):
    for log in (False, True):
        assert line_chart("t", "n", [Series(label="x", x=[1, 2], y=values)], log=log).svg.endswith(
            "</svg>"
        )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.6144, "0.614"),
        (12.345, "12.35"),
        (1234.56, "1,234.6"),
        (-0.5, "−0.500"),
        (0.00012, "1.2e−04"),
        (0.0, "0.000"),
        (None, "–"),
    ],
)
def test_numbers_are_written_for_people(value, text):
    assert number(value) == text


def test_signs_and_clocks():
    assert [signed(v) for v in (0.1, -0.1, None)] == ["+0.100", "−0.100", "–"]
    assert [clock(s) for s in (2.04, 65, 7_620)] == ["2.0 s", "1 min 05 s", "2 h 07 min"]


def test_the_cost_names_the_rewards_that_the_rounds_waited_for(tmp_path):
    rows = dict(cost(read_run(make_run(tmp_path))))
    assert rows["Waited for rewards"] == "shapes 20 %, jpeg 5 % of the time in rounds"
    assert "Node hours" not in rows


def test_the_cost_of_a_run_on_ray_has_node_hours(tmp_path):
    """Also where the last rounds were made in one process."""
    run = read_run(make_run(tmp_path))
    hours = {"nodes/hours": 12.5, "nodes/cpu_hours": 1200.0, "nodes/gpu_hours": 0.0}
    run.rounds[2].update(hours, **{"nodes/drained": 3})
    rows = dict(cost(run))
    assert rows["Node hours"] == "12.50, with 1,200.00 CPU hours and 0.00 GPU hours"
    assert rows["Nodes taken away with notice"] == "3"


# several rewards, and what changed most


def of_two_rewards(folder: Path, *, done: int = 6) -> Path:
    """A run of two rewards, one of them a constraint too, whose metrics say how they stand to each
    other."""
    rewards = [{"name": "shapes"}, {"name": "jpeg", "label": "small", "at_least": -1.5}]
    config = CONFIG | {"rewards": rewards, "combine": "normalised"}
    make_run(folder, done=done, config=config)
    lines = []
    for r in range(1, done + 1):
        line = round_record(r) | {"reward/small/mean": -2.0 + 0.1 * r, "reward/small/std": 0.02}
        line |= {f"reward/{t}/flat_groups": 0.25 for t in ("total", "shapes", "small")}
        line |= {"reward/shapes/correlation/small": -0.5, "constraint/small/below": r}
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_the_table_of_rewards_is_of_the_last_five_rounds(tmp_path):
    table = reward_table(read_run(of_two_rewards(tmp_path / "run")))
    assert table is not None
    assert (table.rounds, table.titles) == (5, ["shapes", "small"])
    shapes, small, total = table.rows
    assert (small.title, small.role, small.below) == ("small", "weight 1", "20 of 320 below −1.5")
    assert small.before == pytest.approx(-1.9)
    assert small.after == pytest.approx(np.mean([-2.0 + 0.1 * r for r in range(2, 7)]))
    assert (small.spread, small.flat) == (pytest.approx(0.02), pytest.approx(0.25))
    assert shapes.after == pytest.approx(np.mean([0.52, 0.53, 0.55, 0.56])), "one has no number"
    assert shapes.correlations == [None, pytest.approx(-0.5)]
    assert small.correlations == [pytest.approx(-0.5), None]
    assert total.role == "sum of weight × reward, to look at: each reward is learned by itself"
    assert total.correlations == []


def test_a_run_of_before_has_a_table_without_what_was_not_measured(tmp_path):
    table = reward_table(read_run(make_run(tmp_path / "run")))
    assert table is not None
    (row,) = table.rows
    assert (row.title, row.flat, row.below, table.titles) == ("shapes", None, "", [])
    assert reward_table(read_run(make_run(tmp_path / "other", done=0))) is None


def test_the_page_shows_rewards_and_what_changed_most(tmp_path):
    folder = of_two_rewards(tmp_path / "run", done=4)
    media = np.random.default_rng(0).integers(0, 256, (4, 1, 3, 16, 16), dtype=np.uint8)
    captions = ["won <b>", "won <b>", "lost", "lost"]
    write_grid(changes_file(folder, 4), media, captions, [0.25, 0.75, 0.5, 0.375])
    text = write_report(folder).read_text(encoding="utf-8")
    page = Page(text)
    for word in ("with shapes", "with small", "−0.50", "flat prompts", "10 of 256 below −1.5"):
        assert word in page.words, word
    assert "Largest gains" in page.words
    assert "Largest losses" in page.words
    assert page.words.index("won <b>") < page.words.index("lost")
    assert "+0.500" in page.words
    assert "−0.125" in page.words
    assert "load it again" in page.words, "the run goes on"


def test_nothing_changed_most_where_no_evaluation_kept_it(tmp_path):
    text = write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    assert "What changed most" not in text


def test_a_password_in_the_settings_is_not_on_the_page(tmp_path):
    store = "postgresql://me:hush-hush@host/votes"
    config = CONFIG | {"preferences": {"ballots": {"store": store}}}
    text = write_report(make_run(tmp_path / "run", config=config)).read_text(encoding="utf-8")
    assert "hush-hush" not in text
    assert "postgresql://me:***@host/votes" in text
