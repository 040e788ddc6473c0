"""The documentation builds without a warning, and what it says of code comes from the code."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from misa.methods import METHODS
from misa.results.sections import fill_page, schema_table

NEEDED = ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers", "latex2mathml")


@pytest.fixture(scope="module")
def site(repository: Path, tmp_path_factory) -> Path:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (pip install 'misa-optimizer[docs]')")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=repository,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_site_holds_api_figures_methods_and_configuration(site: Path, repository: Path) -> None:
    pages = {page.parent.name: page.read_text(encoding="utf-8") for page in site.rglob("*/index.html")}
    of_engine = ("engine.BlockCoordinateOptimizer", "settings.Settings")
    for name in ("presets.MISA", "presets.BAdam", "presets.LISA", *of_engine):
        assert f'id="misa.optimizer.{name}"' in pages["optimizer"]
    drawn = {path.name for path in (repository / "paper_figures").glob("*.png")}
    assert {path.name for path in (site / "figures").iterdir()} == drawn
    assert all(f"figures/{name}" in pages["evidence"] for name in drawn)
    assert all(f"<code>{name}</code>" in pages["finetune"] for name in METHODS)
    assert "<code>memory_grid.in_all</code>" in pages["workflow"]
    assert "<math" in pages["method"]


def test_nothing_is_fetched_when_a_page_opens(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert 'src="http' not in text, page
        assert '<link rel="stylesheet" href="http' not in text, page


def test_every_key_of_the_configuration_is_explained(repository: Path) -> None:
    for name in ("config", "runs"):
        schema = yaml.safe_load((repository / "workflows" / "schemas" / f"{name}.schema.yaml").read_text())
        for row in schema_table(schema).splitlines()[2:]:
            assert all(cell.strip() for cell in row.strip("|").split("|")), row


def test_unknown_section_is_named(repository: Path) -> None:
    with pytest.raises(ValueError, match="no generated section is called nothing"):
        fill_page("<!-- generated:nothing -->\n<!-- /generated:nothing -->", repository)


def test_pages_and_readme_repeat_no_sentence(repository: Path) -> None:
    seen: dict[str, Path] = {}
    for page in [repository / "README.md", *sorted((repository / "docs").rglob("*.md"))]:
        text = " ".join(line.strip() for line in prose(page.read_text(encoding="utf-8")))
        for sentence in {part.strip() for part in text.split(". ") if len(part.strip()) > 60}:
            assert sentence not in seen, f"{page} and {seen.get(sentence)}: {sentence}"
            seen[sentence] = page


def prose(text: str) -> list[str]:
    """Lines written by hand, outside code and tables."""
    text = re.sub(r"<!-- generated:(\S+) -->.*?<!-- /generated:\1 -->", "", text, flags=re.DOTALL)
    lines, in_code = [], False
    for line in text.splitlines():
        in_code ^= line.startswith("```")
        if not in_code and not line.startswith(("```", "|", "<!--", "#")):
            lines.append(line)
    return lines


def test_options_in_commands_exist(repository: Path) -> None:
    """A misspelt option in a page is found without running the command."""
    known = "\n".join(path.read_text(encoding="utf-8") for path in (repository / "misa").rglob("*.py"))
    known += (repository / "benchmarks" / "training.py").read_text(encoding="utf-8")
    for page in [repository / "README.md", *(repository / "docs").rglob("*.md")]:
        for line in re.findall(r"python -m misa\.(?:[^\n`]|\\\n)*", page.read_text(encoding="utf-8")):
            for option in re.findall(r"--([a-z_-]+)", line):
                assert re.search(rf"\b{option.replace('-', '_')}\b", known), f"{page.name}: --{option}"
