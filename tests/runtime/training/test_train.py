"""What a learner's exception tells: its own fault, or that another learner of the group is gone."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlalign.networks.sharding import lost_a_peer

PAIR = """
import os, pickle, signal, sys
import torch.distributed as group
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
import torch
from rlalign.networks.sharding import lost_a_peer

rank, what, folder = sys.argv[1:]
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "WORLD_SIZE": "2"}
os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
group.init_process_group("gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=2)
accelerator = Accelerator(cpu=True)
accelerator.wait_for_everyone()
if rank == "0":
    os.kill(os.getpid(), signal.SIGKILL)
try:
    if what == "reduce":
        accelerator.reduce(torch.ones(3))
    elif what == "broadcast":
        broadcast_object_list([None])
    elif what == "gather":
        from accelerate.utils import gather_object
        gather_object([1])
    else:
        accelerator.wait_for_everyone()
    said = "nothing was raised"
except Exception as error:
    said = (lost_a_peer(error), type(error).__name__, str(error))
with open(f"{folder}/said", "wb") as file:
    file.write(pickle.dumps(said))
# gloo's threads have lost their peer, and ending them in order sometimes aborts the process
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["reduce", "broadcast", "gather", "barrier"])
def test_a_collective_fails_where_the_other_process_is_gone(tmp_path: Path, what: str) -> None:
    command = [sys.executable, "-c", PAIR]
    pair = [subprocess.Popen([*command, str(rank), what, str(tmp_path)]) for rank in (0, 1)]
    assert [process.wait() for process in pair] == [-signal.SIGKILL, 0]
    told = pickle.loads((tmp_path / "said").read_bytes())
    assert told[0] is True, told


def test_an_error_of_ones_own_is_no_lost_peer() -> None:
    import torch

    with pytest.raises(RuntimeError) as own:
        torch.ones(2) @ torch.ones(3)
    assert not lost_a_peer(own.value)
    assert not lost_a_peer(RuntimeError("Connection closed by peer"))
    with pytest.raises(ValueError, match="process group") as unready:
        torch.distributed.barrier()  # ours: no group was made
    assert not lost_a_peer(unready.value)
