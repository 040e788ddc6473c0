"""The report of the cached results, opened in a browser: nothing fails, every figure and table is shown."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.browser
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CATEGORIES = ("Convergence", "Gradient variance", "Memory", "Tables", "Runs")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium of the system."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed (Debian: apt-get install chromium)")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed (pip install 'misa-optimizer[dev]')")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        # Without a sandbox of its own, which root in a container cannot have; the page is ours.
        chromium = player.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(browser: Any, snakemake, repository: Path, tmp_path_factory) -> Path:
    """The report of what is committed, made in another folder."""
    folder = tmp_path_factory.mktemp("report")
    shutil.copytree(repository / "paper_figures", folder / "paper_figures")
    words = ("--cores", "1", "--config", "results=cached")
    drawn = snakemake(*words, folder=folder)
    assert drawn.returncode == 0, drawn.stdout
    done = snakemake(*words, "--report", "report.html", folder=folder)
    assert done.returncode == 0, done.stdout
    return folder / "report.html"


def test_report_shows_every_figure_and_table_without_an_error(browser: Any, report: Path) -> None:
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(request.url[:200]))
    figures, tables = set(), set()
    for category in CATEGORIES:
        page.goto(report.as_uri())
        page.get_by_text(category, exact=True).first.click()
        rows = page.locator("tr:has(a[iconname=eye])")
        rows.first.wait_for()
        for row in rows.all():
            name = row.locator("td").first.inner_text()
            row.locator("a[iconname=eye]").click()
            if category in ("Tables", "Runs"):
                shown = page.frame_locator("iframe").locator("td").first
                shown.wait_for()
                tables.add(name)
            else:
                shown = page.locator(f'img[src*="{name}.png"]')
                shown.wait_for()
                assert shown.evaluate("image => image.naturalWidth") > 900
                figures.add(name)
            page.keyboard.press("Escape")
    assert figures == {path.stem for path in (report.parent / "paper_figures").glob("*.png")}
    assert len(tables) == len(list((report.parent / "results" / "cached" / "pages").iterdir()))
    assert errors == []


def test_captions_say_what_is_shown_and_where_it_comes_from(browser: Any, report: Path) -> None:
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.goto(report.as_uri())
    page.get_by_text("Memory", exact=True).first.click()
    page.locator("a[iconname=information-circle]").first.click()
    caption = page.locator("body")
    page.get_by_text("Drawn from paper_figures/data/memory.csv").wait_for()
    assert "Bytes that are alive at the peak" in caption.inner_text()


def test_committed_results_are_called_so(browser: Any, report: Path) -> None:
    """They are of several scales, and none of the configuration's."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.goto(report.as_uri())
    page.get_by_text("Memory", exact=True).first.click()
    row = page.locator("tr:has(a[iconname=eye])").first
    row.wait_for()
    assert [cell.inner_text() for cell in row.locator("td").all()[:2]] == ["memory", "committed"]
