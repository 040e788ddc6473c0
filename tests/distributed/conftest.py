"""Several processes on this machine that talk over gloo, started once for many checks."""

from __future__ import annotations

import multiprocessing
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "optimizer"), str(TESTS / "distributed")]  # tiny models and batches

from processes import command, one_of_group  # noqa: E402
from train.conftest import small  # noqa: E402, F401

# New processes are forked from one that has imported everything, and that has no threads.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    [
        *("torch", "torch.distributed.tensor", "torch.distributed.checkpoint", "torch.distributed.fsdp"),
        *("transformers.models.llama.modeling_llama", "transformers.trainer", "datasets", "peft", "misa"),
        *("misa.train", "misa.pretrain", "misa.training.run", "misa.training.trainer", "misa.methods"),
    ]
)

Call = Callable[..., Any]


@pytest.fixture(scope="session")
def together(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """Call a function in so many processes at once; returned is what each of them returned."""

    def start(size: int, call: Call, *args: Any) -> list[Any]:
        folder = tmp_path_factory.mktemp("processes")
        context = torch.multiprocessing.start_processes(
            one_of_group, (size, str(folder / "store"), str(folder), call, args), nprocs=size, start_method="forkserver"
        )
        assert context is None
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]

    return start


@pytest.fixture(scope="session")
def launch() -> Callable[..., list[int]]:
    """Run a training command in so many processes, all ended when one fails; returned are their exit codes."""

    def run(size: int, name: str, words: list[str], kill: tuple[int, int] | None = None) -> list[int]:
        context = multiprocessing.get_context("forkserver")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [context.Process(target=command, args=(r, size, port, name, words, kill)) for r in range(size)]
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            if any(process.exitcode not in (None, 0) for process in processes):
                time.sleep(0.2)  # the others may be about to fail by themselves
                for process in processes:
                    process.kill()
            time.sleep(0.02)
        return [process.exitcode or 0 for process in processes]

    return run
