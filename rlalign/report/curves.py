"""Curves as inline SVG that follow the page's own colours and font; equal numbers give equal bytes.

Colours are drawn as placeholders and become CSS variables (``--ink``, ``--rule``, ``--series-1``
...), so that one drawing serves a light and a dark page. Text stays text.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK = "#a100f0"
_RULE = "#a100f1"
_COLOURS = (_INK, *(f"#a1000{n}" for n in range(1, 7)))
_LOOKS: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.8},
    "points": {"linewidth": 1.8},
    "faint": {"linewidth": 1.0, "alpha": 0.35},
    "limit": {"linewidth": 1.0, "linestyle": (0, (4, 3))},
}
_SIZE = (4.9, 2.55)
"""Inches of 72 units: legible at half a desktop page and at a whole phone."""
_MOST_BARS = 60

Number = float | int | None


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart. A missing value (None, NaN) leaves a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[Number]
    colour: int = 1
    """1 to 6; 0 is the ink's."""
    look: str = "line"
    """line, points (a line with a mark at each value), faint (what a smoothed line was made of), or
    limit (dashed)."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing with its words, for a page."""

    title: str
    note: str
    svg: str
    legend: tuple[tuple[str, int], ...] = ()
    """(label, colour) of each series, where there are two or more; colour 0 is the ink's."""


def line_chart(
    title: str, note: str, series: Sequence[Series], *, log: bool = False, along: str = "round"
) -> Chart:
    """Lines over rounds, or what else ``along`` says."""
    with _style():
        figure, axes = _axes()
        axes.set_xlabel(along)
        for one in series:
            y = [float("nan") if v is None or (log and v <= 0) else v for v in one.y]
            alone = sum(math.isfinite(v) for v in y) == 1
            mark = {"marker": "o", "markersize": 4.5} if one.look == "points" or alone else {}
            style = {"color": _COLOURS[one.colour], "solid_joinstyle": "round"}
            axes.plot(one.x, y, **style, **mark, **_LOOKS[one.look])
        values = chain.from_iterable(one.y for one in series)
        known = [v for v in values if v is not None and v > 0]
        if log and known:
            _log_scale(axes, decades=math.log10(max(known) / min(known)))
        svg = _finished(figure, axes, title)
    legend = tuple((one.label, one.colour) for one in series if one.look != "faint")
    return Chart(title=title, note=note, svg=svg, legend=legend if len(legend) > 1 else ())


def stacked_bars(title: str, note: str, series: Sequence[Series]) -> Chart:
    """Bars of parts that add up. More than 60 rounds are averaged in groups of neighbours, and the
    note says so."""
    rounds = list(series[0].x)
    group = max(1, -(-len(rounds) // _MOST_BARS))
    middles = [_mean(rounds[i : i + group]) for i in range(0, len(rounds), group)]
    with _style():
        figure, axes = _axes()
        base = [0.0] * len(middles)
        for one in series:
            values = [float(v or 0.0) for v in one.y]
            heights = [_mean(values[i : i + group]) for i in range(0, len(values), group)]
            style = {"color": _COLOURS[one.colour], "linewidth": 0}
            axes.bar(middles, heights, bottom=base, width=0.82 * group, **style)
            base = [b + h for b, h in zip(base, heights, strict=True)]
        svg = _finished(figure, axes, title)
    if group > 1:
        note = f"{note} Each bar is the mean of {group} rounds."
    return Chart(
        title=title, note=note, svg=svg, legend=tuple((one.label, one.colour) for one in series)
    )


def smooth(values: Sequence[Number], window: int) -> list[float]:
    """Mean over a centred window of known values, cut off at the ends; NaN where it holds none."""
    half = window // 2
    means = []
    for i in range(len(values)):
        known = [float(v) for v in values[max(0, i - half) : i + half + 1] if v is not None]
        means.append(_mean(known) if known else float("nan"))
    return means


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _style() -> Any:
    from matplotlib import rc_context

    return rc_context(
        {
            "svg.hashsalt": "rlalign",
            "svg.fonttype": "none",
            "font.size": 9.0,
            "text.color": _INK,
            "axes.edgecolor": _RULE,
            "axes.labelcolor": _INK,
            "xtick.color": _RULE,
            "ytick.color": _RULE,
            "xtick.labelcolor": _INK,
            "ytick.labelcolor": _INK,
            "grid.color": _RULE,
            "grid.linewidth": 0.7,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "axes.axisbelow": True,
            "axes.formatter.useoffset": False,
            "figure.facecolor": "none",
            "axes.facecolor": "none",
        }
    )


def _axes() -> tuple[Any, Axes]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.grid(axis="y")
    axes.tick_params(length=0)
    axes.margins(x=0.02, y=0.08)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    return figure, axes


def _log_scale(axes: Axes, decades: float) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,), numticks=9)
    )
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _finished(figure: Any, axes: Axes, title: str) -> str:
    """The SVG without what a page needs not: headers, metadata, ids that nothing refers to, white
    space."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    low, high = axes.get_xlim()
    if high - low < 2.0:  # a single round
        axes.set_xlim((low + high) / 2 - 1.0, (low + high) / 2 + 1.0)
    text = io.StringIO()
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<g|<path) id="[A-Za-z0-9.]+_\d+"', r"\1", svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    # its style would reach the whole page
    svg = re.sub(r"<!--.*?-->|<style.*?</style>|<g/>", "", svg, flags=re.DOTALL)
    svg = re.sub(r" font-family: [^;]*;| transform=\"rotate\(-0 [^\"]*\"", "", svg)
    svg = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", svg, count=1)
    svg = svg.replace("xlink:href", "href").replace(
        "<svg", f'<svg role="img" aria-label="{_plain(title)}"', 1
    )
    for colour, name in (
        (_INK, "soft"),
        (_RULE, "rule"),
        *((c, f"series-{i}") for i, c in enumerate(_COLOURS) if i),
    ):
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r"\s*\n\s*", "\n", svg).strip()


def _plain(text: str) -> str:
    return re.sub(r"[<>&\"]", " ", text)
