"""Instruction data by name, hub id, or local file or folder.

Hub ids and fields were compared with public code that reads them: alpaca-gpt4, commonsense170k, gsm8k, svamp, aqua and
boolq in public repositories, the other commonsense sets in lm-evaluation-harness 0.4.13, whose copies without loading
scripts are used (`baber/piqa`, `lighteval/siqa`), since `datasets` no longer runs scripts. The copy of MAWPS on the hub
has other items than LLM-Adapters' file. Math10K has no hub id here because none could be verified: it is read from
LLM-Adapters' `math_10k.json`.

In LLM-Adapters' own `dataset/NAME/train.json` the outputs were written by a model and some are wrong; those of
`math_10k.json` and `commonsense_170k.json` are what the published runs were trained on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from misa.data.formats import ALPACA, Format, format_of
from misa.data.hub import load_hub
from misa.data.records import (
    SUFFIXES,
    Record,
    files_digest,
    find_split,
    numbered_records,
    records_digest,
    require_unicode,
    sound_records,
    surely_a_path,
)

logger = logging.getLogger(__name__)

# First parts of a path such as `datasets/Math10k` that name a folder for data and no owner on the hub.
_DATA_FOLDERS = ("data", "dataset", "datasets")


@dataclass(frozen=True)
class Known:
    """A data set known by name.

    Attributes:
        hub_id: Repository on the hub, or None if none is verified.
        config: Configuration there.
        others: Further names of local files and folders, compared without case and without - and _.
    """

    hub_id: str | None
    config: str | None = None
    others: tuple[str, ...] = ()


KNOWN = {
    "alpaca-gpt4": Known("vicgalle/alpaca-gpt4", others=("alpaca_gpt4_data",)),
    "math10k": Known(None, others=("math_10k",)),
    "commonsense170k": Known("zwhe99/commonsense_170k", others=("commonsense_170k",)),
    "gsm8k": Known("openai/gsm8k", "main"),
    "mawps": Known("mwpt5/MAWPS"),
    "svamp": Known("ChilleD/SVAMP"),
    "aqua": Known("deepmind/aqua_rat", "raw", others=("aqua_rat",)),
    "boolq": Known("google/boolq"),
    "piqa": Known("baber/piqa"),
    "social_i_qa": Known("lighteval/siqa", others=("siqa",)),
    "hellaswag": Known("Rowan/hellaswag"),
    "winogrande": Known("allenai/winogrande", "winogrande_xl"),
    "arc_easy": Known("allenai/ai2_arc", "ARC-Easy"),
    "arc_challenge": Known("allenai/ai2_arc", "ARC-Challenge"),
    "openbookqa": Known("allenai/openbookqa", "main"),
}


@dataclass(frozen=True)
class InstructionSource:
    """Where instruction data is.

    Attributes:
        name: Short name, for the result.
        train: Local training files, or none if the data comes from the hub.
        validation: Local validation files, maybe none.
        hub_id: Repository on the hub, or None.
        config: Configuration there.
    """

    name: str
    train: tuple[Path, ...] = ()
    validation: tuple[Path, ...] = ()
    hub_id: str | None = None
    config: str | None = None

    def read(self, with_validation: bool, max_malformed: float = 0.0) -> tuple[list[Record], list[Record], str]:
        """Read the records, converted to instruction, input and output.

        Args:
            with_validation: Whether a validation split, if there is one, is wanted.
            max_malformed: Share of the records that may be malformed and is then left out with a warning.

        Returns:
            Training records, validation records (maybe none), and a digest of the data.

        Raises:
            ValueError: If the hub cannot give the data, a file cannot be read, or too many records are malformed.
        """
        if self.hub_id is None:
            validation = self.validation if with_validation else ()
            parts = [_read_files(files, max_malformed) for files in (self.train, validation)]
            return *parts, files_digest([*self.train, *validation])
        splits = load_hub(self.hub_id, self.config)
        if "train" not in splits:
            raise ValueError(f"{self.hub_id} has no split train; it has {', '.join(splits)}")
        names = ["train", *(["validation"] if with_validation and "validation" in splits else [])]
        read = {name: read_rows(self.hub_id, name, splits[name], max_malformed) for name in names}
        digest = records_digest([record for name in names for record in read[name]])
        return read["train"], read.get("validation", []), digest


def find_instructions(dataset_path: str, data_dir: str | None = None) -> InstructionSource:
    """Find instruction data.

    Args:
        dataset_path: A local file or folder, a name out of `KNOWN`, or a hub id, tried in this order. In a folder the
            training file is `train.*`, `*_train.*`, the only data file there is, or Parquet pieces as the hub keeps
            them (`data/train-00000-of-00001.parquet`).
        data_dir: Folder in which the local copy of a known name is looked for, at most two folders down:
            `NAME_train.*`, `NAME/train.*` or `NAME.*`; with it, the hub is not asked.

    Raises:
        ValueError: If nothing is there, or it is not clear which file is meant.
    """
    if not dataset_path:
        raise ValueError("dataset_path is empty; it must name a file, a folder or a data set")
    path = Path(dataset_path)
    if data_dir is not None:
        return _find_copy(dataset_path, Path(data_dir))
    if path.is_file():
        return InstructionSource(path.stem, (path,))
    if path.is_dir():
        return _find_in_folder(path)
    if (name := _known_name(dataset_path)) is not None:
        hub = KNOWN[name]
        if hub.hub_id is None:
            raise ValueError(f"{name} has no verified hub id; give its file as dataset_path, or its folder as data_dir")
        if name != dataset_path:
            logger.info("no folder at %s; taking %s from the hub", dataset_path, hub.hub_id)
        return InstructionSource(name, hub_id=hub.hub_id, config=hub.config)
    if surely_a_path(dataset_path):
        raise ValueError(
            f"data source {path} is neither a folder nor a file, nor a hub id (owner/name), nor one of "
            f"{', '.join(KNOWN)}"
        )
    return InstructionSource(path.name, hub_id=dataset_path)


def _known_name(text: str) -> str | None:
    """Return the known name meant by a name, its hub id, or a missing path such as `datasets/Math10k`."""
    # One repository may hold several known sets.
    if len(same := [name for name, known in KNOWN.items() if text == known.hub_id]) == 1:
        return same[0]
    owner, _, last = text.rstrip("/").rpartition("/")
    if owner and (text.startswith(".") or Path(owner).parts[0] not in _DATA_FOLDERS):
        return None
    return next((name for name in KNOWN if _plain(last) in _plain_names(name)), None)


def _plain(text: str) -> str:
    return text.lower().replace("-", "").replace("_", "")


def _plain_names(name: str) -> set[str]:
    return {_plain(alias) for alias in (name, *KNOWN[name].others)}


def _find_copy(dataset_path: str, folder: Path) -> InstructionSource:
    name = _known_name(dataset_path)
    if name is None:
        raise ValueError(f"data_dir goes with a known name as dataset_path ({', '.join(KNOWN)}), not {dataset_path!r}")
    if not folder.is_dir():
        raise ValueError(f"data_dir {folder} is no folder")
    files = sorted(path for depth in ("*", "*/*", "*/*/*") for path in folder.glob(depth) if path.suffix in SUFFIXES)
    aliases = _plain_names(name)

    def split_files(split: str) -> list[Path]:
        wanted = {f"{alias}{split}" for alias in aliases}
        return [
            path
            for path in files
            if _plain(path.stem) in wanted or (path.stem == split and _plain(path.parent.name) in aliases)
        ]

    train = split_files("train") or [path for path in files if _plain(path.stem) in aliases]
    if len(train) != 1:
        found = ", ".join(map(str, train)) or "none"
        raise ValueError(f"data_dir {folder} must hold one training file of {name}, such as {name}_train.json: {found}")
    return InstructionSource(name, tuple(train), tuple(split_files("validation")[:1]))


def _find_in_folder(folder: Path) -> InstructionSource:
    train, validation = find_split(folder, "train"), find_split(folder, "validation")
    if train is not None:
        return InstructionSource(folder.stem, (train,), (validation,) if validation else ())
    pieces = tuple(sorted(folder.glob("**/train-*.parquet")))
    if pieces and len({piece.parent for piece in pieces}) == 1:
        return InstructionSource(folder.stem, pieces, tuple(sorted(pieces[0].parent.glob("validation-*.parquet"))))
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    files = [path for path in files if path.stem.endswith("_train")] or files
    if len(files) == 1:
        return InstructionSource(folder.stem, (files[0],))
    present = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
    raise ValueError(
        f"{folder} has no train.jsonl, train.json or train.parquet, nor a single data file; it holds {present}"
    )


def question_of(record: Record) -> tuple[str, str]:
    """Return what a record asks: its instruction and its input, "" if it has none."""
    return record["instruction"], record.get("input") or ""


def read_questions(path: Path) -> list[tuple[str, str]]:
    """Return the questions of a test file, whose answers may be missing.

    Args:
        path: A data file.

    Raises:
        ValueError: If the file cannot be read, or a record has no instruction.
    """
    # What is scored needs an answer, and no output to learn.
    numbered = (
        (where, {"output": "", **record} if isinstance(record, dict) and "instruction" in record else record)
        for where, record in numbered_records(path)
    )
    return [question_of(record) for record in _read(numbered, 0.0, str(path), to_learn=False)]


def read_rows(
    hub_id: str, split: str, rows: Iterable[Record], max_malformed: float = 0.0, to_learn: bool = True
) -> list[Record]:
    """Convert the rows of a split of the hub.

    Args:
        hub_id: Repository on the hub, for messages.
        split: Name of the split, for messages.
        rows: The rows in the fields they have there.
        max_malformed: Share of the rows that may be malformed and is then left out with a warning.
        to_learn: Refuse empty outputs.

    Returns:
        Records with instruction, input, output and, where the layout has one, answer.

    Raises:
        ValueError: If too many rows are malformed; the first few are named.
    """
    numbered = ((f"{hub_id}, {split}, row {number}", row) for number, row in enumerate(rows, start=1))
    return _read(numbered, max_malformed, hub_id, to_learn)


def _read_files(files: Iterable[Path], max_malformed: float) -> list[Record]:
    return [record for path in files for record in _read(numbered_records(path), max_malformed, str(path))]


def _read(
    numbered: Iterable[tuple[str, Any]], max_malformed: float, source: str, to_learn: bool = True
) -> list[Record]:
    """Convert the records of one file, whose first whole record says how its fields are laid out."""
    layout: Format | None = None

    def convert(record: Record) -> Record:
        nonlocal layout
        if layout is None:
            found = format_of(record)
            if not all(field in record for field in found.fields):
                return ALPACA.convert(record)
            layout = found
        missing = next((field for field in layout.fields if field not in record), None)
        if missing is not None:
            raise ValueError(f"field {missing!r} is missing; the record has {', '.join(map(repr, record))}")
        converted = layout.convert(record)
        if to_learn and not converted["output"].strip():
            raise ValueError("field 'output' is empty, so there is nothing to learn")
        for field, value in converted.items():
            require_unicode(field, value)
        return converted

    return sound_records(numbered, convert, max_malformed, source)
