# Configuration, its check, and the names all rules share.
import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import psutil
import yaml
from snakemake.exceptions import WorkflowError

# jsonschema would build a grammar of internationalized addresses, which takes longer than all else that snakemake does
# before the first job; no schema here has one.
sys.modules.setdefault("rfc3987_syntax", None)

from jsonschema import Draft202012Validator

# A configuration file given with --configfile stands for itself; otherwise the scale names one.
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
        elif "description" in error.schema:
            allowed = f" ({error.schema['description']})"
        raise WorkflowError(f"{': '.join(filter(None, places))}{allowed}")


check(dict(config), "config", "configuration")


SCALE = config["scale"]
CACHED = config["results"] == "cached"
STUDY = config["study"]
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
# However the folder is written, it is the same one, and what was made of it stays.
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
    PATH=os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()]),
)


def hold_lock():
    """Refuse to run beside another run of this folder.

    The lock is the system's and goes away with the process, so after a kill the same command works again; snakemake's
    own lock files would stay.
    """
    global lock_file
    lock_file = open(".snakemake/running.lock", "w")
    try:
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise WorkflowError(
            "another snakemake is running in this folder; wait until it has finished"
        ) from None


def end_orphans():
    """End jobs of an earlier run whose snakemake was killed: they would write beside the same job started again.

    This run holds the lock, so that no snakemake waits for them any more; a run that was trained goes on from its
    checkpoint. A command that someone started by hand has not the variable that jobs get.
    """
    for process in psutil.process_iter(["cmdline", "environ"]):
        words, variables = process.info["cmdline"] or [], process.info["environ"] or {}
        is_job = any(word.startswith("misa.") for word in words)
        is_ours = any(f"{OUT}/" in word for word in words)
        if variables.get("MISA_WORKFLOW") == os.getcwd() and is_job and is_ours:
            print(
                f"ending process {process.pid}, left over from a run that was killed",
                file=sys.stderr,
            )
            process.kill()
            psutil.wait_procs([process], timeout=5)


def check_frozen():
    """Refuse committed tables that are not those which were collected from result files."""
    for manifest in Path(TABLES).rglob("MANIFEST.json") if CACHED else ():
        try:
            described = {
                manifest.parent / name: entry["sha256"]
                for name, entry in json.loads(manifest.read_text())["tables"].items()
            }
        except (ValueError, TypeError, KeyError) as error:
            raise WorkflowError(f"{manifest} is no manifest: {error!r}") from None
        for table, digest in described.items():
            # A study of one question keeps only what its own table is made from.
            if (
                table.is_file()
                and hashlib.sha256(table.read_bytes()).hexdigest() != digest
            ):
                raise WorkflowError(
                    f"{table} was changed since it was collected: its SHA-256 is not that of {manifest}; "
                    "take the committed one back, or collect it anew"
                )


def name_left_out():
    """Say which runs of the sheet are not made, since they need real sets and no folder was given."""
    if len(LEFT_OUT) and not CACHED:
        print(
            f"left out, because data_dir is not given: {', '.join(LEFT_OUT['run'])}",
            file=sys.stderr,
        )


def write_report(targets):
    """Write results/report.html with snakemake's own report, if all that it shows is there."""
    if CACHED or not all(Path(target).exists() for target in targets):
        return
    resolved = Path(OUT, "config.yaml")
    resolved.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        str(workflow.main_snakefile),
        "--quiet",
        "all",
    ]
    subprocess.run(
        [*command, "--configfile", str(resolved), "--report", "results/report.html"],
        check=True,
    )
    print("report: results/report.html")
