"""Published numbers stand beside ours where task, model and method are the same, each with its source."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest

from misa.memory.models import MODEL_NAMES
from misa.methods import METHODS
from misa.results.__main__ import main
from misa.results.benchmarks import SETS, benchmark_table
from misa.results.pages import runs_table
from misa.results.published import MEMORY_FILE, published, published_table, same_model
from misa.results.tables import Cell, score_table


def test_every_number_has_a_source_and_known_names() -> None:
    table = published()
    assert not (table[["source", "model", "label", "task", "metric", "value"]] == "").any().any()
    assert table["source"].str.contains(r"\(arXiv \d{4}\.\d{5}\)$").all()
    assert set(table["method"]) - {""} <= set(METHODS)
    assert set(table["model"]) - {"llama-7b"} <= set(MODEL_NAMES)
    assert {task for task in table["task"] if task in SETS} == {"gsm8k", "svamp", "aqua", "mawps"}
    assert pd.to_numeric(table["value"]).gt(0).all()


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ("llama-3-8b", "llama3-8b", True),
        ("Meta-Llama-3-8B", "llama3-8b", True),
        ("llama-3-8b-instruct", "llama3-8b", False),
        ("smollm2-135m-instruct", "130m", False),
        ("130m", "130m", True),
    ],
)
def test_models_are_told_by_their_names(ours: str, theirs: str, same: bool) -> None:
    assert same_model(ours, theirs) == same


def of_model(model: str, method: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    runs = pd.DataFrame([("a", "finetune", method, 0, model, "math10k", 9.0)])
    runs.columns = ["run", "kind", "method", "seed", "model", "data", "train_s"]
    scores = pd.DataFrame([("a", method, 0, "misa_gsm8k", "acc", 0.5, 0.1, 100)])
    scores.columns = ["run", "method", "seed", "task", "metric", "value", "stderr", "num_documents"]
    return scores, runs


@pytest.mark.parametrize("method", ["misa", "misa_official", "misa_paper"])
def test_same_task_model_and_method_get_a_column(method: str, tmp_path) -> None:
    scores, runs = of_model("llama-3-8b", method)
    number = published().query("method == 'misa' and model == 'llama3-8b' and task == 'gsm8k'")["value"].item()
    head, rows = score_table(scores, runs, "finetune")
    assert rows[0][head.index("published")] == f"{number} (MISA, Table 4)"
    head, rows = benchmark_table(scores, {"a": "llama-3-8b"})
    assert rows[0][head.index("published")] == f"{number} (MISA, Table 4)"
    for name, table in (("scores", scores), ("runs", runs)):
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    _, rows = published_table(tmp_path)
    assert [(row[1], row[-2], row[-1]) for row in rows if row[-1]] == [("llama3-8b", number, "50")]


@pytest.mark.parametrize(("model", "method"), [("smollm2-135m-instruct", "misa"), ("llama-3-8b", "badam")])
def test_another_model_or_method_gets_none(model: str, method: str) -> None:
    scores, runs = of_model(model, method)
    assert "published" not in score_table(scores, runs, "finetune")[0]
    assert "published" not in benchmark_table(scores, {"a": model})[0]


def test_memory_is_compared_at_the_published_setting_alone(tmp_path) -> None:
    columns = ["method", "model", "batch_size", "seq_len", "checkpointing", "category", "bytes", "moment"]
    rows = [
        ("BAdam", "llama3-8b", 2, 728, True, "weights", 16_000_000_000, "peak"),
        ("BAdam", "llama3-8b", 2, 728, True, "optimizer", 2_000_000_000, "peak"),
        ("BAdam", "llama3-8b", 1, 728, True, "weights", 1, "peak"),
        ("BAdam", "llama3-8b", 4, 728, True, "weights", 1, "peak"),
        # Published is a step with checkpointing.
        ("LoRA r8, fp32 adapters", "llama3-8b", 2, 728, False, "weights", 1, "peak"),
    ]
    (tmp_path / MEMORY_FILE).parent.mkdir()
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / MEMORY_FILE, index=False)
    _, table = published_table(tmp_path)
    assert [(row[4], row[-1]) for row in table if row[-1]] == [("BAdam", "18.0")]
    (tmp_path / MEMORY_FILE).write_text("")
    with pytest.raises(ValueError, match=r"memory_compare\.csv is empty"):
        published_table(tmp_path)


@pytest.mark.parametrize("kinds", [("evaluate", "pretrain"), ("pretrain", "evaluate")])
def test_pretraining_is_told_by_its_text_in_any_order_of_rows(kinds: tuple[str, ...], tmp_path) -> None:
    """`collect --add` puts the rows of an evaluation behind those of the training."""
    data = {"pretrain": "c4", "evaluate": "corpus"}
    runs = pd.DataFrame([("a", kind, "adamw", 0, "60m", data[kind]) for kind in kinds])
    runs.columns = ["run", "kind", "method", "seed", "model", "data"]
    runs.to_csv(tmp_path / "runs.csv", index=False)
    scores = pd.DataFrame([("a", "adamw", 0, "perplexity", "perplexity", 35.0, None, 100)])
    scores.columns = ["run", "method", "seed", "task", "metric", "value", "stderr", "num_documents"]
    scores.to_csv(tmp_path / "scores.csv", index=False)
    _, table = published_table(tmp_path)
    assert [(row[1], row[4], row[-1]) for row in table if row[-1]] == [("60m", "Adam", "35")]


def test_pages_show_tables_and_where_runs_come_from(repository, tmp_path) -> None:
    from misa.results.pages import PAGES, to_html, write_pages

    tables = repository / "paper_figures" / "data"
    pages = {path.stem: path.read_text(encoding="utf-8") for path in write_pages(tables, tmp_path)}
    assert set(pages) == set(PAGES)
    manifest = json.loads((tables / "MANIFEST.json").read_text())
    for run in [row["run"] for row in manifest["runs"]] + ["memory_grid"]:
        assert f"<td>{run}</td><td></td>" in pages["runs"]
    for manifest in tables.glob("*/MANIFEST.json"):
        for row in json.loads(manifest.read_text())["runs"]:
            assert f"<td>{row['run']}</td><td>{manifest.parent.name}</td>" in pages["runs"]
    assert "MISA (arXiv 2511.00056), Table 4" in pages["published"]
    page = to_html("a<b", ["method"], [["<script>"], [Cell(2.0, 0.5, best=True)]])
    assert "&lt;script&gt;" in page
    assert "<b>2.00 ± 0.50</b>" in page
    with pytest.raises(ValueError, match=r"MANIFEST\.json does not exist"):
        runs_table(tmp_path)


def test_memory_of_the_full_size_model_may_lie_in_another_folder(repository, tmp_path) -> None:
    committed, tables, grid = repository / "paper_figures" / "data", tmp_path / "tables", tmp_path / "grid"
    for folder, names in (
        (tables, ("scores.csv", "runs.csv", "settings.csv", "MANIFEST.json")),
        (grid, ("memory_grid.csv", "memory_grid.json")),
    ):
        folder.mkdir()
        for name in names:
            shutil.copy(committed / name, folder)
    words = ["--tables", str(tables), "--output_dir", str(tmp_path)]
    for more, shown in (([], False), (["--memory_grid", str(grid)], True)):
        assert main(["tables", *words, *more]) == 0
        assert main(["pages", *words, *more]) == 0
        assert ("peak of a step, llama3-8b" in (tmp_path / "overview.md").read_text()) == shown
        assert ("peak of a step, llama3-8b" in (tmp_path / "overview.html").read_text()) == shown
        assert ("<td>memory_grid</td>" in (tmp_path / "runs.html").read_text()) == shown


@pytest.mark.parametrize("content", ["{", '{"tables": {}}', '{"runs": [{"run": "x"}]}'])
def test_manifest_that_is_none_is_named(content: str, tmp_path) -> None:
    (tmp_path / "MANIFEST.json").write_text(content)
    with pytest.raises(ValueError, match=r"MANIFEST\.json does not say where its tables come from"):
        runs_table(tmp_path)
