"""The result file: its schema, where a result comes from, and atomic reading and writing."""

from misa.results.io import (
    CURVES_FILE,
    RESULT_FILE,
    output_folder,
    read_curves,
    read_result,
    write_curves,
    write_result,
)
from misa.results.provenance import package_digest, provenance
from misa.results.schema import (
    CURVE_COLUMNS,
    SCHEMA_VERSION,
    CurvePoint,
    Machine,
    Provenance,
    Result,
)

__all__ = [
    "CURVES_FILE",
    "CURVE_COLUMNS",
    "RESULT_FILE",
    "SCHEMA_VERSION",
    "CurvePoint",
    "Machine",
    "Provenance",
    "Result",
    "output_folder",
    "package_digest",
    "provenance",
    "read_curves",
    "read_result",
    "write_curves",
    "write_result",
]
