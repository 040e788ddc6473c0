"""Bytes that processes send in a training step, and bytes of the buffers they send: `python -m benchmarks.distributed`.

Several processes on this machine train the same model over gloo; every collective operation is counted by the bytes of
the tensors handed to it, in Python and out of it (DDP's reducer, FSDP2), so no time is measured. Contestants: AdamW in
DistributedDataParallel; MISA in it with `find_unused_parameters`, DDP's own answer to switching; MISA as it is, and
with its state shared out over the processes; both under FSDP2. What is sent before the first step is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

LIMIT = 1.1  # times the budget's share of the full gradients


class Traffic(TorchDispatchMode):
    """Counts bytes of collective operations by their name; each is the input that a process sends or the output."""

    def __init__(self) -> None:
        super().__init__()
        self.sent_bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a collective operation, and carry it out."""
        namespace, _, name = func.name().partition("::")
        if namespace in ("c10d", "_c10d_functional"):
            self.sent_bytes[name] += max((_bytes(argument) for argument in args), default=0)
        return func(*args, **(kwargs or {}))


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program name; None takes them from the process.

    Returns:
        Exit status: 0; 1 if a bar is missed; 2 if something asked for is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distributed",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="34m", help="size of the LLaMA")
    parser.add_argument("--num_processes", type=int, default=2, help="processes")
    parser.add_argument("--budgets", default="0.03,0.1,0.25", help="shares of all parameters, comma separated")
    parser.add_argument("--interval", type=int, default=3, help="steps in a round")
    parser.add_argument("--num_rounds", type=int, default=3, help="rounds counted")
    parser.add_argument("--output_dir", default="benchmarks/results", help="folder for distributed.json and .md")
    options = parser.parse_args(argv)
    command = ["python", "-m", "benchmarks.distributed", *(sys.argv[1:] if argv is None else argv)]
    try:
        report = run(options, command)
    except ValueError as error:
        print(f"benchmarks.distributed: error: {error}", file=sys.stderr)
        return 2
    print(table(report))
    return 0 if all(bar["met"] for bar in report["bars"]) else 1


def run(options: argparse.Namespace, command: Sequence[str]) -> dict[str, Any]:
    """Count every contestant, and write `distributed.json` and `distributed.md`.

    Args:
        options: The command line's options.
        command: The command line, for the record.

    Returns:
        What `distributed.json` holds.
    """
    from misa.files import write_text
    from misa.models import model_config
    from misa.results import provenance

    try:
        budgets = [float(word) for word in options.budgets.split(",")]
    except ValueError:
        budgets = []
    if not budgets or not all(0 < budget <= 1 for budget in budgets):
        raise ValueError(f"budgets is {options.budgets!r}, allowed are numbers above 0 and up to 1, comma separated")
    model_config(options.model)
    for name in ("num_processes", "interval", "num_rounds"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}, allowed is 1 or more")
    contestants: list[tuple[str, float]] = [("AdamW, DDP", 1.0), ("AdamW, FSDP2", 1.0)]
    for budget in budgets:
        names = ("MISA, DDP with find_unused", "MISA", "MISA, state shared out", "MISA, FSDP2")
        contestants += [(name, budget) for name in names]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options.num_processes, vars(options), contestants, folder)
        torch.multiprocessing.start_processes(_process, arguments, nprocs=options.num_processes)  # type: ignore[attr-defined]
        rows = json.loads(Path(folder, "rows.json").read_text())
    report = {"settings": vars(options), "rows": rows, "bars": bars(rows)}
    report["provenance"] = provenance(command).model_dump()
    write_text(Path(options.output_dir, "distributed.json"), json.dumps(report, indent=1) + "\n")
    write_text(Path(options.output_dir, "distributed.md"), table(report))
    return report


def _process(rank: int, size: int, options: dict[str, Any], contestants: list[tuple[str, float]], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size)
    rows = [count(name, budget, options) for name, budget in contestants]
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def count(name: str, budget: float, options: dict[str, Any]) -> dict[str, Any]:
    """Train for some rounds and count.

    Args:
        name: A contestant.
        budget: Its share of all parameters.
        options: Size of the model, rounds and their length.

    Returns:
        Bytes in a step by kind: gradients, weights (where state or weights are shared out), and what is agreed on once
        a round; bytes of the buckets held between steps and at most during one; largest bytes of moments and masters.
    """
    model, optimizer, held_bytes = make(name, budget, options)
    num_steps = options["interval"] * options["num_rounds"]
    numels, gradients, weights, rounds, largest, states = [], 0, 0, 0, 0, 0
    tokens = torch.randint(0, 100, (1, 8), generator=torch.Generator().manual_seed(dist.get_rank()))
    full_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    for _ in range(num_steps):
        numels.append(getattr(optimizer, "active_numel", 0) or numels_of(model))
        with Traffic() as backward:
            model(input_ids=tokens, labels=tokens).loss.backward()
        with Traffic() as update:
            optimizer.step()
        optimizer.zero_grad()
        gathered, exchanged = _gathered(backward), _gathered(update)
        reduced = sum(backward.sent_bytes.values()) - gathered
        weights += gathered + exchanged
        gradients += reduced
        rounds += sum(update.sent_bytes.values()) - exchanged
        largest = max(largest, reduced)
        states = max(states, _state_bytes(optimizer))
    return {
        "contestant": name,
        "budget": budget,
        "num_processes": dist.get_world_size(),
        "full_gradient_bytes": full_bytes,
        "active_share": sum(numels) / len(numels) / numels_of(model),
        "gradient_bytes_per_step": gradients / num_steps,
        "weight_bytes_per_step": weights / num_steps,
        "agreement_bytes_per_round": rounds / options["num_rounds"],
        "bucket_bytes_held": held_bytes,
        "bucket_bytes_in_backward": held_bytes if "FSDP2" in name else max(held_bytes, largest),
        "state_bytes": states,
    }


def _gathered(traffic: Traffic) -> int:
    return sum(size for kind, size in traffic.sent_bytes.items() if "allgather" in kind)


def _state_bytes(optimizer: Any) -> int:
    """Moments and masters that this process holds."""
    if hasattr(optimizer, "state_bytes"):
        return sum(optimizer.state_bytes().values())
    held = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor) and v.ndim]
    return sum((v.to_local() if hasattr(v, "to_local") else v).nbytes for v in held)  # type: ignore[attr-defined]


def numels_of(model: nn.Module) -> int:
    """Elements of all parameters."""
    return sum(p.numel() for p in model.parameters())


def make(name: str, budget: float, options: dict[str, Any]) -> tuple[nn.Module, Any, int]:
    """Make model, optimizer, and count the bytes of DDP's buckets."""
    from torch.distributed.fsdp import fully_shard

    from misa.models import build_model, model_config
    from misa.optimizer import MISA

    model = build_model(model_config(options["model"]), seed=0)
    if "FSDP2" in name:
        for layer in (*model.model.layers, model):
            fully_shard(layer)
    wrapped, held_bytes = model, 0
    if "DDP" in name:
        wrapped = DistributedDataParallel(model, find_unused_parameters="find_unused" in name)
        sizes = wrapped._get_ddp_logging_data()["bucket_sizes"]
        held_bytes = sum(int(size) for size in str(sizes).split(", "))
    if name.startswith("AdamW"):
        return wrapped, torch.optim.AdamW(model.parameters(), lr=1e-4), held_bytes
    with reducer_goes_on() if "find_unused" in name else nullcontext():
        shared = {"shard_state": "shared" in name}
        optimizer = MISA(wrapped, lr=1e-4, budget=budget, interval=options["interval"], **shared)
        # The wrapper is looked at again in the first forward pass.
        if "find_unused" in name:
            tokens = torch.zeros(1, 2, dtype=torch.long)
            wrapped(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.zero_grad()
    return wrapped, optimizer, held_bytes


@contextmanager
def reducer_goes_on() -> Iterator[None]:
    """Let DDP's reducer reduce, as where torch does not admit anything else."""
    from misa.distributed import wrapped

    wrapped._REDUCER, kept = ("not there",), wrapped._REDUCER
    try:
        yield
    finally:
        wrapped._REDUCER = kept


def bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hold the traffic and the buckets of MISA against the budget's share of the full gradients.

    Args:
        rows: What `count` returned.
    """
    found = []
    for row in rows:
        if row["contestant"] != "MISA":
            continue
        for what in ("gradient_bytes_per_step", "bucket_bytes_in_backward"):
            value = row[what] / (row["budget"] * row["full_gradient_bytes"])
            found.append({"budget": row["budget"], "bar": what, "value": value, "limit": LIMIT, "met": value <= LIMIT})
    return found


def table(report: dict[str, Any]) -> str:
    """Write the results as Markdown.

    Args:
        report: What `distributed.json` holds.
    """
    settings, rows = report["settings"], report["rows"]
    mib = 2**20
    lines = [
        "# Bytes between processes",
        "",
        f"`{' '.join(report['provenance']['command'])}`: a LLaMA of size {settings['model']} in fp32, all its",
        f"gradients {rows[0]['full_gradient_bytes'] / mib:.1f} MiB, {settings['num_processes']} processes. Bytes are",
        "those handed to collective operations; a ring moves 2 (n - 1) / n times as many over n processes.",
        "",
        "| contestant | budget | gradients a step (MiB) | of all gradients | weights a step (MiB) | "
        "agreement a round (KiB) | buckets held (MiB) | at most in a step (MiB) | optimizer state (MiB) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        share = row["gradient_bytes_per_step"] / row["full_gradient_bytes"]
        lines.append(
            f"| {row['contestant']} | {row['budget']:g} | {row['gradient_bytes_per_step'] / mib:.2f} | {share:.1%} | "
            f"{row['weight_bytes_per_step'] / mib:.1f} | {row['agreement_bytes_per_round'] / 1024:.1f} | "
            f"{row['bucket_bytes_held'] / mib:.1f} | {row['bucket_bytes_in_backward'] / mib:.1f} | "
            f"{row['state_bytes'] / mib:.2f} |"
        )
    lines += ["", "| budget | bytes of MISA over budget x all gradients | value | limit | met |"]
    lines.append("| ---: | --- | ---: | ---: | --- |")
    names = {"gradient_bytes_per_step": "gradients sent in a step", "bucket_bytes_in_backward": "buckets in a step"}
    for bar in report["bars"]:
        met = "yes" if bar["met"] else "no"
        lines.append(f"| {bar['budget']:g} | {names[bar['bar']]} | {bar['value']:.3f} | {bar['limit']} | {met} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
