"""What fits: the largest batch of tokens in a given memory, and the setting that a memory budget asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from misa.memory.closed_form import uncovered
from misa.memory.draws import Draws
from misa.memory.models import configuration, longest_sequence
from misa.memory.scenario import ALL_LAYERS, Laboratory, Scenario, is_blockwise
from misa.memory.sizes import in_gib
from misa.memory.step import StepMemory

TOKEN_STEP = 128
_MAX_TOKENS = 2**20
#: The formula decides what is worth measuring: what it puts below so many times the limit, since it errs by 3 %.
NEAR = 1.03
#: Budgets tried where none is given, the paper's first, then smaller ones.
BUDGETS = (0.03, 0.02, 0.01, 0.005)


def measure_worst(laboratory: Laboratory, **changes: Any) -> StepMemory:
    """Measure a step; of a block method, with the worst draw that the closed form finds for the setting, if it can.

    Args:
        laboratory: What trains.
        **changes: Fields of the scenario to change.
    """
    if draw_measured(laboratory) == "worst":
        laboratory.switch_to(Draws(laboratory, **changes).worst())
    return laboratory.measure(**changes)


def draw_measured(laboratory: Laboratory) -> str:
    """What `measure_worst` measures: the "worst" draw, the one "at hand" where no formula finds a worse, or "all".

    Args:
        laboratory: What trains; "all" is said of a method without blocks.
    """
    if not laboratory.blocks:
        return "all"
    return "at hand" if uncovered(laboratory.scenario, laboratory.config) else "worst"


def batch_of(num_tokens: int, limit: int | None) -> dict[str, int]:
    """Batch size and sequence length for about so many tokens, with sequences as long as the model allows.

    Args:
        num_tokens: Tokens in a step; a few fewer where they are no multiple of the sequences.
        limit: Longest sequence, or None.
    """
    batch_size = 1 if limit is None else math.ceil(num_tokens / limit)
    return {"batch_size": batch_size, "seq_len": num_tokens // batch_size}


def most_tokens(peak: Callable[[int], int], limit_bytes: int, known: dict[int, int] | None = None) -> int:
    """The largest number of tokens, a multiple of `TOKEN_STEP`, whose peak stays within a limit.

    Memory grows convexly with tokens (it is the largest of several linear functions), so that a chord between a number
    that fits and one that does not never points too far.

    Args:
        peak: Peak bytes of a number of tokens.
        limit_bytes: What there is.
        known: Peaks already measured; filled with what is measured here.

    Returns:
        Tokens, 0 if not even `TOKEN_STEP` fit. The search ends at 2^20 tokens, also where more would fit.
    """
    known = {} if known is None else known

    def ask(num: int) -> int:
        if num not in known:
            known[num] = peak(num)
        return known[num]

    low = max((n for n, b in known.items() if b <= limit_bytes and n % TOKEN_STEP == 0), default=TOKEN_STEP)
    if ask(low) > limit_bytes:
        return 0 if low == TOKEN_STEP else most_tokens(peak, limit_bytes)
    high = min((n for n, b in known.items() if b > limit_bytes), default=0)
    while not high:
        if low >= _MAX_TOKENS:
            return low
        if ask(2 * low) > limit_bytes:
            high = 2 * low
        else:
            low *= 2
    while high - low > TOKEN_STEP:
        slope = (ask(high) - ask(low)) / (high - low)
        guess = low + int((limit_bytes - ask(low)) / slope) // TOKEN_STEP * TOKEN_STEP if slope > 0 else low
        if guess <= low:
            # The chord says that no further step fits; a convex function may lie below it.
            guess = low + TOKEN_STEP
        guess = min(guess, high - TOKEN_STEP) if high - low > TOKEN_STEP else low
        if ask(guess) <= limit_bytes:
            # The next step adds at least as much as this one did.
            if guess == low + TOKEN_STEP and 2 * ask(guess) - ask(low) > limit_bytes:
                return guess
            low = guess
        else:
            high = guess
    return low


def largest_batch(
    laboratory: Laboratory, limit_bytes: int, known: dict[int, int] | None = None, **setting: Any
) -> dict[str, Any]:
    """The most tokens of a step that fit, as sequences no longer than the model allows.

    Args:
        laboratory: What trains.
        limit_bytes: What there is.
        known: Peaks already measured, by tokens; filled with what is measured here.
        **setting: Fields of the scenario to change: checkpointing, loss.

    Returns:
        `batch_size`, `seq_len`, their product `num_tokens`, `peak_bytes`, and `at_least`: the search ended while all
        fitted, so that more may fit. No tokens and the peak of the fewest if none fit.
    """
    limit = longest_sequence(laboratory.config)
    known = {} if known is None else known
    num = most_tokens(
        lambda n: measure_worst(laboratory, **batch_of(n, limit), **setting).peak.total_bytes, limit_bytes, known
    )
    found = batch_of(num, limit) if num else {"batch_size": 0, "seq_len": 0}
    num_tokens = found["batch_size"] * found["seq_len"]
    at_least = num >= _MAX_TOKENS
    return {"num_tokens": num_tokens, **found, "peak_bytes": known[num or TOKEN_STEP], "at_least": at_least}


@dataclass(frozen=True)
class Plan:
    """A setting that fits, and why it was chosen.

    Attributes:
        scenario: The setting.
        peak: Of the worst draw that was found, by the tracker.
        reasons: What was given up for memory, in the order in which it was tried.
        laboratory: In which the peak was measured.
    """

    scenario: Scenario
    peak: StepMemory
    reasons: tuple[str, ...]
    laboratory: Laboratory


def plan(scenario: Scenario, limit_bytes: int, fixed: tuple[str, ...] = (), **options: Any) -> Plan:
    """Choose loss, checkpointing, state format and budget, so that a step of a block method fits.

    What costs least is tried first: the chunked loss, which costs nothing; lean activations, which cost little;
    checkpointing as few layers as will do; then smaller optimizer states; then a smaller budget, which changes what
    is trained.

    Args:
        scenario: Model, method, batch, sequence and precision.
        limit_bytes: What there is.
        fixed: Fields that the caller chose and that stay: "checkpointing", "loss", "lean_activations",
            "state_format", "budget".
        **options: Of the `Laboratory`: the model's configuration, and where it is to run.

    Raises:
        ValueError: If nothing fits, with what the least setting takes; for a method without blocks; or for a model that
            the closed form does not cover.
    """
    if not is_blockwise(scenario.method):
        raise ValueError(f"memory_budget: chooses for block methods; method {scenario.method} is none")
    if why := uncovered(scenario, options.get("config") or configuration(scenario.model)):
        raise ValueError(f"memory_budget: chooses by the closed form; {why}")
    reasons: list[str] = []
    least: tuple[int, Scenario] | None = None
    for candidate, words in _candidates(scenario, fixed):
        if words:
            reasons.append(words)
        try:
            laboratory = Laboratory(candidate, **options)
        except ValueError:
            if candidate.options == scenario.options or least is None:
                raise
            reasons.append("no block fits into that")
            continue
        estimate = worst_bytes(laboratory)
        if least is None or estimate < least[0]:
            least = (estimate, candidate)
        if estimate > NEAR * limit_bytes:
            reasons.append(f"that takes about {in_gib(estimate)}")
            continue
        is_free = candidate.checkpointing == ALL_LAYERS and "checkpointing" not in fixed
        num, peak = (
            _settle(laboratory, limit_bytes) if is_free else (candidate.checkpointing, measure_worst(laboratory))
        )
        if peak.peak.total_bytes <= limit_bytes:
            if is_free and num != ALL_LAYERS:
                reasons.append(f"the lowest {num} layers are enough")
            reasons.append(f"fits: {in_gib(peak.peak.total_bytes)} with the worst draw")
            return Plan(replace(candidate, checkpointing=num), peak, tuple(reasons), laboratory)
        reasons.append(f"that takes {in_gib(peak.peak.total_bytes)}")
    assert least is not None
    raise ValueError(
        f"memory_budget: {in_gib(limit_bytes)} is too little for {scenario.model} with {scenario.batch_size} x "
        f"{scenario.seq_len} tokens; the least that was found takes about {in_gib(least[0])} "
        f"({_words(least[1])})"
    )


def _candidates(scenario: Scenario, fixed: tuple[str, ...]) -> Iterator[tuple[Scenario, str]]:
    given = scenario.options.get("budget")
    budgets = (given,) if "budget" in fixed or "budget" not in _options(scenario) else BUDGETS
    now = scenario if given or budgets == (given,) else replace(scenario, options={**scenario.options, "budget": 0.03})
    yield now, ""
    if "loss" not in fixed:
        now = replace(now, loss="chunked")
        yield now, "chunked loss: never holds all logits, costs no time"
    if "lean_activations" not in fixed:
        now = replace(now, lean_activations=True)
        yield now, "lean activations: computes norms and gated products twice"
    if "checkpointing" not in fixed:
        now = replace(now, checkpointing=ALL_LAYERS)
        yield now, "checkpointing: computes layers twice"
    if "state_format" not in fixed and now.dtype == "bfloat16":
        for name, words in (
            ("bf16", "bf16 moments without master copy: rounded stochastically"),
            ("8bit", "8-bit moments without master copy"),
        ):
            now = replace(now, state_format=name)
            yield now, words
    for budget in budgets[1:]:
        yield (
            replace(now, options={**now.options, "budget": budget}),
            f"budget {budget:g}: fewer matrices train at a time",
        )


def _options(scenario: Scenario) -> dict[str, Any]:
    from misa.methods import METHODS

    return METHODS[scenario.method].defaults


def worst_bytes(laboratory: Laboratory, **changes: Any) -> int:
    """Peak of the worst draw that was found, by the closed form.

    Args:
        laboratory: What trains.
        **changes: Fields of the scenario to change.
    """
    draws = Draws(laboratory, **changes)
    return draws.estimate(draws.worst()).peak_bytes


def _settle(laboratory: Laboratory, limit_bytes: int) -> tuple[int, StepMemory]:
    """As few checkpointed layers as fit, by the formula, which the tracker sets right where it promised too much."""
    limit = 0.99 * limit_bytes
    for _ in range(2):
        num = fewest_layers(partial(_worst_with, laboratory), laboratory, limit)
        peak = measure_worst(laboratory, checkpointing=num)
        if peak.peak.total_bytes <= limit_bytes or num == ALL_LAYERS:
            return num, peak
        limit *= _worst_with(laboratory, num) / peak.peak.total_bytes
    return ALL_LAYERS, measure_worst(laboratory, checkpointing=ALL_LAYERS)


def _worst_with(laboratory: Laboratory, layers: int) -> int:
    return worst_bytes(laboratory, checkpointing=layers)


def fewest_layers(peak: Callable[[int], int], laboratory: Laboratory, limit_bytes: float) -> int:
    """Layers to checkpoint; all if none fewer will do.

    Args:
        peak: Bytes with so many layers checkpointed.
        laboratory: Whose model has the layers.
        limit_bytes: What there is.
    """
    low, high = 0, laboratory.config.num_hidden_layers
    while low < high:
        middle = (low + high) // 2
        if peak(middle) <= limit_bytes:
            high = middle
        else:
            low = middle + 1
    return high if high < laboratory.config.num_hidden_layers else ALL_LAYERS


def _words(scenario: Scenario) -> str:
    layers = scenario.checkpointing
    parts = [
        f"budget {scenario.options['budget']:g}" if "budget" in scenario.options else "",
        f"{scenario.loss} loss",
        "lean activations" if scenario.lean_activations else "",
        "all layers checkpointed" if layers == ALL_LAYERS else f"{layers} layers checkpointed",
        f"states {scenario.state_format}" if scenario.state_format else "",
    ]
    return ", ".join(part for part in parts if part)
