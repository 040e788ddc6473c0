"""Score tables from the tidy ones."""

import pandas as pd
import pytest

from misa.results.__main__ import main
from misa.results.collect import collect, find_results
from misa.results.tables import Cell, mark_best, score_table, summarise, to_latex, to_markdown, with_series

RUN_COLUMNS = ["run", "kind", "method", "seed", "model", "data"]


def test_scores_are_averaged_over_seeds_with_the_larger_error(results):
    summary = summarise(collect(find_results([results]))["scores"]).set_index("method")
    assert summary.loc["misa", "value"] == pytest.approx(0.71)
    assert summary.loc["misa", "num_seeds"] == 2
    assert summary.loc["misa", "stderr"] == pytest.approx(0.02)  # over documents; over seeds it is 0.01
    far = pd.DataFrame(
        {
            "run": ["a-s0", "a-s1"],
            "method": "a",
            "seed": [0, 1],
            "task": "t",
            "metric": "acc",
            "value": [0.2, 0.6],
            "stderr": 0.01,
        }
    )
    assert summarise(far)["stderr"].item() == pytest.approx(0.2)


def test_an_ablation_is_a_series_of_its_own():
    table = pd.DataFrame({"run": ["misa-s0", "misa-d10-s0", "lora-s0"], "method": ["misa", "misa", "lora"], "seed": 0})
    assert with_series(table)["series"].tolist() == ["misa", "misa-d10", "lora"]
    assert with_series(table.iloc[[0, 2]])["series"].tolist() == ["misa", "lora"]


def test_best_is_marked_only_if_it_leads_by_two_standard_errors():
    near, far = Cell(0.50, 0.03), Cell(0.70, 0.03)
    assert [cell.best for cell in mark_best([near, far, Cell(0.1, 0.03)], higher=True)] == [False, True, False]
    assert not any(cell.best for cell in mark_best([near, Cell(0.58, 0.03)], higher=True))
    assert [cell.best for cell in mark_best([near, far], higher=False)] == [True, False]
    assert not any(cell.best for cell in mark_best([Cell(1.0), Cell(9.0)], higher=True))  # errors unknown
    assert not any(cell.best for cell in mark_best([far], higher=True))


def test_score_tables_in_markdown_and_latex(results, tmp_path):
    main(["collect", str(results), "--output_dir", str(tmp_path / "tables")])
    assert main(["tables", "--tables", str(tmp_path / "tables"), "--output_dir", str(tmp_path / "out")]) == 0
    lines = (tmp_path / "out" / "scores.md").read_text().splitlines()
    assert lines[0] == "| method | runs | family: exact match (%) | training (s) | optimizer state (MiB) |"
    assert lines[2] == "| base model | 1 | 10.0 ± 1.0 |  |  |"
    assert lines[3] == "| LoRA | 2 | 41.0 ± 2.0 | 105 | 3.00 |"
    assert lines[4] == "| MISA | 2 | **71.0** ± 2.0 | 105 | 2.00 |"
    latex = (tmp_path / "out" / "scores.tex").read_text()
    assert r"MISA & 2 & $\mathbf{71.0} \pm 2.0$ & $105$ & $2.00$ \\" in latex
    assert r"family: exact match (\%)" in latex
    assert (tmp_path / "out" / "pretraining.md").read_text() == "No scores of kind pretrain yet.\n"
    assert "| d | LoRA | 2 | 1.50 | 0 |  |" in (tmp_path / "out" / "paired.md").read_text()


@pytest.mark.parametrize("lost", [float("nan"), float("inf")])
def test_score_that_is_not_finite_diverged(lost):
    rows = [("misa-s0", "misa", 0, lost), ("misa-s1", "misa", 1, 0.9), ("lora-s0", "lora", 0, 1.2)]
    scores = pd.DataFrame(
        [(*row[:3], "validation", "bits_per_byte", row[3], float("nan")) for row in rows],
        columns=["run", "method", "seed", "task", "metric", "value", "stderr"],
    )
    runs = pd.DataFrame([(row[0], "pretrain", *row[1:3], "m", "d") for row in rows], columns=RUN_COLUMNS)
    text = to_markdown(*score_table(scores, runs, "pretrain"))
    assert text.splitlines()[2:] == ["| LoRA | 1 | 1.20 |", "| MISA | 2 | diverged |"]


def test_perplexities_are_better_when_lower_and_not_percent():
    scores = pd.DataFrame(
        {
            "run": ["pre-adamw-s0", "pre-misa-s0"],
            "method": ["adamw", "misa"],
            "seed": 0,
            "task": "perplexity",
            "metric": "bits_per_byte",
            "value": [0.9, 0.5],
            "stderr": 0.01,
            "num_documents": 5,
        }
    )
    runs = scores[["run", "method", "seed"]].assign(kind="pretrain", model="2m", data="corpus", train_s=[1.0, 2.0])
    head, rows = score_table(scores, runs, "pretrain")
    assert head == ["method", "runs", "perplexity: bits per byte", "training (s)"]
    assert "| MISA | 1 | **0.500** ± 0.010 | 2.00 |" in to_markdown(head, rows)
    assert r"\toprule" in to_latex(head, rows)


def test_each_data_set_has_lines_and_each_machine_a_time_of_its_own():
    rows = [(f"{task}-misa-s{s}", "misa", s, task, "acc", 0.5, 0.01, 9) for task in ("math", "choice") for s in (0, 1)]
    rows += [
        ("base-math", "none", 0, "math", "acc", 0.1, 0.01, 9),
        ("base-choice", "none", 0, "choice", "acc", 0.2, 0.01, 9),
    ]
    scores = pd.DataFrame(
        rows[1:], columns=["run", "method", "seed", "task", "metric", "value", "stderr", "num_documents"]
    )
    runs = scores[["run", "method", "seed"]].assign(
        kind="finetune",
        model="2m",
        data=scores["task"],
        machine=["gpu", "cpu", "gpu", "", ""],
        train_s=[3.0, 5.0, 7.0, 0.0, 0.0],
    )
    head, lines = score_table(scores, runs[runs["method"] != "none"], "finetune")
    assert head[:5] == ["trained on", "method", "runs", "math: acc (%)", "choice: acc (%)"]
    assert head[5:] == ["training (s), gpu", "training (s), cpu"]
    values = [[cell.value if isinstance(cell, Cell) else cell for cell in line] for line in lines]
    assert values == [
        ["", "base model", "1", 10.0, 20.0, "", ""],
        ["choice", "MISA", "2", "", 50.0, 7.0, 5.0],
        ["math", "MISA", "1", 50.0, "", 3.0, ""],
    ]


@pytest.mark.parametrize("verb", ["tables", "pages", "benchmarks"])
@pytest.mark.parametrize(
    ("text", "message"), [("run,seed\na,0\n", "lacks the columns method"), ("a,b\n1,2\n1,2,3,4\n", "is no CSV")]
)
def test_wrong_tidy_table_is_named(verb, text, message, results, tmp_path, capsys):
    main(["collect", str(results), "--output_dir", str(tmp_path)])
    (tmp_path / "scores.csv").write_text(text)
    capsys.readouterr()
    assert main([verb, "--tables", str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 2
    assert f"table {tmp_path / 'scores.csv'} {message}" in capsys.readouterr().err
