# Configuration, its check, and the names all rules share.
import importlib.util
import os
import re
import sys
from pathlib import Path

import pandas as pd
import yaml
from snakemake.exceptions import WorkflowError

# jsonschema would build a grammar of internationalized addresses, which takes longer than all else that snakemake does
# before the first job; no schema here has one.
sys.modules.setdefault("rfc3987_syntax", None)

from jsonschema import Draft202012Validator

from misa.data.sources import KNOWN
from misa.memory.models import MODEL_NAMES

# A configuration file given with --configfile that has the section `pretrain` stands for itself and needs every key; of any
# other the keys replace those in the file of its scale.
if "pretrain" not in config:
    scales = {
        path.stem: path
        for path in Path(workflow.basedir, "workflows", "config").glob("*.yaml")
    }
    scale = config.get("scale", "laptop")
    if scale not in scales:
        raise WorkflowError(f"scale is {scale!r}, allowed: {', '.join(sorted(scales))}")

    configfile: str(scales[scale])


VALIDATORS = {
    name: Draft202012Validator(
        yaml.safe_load(
            Path(
                workflow.basedir, "workflows", "schemas", f"{name}.schema.yaml"
            ).read_text()
        )
    )
    for name in ("config", "runs")
}


def check(values, schema, where):
    """Refuse values that a schema does not allow, in words that name the place, the value and what is allowed."""
    for error in VALIDATORS[schema].iter_errors(values):
        places = [where, ".".join(map(str, error.absolute_path)), error.message]
        allowed = ""
        if error.validator == "additionalProperties":
            allowed = f"; allowed: {', '.join(error.schema['properties'])}"
        elif (
            error.validator == "required"
            and error.schema is VALIDATORS["config"].schema
        ):
            allowed = "; a file with the section pretrain stands for itself and needs every key of a scale"
        elif error.validator != "required" and "description" in error.schema:
            allowed = f" ({error.schema['description']})"
        raise WorkflowError(f"{': '.join(filter(None, places))}{allowed}")


check(dict(config), "config", "configuration")


SCALE = config["scale"]
CACHED = config["results"] == "cached"
STUDY = config["study"]
if not Path("paper_figures", "data").is_dir() and (
    CACHED or workflow.overwrite_workdir is None
):
    raise WorkflowError(
        f"{os.getcwd()} has no folder paper_figures/data: run snakemake in the checkout, or with --directory CHECKOUT"
    )
OUT = f"results/{SCALE}"
LOGS = f"{OUT}/logs"
SCRATCH = f"scratch/{SCALE}"
BASE_MODEL = f"results/inputs/models/{config['base_model']}"

# Where `freeze` puts the tables: those of a study of one question lie beside those of the headline comparison.
FROZEN = "paper_figures/data" if STUDY == "headline" else f"paper_figures/data/{STUDY}"
# Cached tables and figures are committed; fresh ones lie elsewhere, so that a run never changes what is committed.
TABLES = "paper_figures/data" if CACHED else f"{OUT}/tables"
FIGURES = "paper_figures" if CACHED else f"{OUT}/figures"
SCORES = "paper_figures/tables" if CACHED else f"{OUT}/tables"
# The pages of the report are made from either and committed from neither.
PAGES = "results/cached/pages" if CACHED else f"{OUT}/pages"
# Folder of the memory grid that tables and pages show, "" if they show none.
GRID = TABLES if CACHED else ""
if config["memory_grid"]["in_all"] and not CACHED:
    GRID = f"{OUT}/memory_grid"
# What the report calls it: the committed tables are of several scales.
SHOWN = "committed" if CACHED else SCALE

# Figure -> the table it is drawn from.
FIGURE_TABLES = {
    "convergence": "convergence",
    "gradient_variance": "variance",
    "gradient_norms": "gradient_norms",
    "staleness": "staleness",
    "rate": "rate",
    "ablation": "settings",
    "memory": "memory",
    "memory_sequence": "memory_grid",
    "memory_stacked": "memory_grid",
    "memory_delta": "memory_sweep",
    "memory_fit": "memory_fit",
    "scores": "scores",
}
# Tables that only one study makes, by its name.
STUDY_TABLES = {
    "ablation": "ablation",
    "learning_rates": "tune",
    "finetune_rates": "finetune_rates",
}
# Tables of the variance, which a scale without pre-training does not measure.
VARIANCE_TABLES = ["variance", "gradient_norms", "staleness"]
# Tables and figures of the full-size model, which a scale may leave out.
GRID_TABLES = ["memory_grid", "memory_sweep", "memory_fit", "memory_levers"]
GRID_FIGURES = [name for name, table in FIGURE_TABLES.items() if table in GRID_TABLES]
ALL_TABLES = [
    "convergence",
    "scores",
    "memory",
    "variance",
    "gradient_norms",
    "staleness",
    "rate",
    "settings",
    "runs",
]

# Of a study of one question no more is committed than its own table and that of what scales take are made of.
FROZEN_TABLES = ALL_TABLES if STUDY == "headline" else ["runs", "settings"]

# Heavy jobs take all cores and run one after another: more threads than --cores allows are scaled down to it.
THREADS = config["threads"] or os.cpu_count()

sheet_file = next(
    (
        path
        for path in (Path(config["sheet"]), Path(workflow.basedir, config["sheet"]))
        if path.is_file()
    ),
    None,
)
if sheet_file is None:
    raise WorkflowError(f"sheet {config['sheet']} does not exist")


def read_sheet(path):
    """Rows of a run sheet: tab separated, names of the columns first; empty lines and those that begin with # are none."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise WorkflowError(f"{path} is no text in UTF-8: {error}") from None
    numbered = [
        (number, line.split("\t"))
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.startswith("#")
    ]
    if len(numbered) < 2:
        raise WorkflowError(
            f"{path} has no rows: it needs a line of names (run, kind, args) and a line for each run, with tabs between"
        )
    (_, columns), *numbered = numbered
    rows = []
    for number, cells in numbered:
        if len(cells) != len(columns):
            raise WorkflowError(
                f"{path}, line {number}: {len(cells)} cells, and the first line names {len(columns)}, "
                f"with tabs between: {', '.join(columns)}"
            )
        row = dict(zip(columns, map(str.strip, cells)))
        check(row, "runs", f"{path}, line {number} (run {cells[0]!r})")
        rows.append(row)
    return pd.DataFrame(rows, dtype=str)


RUNS = read_sheet(sheet_file)
if repeated := sorted(RUNS["run"][RUNS["run"].duplicated()]):
    raise WorkflowError(f"{sheet_file}: run {repeated[0]!r} occurs twice")


def check_names():
    """Refuse names that the package does not know, as far as that takes no library that is slow to load."""
    # Importing the methods takes torch, for seconds.
    source = "".join(
        path.read_text() for path in Path(workflow.basedir).glob("misa/methods/*.py")
    )
    methods = re.findall(r'[mM]ethod\(\s*"(\w+)"', source)
    names = {name for known in KNOWN.items() for name in (known[0], *known[1].others)}
    places = [("memory_grid.model", config["memory_grid"]["model"], MODEL_NAMES)]
    places += [
        (f"mixes.{mix}.sets", name, sorted(names))
        for mix in MIXES
        for name in MIXES[mix]["sets"]
    ]
    places += [
        (f"{sheet_file}: method of run {row.run}", method, methods)
        for row in RUNS.itertuples()
        for method in re.findall(
            r"--method[ =]+['\"]?(\w+)", f"{row.shared} {row.args}"
        )
    ]
    for place, name, allowed in places:
        if name not in allowed:
            raise WorkflowError(f"{place}: {name!r}, allowed: {', '.join(allowed)}")
    for package in config["corpus"]["packages"] if not CACHED else ():
        if importlib.util.find_spec(package) is None:
            raise WorkflowError(
                f"corpus.packages: {package!r}, which is not installed; give the names packages are imported by"
            )


def share_out(args, num_processes):
    """Options of a training command with the sequences of a step shared out among processes."""
    names = ("gradient_accumulation_steps", "per_device_train_batch_size")
    for name in names:
        # The last one counts.
        *_, found = [None, *re.finditer(rf"--{name} (\d+)", args)]
        if found and int(found[1]) % num_processes == 0:
            share = int(found[1]) // num_processes
            return f"{args[: found.start()]}--{name} {share}{args[found.end() :]}"
    raise WorkflowError(
        f"gpus is {num_processes}: it must divide {' or '.join(names)} of the training commands"
    )


# What a run is trained on: the text of the scale, its generated questions, or a mix of real sets.
DATA_DIR = os.path.realpath(config["data_dir"]) if "data_dir" in config else None
if DATA_DIR is not None and not os.path.isdir(DATA_DIR):
    raise WorkflowError(f"data_dir is {config['data_dir']!r}, which is no folder")
MIXES = config["mixes"]
BUILT_IN = {"pretrain": "corpus", "finetune": "family"}
if "data" not in RUNS:
    RUNS["data"] = ""
RUNS["data"] = RUNS["data"].where(RUNS["data"] != "", RUNS["kind"].map(BUILT_IN))
for row in RUNS.itertuples():
    if row.data != BUILT_IN[row.kind] and (
        row.kind == "pretrain" or row.data not in MIXES
    ):
        raise WorkflowError(
            f"{sheet_file}: data of run {row.run} is {row.data!r}, allowed: {', '.join(MIXES) or 'none'}"
        )
# Arguments that all runs on the same data get.
RUNS["shared"] = [
    " ".join(
        filter(
            None, [config[row.kind]["args"], MIXES.get(row.data, {}).get("train", "")]
        )
    )
    for row in RUNS.itertuples()
]
# Several GPUs of a training job: a process for each, and the same sequences in a step.
LAUNCH = "python -m"
if config["gpus"] > 1:
    LAUNCH = f"torchrun --standalone --nproc_per_node={config['gpus']} -m"
    RUNS["shared"] = [share_out(args, config["gpus"]) for args in RUNS["shared"]]
# Real sets lie in a local folder: without one, runs on them are left out.
LEFT_OUT = RUNS[RUNS["data"].isin(MIXES) & (DATA_DIR is None)]
RUNS = RUNS.drop(LEFT_OUT.index)
if RUNS.empty and not CACHED:
    raise WorkflowError(
        f"all runs of {sheet_file} train on real sets: name their folder by --config data_dir=FOLDER"
    )
check_names()
for run in config["variance"]["runs"]:
    if run not in set(RUNS["run"]):
        raise WorkflowError(
            f"variance.runs names {run!r}, which is not in {sheet_file}"
        )


def table_of(figure):
    """Path of the table that a figure is drawn from."""
    table = FIGURE_TABLES[figure]
    if CACHED and figure in STUDY_TABLES:
        return f"{TABLES}/{figure}/{table}.csv"
    folder = f"{OUT}/memory_grid" if table in GRID_TABLES and not CACHED else TABLES
    return f"{folder}/{table}.csv"


def settings_of(name):
    """Path of the table of settings that a study's own table is made from."""
    folder = f"{TABLES}/{STUDY_TABLES[name]}" if CACHED else TABLES
    return f"{folder}/settings.csv"


def is_drawn(figure):
    """Whether a figure is among those of the scale; of cached ones, whether its table was frozen."""
    if CACHED:
        return Path(table_of(figure)).is_file()
    if figure in STUDY_TABLES:
        return STUDY == STUDY_TABLES[figure]
    if FIGURE_TABLES[figure] in VARIANCE_TABLES:
        return bool(config["variance"]["runs"])
    return figure not in GRID_FIGURES or config["memory_grid"]["in_all"]


DRAWN = [figure for figure in FIGURE_TABLES if is_drawn(figure)]
WRITTEN = [
    name
    for name, study in STUDY_TABLES.items()
    if (Path(settings_of(name)).is_file() if CACHED else study == STUDY)
]


def claim_of(figure):
    """Category of a figure in the report."""
    if figure.startswith("memory"):
        return "Memory"
    return "Gradient variance" if figure.startswith("gradient") else "Convergence"


def finished(*paths):
    """These paths, if all are there."""
    for path in paths:
        if not Path(path).is_file():
            raise WorkflowError(
                f"{path} does not exist: there is nothing to copy before the scale {SCALE} has been run"
            )
    return list(paths)


def runs_of(*kinds):
    """Names of the runs of some kinds, in the order of the sheet."""
    return RUNS["run"][RUNS["kind"].isin(kinds)].tolist()


def data_of(run):
    """What a run is trained on, and its model is scored on; the base model once for each."""
    if run.partition("-")[0] == "base":
        return run.partition("-")[2] or BUILT_IN["finetune"]
    return RUNS.set_index("run").at[run, "data"]


def base_runs():
    """Names of the evaluations of the base model: one for all that is fine-tuned on, `base` for what is built in."""
    used = dict.fromkeys(RUNS["data"][RUNS["kind"] == "finetune"])
    return ["base" if data == BUILT_IN["finetune"] else f"base-{data}" for data in used]


def one_of(names):
    """Pattern for a wildcard that is one of some names; matches nothing if there are none."""
    return "|".join(names) or "(?!)"


# Two cores are soon oversubscribed: waiting threads sleep instead of spinning. Rules run in this very environment.
for name, value in {
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}.items():
    os.environ.setdefault(name, value)
os.environ.update(
    # By this the jobs of this folder are known, see `end_orphans`.
    MISA_WORKFLOW=os.getcwd(),
    # Commands read it there, so that another folder makes no other command.
    MISA_DATA_DIR=DATA_DIR or "",
    PATH=os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()]),
)
