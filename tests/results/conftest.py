"""Result files of a small study."""

import pandas as pd
import pytest
from made import result

from misa.results import CurvePoint, write_curves, write_result
from misa.results.collect import TABLES


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
