"""Studies of one question: the grid of learning rates, and ablations paired by seed."""

from pathlib import Path

import pandas as pd
import pytest

from misa.results.__main__ import main
from misa.results.ablation import ablation_table, compare_settings
from misa.results.paired import paired_table
from misa.results.tables import Cell
from misa.results.tuning import Rates, chosen_rates

INF = float("inf")


def grid() -> pd.DataFrame:
    losses = {
        ("adamw", 1e-3): 5.0,
        ("adamw", 2e-3): 4.5,
        ("adamw", 4e-3): None,
        ("misa", 1e-3): 6.0,
        ("misa", 2e-3): 5.5,
    }
    losses |= {("misa", 4e-3): 5.2, ("lora", 1e-3): INF}
    return pd.DataFrame(
        [
            {"run": f"{method}-{rate}-s{seed}", "kind": "pretrain", "method": method, "seed": seed}
            | {"data": "corpus", "learning_rate": rate, "eval_loss": loss}
            for (method, rate), loss in losses.items()
            for seed in (0, 1)
        ]
    )


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "settings.csv"
    grid().to_csv(path, index=False)
    return path


def test_lowest_mean_loss_is_chosen_and_divergence_never() -> None:
    assert chosen_rates(grid()) == {("corpus", "adamw"): Rates(2e-3), ("corpus", "misa"): Rates(4e-3)}
    with pytest.raises(ValueError, match="runs of one kind, found pretrain, finetune"):
        chosen_rates(pd.concat([grid(), grid().assign(kind="finetune")]))


def test_two_runs_of_one_method_seed_and_rate_are_refused() -> None:
    again = grid().query("run == 'misa-0.002-s1'").assign(run="again", always_on_lr=2e-3)
    with pytest.raises(
        ValueError, match=r"several runs of one method, seed and learning rate .*: misa-0.002-s1, again"
    ):
        chosen_rates(pd.concat([grid(), again]))


def test_rate_that_is_no_number_is_named_with_its_file(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table.write_text(table.read_text().replace(",0.002,", ",abc,", 1))
    assert main(["learning_rates", "--table", str(table), "--output_dir", str(tmp_path / "out")]) == 2
    assert f"table {table}, line 4: learning_rate is 'abc', allowed is a number" in capsys.readouterr().err


def test_table_shows_the_grid_and_what_was_chosen(table: Path, tmp_path: Path) -> None:
    assert main(["learning_rates", "--table", str(table), "--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / "learning_rates.md").read_text() == (
        "| trained on | method | loss at 0.001 | loss at 0.002 | loss at 0.004 | chosen | end of the grid |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| corpus | AdamW | 5.00 | **4.50** | diverged | 0.002 |  |\n"
        "| corpus | LoRA | diverged |  |  |  |  |\n"
        "| corpus | MISA | 6.00 | 5.50 | **5.20** | 0.004 | yes |\n"
    )
    assert r"\mathbf{4.50}" in (tmp_path / "learning_rates.tex").read_text()


def test_chosen_rates_go_into_a_sheet(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "sheet.tsv"
    sheet.write_text(
        "\ufeff# one line for each run, by a program that marks its text\n"
        "run\tkind\targs\n"
        "a\tpretrain\t--method adamw --seed 0\n"
        "\n"
        "b\tpretrain\t--method misa --learning_rate 1e-5 --seed 0\n"
        "c\tpretrain\t--method badam --seed 0\n"
        "d\tfinetune\t--method misa --seed 0\n"
        "e\tpretrain \t--method adamw --learning_rate 2e-3\n"
        "f\tpretrain \t--method=misa --learning_rate=1e-5\n"
    )
    words = ["learning_rates", "--table", str(table), "--output_dir", str(tmp_path), "--sheets", str(sheet)]
    assert main(words) == 0
    assert f"{sheet}: a, b, f" in capsys.readouterr().out
    assert sheet.read_text() == (
        "\ufeff# one line for each run, by a program that marks its text\n"
        "run\tkind\targs\n"
        "a\tpretrain\t--method adamw --learning_rate 0.002 --seed 0\n"
        "\n"
        "b\tpretrain\t--method misa --learning_rate 0.004 --seed 0\n"
        "c\tpretrain\t--method badam --seed 0\n"
        "d\tfinetune\t--method misa --seed 0\n"
        "e\tpretrain \t--method adamw --learning_rate 2e-3\n"
        "f\tpretrain\t--method=misa --learning_rate 0.004\n"
    )
    assert main(words) == 0
    assert "no row changed" in capsys.readouterr().out


def two_rates() -> pd.DataFrame:
    """The grid, and pairs of rates tried with the seed 0 alone, which ends half a nat higher than the seed 1."""
    tried = {(5e-4, 4e-3): 4.0, (5e-4, 8e-3): 3.9, (5e-4, 16e-3): 4.1, (1e-3, 8e-3): 4.2, (25e-5, 8e-3): 4.3}
    rows = grid().assign(eval_loss=lambda rows: rows["eval_loss"] - 0.5 * rows["seed"])
    row = {"run": "r", "kind": "pretrain", "method": "misa", "seed": 0, "data": "corpus"}
    pairs = [row | {"learning_rate": a, "always_on_lr": b, "eval_loss": loss} for (a, b), loss in tried.items()]
    rows.loc[rows["run"] == "misa-0.002-s0", "always_on_lr"] = 2e-3  # the same as one rate
    return pd.concat([rows, pd.DataFrame(pairs)], ignore_index=True)


def test_pairs_of_rates_are_chosen_by_the_seeds_that_all_have(tmp_path: Path) -> None:
    table, sheet = tmp_path / "settings.csv", tmp_path / "sheet.tsv"
    two_rates().to_csv(table, index=False)
    sheet.write_text(
        "run\tkind\targs\n"
        "a\tpretrain\t--method misa --learning_rate 2e-3 --seed 0\n"
        "b\tpretrain\t--method misa --learning_rate 5e-4 --always_on_lr 8e-3 --seed 0\n"
        "c\tpretrain\t--method adamw --learning_rate 1e-3 --always_on_lr 8e-3 --seed 0\n"
    )
    words = ["learning_rates", "--table", str(table), "--output_dir", str(tmp_path), "--sheets", str(sheet)]
    assert main(words) == 0
    head, _, adamw, _, misa = (tmp_path / "learning_rates.md").read_text().splitlines()
    assert "| loss at 0.004 | loss at 0.0005, 0.004 | loss at 0.00025, 0.008 | loss at 0.0005, 0.008 |" in head
    assert misa == "| corpus | MISA | 6.00 | 5.50 | 5.20 | 4.00 | 4.30 | **3.90** | 4.20 | 4.10 | 0.0005, 0.008 |  |"
    assert adamw.startswith("| corpus | AdamW | 4.75 | **4.25** | diverged |")
    assert [line.split("\t")[2] for line in sheet.read_text().splitlines()[1:]] == [
        "--method misa --learning_rate 0.0005 --always_on_lr 0.008 --seed 0",
        "--method misa --learning_rate 5e-4 --always_on_lr 8e-3 --seed 0",
        "--method adamw --learning_rate 0.002 --seed 0",
    ]


def test_table_says_which_rate_of_a_pair_lies_at_the_end(tmp_path: Path) -> None:
    tried = two_rates()
    for left, ends in ((tried["always_on_lr"] != 16e-3, "rest"), (tried["learning_rate"].ge(5e-4), "matrices")):
        tried[left].to_csv(tmp_path / "settings.csv", index=False)
        words = ["learning_rates", "--table", str(tmp_path / "settings.csv"), "--output_dir", str(tmp_path)]
        assert main(words) == 0
        assert (tmp_path / "learning_rates.md").read_text().endswith(f"| 0.0005, 0.008 | {ends} |\n")


def test_rates_go_into_rows_on_the_same_data_alone(tmp_path: Path) -> None:
    table, sheet = tmp_path / "settings.csv", tmp_path / "sheet.tsv"
    grid().assign(kind="finetune", data="commonsense").to_csv(table, index=False)
    rows = [f"{data or 'built-in'}\tfinetune\t{data}\t--method misa --seed 0" for data in ("", "math", "commonsense")]
    sheet.write_text("\n".join(["run\tkind\tdata\targs", *rows]) + "\n")
    words = ["finetune_rates", "--table", str(table), "--output_dir", str(tmp_path), "--sheets", str(sheet)]
    assert main(words) == 0
    changed = [line.split("\t")[0] for line in sheet.read_text().splitlines() if "--learning_rate 0.004" in line]
    assert changed == ["commonsense"]


def test_each_data_set_has_rates_of_its_own(tmp_path: Path) -> None:
    table, sheet = tmp_path / "settings.csv", tmp_path / "sheet.tsv"
    one = grid().assign(kind="finetune", data="math")
    other = one[one["method"] == "misa"].assign(data="boolq", eval_loss=lambda rows: -rows["eval_loss"])
    pd.concat([one, other]).to_csv(table, index=False)
    sheet.write_text("run\tkind\tdata\targs\na\tfinetune\tmath\t--method misa\nb\tfinetune\tboolq\t--method misa\n")
    assert chosen_rates(pd.read_csv(table))[("boolq", "misa")] == Rates(1e-3)
    words = ["finetune_rates", "--table", str(table), "--output_dir", str(tmp_path), "--sheets", str(sheet)]
    assert main(words) == 0
    lines = (tmp_path / "finetune_rates.md").read_text().splitlines()[2:]
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| boolq", "MISA"], ["| math", "AdamW"], ["| math", "LoRA"], ["| math", "MISA"],
    ]  # fmt: skip
    assert [line.rpartition("rate ")[2] for line in sheet.read_text().splitlines()[1:]] == ["0.004", "0.001"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "run\tkind\targs\na\tpretrain\t--method misa --learning_rate fast\n",
            "sheet {sheet}, run a: learning_rate is 'fast', allowed is a number",
        ),
        ("run\tkind\targs\na\tpretrain\n", "sheet {sheet}, line 2: 2 cells, and 3 columns"),
        ("# nothing\n", "sheet {sheet} is empty"),
        (None, "sheet {sheet} does not exist"),
    ],
)
def test_mistake_in_a_sheet_is_named(
    content: str | None, message: str, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.tsv"
    if content is not None:
        sheet.write_text(content)
    words = ["learning_rates", "--table", str(table), "--output_dir", str(tmp_path / "out"), "--sheets", str(sheet)]
    assert main(words) == 2
    assert message.format(sheet=sheet) in capsys.readouterr().err
    assert content is not None or not (tmp_path / "out").exists()


def ablation() -> pd.DataFrame:
    common = {"kind": "pretrain", "method": "misa", "granularity": "matrix", "eta": "auto", "interval": 10}
    common |= {"probe_every": 0}
    different = [{}, {"eta": "0.0"}, {"interval": 50}, {"method": "misa_official"}]
    different += [{"eta": "0.0", "interval": 50}, {"probe_every": 1}]
    return pd.DataFrame(
        [
            {**common, **other, "run": f"{i}-s{seed}", "seed": seed}
            | {"eval_loss": 5 + seed + 0.11 * i + 0.01 * (seed - 1) * i}
            for i, other in enumerate(different)
            for seed in range(3)
        ]
    )


def test_settings_are_paired_by_seed_with_the_common_one_and_with_uniform_draws() -> None:
    found = compare_settings(ablation()).set_index("label")
    both = ["eta = 0", "eta = 0; T = 50"]
    assert list(found.index) == ["common setting", "MISA, authors' code", *both, "T = 50", "fresh scores = 1"]
    assert found.loc["T = 50", "differences"] == pytest.approx([0.2, 0.22, 0.24])
    assert found.loc["T = 50", "num_seeds"] == 3
    # With uniform draws of the same interval; of any scores; of no other variant, and not with itself.
    assert found.loc["T = 50", "from_uniform"] == pytest.approx([-0.2, -0.22, -0.24])
    assert found.loc["common setting", "from_uniform"] == pytest.approx([-0.1, -0.11, -0.12])
    assert found.loc["fresh scores = 1", "from_uniform"] == pytest.approx([0.4, 0.44, 0.48])
    assert not any(found.loc[[*both, "MISA, authors' code"], "from_uniform"])


def test_two_runs_of_one_setting_and_seed_are_refused() -> None:
    table = ablation()
    with pytest.raises(ValueError, match="several runs of one setting and seed: 2-s1, 4-s1"):
        compare_settings(table.assign(eta=table["eta"].where(table["run"] != "4-s1", "auto")))


def test_an_ablation_s_table_has_means_errors_and_p_values() -> None:
    head, rows = ablation_table(ablation())
    assert [len(row) for row in rows] == [len(head)] * 6
    # Seeds differ by 1, settings by a ninth: without pairing, nothing could be told apart.
    label, num_seeds, _, difference, p, after, *uniform = next(row for row in rows if row[0] == "eta = 0")
    assert (label, num_seeds, p, uniform) == ("eta = 0", "3", "0.0027", ["", "", ""])
    assert after == "0.014"  # times five: all settings differ by as many standard errors
    assert isinstance(difference, Cell)
    assert (difference.value, difference.stderr) == (pytest.approx(0.11), pytest.approx(0.01 / 3**0.5))


def test_one_seed_has_differences_without_errors(tmp_path: Path) -> None:
    table = tmp_path / "settings.csv"
    ablation()[lambda rows: rows["seed"] == 1].to_csv(table, index=False)
    assert main(["ablation", "--table", str(table), "--output_dir", str(tmp_path)]) == 0
    lines = (tmp_path / "ablation.md").read_text().splitlines()
    assert lines[2:] == [
        "| common setting | 1 | 6.00 |  |  |  | -0.110 |  |  |",
        "| MISA, authors' code | 1 | 6.33 | 0.330 |  |  |  |  |  |",
        "| eta = 0 | 1 | 6.11 | 0.110 |  |  |  |  |  |",
        "| eta = 0; T = 50 | 1 | 6.44 | 0.440 |  |  |  |  |  |",
        "| T = 50 | 1 | 6.22 | 0.220 |  |  | -0.220 |  |  |",
        "| fresh scores = 1 | 1 | 6.55 | 0.550 |  |  | 0.440 |  |  |",
    ]


def test_a_setting_with_a_run_without_a_finite_loss_diverged(tmp_path: Path) -> None:
    rows = ablation()
    lost = {"2-s0": float("nan"), "3-s1": INF, "1-s2": None}  # None: the run has no loss at all
    rows["eval_loss"] = [lost.get(run, loss) for run, loss in zip(rows["run"], rows["eval_loss"], strict=True)]
    rows.to_csv(tmp_path / "settings.csv", index=False)
    words = ["ablation", "--table", str(tmp_path / "settings.csv"), "--output_dir", str(tmp_path)]
    assert main(words) == 0
    lines = (tmp_path / "ablation.md").read_text().splitlines()
    assert [line for line in lines if "diverged" in line] == [
        "| MISA, authors' code | 3 | diverged |  |  |  |  |  |  |",
        "| eta = 0 | 3 | diverged |  |  |  |  |  |  |",
        "| T = 50 | 3 | diverged |  |  |  |  |  |  |",
    ]
    # Against what diverged with one seed, the other two stay.
    found = compare_settings(rows).set_index("label")
    assert found.loc["common setting", "from_uniform"] == pytest.approx([-0.1, -0.11])


@pytest.mark.parametrize("verb", ["learning_rates", "finetune_rates", "ablation"])
def test_table_without_the_columns_is_refused_by_name(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.csv").write_text("kind,method,seed\npretrain,misa,0\n")
    assert main([verb, "--table", str(tmp_path / "wrong.csv"), "--output_dir", str(tmp_path)]) == 2
    lacking = "run, eval_loss" if verb == "ablation" else "run, data, learning_rate, eval_loss"
    error = capsys.readouterr().err
    assert f"error: table lacks the columns {lacking}; it has kind, method, seed" in error


def test_methods_are_compared_with_misa_by_seed_on_each_data_set() -> None:
    losses = {
        ("corpus", "adamw"): (2.0, 3.1, 4.2),
        ("corpus", "misa"): (1.0, 2.0, 3.0),
        ("quiz", "misa"): (1.0,),
        ("quiz", "lora"): (1.5,),
        ("quiz", "sgd"): (INF,),
        ("quiz", "dora"): (None,),
        ("poems", "adamw"): (9.0,),
    }
    table = pd.DataFrame(
        [
            {"run": "", "kind": "finetune", "data": data, "method": method, "seed": seed, "eval_loss": loss}
            for (data, method), values in losses.items()
            for seed, loss in enumerate(values)
        ]
    )
    no_scores = pd.DataFrame(columns=["run", "task", "metric", "value"])
    _, rows = paired_table(table, no_scores)
    assert [row[:3] for row in rows] == [
        ["corpus", "AdamW", "3"],
        ["corpus", "MISA", "3"],
        ["quiz", "SGD", "1"],
        ["quiz", "LoRA", "1"],
        ["quiz", "DoRA", "1"],
        ["quiz", "MISA", "1"],
    ]
    difference = rows[0][4]
    assert difference.value == pytest.approx(1.1)
    assert difference.stderr == pytest.approx(0.1 / 3**0.5)  # of 1.0, 1.1 and 1.2; the losses themselves spread by 1
    assert float(rows[0][5]) == pytest.approx(0.0027, rel=0.02)
    assert rows[0][6] == rows[0][5]  # no other method to correct for
    assert rows[1][4:] == ["", "", ""]
    assert rows[3][4].value == pytest.approx(0.5)
    assert rows[3][5] == ""  # one seed tests nothing
    assert [rows[2][3:], rows[4][3:]] == [["diverged", "", "", ""]] * 2
    lost = table.assign(eval_loss=table["eval_loss"].where(table["method"] != "misa"))  # MISA itself diverged
    assert [row[4:] for row in paired_table(lost, no_scores)[1]] == [["", "", ""]] * 6
    again = pd.concat([table, table[table["data"] == "corpus"]])
    assert {row[0] for row in paired_table(again, no_scores)[1]} == {"quiz"}
