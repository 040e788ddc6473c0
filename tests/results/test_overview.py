"""The table of all methods at a glance, and that of what each scale takes."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml

from misa.results.__main__ import main
from misa.results.overview import SEQ_LEN, overview_table
from misa.results.scales import scale_row
from misa.results.tables import Cell

# Minus MISA's: LoRA's losses lie apart from its own by nearly the same with each seed, BAdam's scatter.
LOSSES = {
    "misa": (1.0, 1.5, 3.5),
    "lora": (0.5, 1.001, 3.0),
    "badam": (1.2, 1.3, 3.4),
    "adamw": (9.0, 9.0, float("nan")),
}
ACCURACIES = {"misa": (0.4, 0.3, 0.5), "lora": (0.5, 0.3, 0.6)}


@pytest.fixture
def settings() -> pd.DataFrame:
    rows = [(f"{m}-s{s}", "finetune", "math", m, s, loss) for m, own in LOSSES.items() for s, loss in enumerate(own)]
    rows += [(f"pretrain-{m}-s0", "pretrain", "corpus", m, 0, loss) for m, loss in (("misa", 4.0), ("galore", 3.75))]
    return pd.DataFrame(rows, columns=["run", "kind", "data", "method", "seed", "eval_loss"])


@pytest.fixture
def scores() -> pd.DataFrame:
    rows = [(f"{m}-s{s}", m, s, "one", "acc", v, 0.01) for m, own in ACCURACIES.items() for s, v in enumerate(own)]
    return pd.DataFrame(rows, columns=["run", "method", "seed", "task", "metric", "value", "stderr"])


@pytest.fixture
def runs(settings: pd.DataFrame) -> pd.DataFrame:
    return settings.drop(columns="eval_loss").assign(state_bytes=2**20)


@pytest.fixture
def memory() -> pd.DataFrame:
    rows = [
        ("misa-3", SEQ_LEN, True, "worst", 2),
        ("misa-3", SEQ_LEN, True, "worst", 3),  # another category
        ("misa-3", SEQ_LEN, True, "mean", 50),
        ("misa-3", SEQ_LEN, False, "worst", 60),
        ("misa-1", SEQ_LEN, True, "worst", 70),
        ("lora-r16", SEQ_LEN, True, "all", 4),
        ("lora-r16", 2 * SEQ_LEN, True, "all", 80),
    ]
    table = pd.DataFrame(rows, columns=["variant", "seq_len", "checkpointing", "draw", "gib"])
    return table.assign(bytes=table["gib"] * 2**30, batch_size=1, loss="full", model="large")


def test_row_of_a_method_holds_differences_state_and_peak(settings, scores, runs, memory) -> None:
    head, rows = overview_table(settings, scores, runs, memory)
    assert head == [
        "method",
        "pre-training: loss minus MISA's",
        "math: loss minus MISA's",
        "math: accuracy minus MISA's (points)",
        "optimizer state, fine-tuning (MiB)",
        "peak of a step, large (GiB)",
    ]
    of_method = {row[0]: row[1:] for row in rows}
    assert list(of_method) == ["AdamW", "LoRA", "GaLore", "BAdam", "MISA"]
    _, loss, accuracy, state, peak = of_method["LoRA"]
    assert isinstance(loss, Cell)
    assert loss.value == pytest.approx(-0.4997, abs=1e-4)
    assert isinstance(accuracy, Cell)
    assert accuracy.value == pytest.approx(20 / 3)
    assert (state, peak) == (Cell(1.0), Cell(4.0))
    assert of_method["GaLore"][0] == Cell(-0.25)
    assert of_method["MISA"][:2] == ["(4.00)", "(2.00 ± 0.76)"]
    assert of_method["MISA"][-1] == Cell(5.0)
    assert of_method["AdamW"][1] == "diverged"


def test_only_what_is_told_apart_is_bold(settings, scores, runs) -> None:
    _, rows = overview_table(settings, scores, runs)
    marked = {row[0] for row in rows if isinstance(row[2], Cell) and row[2].best}
    assert marked == {"LoRA"}


def test_one_seed_of_scores_and_no_memory_make_no_column(settings, scores, runs) -> None:
    head, rows = overview_table(settings, scores[scores["seed"] == 0], runs.drop(columns="state_bytes"))
    assert len(head) == len(rows[0]) == 3


def test_memory_grid_without_columns_is_named_and_one_without_rows_left_out(
    settings, scores, runs, memory, tmp_path, capsys
) -> None:
    scores = scores.assign(num_documents=10)
    for name, table in (("settings", settings), ("scores", scores), ("runs", runs.assign(model="m", train_s=1.0))):
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    grid, words = tmp_path / "memory_grid.csv", ["tables", "--tables", str(tmp_path), "--output_dir", str(tmp_path)]
    memory.drop(columns=["draw", "model"]).to_csv(grid, index=False)
    assert main(words) == 2
    assert f"table {grid} lacks the columns model, draw" in capsys.readouterr().err
    memory.iloc[:0].to_csv(grid, index=False)
    assert main(words) == 0
    assert "peak of a step" not in (tmp_path / "overview.md").read_text()


@pytest.fixture
def scale() -> dict:
    mixes = {"math": {"train": "--max_steps 30"}}
    args = {"args": "--max_steps 20"}
    return {"scale": "small", "threads": 1, "gpus": 0, "pretrain": args, "finetune": args, "mixes": mixes}


def test_hours_are_those_of_runs_with_the_steps_of_the_scale(scale) -> None:
    sheet = [
        {"run": "a", "kind": "pretrain", "args": ""},
        {"run": "b", "kind": "finetune", "data": "math", "args": ""},
        {"run": "c", "kind": "pretrain", "args": "--max_steps 40"},
        {"run": "d", "kind": "pretrain", "args": ""},
    ]
    runs = pd.DataFrame(
        [
            ("a", "pretrain", "x", 20, 60.0, None),
            ("a", "evaluate", "x", None, None, 30.0),
            ("b", "finetune", "y", 30, 3 * 3600.0, None),
            ("c", "pretrain", "x", 40, 10.0, None),
            ("d", "pretrain", "x", 99, 5000.0, None),  # of another scale
            ("d", "evaluate", "x", None, None, 5000.0),
        ],
        columns=["run", "kind", "machine", "num_steps", "wall_s", "evaluate_s"],
    )
    assert scale_row(scale, sheet, runs) == ["`small`", "4", "one core", "2 runs, 1 min 40 s on x; 1 run, 3.0 h on y"]
    assert scale_row(scale | {"gpus": 2}, sheet, None) == ["`small`", "4", "2 GPU", "none"]
    assert scale_row(scale | {"threads": 0}, sheet, None)[2] == "all cores"


def test_command_writes_a_row_for_each_scale(tmp_path: Path, scale, capsys) -> None:
    configs, tables = tmp_path / "workflows" / "config", tmp_path / "tables"
    configs.mkdir(parents=True)
    tables.mkdir()
    (configs / "small.tsv").write_text("# what is asked\nrun\tkind\targs\n\na\tpretrain\t\n")
    more = {"study": "headline", "sheet": "workflows/config/small.tsv"}
    for name in ("small", "laptop"):
        (configs / f"{name}.yaml").write_text(yaml.safe_dump(scale | more | {"scale": name}))
    times = {"make reproduce": {"seconds": 90, "processor": "x"}}
    (tables / "timings.json").write_text(json.dumps(times))
    words = ["scales", "--configs", str(configs), "--tables", str(tables), "--output_dir", str(tmp_path)]
    assert main(words) == 0
    assert (tmp_path / "scales.md").read_text().splitlines()[2:] == [
        "| `laptop` | 1 | one core | the whole chain, 1 min 30 s on x |",
        "| `small` | 1 | one core | none |",
    ]
    assert main(["scales", "--configs", str(tables), *words[3:]]) == 2
    (configs / "small.yaml").write_text("scale: small\n")
    assert main(words) == 2
    assert "small.yaml has no finetune, gpus, mixes, pretrain, sheet, study, threads" in capsys.readouterr().err
    for content, reason in (
        (b"scale: [small", "is no YAML file: "),
        (b"\xe9", "is no YAML file"),
        (b"- a", "holds list"),
    ):
        (configs / "small.yaml").write_bytes(content)
        assert main(words) == 2
        assert f"error: {configs / 'small.yaml'} {reason}" in capsys.readouterr().err


def test_pages_say_what_the_tables_say(repository: Path, monkeypatch) -> None:
    monkeypatch.chdir(repository)
    pages = sorted(map(str, Path("docs").rglob("*.md")))
    assert main(["readme", "README.md", *pages, "--check"]) == 0
