"""What mkdocs calls while it builds: generated sections are filled, and the figures lie beside the pages."""

import re
import sys
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
sys.path.insert(0, str(ROOT))  # the checkout's own package, installed or not

from misa.results.sections import fill_page  # noqa: E402


def on_files(files, config):
    for figure in sorted((ROOT / "paper_figures").glob("*.png")):
        files.append(File.generated(config, f"figures/{figure.name}", abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown, page, config, files):
    return fill_page(markdown, ROOT)


def on_page_content(html, page, config, files):
    # MathML, which browsers draw by themselves: no script has to be fetched.
    displays = {"span": "inline", "div": "block"}
    return _FORMULA.sub(lambda found: convert(unescape(found[2]), display=displays[found[1]]), html)
