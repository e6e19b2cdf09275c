"""What is published, in which order, and what a reader sees when the writer dies at any point."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlalign.learning import checkpoint
from rlalign.learning.checkpoint import Checkpoint
from rlalign.storage.mirror import Mirror, choose_facts, choose_model, choose_work, whole_rounds
from rlalign.storage.store import Store

RUN = "0123456789abcdef"


class Killed(BaseException):
    """The process ends here."""


class Dying(Store):
    """A store whose writer is killed after so many writes; it remembers them."""

    def __init__(self, url: str, writes: int = 10**9) -> None:
        super().__init__(url)
        self.writes: list[str] = []
        self._left = writes

    def _count(self, what: str) -> None:
        if self._left == 0:
            raise Killed
        self._left -= 1
        self.writes.append(what)

    def send(self, name: str, source: Path) -> None:
        self.put(name, source.read_bytes())

    def put(self, name: str, content: bytes) -> None:
        self._count(f"+{name}")
        super().put(name, content)

    def delete(self, name: str) -> None:
        self._count(f"-{name}")
        super().delete(name)


def learn(folder: Path, round: int) -> None:
    """What a round writes: its line, in every second round a picture and then a checkpoint."""
    with (folder / "metrics.jsonl").open("a") as lines:
        lines.write(f'{{"round": {round}}}\n')
    if round % 2 == 0:
        (folder / "samples").mkdir(exist_ok=True)
        (folder / "samples" / f"round-{round:05d}.png").write_bytes(b"a picture" * round)
        made = Checkpoint(round=round, tensors={"a": torch.full((9,), float(round))}, facts={})
        checkpoint.save(folder, made, run_identity=RUN, keep=1)


def work(store: Store, folder: Path, rounds: range) -> None:
    """Rounds of a run, each published, by a process that takes up what is there."""
    folder.mkdir()
    mirror = Mirror(store, folder)
    mirror.fetch(choose_work)
    (folder / "config.yaml").write_text("name: x\n")
    mirror.publish(checkpoints=True)
    for round in rounds:
        learn(folder, round)
        mirror.publish(checkpoints=True)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"local://{tmp_path}/store/run"


def at(round: int, name: str) -> str:
    return f"checkpoints/round-{round:05d}/{name}"


def test_a_checkpoint_comes_last_and_an_older_one_goes_after_it(url: str, tmp_path: Path) -> None:
    store = Dying(url)
    work(store, tmp_path / "here", range(1, 5))
    assert store.writes == [
        "+config.yaml",
        "+metrics.jsonl",
        "+metrics.jsonl",
        "+samples/round-00002.png",
        "+" + at(2, "state.safetensors"),
        "+" + at(2, "state.json"),
        "+metrics.jsonl",
        "+metrics.jsonl",
        "+samples/round-00004.png",
        "+" + at(4, "state.safetensors"),
        "+" + at(4, "state.json"),
        "-" + at(2, "state.json"),
        "-" + at(2, "state.safetensors"),
    ]


def test_whenever_the_writer_is_killed_what_can_be_seen_is_whole(tmp_path: Path) -> None:
    whole = Dying(f"local://{tmp_path}/whole/run")
    work(whole, tmp_path / "undisturbed", range(1, 5))
    names = sorted(whole.list())
    for writes in range(len(whole.writes)):
        home = tmp_path / str(writes)
        home.mkdir()
        store = Dying(f"local://{home}/store/run", writes)
        with pytest.raises(Killed):
            work(store, home / "killed", range(1, 5))

        # a checkpoint that is seen is whole, newer than any before, and has the lines of its rounds
        found = home / "found"
        found.mkdir()
        Mirror(store, found).fetch(choose_work)
        newest = checkpoint.latest(found, run_identity=RUN)
        states = [w for w in store.writes if w.startswith("+") and w.endswith("state.json")]
        assert (newest.round if newest else 0) == 2 * len(states)
        done = newest.round if newest else 0
        if newest is not None:
            assert newest.tensors["a"].tolist() == [float(done)] * 9
            assert (found / "metrics.jsonl").read_text().count("\n") >= done
            assert (found / "samples" / f"round-{done:05d}.png").read_bytes() == b"a picture" * done

        # whoever goes on leaves nothing half behind; an older whole one goes with the next save
        store._left = 10**9
        work(store, home / "next", range(done + 1, 5))
        left = set(store.list())
        assert left - set(names) in (set(), {at(2, "state.json"), at(2, "state.safetensors")})
        assert left >= set(names)
        assert checkpoint.newest_round(home / "next") == 4


def test_a_checkpoint_that_goes_here_while_it_is_sent_is_whole_there(
    url: str, tmp_path: Path
) -> None:
    """Sending takes longer than the run keeps a checkpoint."""
    folder = tmp_path / "here"

    class Slow(Store):
        def send(self, name: str, source: Path) -> None:
            content = source.read_bytes()
            if name == at(2, "state.safetensors"):
                for round in (3, 4):
                    learn(folder, round)
            self.put(name, content)

    work(Slow(url), folder, range(1, 3))
    assert not (folder / at(2, "state.json")).exists()
    assert whole_rounds(Store(url).list()) == [2]


def test_what_a_process_has_not_fetched_it_does_not_touch(url: str, tmp_path: Path) -> None:
    store = Store(url)
    work(store, tmp_path / "first", range(1, 5))
    for name in ("tensorboard/events.1", "policy/adapter.safetensors", "preferences/a.parquet"):
        store.put(name, b"x")
    before = store.list()
    work(store, tmp_path / "second", range(5, 5))
    assert store.list() == before
    (tmp_path / "driver").mkdir()
    driver = Mirror(store, tmp_path / "driver")
    driver.fetch(choose_facts)
    assert checkpoint.newest_round(tmp_path / "driver") == 4
    assert not (tmp_path / "driver" / at(4, "state.safetensors")).exists()
    (tmp_path / "driver" / "config.yaml").unlink()
    driver.publish(checkpoints=False)
    assert store.list() == {name: size for name, size in before.items() if name != "config.yaml"}


def test_half_a_checkpoint_is_none(url: str, tmp_path: Path) -> None:
    store = Store(url)
    work(store, tmp_path / "first", range(1, 3))
    store.put(at(4, "state.safetensors"), b"half")
    store.put(at(6, "state.json"), b"{}")
    assert whole_rounds(store.list()) == [2]
    for number, choose in enumerate((choose_facts, choose_model, choose_work)):
        folder = tmp_path / str(number)
        folder.mkdir()
        Mirror(store, folder).fetch(choose)
        assert checkpoint.newest_round(folder) == 2
    assert checkpoint.read_tensors(tmp_path / "1")["a"].tolist() == [2.0] * 9


def test_hidden_files_and_links_stay_here(url: str, tmp_path: Path) -> None:
    store = Store(url)
    work(store, tmp_path / "here", range(1, 2))
    folder = tmp_path / "here"
    (folder / ".lock").write_text("1")
    (folder / ".scratch").mkdir()
    (folder / ".scratch" / "a").write_text("1")
    (folder / "link").symlink_to(folder / "config.yaml")
    (folder / "status.json").write_text("{}")
    mirror = Mirror(store, folder)
    mirror.publish(checkpoints=True)
    assert sorted(store.list()) == ["config.yaml", "metrics.jsonl"]
