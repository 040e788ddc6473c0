# What happens before the first job and after the last one.
import fcntl
import hashlib
import json
import subprocess

import psutil


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
    manifests = [*Path(TABLES).rglob("MANIFEST.json"), Path(TABLES, "memory_grid.json")]
    for manifest in filter(Path.is_file, manifests) if CACHED else ():
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
    """Write results/<scale>/report.html with snakemake's own report, if all that it shows is there."""
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
        "--directory",
        os.getcwd(),
        "--quiet",
        "all",
    ]
    page = f"{OUT}/report.html"
    subprocess.run(
        [*command, "--configfile", str(resolved), "--report", page],
        check=True,
    )
    print(f"report: {page}")
