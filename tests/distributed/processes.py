"""What runs in each of several processes: in a module of its own, which new processes can import by its name."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def one_of_group(
    rank: int, size: int, store: str, folder: str, call: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """Call something as one process of a gloo group, and save what it returns."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(store, size), rank=rank, world_size=size
    )
    torch.save(call(*args), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def command(rank: int, size: int, port: int, name: str, words: list[str], kill: tuple[int, int] | None) -> None:
    """What torchrun does in each process; `kill` is a process and the step after which it is killed."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from misa import pretrain, train
    from misa.training.trainer import Schedule

    original = Schedule.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if (rank, state.global_step) == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, args, state, control, **kwargs)

    Schedule.on_step_end = on_step_end
    sys.exit({"train": train, "pretrain": pretrain}[name].main(words))
