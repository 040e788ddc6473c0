"""The command `python -m misa.dynamics rate`.

Runs Algorithm 1 with step sizes in proportion to one over the square root of the number of block updates K, on a
problem with known smoothness and on a small LLaMA, and compares how the mean squared full gradient falls with K with
the published rate, for several numbers of steps in a round, with and without the algorithm's line 16. Written are
rate.csv and result.json.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from misa.dynamics.problems import Problem

COLUMNS = ("problem", "momentum_step", "interval", "seed", "num_updates", "lr", "mean_sq_norm")
PROBLEMS = ("waves", "llama")


@dataclass
class RateArguments:
    """What is run, and where the result goes."""

    dataset_path: str = field(metadata={"help": "Corpus folder; the LLaMA's batches and its tokenizer."})
    output_dir: str = field(metadata={"help": "Folder for result.json and rate.csv."})
    waves_updates: str = field(default="50,100,200,400", metadata={"help": "Block updates K of the runs on waves."})
    llama_updates: str = field(default="50,100,200", metadata={"help": "Block updates K of the runs on the LLaMA."})
    intervals: str = field(default="1,5,20,50", metadata={"help": "Steps in a round, the paper's T."})
    num_seeds: int = field(default=1, metadata={"help": "Seeds: of problem, noise and blocks drawn."})
    budget: float = field(default=0.5, metadata={"help": "Share of the parameters in blocks that is drawn."})
    waves_lr: float = field(default=0.3, metadata={"help": "Step size on waves, times the square root of K."})
    llama_lr: float = field(default=0.5, metadata={"help": "Step size on the LLaMA, times the square root of K."})
    num_batches: int = field(default=8, metadata={"help": "Mini-batches of the LLaMA, which make up its full batch."})
    batch_size: int = field(default=2, metadata={"help": "Sequences in a mini-batch."})
    seq_len: int = field(default=32, metadata={"help": "Tokens in a sequence."})
    run: str = field(default="rate", metadata={"help": "Name of the run in the result file."})

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        for name, least in (("num_seeds", 1), ("num_batches", 2), ("batch_size", 1), ("seq_len", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget is {self.budget}; it must be in (0, 1]")
        for name in ("waves_lr", "llama_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("waves_updates", "llama_updates", "intervals"):
            self.numbers(name)
        for name in ("waves_updates", "llama_updates"):
            if len(self.numbers(name)) < 2:
                raise ValueError(f"{name} is {getattr(self, name)!r}; a slope needs at least 2 numbers, as 100,200")

    def numbers(self, name: str) -> list[int]:
        """A comma list as numbers.

        Raises:
            ValueError: If it is not one of distinct whole numbers from 1 up.
        """
        words = [word.strip() for word in getattr(self, name).split(",")]
        if not all(word.isdecimal() and int(word) > 0 for word in words) or len(set(words)) < len(words):
            raise ValueError(
                f"{name} is {getattr(self, name)!r}; allowed are distinct whole numbers from 1, as 100,200"
            )
        return [int(word) for word in words]


def measure_rate(settings: RateArguments, command: list[str]) -> Path:
    """Run everything and write the table and the result.

    Args:
        settings: What to run.
        command: The command line, for the result's provenance.

    Returns:
        The folder written.

    Raises:
        ValueError: If the data is missing or unusable, or the folder cannot be written.
    """
    from misa.dynamics.command import data_digest
    from misa.dynamics.rate import mean_sq_norm
    from misa.files import write_csv
    from misa.results import Result, output_folder, provenance, write_result

    start = time.perf_counter()
    folder = output_folder(settings.output_dir)
    rows: list[dict[str, Any]] = []
    make = problem_makers(settings)
    runs = itertools.product(PROBLEMS, settings.numbers("intervals"), (True, False), range(settings.num_seeds))
    for problem, interval, momentum_step, seed in tqdm(list(runs), desc="rate", unit="run"):
        for num_updates in settings.numbers(f"{problem}_updates"):
            lr = getattr(settings, f"{problem}_lr") / num_updates**0.5
            mean = mean_sq_norm(*(make[problem](seed), num_updates, interval, lr, settings.budget, momentum_step, seed))
            setting = {"problem": problem, "momentum_step": momentum_step, "interval": interval, "seed": seed}
            rows.append(setting | {"num_updates": num_updates, "lr": lr, "mean_sq_norm": mean})
    write_csv(folder / "rate.csv", COLUMNS, rows)
    metrics = slopes(rows)
    for name, value in metrics.items():
        print(f"{name}: {value:.3f}")
    result = Result(
        run=settings.run,
        kind="rate",
        method="misa_paper",
        model="waves, llama",
        data=Path(settings.dataset_path).resolve().name,
        seed=0,
        config=asdict(settings) | {"waves_smoothness": make["waves"](0).smoothness},  # type: ignore[attr-defined]
        provenance=provenance(command, data_digest(settings.dataset_path, "train")),
        metrics=metrics,
        timings={"measure_s": time.perf_counter() - start},
    )
    write_result(result, folder)
    return folder


def slopes(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Slope and 95% interval of every problem, interval and treatment of line 16; see `fit_slope`.

    Args:
        rows: Of `rate.csv`.

    Returns:
        `<problem>/T<interval>/<with or without>/slope`, `.../slope_low` and `.../slope_high`; none of a group in which
        a run diverged, which is said on standard error.
    """
    from misa.dynamics.rate import fit_slope

    metrics: dict[str, float] = {}
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        line = "with" if row["momentum_step"] else "without"
        groups.setdefault(f"{row['problem']}/T{row['interval']}/{line}", []).append(row)
    for name, own in groups.items():
        if lost := [row for row in own if not 0 < row["mean_sq_norm"] < math.inf]:
            runs = ", ".join(f"{row['num_updates']} updates of seed {row['seed']}" for row in lost)
            print(f"{name}: no slope, since these diverged at lr {lost[0]['lr']:.3g}: {runs}", file=sys.stderr)
            continue
        found = fit_slope(*([row[column] for row in own] for column in ("num_updates", "mean_sq_norm", "seed")))
        values = zip(("slope", "slope_low", "slope_high"), found, strict=True)
        metrics |= {f"{name}/{key}": value for key, value in values}
    return metrics


def problem_makers(settings: RateArguments) -> dict[str, Callable[[int], Problem]]:
    """For each problem a function of a seed that returns it in its first state."""
    from misa.dynamics.batches import load_batches
    from misa.dynamics.problems import SmallLlama, Waves
    from misa.models import build_model, load_tokenizer, model_config

    tokenizer = load_tokenizer(Path(settings.dataset_path) / "tokenizer")
    sizes = (settings.num_batches, settings.batch_size, settings.seq_len)
    batches = load_batches(settings.dataset_path, tokenizer, *sizes)
    # Weights as large as a trained model's: from tiny ones, frozen embeddings would let nothing through.
    config = model_config(
        *("2m", len(tokenizer)),
        **{"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 2},
        initializer_range=0.1,
    )
    return {
        "waves": lambda seed: Waves(seed),
        "llama": lambda seed: SmallLlama(build_model(config, seed), batches, seed),
    }
