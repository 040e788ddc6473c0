"""Every figure draws from a tidy table, in the one style, and gives the same bytes each time."""

import subprocess
import sys

import matplotlib as mpl
import pandas as pd
import pytest
from example_tables import METHODS, TABLES, convergence, memory, memory_grid, rate, scores, settings, staleness
from matplotlib.backends.backend_agg import FigureCanvasAgg

from misa.figures import CACHED_TABLES, FIGURES, plot, read_table
from misa.figures import style as s
from misa.figures.__main__ import main
from misa.memory.tracker import CATEGORIES


def texts(figure):
    return [text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_visible() and text.get_text()]


def test_every_figure_is_tested():
    assert set(TABLES) == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_figure_has_column_width_labels_and_readable_text_inside_its_edges(name):
    figure = plot(name, TABLES[name]())
    width, height = figure.get_size_inches()
    assert width == s.COLUMN_WIDTH_IN
    assert height < 5
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axes in figure.axes:
        assert axes.get_xlabel() or axes.get_ylabel() or axes.get_title(loc="left") or figure.get_supxlabel()
    drawn = figure.get_tightbbox(canvas.get_renderer())  # inches
    assert drawn.x0 >= -0.01
    assert drawn.y0 >= -0.01
    assert drawn.x1 <= width + 0.01
    assert drawn.y1 <= height + 0.01
    sizes = [text.get_fontsize() for text in figure.findobj(mpl.text.Text) if text.get_text().strip()]
    assert min(sizes) >= 6


def test_files_are_the_same_bytes_in_another_process_at_another_time(tmp_path):
    for name, table in FIGURES.items():
        (tmp_path / table).parent.mkdir(exist_ok=True)
        TABLES[name]().to_csv(tmp_path / table, index=False)
    words = ["all", "--data_dir", str(tmp_path), "--output_dir"]
    assert main([*words, str(tmp_path / "one")]) == 0
    # A reader's own style file and locale must not show.
    (tmp_path / "matplotlibrc").write_text("axes.facecolor: red\nfont.size: 20\n")
    command = [sys.executable, "-m", "misa.figures", *words, str(tmp_path / "two")]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    assert len(list((tmp_path / "one").iterdir())) == 2 * len(FIGURES)
    for drawn in (tmp_path / "one").iterdir():
        assert drawn.read_bytes() == (tmp_path / "two" / drawn.name).read_bytes(), drawn.name
        assert b"CreationDate" not in drawn.read_bytes()


def test_committed_figures_are_those_of_the_committed_tables(repository, tmp_path):
    assert main(["all", "--data_dir", str(repository / CACHED_TABLES), "--output_dir", str(tmp_path)]) == 0
    # A figure whose table has not been frozen yet is not there.
    committed = {path.stem for path in (repository / "paper_figures").glob("*.png")}
    assert {path.stem for path in tmp_path.glob("*.png")} == committed
    for drawn in tmp_path.iterdir():
        bytes_there = (repository / "paper_figures" / drawn.name).read_bytes()
        assert bytes_there == drawn.read_bytes(), f"{drawn.name} is out of date: python -m misa.figures all"


def test_forms_measured_at_few_lengths_make_no_curve():
    table = memory_grid()
    table = table[(table["variant"] != "misa-3") | (table["seq_len"] != 1024)]
    labels = texts(plot("memory_sequence", table))
    assert "misa-1" in labels
    assert "misa-3" not in labels


def test_scores_of_many_tasks_fit_on_a_page():
    table = pd.concat([scores().assign(task=f"task{i}") for i in range(5)])
    figure = plot("scores", table)
    width, height = figure.get_size_inches()
    assert width == 2 * s.COLUMN_WIDTH_IN
    assert height < 7
    assert [ax.get_title(loc="left") for ax in figure.axes] == [f"task{i}" for i in range(5)]


def test_variants_stand_behind_their_method():
    names = ["misa_paper", "galore", "adamw_bf16", "misa", "galore_layerwise", "other", "adamw"]
    ordered = ["adamw", "adamw_bf16", "galore", "galore_layerwise", "misa", "misa_paper", "other"]
    assert s.in_order(s.METHODS, names) == ordered


def test_each_method_category_and_scheme_has_its_own_look():
    for kind in (s.METHODS, s.CATEGORIES):
        assert len({look.color for look in kind.values()}) == len(kind)
    assert len({(look.color, look.marker) for look in s.SCHEMES.values()}) == len(s.SCHEMES)
    assert len({look.marker for look in s.METHODS.values()}) == len(s.METHODS)


def test_style_knows_every_method_category_and_scheme_of_the_package():
    from misa.dynamics.variance import SCHEMES
    from misa.methods import METHODS as BUILT

    assert set(BUILT) <= set(s.METHODS) | set(s.VARIANTS)
    assert tuple(s.CATEGORIES) == CATEGORIES
    assert tuple(s.SCHEMES) == SCHEMES


def test_colours_differ_for_colour_blind_eyes():
    """Machado, Oliveira and Fernandes (2009), full protanopia and deuteranopia, on linear RGB."""
    import numpy as np
    from matplotlib.colors import to_rgb

    matrices = {
        "protanopia": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        "deuteranopia": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
    }
    for kind in (s.METHODS, s.CATEGORIES):
        colors = np.array([to_rgb(look.color) for look in kind.values()]) ** 2.2
        for name, matrix in matrices.items():
            seen = np.clip(colors @ np.array(matrix).T, 0, 1) ** (1 / 2.2)
            distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1) + 9 * np.eye(len(seen))
            assert distance.min() > 0.08, (name, list(kind)[int(distance.argmin()) // len(seen)])


def test_drawing_leaves_the_readers_settings_alone():
    before = dict(mpl.rcParams)
    plot("memory", memory())
    assert dict(mpl.rcParams) == before


def test_memory_bars_end_at_the_total_of_the_table():
    table = memory()
    figure = plot("memory", table)
    ends = {}
    for bar in figure.axes[0].patches:
        row = round(bar.get_y() + bar.get_height() / 2)
        ends[row] = max(ends.get(row, 0), bar.get_x() + bar.get_width())
    totals = table.groupby("method")["bytes"].sum() / 2**20
    assert [ends[i] for i in range(len(METHODS))] == pytest.approx([totals[method] for method in METHODS])


def test_thin_parts_of_memory_bars_are_not_hidden_by_edges():
    for name in ("memory", "memory_stacked"):
        for axes in plot(name, TABLES[name]()).axes:
            assert {bar.get_linewidth() for bar in axes.patches} == {0}, name


def test_ages_near_each_other_have_their_labels_in_two_lines():
    table = pd.concat([staleness().assign(age=lambda t, k=k: k * t["age"]) for k in (1, 1.25, 1.4)])
    labels = [label.get_text() for label in plot("staleness", table).axes[0].get_xticklabels()]
    assert labels == ["5", "\n6.25", "", "10", "\n12.5", "", "40", "\n50", ""]


def test_kind_without_evaluation_shows_its_training_loss():
    table = convergence()
    table.loc[table["kind"] == "finetune", "metric"] = "train_loss"
    labels = texts(plot("convergence", table))
    assert {"eval loss (nats/token)", "training loss (nats/token)"} <= set(labels)


@pytest.mark.parametrize("lost", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_leave_the_others_their_room(lost):
    table = convergence()
    table.loc[table["kind"] == "pretrain", "value"] = lost
    finetune = table["kind"] == "finetune"
    table.loc[finetune & (table["method"] == "lora") & (table["step"] > 20), "value"] = lost
    figure = plot("convergence", table)
    FigureCanvasAgg(figure).draw()
    rows = {axes.get_title(loc="left"): axes for axes in figure.axes}
    low, high = rows["Fine-tuning"].get_ylim()
    assert 1.5 < low < high < 3


@pytest.mark.parametrize("lost", [float("nan"), float("inf")])
def test_ablation_leaves_out_what_diverged(lost):
    table = settings()
    table.loc[table["run"] == "3-s1", "eval_loss"] = lost
    labels = [label.get_text() for label in plot("ablation", table).axes[0].get_yticklabels()]
    assert "blocks = layer; $\\eta$ = 0" not in labels
    assert len(labels) == 5
    table.loc[table["run"] == "0-s0", "eval_loss"] = lost  # of the common setting, one of two seeds
    assert plot("ablation", table).get_suptitle() == "Common setting: diverged, 2 seeds"
    with pytest.raises(ValueError, match="the same setting, or diverged"):
        plot("ablation", table.assign(eval_loss=lost))


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged():
    table = convergence()
    table = table[(table["kind"] == "finetune") & (table["method"] == "misa")]
    other = table.assign(run=table["run"].str.replace("misa", "misa-delta10"), value=table["value"] + 1)
    labels = texts(plot("convergence", pd.concat([table, other])))
    assert {"finetune-misa", "finetune-misa-delta10"} <= set(labels)
    assert "MISA" in texts(plot("convergence", table))


def test_kinds_are_split_by_their_data():
    table = convergence()
    two = pd.concat([table.assign(data="family"), table[table["kind"] == "finetune"].assign(data="math")])
    titles = [axes.get_title(loc="left") for axes in plot("convergence", two).axes]
    assert [title for title in titles if title] == ["Pre-training", "Fine-tuning: family", "Fine-tuning: math"]


def test_ablation_shows_each_setting_once_with_its_paired_difference():
    figure = plot("ablation", settings())
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [
        "MISA, Algorithm 1",
        "blocks = layer",
        "blocks = layer; $\\eta$ = 0",
        "$\\eta$ = 0",
        "T = 5",
        "T = 50",
    ]
    means = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert means == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    table = settings()
    table.loc[table["method"] == "misa_paper", "eval_loss"] += 9  # one far off leaves the others their room
    axes = plot("ablation", table).axes[0]
    assert axes.get_xlim()[1] < 1
    assert [text.get_text() for text in axes.texts] == ["+9.10 $\\rightarrow$"]
    with pytest.raises(ValueError, match="all runs of the table have the same setting"):
        plot("ablation", settings().iloc[:1])


def test_wrong_tables_are_named(tmp_path, capsys):
    with pytest.raises(ValueError, match="figure is 'pie'; allowed: convergence"):
        plot("pie", memory())
    with pytest.raises(ValueError, match="table lacks the columns bytes, moment"):
        plot("memory", memory().drop(columns=["bytes", "moment"]))
    with pytest.raises(ValueError, match="no rows with metric eval_loss or train_loss"):
        plot("convergence", convergence().assign(metric="learning_rate"))
    with pytest.raises(ValueError, match="does not exist"):
        read_table(tmp_path / "no.csv")
    assert main(["memory", "--table", str(tmp_path / "no.csv"), "--output", str(tmp_path / "x")]) == 2
    assert "no.csv does not exist" in capsys.readouterr().err
    assert main(["all", "--data_dir", str(tmp_path), "--output_dir", str(tmp_path)]) == 2
    assert "holds none of the tables" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    memory().to_csv(tmp_path / "memory.csv", index=False)
    assert main(["memory", "--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "file")]) == 2
    assert "python -m misa.figures: error: [Errno" in capsys.readouterr().err


def test_all_figures_skip_tables_without_rows(tmp_path, capsys):
    staleness().iloc[:0].to_csv(tmp_path / "staleness.csv", index=False)
    words = ["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    assert main(["all", *words]) == 2
    assert "or none with rows" in capsys.readouterr().err
    memory().to_csv(tmp_path / "memory.csv", index=False)
    assert main(["all", *words]) == 0
    assert f"staleness: skipped, {tmp_path / 'staleness.csv'} has no rows" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"memory.pdf", "memory.png"}
    assert main(["staleness", *words]) == 2
    assert "table has no rows" in capsys.readouterr().err


def test_known_ending_of_an_output_is_taken_off_and_no_other(tmp_path):
    memory().to_csv(tmp_path / "memory.csv", index=False)
    for output in ("paper.v1/one.pdf", "paper.v1/two.png", "paper.v1/three.v2"):
        assert main(["memory", "--data_dir", str(tmp_path), "--output", str(tmp_path / output)]) == 0
    names = {f"{stem}.{ending}" for stem in ("one", "two", "three.v2") for ending in ("pdf", "png")}
    assert {path.name for path in (tmp_path / "paper.v1").iterdir()} == names


def test_ablation_is_drawn_from_the_tables_of_a_fresh_run_as_well(tmp_path, capsys):
    settings().to_csv(tmp_path / "settings.csv", index=False)
    words = ["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    assert main(["ablation", *words]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"ablation.pdf", "ablation.png"}
    assert main(["all", *words]) == 2  # where the settings may be those of runs for all figures
    assert f"{tmp_path / 'ablation/settings.csv'} does not exist" in capsys.readouterr().err
    (tmp_path / "ablation").mkdir()
    (tmp_path / "ablation" / "settings.csv").write_text("")
    assert main(["ablation", *words]) == 2  # its own folder comes first
    assert f"{tmp_path / 'ablation/settings.csv'} is empty" in capsys.readouterr().err


def test_times_of_another_machine_are_left_out():
    table = convergence()
    table = table[table["kind"] == "finetune"].assign(machine="a")
    alone = plot("convergence", table).axes
    again = table[table["method"] == "misa"].assign(
        machine="b", seed=7, run="other", time_s=lambda t: 100 * t["time_s"]
    )
    both = plot("convergence", pd.concat([again, table])).axes
    for axes, expected in zip(both, alone, strict=True):
        for line, other in zip(axes.lines, expected.lines, strict=True):
            assert line.get_xdata().tolist() == other.get_xdata().tolist()


def test_times_are_of_the_seeds_that_all_methods_have_on_their_machine():
    table = convergence()
    table = table[table["kind"] == "finetune"].assign(machine="a")
    # One more seed, which all but one method ran elsewhere.
    more = table[table["seed"] == table["seed"].min()].assign(seed=7, value=lambda t: 9 * t["value"])
    more["machine"] = more["method"].map(lambda method: "a" if method == "misa" else "b")
    for axes, expected in zip(
        plot("convergence", pd.concat([table, more])).axes, plot("convergence", table).axes, strict=True
    ):
        same = [
            line.get_ydata().tolist() == other.get_ydata().tolist()
            for line, other in zip(axes.lines, expected.lines, strict=True)
        ]
        assert all(same) if axes.get_xlabel() == "training time (s)" else not any(same)


def test_means_are_over_the_seeds_that_all_methods_have():
    table = convergence()
    table = table[table["kind"] == "finetune"]
    alone = plot("convergence", table).axes
    more = table[table["method"] == "misa"].assign(seed=7, run="other", value=lambda t: 9 * t["value"])
    both = plot("convergence", pd.concat([table, more])).axes
    for axes, expected in zip(both, alone, strict=True):
        assert [line.get_ydata().tolist() for line in axes.lines] == [
            line.get_ydata().tolist() for line in expected.lines
        ]


def test_text_in_the_place_of_a_number_is_named(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("run,seed,value\na,0,0.5\nb,0,nan\nc,0,\nd,0,inf\ne,1,half\n")
    with pytest.raises(ValueError, match=r"scores\.csv, line 6: value is 'half', allowed is a number"):
        read_table(path)


@pytest.mark.parametrize(("name", "column"), [("memory", "method"), ("memory", "seq_len"), ("rate", "mean_sq_norm")])
def test_cell_that_a_figure_cannot_do_without_is_named(name, column, tmp_path):
    path = tmp_path / f"{name}.csv"
    table = {"memory": memory, "rate": rate}[name]().astype(object)
    table.loc[1, column] = "" if name == "memory" else "some"
    table.to_csv(path, index=False)
    with pytest.raises(ValueError, match=rf"{name}\.csv, line 3: {column} is (empty|'some', allowed is a number)"):
        read_table(path)


def test_points_of_the_rate_are_geometric_means_so_that_their_line_has_the_slope_beside():
    rows = [("waves", True, 5, seed, k, 4.0**seed * 100 / k) for seed in (-1, 0, 1) for k in (100, 400)]
    names = ["problem", "momentum_step", "interval", "seed", "num_updates", "mean_sq_norm"]
    figure = plot("rate", pd.DataFrame(rows, columns=names))
    assert figure.axes[0].get_lines()[0].get_ydata() == pytest.approx([1.0, 0.25])
