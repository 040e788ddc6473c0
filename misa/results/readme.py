"""Fill the generated sections of a Markdown file, so that no number in it is typed by hand.

A section stands between `<!-- generated:NAME -->` and `<!-- /generated:NAME -->`. `times` comes from a file of measured
times, `config`, `sheet` and `methods` from code and schemas, `figures` from the pictures and captions of a checkout;
every other NAME is the content of `NAME.md` in a folder of tables.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from misa.files import write_text
from misa.results.provenance import describe_machine

TIMES_SECTION = "times"
_MARKER = re.compile(r"<!-- (/?)generated:([a-z0-9_-]+) -->")


def fill(text: str, section: Callable[[str], str | None]) -> str:
    """Replace the content of every generated section.

    Args:
        text: Markdown.
        section: Called with a section's name; returns its content, or None to leave it as it is.

    Returns:
        The text with new content between the markers.

    Raises:
        ValueError: If a marker has no partner, or sections overlap.
    """
    parts: list[str] = []
    position, opened = 0, None
    for marker in _MARKER.finditer(text):
        closing, name = marker.group(1) == "/", marker.group(2)
        line = text.count("\n", 0, marker.start()) + 1
        if closing != (opened is not None) or (opened is not None and opened != name):
            raise ValueError(f"line {line}: marker {marker.group(0)} does not pair with {opened or 'an opening one'}")
        if closing:
            content = section(name)
            parts.append(text[position : marker.start()] if content is None else f"\n{content.strip()}\n")
            position, opened = marker.start(), None
        else:
            parts.append(text[position : marker.end()])
            position, opened = marker.end(), name
    if opened is not None:
        raise ValueError(f"marker <!-- generated:{opened} --> is never closed")
    return "".join(parts) + text[position:]


def update_readme(readme: str | Path, tables_dir: str | Path, times: str | Path, check: bool = False) -> bool:
    """Bring the generated sections of a file up to date.

    Args:
        readme: The Markdown file.
        tables_dir: Folder with `NAME.md` for each section that is a table.
        times: File of measured times, see `record_time`.
        check: Only say whether the file is up to date, and leave it as it is.

    Returns:
        True if the file was up to date already.

    Raises:
        ValueError: If a file is missing or the markers do not pair.
    """
    from misa.results.sections import FIGURES_SECTION, figures_section, made_section

    readme = Path(readme)
    if not readme.is_file():
        raise ValueError(f"{readme} does not exist")

    def section(name: str) -> str:
        if name == TIMES_SECTION:
            return times_table(read_times(times))
        if name == FIGURES_SECTION:
            return figures_section(Path(), os.path.relpath("paper_figures", readme.parent))
        if (made := made_section(name, Path())) is not None:
            return made
        path = Path(tables_dir) / f"{name}.md"
        if not path.is_file():
            raise ValueError(f"{readme}: section {name} needs the table {path}, which does not exist")
        return path.read_text(encoding="utf-8")

    old = readme.read_text(encoding="utf-8")
    try:
        new = fill(old, section)
    except ValueError as error:
        raise ValueError(f"{readme}, {error}" if str(error).startswith(("line", "marker")) else str(error)) from None
    if new != old and not check:
        write_text(readme, new)
    return new == old


def record_time(command: str, seconds: float, path: str | Path) -> Path:
    """Write how long a command took on this machine into the file of times, beside those of other commands.

    Args:
        command: The command, such as "make test".
        seconds: Its wall time.
        path: A JSON file `{command: {"seconds": ..., "num_cores": ..., "processor": ...}}`, made if needed.

    Returns:
        The path.

    Raises:
        ValueError: If the time is not positive and finite, or the file is malformed.
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds is {seconds}; it must be positive and finite")
    known = read_times(path) if Path(path).is_file() else {}
    machine = describe_machine()
    known[command] = {
        "seconds": round(seconds, 1),
        "num_cores": machine.num_cores,
        "processor": machine.processor,
        "memory_bytes": machine.memory_bytes,
        "gpu": machine.gpu,
    }
    return write_text(path, json.dumps(known, indent=2) + "\n")


def read_times(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read a file of times.

    Raises:
        ValueError: If it is missing or malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"file of measured times {path} does not exist")
    try:
        times = json.loads(path.read_text(encoding="utf-8"))
        checked = {str(name): dict(entry) for name, entry in times.items()}
        for entry in checked.values():
            float(entry["seconds"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no file of measured times: {error!r}") from error
    return checked


def times_table(times: dict[str, dict[str, Any]]) -> str:
    """Measured times as a Markdown table."""
    lines = ["| command | wall time | machine |", "|---|---:|---|"]
    for command, entry in times.items():
        memory = f", {entry['memory_bytes'] / 2**30:.0f} GiB" if entry.get("memory_bytes") else ""
        device = entry.get("gpu") or "no GPU"
        lines.append(
            f"| `{command}` | {duration(float(entry['seconds']))} | "
            f"{entry.get('num_cores', '?')} cores of {entry.get('processor', 'unknown')}{memory}, {device} |"
        )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """A time as text: seconds, minutes and seconds, or from two hours on hours with one digit."""
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
