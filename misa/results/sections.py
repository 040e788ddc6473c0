"""Sections of the documentation that are made from code and results: a page names them, the build fills them in."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from misa.results.readme import TIMES_SECTION, fill, read_times, times_table

FIGURES_SECTION = "figures"
_CAPTION = re.compile(r'^  "(\w+)": "(.*)",$', re.MULTILINE)


def fill_page(text: str, root: str | Path) -> str:
    """Fill every generated section of a page of the documentation.

    Args:
        text: Markdown with sections between `<!-- generated:NAME -->` and `<!-- /generated:NAME -->`. NAME is
            `times`, `config`, `sheet`, `methods`, `figures`, or a table of `paper_figures/tables`.
        root: The checkout.

    Returns:
        The page.

    Raises:
        ValueError: If a section is unknown or the markers do not pair.
    """
    root = Path(root)

    def section(name: str) -> str:
        if name == TIMES_SECTION:
            return times_table(read_times(root / "paper_figures" / "data" / "timings.json"))
        if (made := made_section(name, root)) is not None:
            return made
        if name == FIGURES_SECTION:
            return figures_section(root, "figures", "{ width=480 }")
        table = root / "paper_figures" / "tables" / f"{name}.md"
        if not table.is_file():
            raise ValueError(f"no generated section is called {name}, and {table} does not exist")
        return table.read_text(encoding="utf-8")

    return fill(text, section)


def made_section(name: str, root: Path) -> str | None:
    """A section that is made from code or from a schema of the workflow; None if it is no such one."""
    import yaml

    if name in ("config", "sheet"):
        file = root / "workflows" / "schemas" / f"{'runs' if name == 'sheet' else name}.schema.yaml"
        return schema_table(yaml.safe_load(file.read_text(encoding="utf-8")))
    return methods_table() if name == "methods" else None


def schema_table(schema: Mapping[str, Any]) -> str:
    """Write a JSON schema of an object as a table: key, what it may be, what it means; nested keys with a dot."""
    rows = ["| key | value | meaning |", "|---|---|---|"]
    for name, node in _keys(schema, schema):
        rows.append(f"| `{name}` | {_value(node)} | {html.escape(node.get('description', ''))} |")
    return "\n".join(rows)


def methods_table() -> str:
    """Write the methods that are compared as a table: name, what is trained and held, options with their defaults."""
    from misa.methods import METHODS

    rows = ["| method | what is trained and held | options (default) |", "|---|---|---|"]
    for method in METHODS.values():
        options = ", ".join(f"`{name}` ({_plain(value)})" for name, value in method.defaults.items())
        rows.append(f"| `{method.name}` | {method.description} | {options} |")
    return "\n".join(rows)


def figures_section(root: Path, folder: str, size: str = "") -> str:
    """Show every figure with its caption and the table it is drawn from.

    Args:
        root: The checkout, whose figures and captions are shown; those not drawn are left out.
        folder: Where the figures lie, seen from the page.
        size: What follows each picture to give its width.
    """
    from misa.figures import FIGURES

    there = {path.stem for path in (root / "paper_figures").glob("*.png")}
    captions = (root / "workflows" / "report" / "figure.rst").read_text(encoding="utf-8")
    said: dict[str, str] = {}
    for name, words in _CAPTION.findall(captions):  # what holds of any run, and then of the committed ones
        said[name] = said.get(name, "") + words
    return "\n\n".join(
        f"### {name.replace('_', ' ').capitalize()}\n\n![{name.replace('_', ' ')}]({folder}/{name}.png){size}"
        f"\n\n{said[name]} Table: `{table}`."
        for name, table in FIGURES.items()
        if name in there
    )


def _keys(schema: Mapping[str, Any], node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, child in node.get("properties", {}).items():
        if "$ref" in child:
            child = schema["$defs"][child["$ref"].rpartition("/")[2]]
        yield prefix + name, child
        yield from _keys(schema, child, f"{prefix}{name}.")


def _value(node: Mapping[str, Any]) -> str:
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    kind = str(node.get("type", ""))
    if kind == "array":
        return f"list of {_value(node['items'])}"
    return f"{kind}, from {node['minimum']}" if "minimum" in node else kind


def _plain(value: object) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
