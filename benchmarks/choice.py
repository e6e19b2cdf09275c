"""What the choice of pairs saves: votes until a fitted reward is as good as one of 150 votes on
random pairs, by rule and by how the votes are made.

    python benchmarks/choice.py [simulations]

People vote by a linear reward on features, and a reward on the same features is fitted; four of
five pairs are chosen by the rule among 256, one at random. The features' standard deviations fall
as k^-decay, so a large decay leaves few directions to learn.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.ballots.active import mean_curve, votes_to_reach

VOTES = 150


def main() -> None:
    simulations = int(sys.argv[1]) if len(sys.argv) > 1 else 96
    table = Table("decay", "two people agree on", "goal", "uncertain", "fisher")
    for decay in (0.0, 0.5, 1.0):
        for agree in (0.6, 0.7, 0.8):
            curves = {
                rule: mean_curve(
                    rule, decay=decay, people_agree=agree, votes=VOTES, simulations=simulations
                )
                for rule in ("random", "uncertain", "fisher")
            }
            goal = float(curves["random"][-1])
            shares = [
                f"{votes_to_reach(curves[rule], goal) / VOTES:.2f}"
                for rule in ("uncertain", "fisher")
            ]
            table.add_row(f"{decay:g}", f"{agree:.0%}", f"{goal:.3f}", *shares)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
