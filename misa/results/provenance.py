"""Say where a result comes from: code, versions, machine, command and data."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from misa._version import __version__
from misa.results.schema import Machine, Provenance

# The libraries whose version can change a number in a result.
LIBRARIES = (
    "torch",
    "numpy",
    "transformers",
    "tokenizers",
    "accelerate",
    "datasets",
    "peft",
    "safetensors",
    "gguf",
    "pytorch_optimizer",
    "reasoning_gym",
    "lm_eval",
)

PACKAGE_FOLDER = Path(__file__).resolve().parents[1]


def provenance(command: Sequence[str], data_digest: str = "") -> Provenance:
    """Describe this process as the origin of a result.

    Args:
        command: The command line as a list of words, such as `["python", "-m", "misa.train", ...]`.
        data_digest: SHA-256 over the data files read, 64 hexadecimal digits, or "" if there are none.

    Returns:
        The filled description; the time of creation is now, in UTC.
    """
    commit, dirty = _checkout()
    return Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=list(command),
        misa_version=__version__,
        package_digest=package_digest(),
        commit=commit,
        dirty=dirty,
        versions=library_versions(),
        machine=describe_machine(),
        data_digest=data_digest,
    )


def package_digest(folder: str | Path = PACKAGE_FOLDER) -> str:
    """Return one SHA-256 over the paths and contents of all Python files of a package.

    Two runs with the same digest ran the same code, installed or from a checkout, committed or not.

    Args:
        folder: The package's folder; the default is this package.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        # Line ends may be rewritten by a checkout, and do not change what the code does.
        digest.update(hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).digest())
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of those of `LIBRARIES` that are installed."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def describe_machine() -> Machine:
    """Describe the machine this process runs on."""
    import torch

    return Machine(
        processor=_processor(),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=_memory_bytes(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        num_threads=torch.get_num_threads(),
    )


def peak_rss_bytes() -> int:
    """Return the largest resident set this process has had, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0  # the system does not say


def _checkout() -> tuple[str, bool]:
    """Return the commit the package runs from and whether its tracked files were changed since."""
    root = PACKAGE_FOLDER.parent
    top = _git(root, "rev-parse", "--show-toplevel")
    # An installed copy may lie in some other project's checkout, whose commit says nothing about this code.
    if top is None or Path(top).resolve() != root:
        return "", False
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return "", False
    return commit, bool(
        _git(
            root,
            "status",
            "--porcelain",
            "--untracked-files=no",
            "--",
            PACKAGE_FOLDER.name,
        )
    )


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
