"""A chain: the winner of a pair stays, and a new picture comes."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlalign.ballots.records import Vote


@dataclass(kw_only=True)
class Chain:
    """Where a person is in a chain: of its prompt, what has been seen, and what has won."""

    prompt: str = ""
    chosen_at: int = 0
    """The log's row at which the prompt was chosen; of earlier votes pictures are seen, no more."""
    seen: list[str] = field(default_factory=list)
    winner: str = ""
    length: int = 0

    def follow(self, vote: Vote) -> None:
        """Goes one vote further: the winner stays, after a tie the left one, after "both bad" and a
        skip none. Votes on other prompts and repeats are no part of a chain."""
        if vote.ballot.item.caption != self.prompt or vote.ballot.item.kind != "live":
            return
        shown = vote.ballot.shown
        self.seen.extend(shown)
        if vote.seq < self.chosen_at:
            return
        self.length += 1
        self.winner = vote.best or (shown[0] if vote.answer.choice == "tie" else "")
