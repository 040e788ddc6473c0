"""The command `python -m misa.dynamics variance`.

For each snapshot (a model folder) it measures the full-batch gradient of every weight matrix and the noise of
mini-batches, then compares sampling schemes at one budget: the variance of the unbiased estimator, the squared gradient
captured, what is really applied, the effective number of blocks; and how old importance scores may be, between
snapshots and while a few rounds are trained from the last one. Written are gradient_norms.csv, variance.csv,
staleness.csv and result.json.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

NORM_COLUMNS = ("snapshot", "step", "block", "layer", "matrix", "numel", "sq_norm", "noise")
VARIANCE_COLUMNS = ("snapshot", "step", "scheme", "quantity", "value")
#: Step of a snapshot of which nothing says at which step it was taken.
UNKNOWN_STEP = -1
_NUMBERED = re.compile(r".*?(?:checkpoint|step)[-_]?(\d+)")
VERBS = {
    "variance": "variance of the gradient under each sampling scheme",
    "rate": "rate of convergence of Algorithm 1 against the published one",
}


@dataclass
class VarianceArguments:
    """What is measured, and where the result goes."""

    model: list[str] = field(metadata={"help": "Snapshots: model folders, NAME=FOLDER, or a run's folder snapshots."})
    dataset_path: str = field(metadata={"help": "Folder with train.jsonl: a corpus or instruction data."})
    output_dir: str = field(metadata={"help": "Folder for result.json, variance.csv and gradient_norms.csv."})
    num_batches: int = field(default=16, metadata={"help": "Mini-batches that make up the full batch."})
    batch_size: int = field(default=8, metadata={"help": "Sequences in a mini-batch."})
    seq_len: int = field(default=128, metadata={"help": "Tokens in a sequence."})
    split: str = field(default="train", metadata={"help": "Split the batches come from."})
    budget: float = field(default=0.03, metadata={"help": "Expected share of all parameters that is drawn."})
    num_draws: int = field(default=100_000, metadata={"help": "Monte Carlo draws for each scheme."})
    effective_share: float = field(default=0.5, metadata={"help": "What automatic eta aims at, as share of blocks."})
    follow_rounds: int = field(
        default=0,
        metadata={"help": "Rounds trained from the last snapshot to see scores grow old; 0 none, else from 2."},
    )
    interval: int = field(default=10, metadata={"help": "Steps in such a round, at least 4."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate in such a round."})
    seed: int = field(default=0, metadata={"help": "Seed of the batches and the Monte Carlo."})
    run: str = field(default="variance", metadata={"help": "Name of the run in the result file."})

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        for name, least in (("num_batches", 2), ("batch_size", 1), ("seq_len", 2), ("num_draws", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.follow_rounds != 0 and (self.follow_rounds < 2 or self.interval < 4):
            raise ValueError(
                f"follow_rounds is {self.follow_rounds} and interval {self.interval}; allowed are 0, or at least 2 "
                "rounds of at least 4 steps"
            )
        if self.follow_rounds and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be positive and finite")
        for name in ("budget", "effective_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in (0, 1]")


@dataclass(frozen=True)
class Snapshot:
    """A model at some step of its training."""

    name: str
    folder: str
    step: int
    run: str


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Words of the command line; by default those of this process.

    Returns:
        Exit status: 0, or 2 for wrong input or a folder that cannot be written.
    """
    from transformers import HfArgumentParser

    from misa.help_text import HelpFormatter

    words = list(sys.argv[1:] if arguments is None else arguments)
    prog = "python -m misa.dynamics"
    if not words or words[0] in ("-h", "--help"):
        verbs = "".join(f"\n  {verb:10}{text}" for verb, text in VERBS.items())
        print(f"usage: {prog} VERB ...\n\nverbs:{verbs}")
        return 0 if words else 2
    if words[0] not in VERBS:
        print(f"{prog}: error: verb is {words[0]!r}; allowed: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    options, run, text = _of_verb(words[0])
    parser = HfArgumentParser(
        options, prog=f"{prog} {words[0]}", description=text.partition("\n\n")[2], formatter_class=HelpFormatter
    )
    try:
        (settings,) = parser.parse_args_into_dataclasses(words[1:])
        run(settings, ["python", "-m", "misa.dynamics", *words])
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _of_verb(verb: str) -> tuple[type, Callable[[Any, list[str]], Path], str]:
    """Arguments, function and description of a verb."""
    if verb == "variance":
        return VarianceArguments, measure, str(__doc__)
    from misa.dynamics import rate_command

    return rate_command.RateArguments, rate_command.measure_rate, str(rate_command.__doc__)


def measure(settings: VarianceArguments, command: list[str]) -> Path:
    """Measure every snapshot and write the three tables and the result.

    Args:
        settings: What to measure.
        command: The command line, for the result's provenance.

    Returns:
        The folder written.

    Raises:
        ValueError: If a model or the data is missing or unusable, or the folder cannot be written.
    """
    from misa.dynamics.comparison import compare
    from misa.dynamics.staleness import COLUMNS as STALENESS_COLUMNS
    from misa.dynamics.staleness import between, mean_staleness
    from misa.files import write_csv
    from misa.results import Result, output_folder, provenance, write_result

    start = time.perf_counter()
    norms: list[dict[str, Any]] = []
    variances: list[dict[str, Any]] = []
    metrics: dict[str, float] = {}
    snapshots = find_snapshots(settings.model)
    folder = output_folder(settings.output_dir)
    of_run: dict[str, list[tuple[str, int, Any]]] = {}
    for snapshot in snapshots:
        gradients, names = snapshot_gradients(snapshot, settings)
        of_run.setdefault(snapshot.run, []).append((snapshot.name, snapshot.step, gradients))
        columns = {"snapshot": snapshot.name, "step": snapshot.step}
        values = zip(gradients.layer, gradients.numel, gradients.sq_norm, gradients.noise, strict=True)
        for (block, matrix), (layer, numel, sq_norm, noise) in zip(names, values, strict=True):
            norms.append(
                columns
                | {"block": block, "layer": int(layer), "matrix": matrix, "numel": int(numel)}
                | {"sq_norm": float(sq_norm), "noise": float(noise)}
            )
        table = compare(
            *(gradients, settings.budget),
            num_draws=settings.num_draws,
            seed=settings.seed,
            effective_share=settings.effective_share,
        )
        metrics[f"{snapshot.name}/full_sq_norm"] = float(gradients.sq_norm.sum())
        metrics[f"{snapshot.name}/noise_to_signal"] = float(gradients.noise.sum() / gradients.sq_norm.sum())
        metrics[f"{snapshot.name}/unbiased_sq_norm"] = float(gradients.unbiased_sq_norm.sum())
        for scheme, row in table.items():
            variances += [columns | {"scheme": scheme, "quantity": key, "value": value} for key, value in row.items()]
            for key in ("relative_variance", "captured_share", "effective_blocks", "variance_agreement"):
                metrics[f"{snapshot.name}/{scheme}/{key}"] = row[key]
            print(
                f"{snapshot.name} {scheme}: relative variance {row['relative_variance']:.4g} (Monte Carlo "
                f"{100 * row['variance_agreement']:+.2f} %), captured {100 * row['captured_share']:.3g} %, "
                f"effective blocks {row['effective_blocks']:.3g}"
            )
        # So far: something may be wrong with the next one, or with the rounds that are followed.
        write_csv(folder / "gradient_norms.csv", NORM_COLUMNS, norms)
        write_csv(folder / "variance.csv", VARIANCE_COLUMNS, variances)
    stale = [
        row
        for own in of_run.values()
        for row in between(sorted(own, key=lambda item: item[1]), settings.budget, settings.effective_share)
    ]
    if settings.follow_rounds:
        stale += follow_last(snapshots[-1], of_run[snapshots[-1].run][-1][2], settings)
    metrics |= mean_staleness(stale)
    write_csv(folder / "staleness.csv", STALENESS_COLUMNS, stale)
    result = Result(
        run=settings.run,
        kind="variance",
        method="none",
        model=snapshots[-1].name,
        data=Path(settings.dataset_path).resolve().name,
        seed=settings.seed,
        config={**asdict(settings), "snapshots": [asdict(snapshot) for snapshot in snapshots]},
        provenance=provenance(command, data_digest(settings.dataset_path, settings.split)),
        metrics=metrics,
        timings={"measure_s": time.perf_counter() - start},
    )
    write_result(result, folder)
    return folder


def snapshot_gradients(snapshot: Snapshot, settings: VarianceArguments) -> tuple[Any, list[tuple[str, str]]]:
    """Load a snapshot in float32 and measure it.

    Args:
        snapshot: The model.
        settings: What to measure.

    Returns:
        Its `BlockGradients`, and the name of each block with its short name inside the layer.

    Raises:
        ValueError: If model or data is missing or unusable, or the sequences are longer than the model allows.
    """
    from transformers.utils import logging as transformers_logging

    from misa.dynamics.gradients import block_gradients, matrix_name
    from misa.memory.models import longest_sequence
    from misa.models import load_model
    from misa.optimizer import partition

    transformers_logging.disable_progress_bar()
    model = load_model(snapshot.folder, "float32")
    limit = longest_sequence(model.config)
    if limit is not None and settings.seq_len > limit:
        raise ValueError(f"seq_len is {settings.seq_len}; {snapshot.folder} allows at most {limit}")
    batches = population(snapshot, settings, settings.seed, settings.num_batches)
    blocks = partition(model)

    def report(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{snapshot.name}: {done}/{total} backward passes", end="", file=sys.stderr, flush=True)

    gradients = block_gradients(model, blocks, batches, report)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return gradients, [(block.name, matrix_name(block)) for block in blocks]


def population(snapshot: Snapshot, settings: VarianceArguments, seed: int, num_batches: int) -> list[dict[str, Any]]:
    """Draw mini-batches for a snapshot's tokenizer; the same for all snapshots with one tokenizer."""
    from misa.dynamics.batches import load_batches
    from misa.models import load_tokenizer

    sizes = (num_batches, settings.batch_size, settings.seq_len)
    tokenizer = load_tokenizer(snapshot.folder)
    return load_batches(settings.dataset_path, tokenizer, *sizes, seed=seed, split=settings.split)


def follow_last(snapshot: Snapshot, gradients: Any, settings: VarianceArguments) -> list[dict[str, Any]]:
    """Train some rounds from a snapshot with these gradients; see `misa.dynamics.staleness.follow`."""
    from misa.dynamics.staleness import FollowSettings, follow
    from misa.models import load_model

    rounds = FollowSettings(
        settings.follow_rounds,
        settings.interval,
        settings.budget,
        settings.learning_rate,
        settings.effective_share,
        settings.seed,
    )
    # Other text than what is measured on, so that training does not fit the measurement.
    measured = population(snapshot, settings, settings.seed, settings.num_batches)
    trained = population(snapshot, settings, settings.seed + 1, settings.interval)
    model = load_model(snapshot.folder, "float32")
    return list(follow(model, gradients, measured, trained, rounds, snapshot.name, snapshot.step))


def find_snapshots(models: list[str]) -> list[Snapshot]:
    """Resolve what `--model` was given.

    A snapshot is called by the name before `=`, or by its folder; a folder called `model` by the run it lies in. A
    folder called `snapshots` stands for all snapshots in it, which are called by the name or the run, and their
    step. Its step is read from `trainer_state.json` in the folder, or from a folder name that ends in a number such as
    `checkpoint-50`, or, for the model of a finished run, from the run's last curve point.

    Args:
        models: Folders, or NAME=FOLDER.

    Returns:
        The snapshots in the order given.

    Raises:
        ValueError: If a folder is missing or two snapshots have the same name.
    """
    snapshots: list[Snapshot] = []
    for word in models:
        name, equals, path = (word, "", "") if Path(word).is_dir() else word.partition("=")
        folder = Path(path if equals else word)
        if not folder.is_dir():
            raise ValueError(f"model {folder} is not a folder")
        whole, run = folder.resolve(), str(folder.parent)
        label = name if equals else whole.parent.name
        if whole.name == "snapshots":
            steps = sorted((snapshot_step(inside), inside) for inside in folder.iterdir() if inside.is_dir())
            snapshots += [Snapshot(f"{label}-{step}", str(inside), step, run) for step, inside in steps]
            continue
        own = label if whole.name == "model" else whole.name
        if equals and whole.name != "model":
            run = name
        elif whole.name != "model" and _NUMBERED.fullmatch(whole.name) is None:
            run = str(whole)  # nothing says that a folder beside it is of the same run
        snapshots.append(Snapshot(name if equals else own, str(folder), snapshot_step(folder), run))
    names = [snapshot.name for snapshot in snapshots]
    if len(set(names)) < len(names):
        raise ValueError(f"two snapshots have the same name among {', '.join(names)}; give them as NAME=FOLDER")
    return snapshots


def snapshot_step(folder: Path) -> int:
    """Step at which a model folder was saved, or `UNKNOWN_STEP`; see `find_snapshots`.

    Raises:
        ValueError: If the folder's `trainer_state.json` does not say it.
    """
    state = folder / "trainer_state.json"
    if state.is_file():
        try:
            return int(json.loads(state.read_text(encoding="utf-8"))["global_step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{state} does not say its global_step ({type(error).__name__}: {error})") from error
    numbered = _NUMBERED.fullmatch(folder.resolve().name)
    if numbered:
        return int(numbered.group(1))
    if (folder.parent / "curves.csv").is_file():
        from misa.results import read_curves

        return max((point.step for point in read_curves(folder.parent)), default=UNKNOWN_STEP)
    return UNKNOWN_STEP


def data_digest(dataset_path: str, split: str) -> str:
    """SHA-256 over the data file the batches come from."""
    from misa.data.records import require_split

    return hashlib.sha256(require_split(dataset_path, split).read_bytes()).hexdigest()
