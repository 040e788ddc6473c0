"""Time the paper's evaluation in batches against a loop over single documents: `python -m benchmarks.evaluation`.

Both generate with beams of 4 for the same documents in one process, a batch by turns with its documents one by one, so
that whatever else the machine does falls on both alike. The loop is what the paper's programs do: `generate` on one
prompt at a time. Compared are wall time and processor time; the answers must be the same, word for word.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from misa.files import write_text
from misa.results.provenance import describe_machine


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program name; None takes them from the process.

    Returns:
        Exit status: 0; 1 if an answer differs; 2 if something asked for is wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", required=True, help="folder of a causal LM")
    parser.add_argument("--data_dir", required=True, help="folder with the test sets")
    parser.add_argument("--dataset", default="openbookqa", help="test set (%(default)s)")
    parser.add_argument("--num_documents", type=int, default=32, help="documents from the start (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="documents at a time (%(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens to generate at most (%(default)s)")
    parser.add_argument("--dtype", default="float32", help="dtype of the weights (%(default)s)")
    parser.add_argument("--output_dir", default="benchmarks/results", help="folder for evaluation.json and .md")
    options = parser.parse_args(argv)
    try:
        for name in ("num_documents", "batch_size", "max_new_tokens"):
            if getattr(options, name) < 1:
                raise ValueError(f"{name} is {getattr(options, name)}, allowed is 1 or more")
        result = measure(options)
    except ValueError as error:
        print(f"benchmarks.evaluation: error: {error}", file=sys.stderr)
        return 2
    write_text(Path(options.output_dir) / "evaluation.json", json.dumps(result, indent=2) + "\n")
    write_text(Path(options.output_dir) / "evaluation.md", table(result))
    print(table(result))
    return int(result["num_different"] > 0)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Generate for the same documents both ways.

    Args:
        options: Model, documents, sizes.

    Returns:
        Seconds of both, their ratios, tokens generated, answers that differ, machine.
    """
    import torch

    from misa.evaluation.beams import SHARED_ATTENTION
    from misa.evaluation.folder import ModelFolder
    from misa.evaluation.model import load_model
    from misa.tasks.benchmarks import prompt, read_test

    model = load_model(
        ModelFolder(options.model_name_or_path),
        dtype=options.dtype,
        device="cpu",
        batch_size=options.batch_size,
        max_length=None,
    )
    documents = read_test(options.dataset, options.data_dir)[: options.num_documents]
    # As the harness orders them: by length, so that a batch has little padding.
    prompts = sorted(map(prompt, documents), key=lambda text: -len(model.tok_encode(text)))
    seconds = {"batch_wall_s": 0.0, "batch_cpu_s": 0.0, "single_wall_s": 0.0, "single_cpu_s": 0.0}
    num_tokens, num_different, different = 0, 0, []
    for start in range(0, len(prompts), options.batch_size):
        batch = prompts[start : start + options.batch_size]
        with _timed(seconds, "batch"):
            context, mask = model.tok_batch_encode(batch)
            found = model._model_generate(
                context, context.shape[1] + options.max_new_tokens, [], attention_mask=mask, num_beams=4
            )
            answers = [model.tok_decode(row[context.shape[1] :].tolist()) for row in found]
        # What transformers does by default, without our attention.
        model.model.set_attn_implementation("sdpa")
        for text, answer in zip(batch, answers, strict=True):
            with _timed(seconds, "single"), torch.inference_mode():
                encoded = model.tokenizer(text, return_tensors="pt")
                tokens = model.model.generate(
                    **encoded,
                    num_beams=4,
                    do_sample=False,
                    max_new_tokens=options.max_new_tokens,
                    pad_token_id=model.tokenizer.pad_token_id,
                )[0, encoded["input_ids"].shape[1] :].tolist()
                single = model.tok_decode(tokens)
            num_tokens += len(tokens)
            if single != answer:
                num_different += 1
                different.append({"single": single, "batch": answer})
        model.model.set_attn_implementation(SHARED_ATTENTION)
    return {
        "model": Path(options.model_name_or_path).name,
        "dataset": options.dataset,
        "num_documents": len(prompts),
        "batch_size": options.batch_size,
        "num_beams": 4,
        "max_new_tokens": options.max_new_tokens,
        "dtype": options.dtype,
        "num_tokens": num_tokens,
        **{name: round(value, 2) for name, value in seconds.items()},
        "speedup_wall": round(seconds["single_wall_s"] / seconds["batch_wall_s"], 2),
        "speedup_cpu": round(seconds["single_cpu_s"] / seconds["batch_cpu_s"], 2),
        "num_different": num_different,
        "different": different,
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": describe_machine().model_dump(),
    }


class _timed:  # noqa: N801
    """Add the wall and processor seconds of a block to a dictionary."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.seconds[f"{self.name}_wall_s"] += time.perf_counter() - self.wall
        self.seconds[f"{self.name}_cpu_s"] += time.process_time() - self.cpu


def table(result: dict[str, Any]) -> str:
    """Write the result as Markdown.

    Args:
        result: From `measure`.
    """
    per_100 = 100 / result["num_documents"]
    lines = [
        f"{result['model']}, {result['dtype']}, {result['num_documents']} documents of {result['dataset']}, beams of "
        f"{result['num_beams']}, at most {result['max_new_tokens']} new tokens, {result['num_threads']} thread(s) of "
        f"{result['machine']['processor']}, torch {result['torch']}. Answers that differ: {result['num_different']}.\n",
        "| way | wall (s) | processor (s) | processor seconds for 100 documents |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, way in (
        ("single", "one document at a time, `generate`"),
        ("batch", f"batches of {result['batch_size']}"),
    ):
        wall, cpu = result[f"{name}_wall_s"], result[f"{name}_cpu_s"]
        lines.append(f"| {way} | {wall:.1f} | {cpu:.1f} | {cpu * per_100:.0f} |")
    lines.append(f"| ratio | {result['speedup_wall']:.1f} | {result['speedup_cpu']:.1f} | |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
