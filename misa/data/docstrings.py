"""English technical prose that every installation has: the docstrings of installed packages.

They are read out of the source by `ast`, so nothing is imported or run.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

# Shorter docstrings are mostly "Return the name." and teach little.
MIN_CHARACTERS = 80

# Tests have next to no docstrings and take a third of the time.
SKIPPED_FOLDERS = frozenset({"tests", "test", "testing", "_vendor"})

MAX_LICENCE_CHARACTERS = 80

SURROGATES = re.compile("[\ud800-\udfff]")


def package_files(package: str) -> list[Path]:
    """Return the Python files of an installed package in a fixed order, without those of its tests.

    Args:
        package: Name it is imported by, such as "sklearn".

    Raises:
        ValueError: If it is not installed or has no source files.
    """
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise ValueError(f"package {package!r} is not installed; give the names packages are imported by")
    roots = [Path(root) for root in spec.submodule_search_locations or []]
    files = [
        path
        for root in roots
        for path in sorted(root.rglob("*.py"), key=lambda path: path.as_posix())
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts[:-1])
    ]
    if not files:
        raise ValueError(f"package {package!r} has no Python source files")
    return files


def package_origin(package: str) -> dict[str, str]:
    """Return name, version and licence of the distribution that an installed package comes from.

    Args:
        package: Name it is imported by.
    """
    names = importlib.metadata.packages_distributions().get(package)
    if not names:
        return {"distribution": "", "version": "", "licence": "not stated"}
    metadata = importlib.metadata.metadata(names[0])
    licence = metadata.get("License-Expression")
    if not licence:
        # The older free-text field may hold the whole licence; the classifiers are short.
        classifiers = [line for line in metadata.get_all("Classifier") or [] if line.startswith("License ::")]
        text = (metadata.get("License") or "").strip()
        licence = text.splitlines()[0][:MAX_LICENCE_CHARACTERS] if text else ""
        if classifiers:
            licence = "; ".join(line.rpartition(" :: ")[2] for line in classifiers)
    return {"distribution": names[0], "version": metadata["Version"], "licence": licence or "not stated"}


def file_docstrings(path: str | Path) -> list[str]:
    """Return the docstrings of one source file: its module, classes and functions, in source order.

    A file that does not parse (a template, or syntax of another version) has none.

    Args:
        path: A Python file.
    """
    try:
        with warnings.catch_warnings():
            # Parsing others' source warns of their invalid escape sequences.
            warnings.simplefilter("ignore")
            tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError):
        return []
    # An escape in the source may stand for half a character, which no file can hold.
    return [doc for doc in _docstrings(tree) if len(doc) >= MIN_CHARACTERS and not SURROGATES.search(doc)]


def docstrings(packages: list[str], num_workers: int = 1) -> list[str]:
    """Return all docstrings of some packages, in package and file order, repeats included.

    Args:
        packages: Names they are imported by.
        num_workers: Processes that parse; the result does not depend on it.

    Raises:
        ValueError: If a package is not installed.
    """
    files = [path for package in packages for path in package_files(package)]
    if num_workers <= 1:
        return [doc for path in files for doc in file_docstrings(path)]
    with ProcessPoolExecutor(num_workers) as pool:
        return [doc for docs in pool.map(file_docstrings, files, chunksize=16) for doc in docs]


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        doc = ast.get_docstring(node, clean=False)
        if doc is not None:
            yield inspect.cleandoc(doc).strip()
        # Definitions stand in bodies and in the branches of a condition, never inside an expression.
        for child in node.body:
            yield from _docstrings(child)
    elif isinstance(node, ast.If | ast.Try | ast.With):
        for child in ast.iter_child_nodes(node):
            yield from _docstrings(child)
    elif isinstance(node, ast.ExceptHandler):
        for child in node.body:
            yield from _docstrings(child)
