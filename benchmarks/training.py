"""Train every method side by side on the same model and tokens: `python -m benchmarks.training`.

The methods take turns, step by step and in an order drawn anew for each, so that whatever else the machine does, and
what the method before leaves in the caches, falls on all of them alike. Compare inside one run only. Reported: tokens a
second, the medians of a step and its phases, the tracked peak of a step's memory (`misa.memory`), and the loss on
held-out text before and after; as JSON and as a table.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PHASES = ("forward", "backward", "update")
METHODS = "adamw,adamw_bf16,lora,dora,galore,badam,lisa,misa,misa_uniform,misa_lora"
# A LLaMA of 20 million parameters: the shape of "17m" with a larger vocabulary.
LLAMA_20M, LLAMA_20M_VOCAB_SIZE = "20m", 12_288
# The first steps make the optimizer's state and warm the caches.
NUM_WARMUP_STEPS = 2
# (method, other, least ratio of tokens a second) at each sequence length, and where MISA's peak must lie below LoRA's.
SPEED_BARS = (("misa", "adamw", 1.35), ("misa", "lora", 1.3))
PEAK_BAR_SEQ_LEN = 512


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program name; None takes them from the process.

    Returns:
        Exit status: 0, or 2 if something asked for is wrong.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        _check(options)
        command = ["python", "-m", "benchmarks.training", *(sys.argv[1:] if argv is None else argv)]
        run(options, command)
    except ValueError as error:
        print(f"benchmarks.training: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--models", default=LLAMA_20M, help="sizes (20m, 60m, ...) or model folders, comma separated")
    parser.add_argument("--methods", default=METHODS, help="methods, comma separated")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="precisions of the weights, comma separated")
    parser.add_argument("--seq_lens", default="128,512", help="tokens in a sequence, comma separated")
    parser.add_argument("--tokens_per_step", type=int, default=1024, help="tokens in a step, whatever the length")
    parser.add_argument("--num_steps", type=int, default=20, help="timed steps of each method")
    parser.add_argument("--interval", type=int, default=4, help="steps in a round, short so that several draws count")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="of every method")
    parser.add_argument("--text", default="numpy,networkx", help="packages whose docstrings are the text")
    parser.add_argument("--seed", type=int, default=0, help="of weights and draws")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to train")
    parser.add_argument("--force_bfloat16", action="store_true", help="even where the processor only emulates it")
    parser.add_argument("--output_dir", default="benchmarks/results", help="folder for training[_gpu].json and .md")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Turn lists into lists, and refuse what cannot be run."""
    import torch

    from misa.methods import METHODS as BUILT
    from misa.models import DTYPES, MODEL_SIZES, resolve_dtype

    for name in ("models", "methods", "dtypes", "seq_lens", "text"):
        setattr(options, name, [word.strip() for word in getattr(options, name).split(",") if word.strip()])
    sizes = (LLAMA_20M, *MODEL_SIZES)
    for name, allowed in (("methods", tuple(BUILT)), ("dtypes", DTYPES)):
        for word in getattr(options, name):
            if word not in allowed:
                raise ValueError(f"{name} has {word!r}, allowed is {', '.join(allowed)}")
    for model in options.models:
        if model not in sizes and not Path(model).is_dir():
            raise ValueError(f"models has {model!r}, allowed is {', '.join(sizes)} or a folder")
    if not all(word.isdigit() and int(word) > 1 for word in options.seq_lens):
        raise ValueError(f"seq_lens is {','.join(options.seq_lens)!r}, allowed are whole numbers above 1")
    options.seq_lens = [int(word) for word in options.seq_lens]
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but there is no CUDA device")
    for name in ("tokens_per_step", "num_steps", "interval"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}, allowed is 1 or more")
    options.notes = []
    emulated = options.device == "cpu" and not options.force_bfloat16
    if "bfloat16" in options.dtypes and emulated and resolve_dtype("auto") != "bfloat16":
        options.dtypes.remove("bfloat16")
        options.notes.append("bfloat16 left out: this processor only emulates it (--force_bfloat16 runs it anyway)")


def run(options: argparse.Namespace, command: Sequence[str]) -> dict[str, Any]:
    """Measure every combination, writing the results after each.

    Args:
        options: Checked options.
        command: The command line, for the record.

    Returns:
        What `training.json` holds.
    """
    from misa.files import write_text
    from misa.results import provenance

    settings = {name: value for name, value in vars(options).items() if name != "notes"}
    report: dict[str, Any] = {"settings": settings, "notes": options.notes, "cells": [], "bars": []}
    report["provenance"] = provenance(command).model_dump()
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    stem = "training_gpu" if options.device == "cuda" else "training"
    for source in options.models:
        for dtype in options.dtypes:
            for seq_len in options.seq_lens:
                report["cells"] += measure(source, dtype, seq_len, options)
                report["bars"] = bars(report["cells"])
                write_text(folder / f"{stem}.json", json.dumps(report, indent=1) + "\n")
                write_text(folder / f"{stem}.md", table(report))
    print(table(report))
    return report


def measure(source: str, dtype: str, seq_len: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train every method step by step in turn.

    Args:
        source: Model folder or size.
        dtype: Precision of the weights.
        seq_len: Tokens in a sequence.
        options: Checked options.

    Returns:
        One row for each method.
    """
    import torch

    from misa.memory.command import make_optimizer
    from misa.memory.step import measure_step
    from misa.methods import METHODS as BUILT
    from misa.methods import build

    batch_size = max(1, options.tokens_per_step // seq_len)
    model, batches = load(source, dtype, seq_len, batch_size, options)
    held_out = next(batches)
    trained: dict[str, tuple[Any, Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in options.methods:
        torch.manual_seed(options.seed)
        chosen = {"interval": options.interval} if "interval" in BUILT[name].defaults else {}
        built = build(name, model().to(options.device), lr=options.learning_rate, seed=options.seed, options=chosen)
        rows[name] = {"start_loss": _loss(built.model, held_out)}
        built.model.train()
        trained[name] = (built.model, make_optimizer(built))
    times: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in PHASES} for name in trained}
    turns = random.Random(options.seed)
    for step in range(-NUM_WARMUP_STEPS, options.num_steps):
        batch = next(batches)
        for name in turns.sample(options.methods, len(options.methods)):
            marks = _timed_step(*trained[name], batch)
            if step >= 0:
                for phase, start, stop in zip(PHASES, marks, marks[1:], strict=False):
                    times[name][phase].append(stop - start)
    for name in options.methods:
        # Taken out one by one: the tracker is to see one method's tensors, and the memory is wanted back.
        trained_model, optimizer = trained.pop(name)
        final_loss = _loss(trained_model, held_out)
        trained_model.train()
        peak = measure_step(trained_model, optimizer, held_out).peak
        steps_s = [sum(parts) for parts in zip(*times[name].values(), strict=True)]
        rows[name] |= {
            "final_loss": final_loss,
            "num_tokens": batch_size * seq_len * (options.num_steps + NUM_WARMUP_STEPS),
            "tokens_per_s": batch_size * seq_len * len(steps_s) / sum(steps_s),
            "step_s": statistics.median(steps_s),
            **{f"{phase}_s": statistics.median(values) for phase, values in times[name].items()},
            "peak_bytes": peak.total_bytes,
            "peak_by_category": dict(peak.by_category),
        }
        del trained_model, optimizer
        gc.collect()
    cell = {"model": Path(source).name, "dtype": dtype, "seq_len": seq_len, "batch_size": batch_size}
    cell["num_threads"] = torch.get_num_threads()
    print(f"measured: {cell}", file=sys.stderr, flush=True)
    return [{**cell, "method": name, **row} for name, row in rows.items()]


def _timed_step(model: Any, optimizer: Any, batch: dict[str, Any]) -> list[float]:
    """One training step; the times at its start and after each of `PHASES`."""
    marks = [_now(batch)]
    loss = model(**batch).loss
    marks.append(_now(batch))
    loss.backward()
    marks.append(_now(batch))
    optimizer.step()
    optimizer.zero_grad()
    marks.append(_now(batch))
    return marks


def _now(batch: dict[str, Any]) -> float:
    """Seconds on the clock when the batch's device has done all it was told."""
    import torch

    if batch["input_ids"].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _loss(model: Any, batch: dict[str, Any]) -> float:
    import torch

    model.eval()
    with torch.no_grad():
        return float(model(**batch).loss)


def load(
    source: str, dtype: str, seq_len: int, batch_size: int, options: argparse.Namespace
) -> tuple[Any, Iterator[dict[str, Any]]]:
    """Prepare a model and its text.

    Args:
        source: Model folder or size.
        dtype: Precision of the weights.
        seq_len: Tokens in a sequence.
        batch_size: Sequences in a batch.
        options: Checked options.

    Returns:
        A function that gives a fresh copy of the model, and the batches, of which there is no end.
    """
    import itertools

    import torch

    from misa.data.corpus import train_tokenizer
    from misa.data.docstrings import docstrings
    from misa.models import build_model, load_model, load_tokenizer, model_config

    texts = docstrings(options.text)
    if Path(source).is_dir():
        tokenizer = load_tokenizer(source)

        def model() -> Any:
            return load_model(source, dtype)
    else:
        size, vocab_size = ("17m", LLAMA_20M_VOCAB_SIZE) if source == LLAMA_20M else (source, 8192)
        tokenizer = train_tokenizer(texts, vocab_size)
        config = model_config(size, vocab_size=vocab_size)

        def model() -> Any:
            return build_model(config, options.seed, dtype)

    needed = batch_size * seq_len * (options.num_steps + NUM_WARMUP_STEPS + 1)
    tokens: list[int] = []
    for text in texts:
        if len(tokens) >= needed:
            break
        tokens += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    size = batch_size * seq_len
    ids = torch.tensor(tokens[: len(tokens) // size * size]).view(-1, batch_size, seq_len)
    if not len(ids):
        raise ValueError(f"text is {','.join(options.text)!r}, which has {len(tokens)} tokens; a step needs {size}")
    return model, itertools.cycle({"input_ids": part, "labels": part} for part in ids.to(options.device))


def bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare MISA with what it is meant to beat.

    Args:
        rows: Rows of `measure`.

    Returns:
        For each comparison its value, its limit, and whether it is met.
    """
    cells: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["model"], row["dtype"], row["seq_len"]), {})[row["method"]] = row
    found = []
    for (model, dtype, seq_len), methods in cells.items():
        where = {"model": model, "dtype": dtype, "seq_len": seq_len}
        for method, other, limit in SPEED_BARS:
            if {method, other} <= methods.keys():
                value = methods[method]["tokens_per_s"] / methods[other]["tokens_per_s"]
                what = f"tokens/s of {method} over {other}"
                found.append({**where, "bar": what, "value": value, "limit": f">= {limit}", "met": value >= limit})
        if seq_len >= PEAK_BAR_SEQ_LEN and {"misa", "lora"} <= methods.keys():
            value = methods["misa"]["peak_bytes"] / methods["lora"]["peak_bytes"]
            what = "tracked peak of misa over lora"
            found.append({**where, "bar": what, "value": value, "limit": "< 1", "met": value < 1})
    return found


def table(report: dict[str, Any]) -> str:
    """Write the results as Markdown.

    Args:
        report: What `training.json` holds.
    """
    machine = report["provenance"]["machine"]
    lines = ["# Training every method side by side", ""]
    device = f"{machine['num_cores']} cores of {machine['processor']}"
    if report["settings"]["device"] == "cuda":
        device = f"one {machine['gpu']} beside {device}"
    measured = {(row["model"], row["dtype"], row["seq_len"]) for row in report["cells"]}
    num_asked = math.prod(len(report["settings"][name]) for name in ("models", "dtypes", "seq_lens"))
    # A run that was cut off leaves a table, too.
    missing = f"Not finished: {len(measured)} of {num_asked} combinations of model, dtype and length were measured."
    lines += [
        f"`{' '.join(report['provenance']['command'])}` on {device};",
        f"torch {report['provenance']['versions']['torch']}.",
        *report["notes"],
        *([missing] if len(measured) < num_asked else []),
        "",
    ]
    heads = ("model", "dtype", "length", "method", "tokens/s", "step (ms)", *(f"{phase} (ms)" for phase in PHASES))
    heads += ("peak (MiB)", "loss before", "loss after")
    lines += [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * 4 + ['---:'] * (len(heads) - 4))} |"]
    for row in report["cells"]:
        cells = [row["model"], row["dtype"], str(row["seq_len"]), row["method"], f"{row['tokens_per_s']:.0f}"]
        cells += [f"{1000 * row[f'{name}_s']:.0f}" for name in ("step", *PHASES)]
        cells += [f"{row['peak_bytes'] / 2**20:.0f}", f"{row['start_loss']:.3f}", f"{row['final_loss']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    heads = ("model", "dtype", "length", "bar", "value", "limit", "met")
    lines += ["", f"| {' | '.join(heads)} |", "| --- | --- | --- | --- | ---: | ---: | --- |"]
    for bar in report["bars"]:
        cells = [bar["model"], bar["dtype"], str(bar["seq_len"]), bar["bar"], f"{bar['value']:.2f}", bar["limit"]]
        lines.append(f"| {' | '.join([*cells, 'yes' if bar['met'] else 'no'])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
