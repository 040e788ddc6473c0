"""A small table for every figure, as `misa.results` writes them."""

import pandas as pd

from misa.figures import memory_sequence
from misa.figures import style as s
from misa.memory.tracker import CATEGORIES

METHODS = ["adamw", "lora", "badam", "lisa", "misa"]


def convergence():
    return pd.DataFrame(
        [
            (
                kind,
                f"{kind}-{method}-s{seed}",
                method,
                seed,
                step,
                100 * step,
                1.5 * step,
                "eval_loss",
                3 - step / 40 + seed / 9,
            )
            for kind in ("finetune", "pretrain")
            for method in METHODS
            for seed in (0, 1)
            for step in range(0, 50, 10)
        ],
        columns=["kind", "run", "method", "seed", "step", "tokens", "time_s", "metric", "value"],
    )


def gradient_variance():
    names = ["relative_variance", "variance", "variance_mc", "variance_mc_stderr", "captured_share"]
    names += ["captured_share_q05", "captured_share_q95", "active_share"]
    values = [12.0, 120.0, 121.0, 2.0, 0.2, 0.0, 0.5, 0.03]
    return pd.DataFrame(
        [
            (f"checkpoint-{step}", step, scheme, name, value * (1 + i / 7 if "share" not in name else 1))
            for step in (0, 50)
            for i, scheme in enumerate(s.SCHEMES)
            for name, value in zip(names, values, strict=True)
        ],
        columns=["snapshot", "step", "scheme", "quantity", "value"],
    )


def gradient_norms():
    return pd.DataFrame(
        [
            ("checkpoint-5", 5, f"layers.{layer}.{matrix}", layer, matrix, 64, 10.0**-i * (layer + 1), 0.1)
            for layer in range(3)
            for i, matrix in enumerate(["q_proj", "k_proj", "down_proj"])
        ],
        columns=["snapshot", "step", "block", "layer", "matrix", "numel", "sq_norm", "noise"],
    )


def staleness():
    aged = [("round_start", 5), ("round_start", 10), ("snapshot", 40)]
    kept = [(source, 0) for source in ("eta1", "auto", "auto_probed")]
    known = [(source, 0) for source in ("uniform", "fresh_eta1", "fresh_auto", "oracle")]
    return pd.DataFrame(
        [
            ("checkpoint-5", 5 + number, "" if age else "auto", source, age, quantity, value)
            for number in (0, 10)
            for i, (source, age) in enumerate([*aged, *kept, *known])
            for quantity, value in (("rank_correlation", 1 - i / 20), ("captured_share", 0.05 + i / 50 + number / 999))
            if quantity == "captured_share" or (source, age) not in known
        ],
        columns=["snapshot", "step", "policy", "source", "age", "quantity", "value"],
    )


def rate():
    return pd.DataFrame(
        [
            (problem, line_16, interval, 0, k, 0.3 / k**0.5, interval * k ** (-0.5 - 0.1 * line_16))
            for problem in ("waves", "llama")
            for line_16 in (True, False)
            for interval in (1, 5, 20, 50)
            for k in (50, 100, 200)
        ],
        columns=["problem", "momentum_step", "interval", "seed", "num_updates", "lr", "mean_sq_norm"],
    )


def settings():
    common = {"method": "misa", "granularity": "matrix", "eta": "auto", "interval": 10.0, "probe_every": 0}
    others = [
        *({"method": "misa_paper"}, {"granularity": "layer"}, {"granularity": "layer", "eta": "0.0"}, {"eta": "0.0"}),
        *({"interval": 5.0}, {"interval": 50.0}),
    ]
    return pd.DataFrame(
        [
            {"run": f"{i}-s{seed}", "kind": "pretrain", "seed": seed, **common, **other}
            | {"eval_loss": 5 + seed + i / 10}
            for seed in (0, 1)
            for i, other in enumerate([{}, *others])
        ]
    )


def memory():
    return pd.DataFrame(
        [
            (method, "m", 4, 128, False, category, 2**20 * (i + j + 1), "peak")
            for i, method in enumerate(METHODS)
            for j, category in enumerate(CATEGORIES)
        ],
        columns=["method", "model", "batch_size", "seq_len", "checkpointing", "category", "bytes", "moment"],
    )


def memory_grid():
    forms = [("adamw", "adamw"), ("lora-r16", "lora"), ("badam", "badam"), ("misa-1", "misa"), ("misa-3", "misa")]
    return pd.DataFrame(
        [
            (
                variant,
                method,
                variant,
                "m",
                1,
                length,
                checkpointing,
                "full",
                draw,
                category,
                2**30 * (i + length / 999),
            )
            for i, (variant, method) in enumerate(forms)
            for length in (512, 1024, 4096)
            for checkpointing in (False, True)
            for draw, categories in (("worst", CATEGORIES), ("mean", ["total"]))
            for category in categories
        ],
        columns=[*memory_sequence.COLUMNS[:9], "category", "bytes"],
    )


def memory_sweep():
    return pd.DataFrame(
        [
            (method, "m", budget, length, draw, 2**34, 2**34 + 2**30 * budget * length)
            for method, budgets in (("badam", [0.027]), ("misa", [0.01, 0.03, 0.25]))
            for budget in budgets
            for length in (512, 2048)
            for draw in ("worst", "mean")
        ],
        columns=["method", "model", "budget", "seq_len", "draw", "weights_bytes", "bytes"],
    )


def memory_fit():
    return pd.DataFrame(
        [
            (method, method, method, "m", 24 * 2**30, loss, 0 if method == "adamw" else 128 * (i + j + 1))
            for i, method in enumerate(METHODS)
            for j, loss in enumerate(["full", "chunked"])
        ],
        columns=["variant", "method", "label", "model", "limit_bytes", "loss", "num_tokens"],
    )


def scores():
    return pd.DataFrame(
        [
            (f"{method}-s{seed}", method, seed, "family", "exact_match", 0.1 * i + 0.05 * seed, 0.02, 200, "1.0")
            for i, method in enumerate(["none", *METHODS])
            for seed in range(2 if i else 1)
        ],
        columns=["run", "method", "seed", "task", "metric", "value", "stderr", "num_documents", "task_version"],
    )


TABLES = {
    "convergence": convergence,
    "gradient_variance": gradient_variance,
    "gradient_norms": gradient_norms,
    "staleness": staleness,
    "rate": rate,
    "ablation": settings,
    "memory": memory,
    "memory_sequence": memory_grid,
    "memory_stacked": memory_grid,
    "memory_delta": memory_sweep,
    "memory_fit": memory_fit,
    "scores": scores,
}
