"""Results that no run made."""

from misa.results import Machine, Provenance, Result


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
