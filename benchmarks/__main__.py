"""Time one training step of every method, in one run: `python -m benchmarks`.

The methods take turns, step by step, so that whatever else the machine does falls on all of them alike. Other processes
on the same cores change every figure many times over: run it on a quiet machine and compare inside one run only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program name; None takes them from the process.

    Returns:
        Exit status: 0, or 2 if something asked for is wrong.
    """
    from misa.methods import METHODS
    from misa.models import MODEL_SIZES

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model_config", default="17m", choices=list(MODEL_SIZES), help="size of the model")
    parser.add_argument("--methods", default="adamw,lora,badam,lisa,misa", help="methods, separated by commas")
    parser.add_argument("--batch_size", type=int, default=4, help="sequences in a step")
    parser.add_argument("--seq_len", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--num_steps", type=int, default=20, help="timed steps of each method")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="dtype of the weights")
    options = parser.parse_args(argv)
    names = [name.strip() for name in options.methods.split(",") if name.strip()]
    if unknown := [name for name in names if name not in METHODS]:
        print(f"{parser.prog}: error: methods has {unknown[0]!r}, allowed: {', '.join(METHODS)}", file=sys.stderr)
        return 2
    if min(options.batch_size, options.seq_len, options.num_steps) < 1:
        print(f"{parser.prog}: error: batch_size, seq_len and num_steps must be 1 or more", file=sys.stderr)
        return 2
    print_table(measure(names, options), options)
    return 0


def measure(names: Sequence[str], options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Train every method step by step in turn.

    Args:
        names: Keys of `misa.methods.METHODS`.
        options: Size of model and batch, number of steps.

    Returns:
        For each method the seconds of each step, by phase: forward, backward, update.
    """
    import torch

    from misa.memory.command import make_optimizer
    from misa.methods import build
    from misa.models import build_model, model_config

    trained: dict[str, tuple[Any, Any]] = {}
    for name in names:
        torch.manual_seed(0)
        built = build(
            name, build_model(model_config(options.model_config), 0, options.dtype), lr=1e-4, seed=0, options={}
        )
        built.model.train()
        trained[name] = (built.model, make_optimizer(built))
    generator = torch.Generator().manual_seed(0)
    vocab_size = next(iter(trained.values()))[0].config.vocab_size
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": [], "update": []} for name in names}
    # The first steps make the optimizer's state and warm the caches.
    for step in range(-3, options.num_steps):
        tokens = torch.randint(vocab_size, (options.batch_size, options.seq_len), generator=generator)
        for name, (model, optimizer) in trained.items():
            marks = [time.perf_counter()]
            loss = model(input_ids=tokens, labels=tokens).loss
            marks.append(time.perf_counter())
            loss.backward()
            marks.append(time.perf_counter())
            optimizer.step()
            optimizer.zero_grad()
            marks.append(time.perf_counter())
            if step >= 0:
                for phase, start, stop in zip(times[name], marks, marks[1:], strict=False):
                    times[name][phase].append(stop - start)
    return times


def print_table(times: dict[str, dict[str, list[float]]], options: argparse.Namespace) -> None:
    """Print the medians as a Markdown table.

    Args:
        times: From `measure`.
        options: What was measured.
    """
    import torch

    print(
        f"{options.model_config}, {options.dtype}, {options.batch_size} x {options.seq_len} tokens, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians of {options.num_steps} steps\n"
    )
    print("| method | forward (ms) | backward (ms) | update (ms) | step (ms) |\n| --- | ---: | ---: | ---: | ---: |")
    for name, phases in times.items():
        cells = [statistics.median(values) for values in phases.values()]
        cells.append(statistics.median(sum(parts) for parts in zip(*phases.values(), strict=True)))
        print(f"| {name} | {' | '.join(f'{1000 * cell:.1f}' for cell in cells)} |")


if __name__ == "__main__":
    sys.exit(main())
