"""Several processes on this machine that talk over gloo, started once for many checks."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

sys.path.insert(0, str(Path(__file__).parents[1] / "optimizer"))  # tiny models and batches

# New processes are forked from one that has imported everything, and that has no threads.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["torch", "torch.distributed.tensor", "transformers.models.llama.modeling_llama", "misa"]
)

Call = Callable[..., Any]


def _process(rank: int, size: int, store: str, folder: str, call: Call, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(store, size), rank=rank, world_size=size
    )
    torch.save(call(*args), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def together(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """Call a function in so many processes at once; returned is what each of them returned."""

    def start(size: int, call: Call, *args: Any) -> list[Any]:
        folder = tmp_path_factory.mktemp("processes")
        context = torch.multiprocessing.start_processes(
            _process, (size, str(folder / "store"), str(folder), call, args), nprocs=size, start_method="forkserver"
        )
        assert context is None
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]

    return start
