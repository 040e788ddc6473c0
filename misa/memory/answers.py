"""What the command says of a model that need not be there: peak, breakdown, what would lower it, what fits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from misa.memory.closed_form import uncovered
from misa.memory.draws import NUM_DRAWS, Draws
from misa.memory.fit import NEAR, TOKEN_STEP, Plan, draw_measured, largest_batch, measure_worst, worst_bytes
from misa.memory.models import configuration
from misa.memory.scenario import ALL_LAYERS, Laboratory, Scenario, is_blockwise
from misa.memory.sizes import GIB, in_gib
from misa.memory.step import StepMemory
from misa.memory.variants import VARIANTS, Variant

NOT_COUNTED = (
    "Bytes of tensors, each rounded up to 512. A GPU adds its context (some 0.3 to 0.6 GiB), workspaces of matrix "
    "products and an allocator that fragments (a few per cent)."
)

_BUDGETS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5)


def explain(scenario: Scenario, num_draws: int = NUM_DRAWS) -> dict[str, Any]:
    """Measure one scenario: with the blocks drawn, and for block methods with the worst draw and the mean over draws.

    Args:
        scenario: What to measure.
        num_draws: Draws of the mean, by the closed form.

    Returns:
        A dictionary that JSON can hold. Where there is no closed form, `no_closed_form` says why, and what comes of it
        is left out: the worst draw, the mean, and what would lower the peak.
    """
    laboratory = Laboratory(scenario)
    drawn = laboratory.active
    memory = laboratory.measure()
    found: dict[str, Any] = {"scenario": asdict(scenario), "num_params": laboratory.num_params, **_step(memory)}
    found["settings"] = {k: list(v) if isinstance(v, tuple) else v for k, v in laboratory.settings.items()}
    if laboratory.blocks:
        names = [laboratory.blocks[i].name for i in drawn]
        found["draw"] = {"used": names, "used_bytes": memory.peak.total_bytes}
    if why := uncovered(scenario, laboratory.config):
        return {**found, "no_closed_form": why}
    draws = Draws(laboratory, num_draws)
    estimate = draws.estimate(drawn)
    found["closed_form"] = {"peak_bytes": estimate.peak_bytes, "moment": estimate.moment}
    if laboratory.blocks:
        lowest = draws.lowest_layers()
        # The formula that looks for it errs by a little: the draw at hand may take more.
        looked_for = (measure_worst(laboratory).peak.total_bytes, laboratory.active)
        worst_bytes, worst = max(looked_for, (memory.peak.total_bytes, drawn))
        found["draw"] |= {
            "worst": [laboratory.blocks[i].name for i in worst],
            "worst_bytes": worst_bytes,
            "mean_bytes": round(draws.mean_bytes()),
            "num_draws": num_draws,
            "mean_lowest_layer": sum(lowest) / len(lowest),
        }
    found["would_lower"] = _levers(scenario, laboratory, drawn)
    return found


def _step(memory: StepMemory) -> dict[str, Any]:
    peak = memory.peak
    return {
        "peak_bytes": peak.total_bytes,
        "by_category": peak.by_category,
        "phase": peak.phase,
        "operation": peak.operation,
        "moments": {name: moment.total_bytes for name, moment in memory.moments.items()},
    }


def _levers(scenario: Scenario, laboratory: Laboratory, draw: Sequence[int]) -> list[dict[str, Any]]:
    """What one change each saves of the peak of a draw, by the closed form, the largest saving first."""
    changes: list[tuple[str, dict[str, Any]]] = []
    if scenario.loss == "full":
        changes.append(("--loss chunked", {"loss": "chunked"}))
    # The command takes one of the two.
    all_layers = "--checkpointing" + (" instead of --checkpoint_layers" if scenario.checkpointing > 0 else "")
    if scenario.checkpointing != ALL_LAYERS:
        changes.append((all_layers, {"checkpointing": ALL_LAYERS}))
    if not scenario.lean_activations:
        changes.append(("--lean_activations", {"lean_activations": True}))
    if scenario.loss == "full" and scenario.checkpointing != ALL_LAYERS:
        both = {"loss": "chunked", "checkpointing": ALL_LAYERS}
        changes.append((f"--loss chunked {all_layers}", both))
    if is_blockwise(scenario.method) and scenario.dtype == "bfloat16":
        changes += [
            (f"--state_format {name}", {"state_format": name})
            for name in ("bf16", "8bit")
            if name != scenario.state_format
        ]
    if scenario.seq_len > 1:
        changes.append((f"--seq_len {scenario.seq_len // 2}", {"seq_len": scenario.seq_len // 2}))
    now = Draws(laboratory, 1).estimate(draw).peak_bytes
    found = []
    for words, fields in changes:
        saved = now - Draws(laboratory, 1, **fields).estimate(draw).peak_bytes
        if saved > 0.001 * now:
            found.append({"change": words, "saves_bytes": saved})
    return sorted(found, key=lambda lever: -lever["saves_bytes"])


def print_explained(found: dict[str, Any]) -> None:
    """Print what `explain` returned."""
    s = found["scenario"]
    layers = s["checkpointing"]
    recompute = "" if not layers else f", {'all' if layers == ALL_LAYERS else layers} layers checkpointed"
    print(f"{s['model']}, {s['method']}, {s['batch_size']} x {s['seq_len']} tokens, {s['loss']} loss{recompute}")
    print(f"peak {in_gib(found['peak_bytes'])} in the {found['phase']} at {found['operation']}")
    for category, num in found["by_category"].items():
        print(f"  {category:12} {num / GIB:8.3f} GiB")
    for name, num in found["moments"].items():
        if name != "peak":
            print(
                f"{name.replace('_', ' of ').replace('end of', 'end'):14} {num / GIB:8.3f} GiB".replace(
                    " of end", " end"
                )
            )
    if draw := found.get("draw"):
        print(f"this draw: {', '.join(draw['used'][:4])}{', ...' if len(draw['used']) > 4 else ''}")
        if "worst_bytes" in draw:
            print(
                f"worst draw found {in_gib(draw['worst_bytes'])}, mean of {draw['num_draws']} draws "
                f"{in_gib(draw['mean_bytes'])} (formula), lowest layer on average {draw['mean_lowest_layer']:.1f}"
            )
    if why := found.get("no_closed_form"):
        print(f"nothing on {'worse draws and ' if draw else ''}what would lower it: {why}")
    else:
        print(f"closed form: {in_gib(found['closed_form']['peak_bytes'])}, at {found['closed_form']['moment']}")
        if found["would_lower"]:
            print("would lower it, each alone, by the closed form:")
        for lever in found["would_lower"]:
            print(f"  {lever['change']:34} -{in_gib(lever['saves_bytes'])}")
    print(NOT_COUNTED)


def compare(base: Scenario, variants: Sequence[str], folder: Path | None) -> list[dict[str, Any]]:
    """Measure forms of all methods in one setting, block methods by `measure_worst`; draw stacked bars.

    Args:
        base: Model, batch, sequence, checkpointing, loss.
        variants: Keys of `VARIANTS`.
        folder: Where `memory_compare.pdf`, `.png` and `.csv` go, or None.

    Returns:
        One dictionary for each form.
    """
    found = []
    for name in variants:
        variant = VARIANTS[name]
        laboratory = Laboratory(_of(variant, base))
        step, draw = _step(measure_worst(laboratory)), draw_measured(laboratory)
        found.append({"variant": name, "label": variant.label, "method": variant.method, "draw": draw, **step})
        print(_row(variant.label, step), flush=True)
    _warn(found)
    if folder is not None:
        _draw(found, base, folder)
    return found


def _warn(found: Iterable[dict[str, Any]]) -> None:
    """Say of which forms no worst draw was found."""
    labels = [row["label"] for row in found if row["draw"] == "at hand"]
    if labels:
        print(f"a draw at hand, others may take more (no closed form for this model): {', '.join(labels)}")


def _of(variant: Variant, base: Scenario) -> Scenario:
    same = ("model", "batch_size", "seq_len", "checkpointing", "loss", "dtype", "lean_activations")
    return variant.scenario(**{name: getattr(base, name) for name in same})


def _row(label: str, step: dict[str, Any]) -> str:
    parts = "  ".join(f"{category} {num / GIB:.2f}" for category, num in step["by_category"].items() if num)
    return f"{label:26} {step['peak_bytes'] / GIB:7.2f} GiB   {parts}"


def _draw(found: Iterable[dict[str, Any]], base: Scenario, folder: Path) -> None:
    import pandas as pd

    from misa.figures import plot
    from misa.figures.style import save
    from misa.files import write_csv
    from misa.memory.command import COLUMNS

    rows = [
        {
            "method": row["label"],
            "model": base.model,
            "batch_size": base.batch_size,
            "seq_len": base.seq_len,
            "checkpointing": base.checkpointing != 0,
            "category": category,
            "bytes": num,
            "moment": "peak",
        }
        for row in found
        for category, num in row["by_category"].items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "memory_compare.csv", COLUMNS, rows)
    paths = save(plot("memory", pd.DataFrame(rows, columns=list(COLUMNS))), folder / "memory_compare")
    print(f"drawn: {', '.join(map(str, paths))}")


def fit(base: Scenario, variants: Sequence[str], limit_bytes: int) -> list[dict[str, Any]]:
    """The most tokens of a step that fit, for each form of a method; for budgets also the largest at the given length.

    Args:
        base: Model, checkpointing, loss; its sequence is that of the largest budget.
        variants: Keys of `VARIANTS`.
        limit_bytes: What there is.

    Returns:
        One dictionary for each form.
    """
    found = []
    with_budget = any(map(has_budget, variants))
    if with_budget:
        base.check_length(configuration(base.model))
    for name in variants:
        variant = VARIANTS[name]
        # Every batch that is tried has sizes of its own.
        laboratory = Laboratory(replace(_of(variant, base), batch_size=1, seq_len=1))
        most = largest_batch(laboratory, limit_bytes)
        found.append({"variant": name, "label": variant.label, "draw": draw_measured(laboratory), **most})
        if most["num_tokens"]:
            least = "at least " if most["at_least"] else ""
            sizes = f"{least}{most['num_tokens']:6} tokens ({most['batch_size']} x {most['seq_len']})"
            print(f"{variant.label:26} {sizes}, {in_gib(most['peak_bytes'])}", flush=True)
        else:
            print(f"{variant.label:26} none: {TOKEN_STEP} tokens take {in_gib(most['peak_bytes'])}", flush=True)
    _warn(found)
    if with_budget:
        budget = largest_budget(base, limit_bytes)
        at_least = budget == _BUDGETS[-1]
        found.append({"variant": "misa", "largest_budget": budget, "at_least": at_least})
        said = {None: "not looked for", 0: "none"}.get(budget) or f"{'at least ' if at_least else ''}{budget:.3f}"
        print(f"MISA's largest budget at {base.batch_size} x {base.seq_len} tokens: {said}")
    return found


def largest_budget(base: Scenario, limit_bytes: int) -> float | None:
    """MISA's largest budget whose worst draw fits, among those tried.

    Args:
        base: Model, batch, sequence, checkpointing, loss.
        limit_bytes: What there is.

    Returns:
        The budget, at most 0.5; 0 if none fits, None where no closed form finds the worst draw.
    """
    misa = replace(base, method="misa", options={})
    if uncovered(misa, configuration(base.model)):
        return None
    for budget in reversed(_BUDGETS):
        try:
            laboratory = Laboratory(replace(misa, options={"budget": budget}))
        except ValueError:
            break  # no block of a small model fits into so small a budget
        if worst_bytes(laboratory) <= NEAR * limit_bytes and measure_worst(laboratory).peak.total_bytes <= limit_bytes:
            return budget
    return 0.0


def print_plan(chosen: Plan) -> None:
    """Print the setting that a memory budget led to, and why."""
    s = chosen.scenario
    print(f"{s.model}, {s.method}, {s.batch_size} x {s.seq_len} tokens:")
    print(f"  budget         {s.options.get('budget', 'of the method')}")
    print(f"  loss           {s.loss}")
    print(f"  checkpointing  {'all layers' if s.checkpointing == ALL_LAYERS else f'{s.checkpointing} layers'}")
    print(f"  activations    {'lean' if s.lean_activations else 'all kept'}")
    print(f"  state format   {s.state_format or 'master'}")
    for reason in chosen.reasons:
        print(f"- {reason}")
    print(NOT_COUNTED)


def has_budget(name: str) -> bool:
    """Whether a variant has a budget, whose largest value `fit` looks for."""
    return "budget" in VARIANTS[name].options


def all_variants(names: str | None) -> list[str]:
    """Check a comma separated list of forms of methods; None means all.

    Raises:
        ValueError: For an unknown name.
    """
    if names is None:
        return list(VARIANTS)
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in VARIANTS]
    if unknown or not chosen:
        raise ValueError(f"variants is {names!r}; allowed, comma separated: {', '.join(VARIANTS)}")
    return chosen
