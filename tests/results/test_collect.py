"""From result files on disk to tidy tables, score tables and the README."""

import json

import pandas as pd
import pytest

from misa.figures import read_table
from misa.results import CurvePoint, Machine, Provenance, Result, write_curves, write_result
from misa.results.__main__ import main
from misa.results.collect import TABLES, collect, digest_warnings, find_results
from misa.results.readme import fill, times_table
from misa.results.tables import Cell, mark_best, score_table, summarise, to_latex, to_markdown, with_series

RUN_COLUMNS = ["run", "kind", "method", "seed", "model", "data"]


def provenance(digest="a" * 64):
    return Provenance(
        created="2026-01-01T00:00:00+00:00",
        command=["python", "-m", "misa.train"],
        misa_version="0.1.0",
        package_digest=digest,
        versions={"python": "3.11"},
        machine=Machine(processor="x", num_cores=2, memory_bytes=8, num_threads=2),
    )


def result(run, kind, method="misa", seed=0, digest="a" * 64, **fields):
    defaults = {"model": "m", "data": "d", "config": {}, "provenance": provenance(digest)}
    return Result(run=run, kind=kind, method=method, seed=seed, **{**defaults, **fields})


@pytest.fixture
def results(tmp_path):
    """A small study: two methods, two seeds, a base model, a memory and a variance measurement."""
    root = tmp_path / "results"
    for i, method in enumerate(("lora", "misa")):
        for seed in (0, 1):
            name = f"{method}-s{seed}"
            folder = root / "runs" / name
            write_curves(
                [
                    CurvePoint(
                        step=step, tokens=10 * step, time_s=0.5 * step, metric="eval_loss", value=2.0 - 0.1 * step
                    )
                    for step in (0, 5)
                ],
                folder / "curves.csv",
            )
            write_result(
                result(
                    *(name, "finetune", method, seed),
                    metrics={"eval_loss": 1.5},
                    peaks={"state_bytes": 2**20 * (3 - i)},
                    timings={"train_s": 100.0 + 10 * seed},
                    curves="curves.csv",
                ),
                folder,
            )
            score = {"family/exact_match": 0.4 + 0.3 * i + 0.02 * seed, "family/exact_match_stderr": 0.02}
            write_result(
                result(
                    *(f"{name}-eval", "evaluate", method, seed),
                    config={"base_run": name, "task_versions": {"family": "1.0"}},
                    metrics=score | {"family/num_documents": 200.0, "family/num_tokens": 5.0},
                ),
                root / "evaluations" / name,
            )
    write_result(
        result(
            *("base", "evaluate", "none"),
            config={"base_run": "", "task_versions": {"family": "1.0"}},
            metrics={"family/exact_match": 0.1, "family/exact_match_stderr": 0.01, "family/num_documents": 200.0},
        ),
        root / "evaluations" / "base",
    )
    write_result(result("memory", "memory", "lora,misa", peaks={"misa/peak_bytes": 5.0}), root / "memory")
    row = {"method": "misa", "model": "m", "batch_size": 4, "seq_len": 128, "checkpointing": False}
    pd.DataFrame([row | {"category": "weights", "bytes": 5, "moment": "peak"}]).to_csv(
        root / "memory/memory.csv", index=False
    )
    write_result(result("variance", "variance", "none"), root / "variance")
    for name in ("variance", "gradient_norms", "staleness"):
        pd.DataFrame([dict.fromkeys(TABLES[name], 1)]).to_csv(root / "variance" / f"{name}.csv", index=False)
    write_result(result("rate", "rate", "misa_paper"), root / "rate")
    pd.DataFrame([dict.fromkeys(TABLES["rate"], 1)]).to_csv(root / "rate" / "rate.csv", index=False)
    return root


def test_collect_writes_every_table_with_its_columns(results, tmp_path):
    out = tmp_path / "tables"
    assert main(["collect", str(results), "--output_dir", str(out)]) == 0
    tables = {name: read_table(out / f"{name}.csv") for name in TABLES}
    for name, columns in TABLES.items():
        assert tuple(tables[name].columns[: len(columns)]) == columns
        assert len(tables[name])
    assert len(tables["convergence"]) == 2 * 2 * 2
    scores = tables["scores"]
    assert set(scores["run"]) == {"lora-s0", "lora-s1", "misa-s0", "misa-s1", "base"}
    assert set(scores["metric"]) == {"exact_match"}
    assert set(scores["num_documents"]) == {200}
    assert "none" in set(scores["method"])
    runs = tables["runs"].set_index("run")
    assert runs.loc["misa-s1", "train_s"] == 110.0
    assert runs.loc["lora-s0", "state_bytes"] == 3 * 2**20
    assert not [column for column in runs if "/" in column]


def test_collecting_again_gives_the_same_bytes_in_any_order(results, tmp_path):
    files = [str(path) for path in results.rglob("result.json")]
    assert main(["collect", *files, "--output_dir", str(tmp_path / "a")]) == 0
    assert main(["collect", *reversed(files), "--output_dir", str(tmp_path / "b")]) == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    manifest = json.loads((tmp_path / "a" / "MANIFEST.json").read_text())
    assert set(manifest["tables"]) == {f"{name}.csv" for name in TABLES}
    assert {run["run"] for run in manifest["runs"]} >= {"misa-s0", "base", "memory", "variance"}


def test_results_are_added_to_tables_whose_own_results_are_gone(results, tmp_path, capsys):
    both, out = tmp_path / "both", tmp_path / "tables"
    main(["collect", str(results), "--output_dir", str(both)])
    late = [results / "runs/misa-s1", results / "evaluations/misa-s1"]
    early = [str(p.parent) for p in results.rglob("result.json") if p.parent not in late]
    main(["collect", *early, "--output_dir", str(out)])
    assert main(["collect", *map(str, late), "--output_dir", str(out), "--add"]) == 0
    for name in TABLES:
        assert sorted((out / f"{name}.csv").read_text().splitlines()) == sorted(
            (both / f"{name}.csv").read_text().splitlines()
        )
    one, other = (json.loads((folder / "MANIFEST.json").read_text()) for folder in (out, both))
    assert {name: table["rows"] for name, table in one["tables"].items()} == {
        name: table["rows"] for name, table in other["tables"].items()
    }
    assert sorted(map(str, one["runs"])) == sorted(map(str, other["runs"]))
    before = {path: path.read_bytes() for path in out.iterdir()}
    for again, reason in ((late[0], "holds the run misa-s1 of kind finetune"), (late[1], "same run on family")):
        assert main(["collect", str(again), "--output_dir", str(out), "--add"]) == 2
        assert reason in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in out.iterdir()}
    (out / "scores.csv").write_text("run\n")
    assert main(["collect", str(late[1]), "--output_dir", str(out), "--add"]) == 2
    assert "scores.csv is not the table" in capsys.readouterr().err
    assert main(["collect", str(late[1]), "--output_dir", str(tmp_path / "none"), "--add"]) == 2
    assert "MANIFEST.json does not exist" in capsys.readouterr().err


def test_runs_made_again_take_the_place_of_those_of_the_same_name(results, tmp_path):
    out = tmp_path / "tables"
    main(["collect", str(results), "--output_dir", str(out)])
    before = {name: read_table(out / f"{name}.csv") for name in TABLES}
    again = [results / "runs/misa-s1", results / "evaluations/misa-s1"]
    for folder, name, value in ((again[0], "eval_loss", 1.25), (again[1], "family/exact_match", 0.9)):
        content = json.loads((folder / "result.json").read_text())
        content["metrics"][name] = value
        (folder / "result.json").write_text(json.dumps(content))
    assert main(["collect", *map(str, again), "--output_dir", str(out), "--replace"]) == 0
    after = {name: read_table(out / f"{name}.csv") for name in TABLES}
    assert {name: len(table) for name, table in after.items()} == {name: len(t) for name, t in before.items()}
    settings, scores = after["settings"].set_index("run"), after["scores"].set_index("run")
    assert settings.loc["misa-s1", "eval_loss"] == 1.25
    assert settings.loc["misa-s0", "eval_loss"] == 1.5
    assert scores.loc["misa-s1", "value"] == 0.9
    assert scores.loc["misa-s0", "value"] == 0.7
    manifest = json.loads((out / "MANIFEST.json").read_text())
    names = [(run["kind"], run["run"]) for run in manifest["runs"]]
    assert len(names) == len(set(names)) == len(before["runs"])


def test_measurement_made_again_takes_the_place_of_the_one_of_its_kind(results, tmp_path, capsys):
    out = tmp_path / "tables"
    main(["collect", str(results), "--output_dir", str(out)])
    before = {path: path.read_bytes() for path in out.glob("*.csv")}
    pd.DataFrame([dict.fromkeys(TABLES["rate"], 2)] * 3).to_csv(results / "rate" / "rate.csv", index=False)
    words = ["collect", str(results / "rate"), "--output_dir", str(out)]
    assert main([*words, "--replace"]) == 0
    assert read_table(out / "rate.csv").shape == (3, len(TABLES["rate"]))
    assert {path for path in before if path.read_bytes() != before[path]} == {out / "rate.csv", out / "runs.csv"}
    content = json.loads((results / "rate/result.json").read_text())
    (results / "rate/result.json").write_text(json.dumps(content | {"run": "other"}))
    assert main([*words, "--add"]) == 0
    assert main([*words, "--replace"]) == 2
    assert "holds the result other of kind rate already, whose rows do not name it" in capsys.readouterr().err


def test_curve_values_keep_every_digit(results, tmp_path):
    value = 0.1 + 0.2
    write_curves(
        [CurvePoint(step=1, tokens=1, time_s=1 / 3, metric="eval_loss", value=value)],
        results / "runs/misa-s0/curves.csv",
    )
    main(["collect", str(results), "--output_dir", str(tmp_path / "tables")])
    table = read_table(tmp_path / "tables" / "convergence.csv")
    assert (table["value"] == value).any()
    assert (table["time_s"] == 1 / 3).any()


def test_missing_kinds_give_tables_with_columns_alone(results):
    tables = collect(find_results([results / "runs"]))
    assert tuple(tables["scores"].columns) == TABLES["scores"]
    assert tables["scores"].empty
    assert not tables["convergence"].empty


def test_different_package_digests_are_warned_of(results, tmp_path, capsys):
    assert digest_warnings(find_results([results])) == []
    write_result(result("odd", "finetune", digest="b" * 64), results / "runs" / "odd")
    assert main(["collect", str(results), "--output_dir", str(tmp_path / "tables")]) == 0
    error = capsys.readouterr().err
    assert "different versions of the package" in error
    assert "package digest bbbbbbbbbbbb: finetune odd" in error


def test_faults_are_named(results, tmp_path, capsys):
    def fails(*paths):
        assert main(["collect", *map(str, paths), "--output_dir", str(tmp_path / "t")]) == 2
        return capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    assert "no result.json at or below" in fails(tmp_path / "empty")
    write_result(result("misa-s0", "finetune"), tmp_path / "twin")
    assert "two results of kind finetune are called misa-s0" in fails(results, tmp_path / "twin")
    (results / "memory/memory.csv").unlink()
    assert "lacks its table memory.csv" in fails(results)


def test_run_may_be_scored_in_parts_on_tasks_of_their_own(tmp_path, capsys):
    def score(folder, tasks):
        scores = {f"{task}/acc": 0.5 for task in tasks}
        part = result("base", "evaluate", "none", metrics=scores, config={"tasks": tasks})
        write_result(part, tmp_path / "parts" / folder)
        return main(["collect", str(tmp_path / "parts"), "--output_dir", str(tmp_path / "t")])

    assert score("one", ["arc_easy"]) == score("two", ["boolq", "piqa"]) == 0
    assert set(pd.read_csv(tmp_path / "t" / "scores.csv")["task"]) == {"arc_easy", "boolq", "piqa"}
    assert score("two", ["piqa", "arc_easy"]) == 2
    assert "are called base with the task arc_easy" in capsys.readouterr().err


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


@pytest.mark.parametrize("verb", ["collect", "tables", "time"])
def test_path_that_cannot_be_written_is_named(verb, results, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    tables, there = tmp_path / "tables", str(tmp_path / "file" / "below")
    main(["collect", str(results), "--output_dir", str(tables)])
    words = {
        "collect": [str(results), "--output_dir"],
        "tables": ["--tables", str(tables), "--output_dir"],
        "time": ["make test", "3", "--output"],
    }
    capsys.readouterr()
    assert main([verb, *words[verb], there]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("python -m misa.results: error: ")
    assert str(tmp_path / "file") in error


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


README = """# Title

<!-- generated:times -->
old
<!-- /generated:times -->
text
<!-- generated:scores -->
<!-- /generated:scores -->
end
"""


def test_readme_sections_are_filled_and_checked(results, tmp_path, capsys):
    readme, tables, times = tmp_path / "README.md", tmp_path / "tables", tmp_path / "timings.json"
    readme.write_text(README)
    main(["collect", str(results), "--output_dir", str(tables)])
    main(["tables", "--tables", str(tables), "--output_dir", str(tables)])
    assert main(["time", "make test", "125.4", "--output", str(times)]) == 0
    words = ["readme", str(readme), "--tables", str(tables), "--times", str(times)]
    assert main([*words, "--check"]) == 1
    assert readme.read_text() == README
    assert main(words) == 0
    text = readme.read_text()
    assert "| `make test` | 2 min 05 s |" in text
    assert (tables / "scores.md").read_text().strip() in text
    assert "old" not in text
    assert text.startswith("# Title\n")
    assert text.endswith("\nend\n")
    assert main([*words, "--check"]) == 0
    # A number changed by hand is found.
    readme.write_text(text.replace("2 min 05 s", "1 min 05 s"))
    assert main([*words, "--check"]) == 1
    (tables / "scores.md").unlink()
    capsys.readouterr()
    assert main(words) == 2
    assert "section scores needs the table" in capsys.readouterr().err


def test_sections_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="generated:a --> is never closed"):
        fill("<!-- generated:a -->", str)
    with pytest.raises(ValueError, match="line 2: marker <!-- /generated:b --> does not pair with a"):
        fill("<!-- generated:a -->\n<!-- /generated:b -->", str)
    with pytest.raises(ValueError, match="does not pair with an opening one"):
        fill("<!-- /generated:a -->", str)
    assert fill("no markers", str) == "no markers"


def test_times_of_several_commands_stand_in_one_table(tmp_path):
    for command, seconds in (("make reproduce", 812.0), ("make test", 40.0)):
        main(["time", command, str(seconds), "--output", str(tmp_path / "t.json")])
    table = times_table(json.loads((tmp_path / "t.json").read_text()))
    assert "| `make reproduce` | 13 min 32 s |" in table
    assert "| `make test` | 40 s |" in table
    assert main(["time", "make test", "0", "--output", str(tmp_path / "t.json")]) == 2
    (tmp_path / "t.json").write_text("[]")
    assert main(["time", "make test", "1", "--output", str(tmp_path / "t.json")]) == 2


def test_collected_settings_say_what_each_run_was_told(tmp_path):
    told = {"granularity": "matrix", "budget": 0.03, "interval": 50, "eta": "auto", "per_parameter": None}
    config = {"learning_rate": 1e-3, "method_settings": told}
    write_result(result("a", "pretrain", config=config, metrics={"eval_loss": 4.5}), tmp_path / "runs" / "a")
    write_result(result("b", "pretrain", "adamw", config={"learning_rate": 2e-3}), tmp_path / "runs" / "b")
    assert main(["collect", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "tables")]) == 0
    rows = read_table(tmp_path / "tables" / "settings.csv").set_index("run")
    assert rows.loc["a", ["budget", "eta", "learning_rate", "eval_loss"]].tolist() == [0.03, "auto", 1e-3, 4.5]
    assert rows.loc["b", "learning_rate"] == 2e-3
    assert pd.isna(rows.loc["b", "budget"])


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
