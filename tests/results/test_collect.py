"""From result files on disk to tidy tables, score tables and the README."""

import json
import shutil

import pandas as pd
import pytest
from made import result

from misa.figures import read_table
from misa.results import CurvePoint, write_curves, write_result
from misa.results.__main__ import main
from misa.results.collect import TABLES, collect, digest_warnings, find_results
from misa.results.readme import fill, times_table

RUN_COLUMNS = ["run", "kind", "method", "seed", "model", "data"]


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
    rates = pd.DataFrame([dict.fromkeys(TABLES["rate"], 2) | {"seed": seed} for seed in range(3)])
    rates.to_csv(results / "rate" / "rate.csv", index=False)
    words = ["collect", str(results / "rate"), "--output_dir", str(out)]
    assert main([*words, "--replace"]) == 0
    assert read_table(out / "rate.csv").shape == (3, len(TABLES["rate"]))
    assert {path for path in before if path.read_bytes() != before[path]} == {out / "rate.csv", out / "runs.csv"}
    content = json.loads((results / "rate/result.json").read_text())
    (results / "rate/result.json").write_text(json.dumps(content | {"run": "other"}))
    assert main([*words, "--add"]) == 2
    assert "table rate would have two measurements of problem 2, momentum_step 2" in capsys.readouterr().err
    rates.assign(problem="other").to_csv(results / "rate" / "rate.csv", index=False)
    assert main([*words, "--add"]) == 0
    assert main([*words, "--replace"]) == 2
    assert "holds the result other of kind rate already, whose rows do not name it" in capsys.readouterr().err


def test_scores_are_replaced_with_all_their_tasks(tmp_path, capsys):
    out = tmp_path / "t"

    def score(folder, tasks, *words):
        part = result("a", "evaluate", metrics={f"{task}/acc": 0.5 for task in tasks}, config={"tasks": tasks})
        write_result(part, tmp_path / folder)
        return main(["collect", str(tmp_path / folder), "--output_dir", str(out), *words])

    assert score("first", ["arc_easy", "boolq"]) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    for again in (["arc_easy"], ["piqa"]):
        assert score("again", again, "--replace") == 2
        assert "boolq, too, of what is to be replaced" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in out.iterdir()}
    assert score("again", ["arc_easy", "boolq", "piqa"], "--replace") == 0
    assert set(read_table(out / "scores.csv")["task"]) == {"arc_easy", "boolq", "piqa"}
    assert len(json.loads((out / "MANIFEST.json").read_text())["runs"]) == 1


def test_runs_are_replaced_in_tables_without_scores(results, tmp_path):
    out = tmp_path / "tables"
    assert main(["collect", str(results / "runs"), "--output_dir", str(out)]) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert main(["collect", str(results / "runs/misa-s1"), "--output_dir", str(out), "--replace"]) == 0
    assert {path: path.stat().st_size for path in out.iterdir()} == {path: len(text) for path, text in before.items()}
    assert tuple(read_table(out / "scores.csv")) == TABLES["scores"]


def test_two_measurements_of_one_setting_are_refused(results, tmp_path, capsys):
    shutil.copytree(results / "memory", results / "again")
    write_result(result("again", "memory", "misa"), results / "again")
    assert main(["collect", str(results), "--output_dir", str(tmp_path / "t")]) == 2
    assert "two measurements of method misa, model m, batch_size 4" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"runs": [{}], "tables": {}}', '{"runs": [], "tables": []}'])
def test_manifest_that_is_none_is_named(text, results, tmp_path, capsys):
    (tmp_path / "MANIFEST.json").write_text(text)
    assert main(["collect", str(results), "--output_dir", str(tmp_path), "--add"]) == 2
    assert "MANIFEST.json is no manifest of collected tables" in capsys.readouterr().err


@pytest.mark.parametrize("described", [{"scores.csv": {}}, {"pies.csv": {"sha256": ""}}])
def test_manifest_of_unknown_tables_is_named(described, results, tmp_path, capsys):
    (tmp_path / "MANIFEST.json").write_text(json.dumps({"runs": [], "tables": described}))
    assert main(["collect", str(results), "--output_dir", str(tmp_path), "--add"]) == 2
    assert "MANIFEST.json is no manifest of collected tables" in capsys.readouterr().err


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
    assert "two results of kind finetune are of the run misa-s0" in fails(results, tmp_path / "twin")
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
    assert "are of the run base with the task arc_easy" in capsys.readouterr().err


def test_one_run_scored_twice_on_a_task_is_no_two_seeds(tmp_path, capsys):
    for name in ("model", "checkpoint-2"):
        config = {"tasks": ["arc_easy"], "base_run": "misa-s0"}
        scored = result(name, "evaluate", metrics={"arc_easy/acc": 0.5}, config=config)
        write_result(scored, tmp_path / "results" / name)
    assert main(["collect", str(tmp_path / "results"), "--output_dir", str(tmp_path / "t")]) == 2
    assert "two results of kind evaluate are of the run misa-s0 with the task arc_easy" in capsys.readouterr().err


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


@pytest.mark.parametrize("seconds", ["0", "-1", "inf", "nan"])
def test_time_that_is_none_is_refused(seconds, tmp_path, capsys):
    assert main(["time", "make test", seconds, "--output", str(tmp_path / "times.json")]) == 2
    assert "must be positive and finite" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


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
