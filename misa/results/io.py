"""Read and write result files; writing is atomic, reading says which file and which field is wrong."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from misa.files import write_text
from misa.results.schema import CURVE_COLUMNS, CurvePoint, Result

RESULT_FILE = "result.json"
CURVES_FILE = "curves.csv"


def write_result(result: Result, folder: str | Path) -> Path:
    """Write `result.json` into a folder in one move.

    Write it after every other file of the run: its presence means that the run is complete.

    Args:
        result: The result.
        folder: The run's folder, made if needed.

    Returns:
        Path of the file written.
    """
    return write_text(Path(folder) / RESULT_FILE, result.model_dump_json(indent=2) + "\n")


def output_folder(path: str | Path) -> Path:
    """Make the folder of a result before it is measured, which can take hours.

    Args:
        path: What the command was given as `output_dir`.

    Returns:
        The folder.

    Raises:
        ValueError: If it cannot be made or written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"output_dir is {str(path)!r}; it must be a folder that can be written ({error.strerror})"
        ) from error
    return folder


def read_result(path: str | Path) -> Result:
    """Read a result file.

    Args:
        path: A `result.json`, or the folder that holds one.

    Returns:
        The checked result.

    Raises:
        ValueError: If there is no such file or its content does not follow the schema; the message names the file
            and the fields at fault.
    """
    path = Path(path)
    if path.is_dir():
        path = path / RESULT_FILE
    if not path.is_file():
        raise ValueError(f"no result file at {path}")
    try:
        return Result.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path}: {_faults(error)}") from error


def write_curves(points: Iterable[CurvePoint], path: str | Path) -> Path:
    """Write training curves as a tidy CSV file with the columns `CURVE_COLUMNS`, in one move.

    Args:
        points: The rows, in the order to write.
        path: The file to write.

    Returns:
        The path written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CURVE_COLUMNS)
    # `repr` of a float reads back as exactly the same number.
    writer.writerows((p.step, p.tokens, repr(p.time_s), p.metric, repr(p.value)) for p in points)
    return write_text(path, text.getvalue())


def read_curves(path: str | Path) -> list[CurvePoint]:
    """Read a curve file.

    Args:
        path: A `curves.csv`, or the folder that holds one.

    Returns:
        The rows in file order.

    Raises:
        ValueError: If the file is missing, its columns are not `CURVE_COLUMNS`, or a row is malformed; the message
            names file and line.
    """
    path = Path(path)
    if path.is_dir():
        path = path / CURVES_FILE
    if not path.is_file():
        raise ValueError(f"no curve file at {path}")
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))
        if tuple(reader.fieldnames or ()) != CURVE_COLUMNS:
            raise ValueError(f"columns are {reader.fieldnames}, expected {list(CURVE_COLUMNS)}")
        return [_point(row, reader.line_num) for row in reader]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from error


def _point(row: dict[str, str], line: int) -> CurvePoint:
    try:
        return CurvePoint.model_validate(row)
    except ValidationError as error:
        raise ValueError(f"line {line}: {_faults(error)}") from error


def _faults(error: ValidationError) -> str:
    faults = []
    for fault in error.errors():
        field = ".".join(str(part) for part in fault["loc"]) or "the file"
        faults.append(f"{field}: {fault['msg']}")
    return "; ".join(faults)
