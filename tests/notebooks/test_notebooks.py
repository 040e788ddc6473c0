"""Every notebook runs from top to bottom on the cached tables, in either folder, and shows its figures."""

from pathlib import Path

import nbclient
import nbformat
import pytest
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from misa.figures import cached_text

ROOT = Path(__file__).resolve().parents[2]
TABLES = ROOT / "paper_figures" / "data"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]


def read(path):
    return nbformat.read(path, as_version=4)


def test_there_is_a_notebook_for_each_claim():
    assert {"quick_tour", "convergence", "gradient_variance", "memory"} <= set(NAMES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_notebook_is_stored_without_outputs_and_names_the_plain_kernel(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        if cell.cell_type == "code":  # logic belongs into the package, where it is tested
            assert not any(word in cell.source for word in ("def ", "for ", "if ", "import matplotlib", "plt."))


def test_text_of_a_table_is_found_from_any_folder_of_the_checkout(monkeypatch, tmp_path):
    for folder in (ROOT, ROOT / "notebooks"):
        monkeypatch.chdir(folder)
        assert cached_text("paired") == (ROOT / "paper_figures" / "tables" / "paired.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"tables/pie\.md does not exist"):
        cached_text("pie")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no folder paper_figures/data at or above"):
        cached_text("paired")


@pytest.mark.parametrize("folder", [ROOT, ROOT / "notebooks"], ids=["from the root", "from its folder"])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_notebook_runs_and_shows_a_figure(path, folder):
    if not any(TABLES.glob("*.csv")):
        pytest.skip(f"no cached tables in {TABLES.relative_to(ROOT)}: run the pipeline once and keep its tables there")
    notebook = read(path)
    client = nbclient.NotebookClient(
        notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    try:
        client.execute()
    except CellExecutionError as error:
        pytest.fail(f"{path.name}: a cell raised an error\n{error}")
    except CellTimeoutError as error:
        pytest.fail(f"{path.name}: a cell took longer than a minute\n{error}")
    except DeadKernelError as error:
        pytest.fail(f"{path.name}: the kernel died\n{error}")
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    errors = [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    assert not errors, errors
    assert any("image/png" in output.get("data", {}) for output in outputs)
