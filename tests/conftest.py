"""What several test files share: `from conftest import DEVICES, needs_gpu, run_processes`."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

os.environ.setdefault("OMP_NUM_THREADS", "1")  # networks this small only lose by more

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def run_processes(function: Callable, world_size: int, *args: Any) -> list:
    """Calls function(rank, world_size, *args) in gloo processes of one thread; returns the results in order of rank.

    function: at the top level of a module, as new processes import it by name. Results: anything that
    torch.load(weights_only=True) reads. An exception in any process stops all of them and is raised here.
    """
    with TemporaryDirectory() as folder:
        mp.spawn(_process, (Path(folder), function, world_size, args), nprocs=world_size)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _process(rank: int, folder: Path, function: Callable, world_size: int, args: tuple) -> None:
    torch.set_num_threads(1)
    rendezvous, patience = f"file://{folder}/rendezvous", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=rendezvous, world_size=world_size, rank=rank, timeout=patience)
    torch.save(function(rank, world_size, *args), folder / f"{rank}.pt")
    dist.barrier()  # no process may leave while another still needs it; one that fails leaves at once, and is reported
    dist.destroy_process_group()
