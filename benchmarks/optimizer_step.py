"""Time of one optimizer step and of one switch: MISA, PyPI `badam` and torch's AdamW on the same tensors.

Every contestant has its own copy of the weights, and all take turns inside one loop, so that whatever else the machine
does hits them alike; a ratio is the median of the ratios of neighbouring calls. Before every call as much memory
as the model has is read and written, as a backward pass would do at least. Run it on a quiet machine:

    python -m benchmarks.optimizer_step

Weights are bf16. Gradients are given, or around a switch come from a backward pass before, so that the optimizer alone
is timed. MISA measures gradient norms in hooks during the backward pass, which is no part of `step()`; `MISA + norms`
adds them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from misa.optimizer import MISA
from misa.results.provenance import describe_machine

# layers, hidden size: small matrices show the overhead, large ones the bandwidth
SMALL = [(12, 128), (30, 128), (100, 128)]
LARGE = [(12, 1024), (30, 512), (100, 384)]
BUDGET = 0.03
# Where everything is computed; set by the command line.
DEVICE = "cpu"
# Stands for the gradients of the model that is measured; set by `placed`.
ELSEWHERE = torch.zeros(0)


class Layer(nn.Module):
    """The seven matrices of a LLaMA layer, without attention between tokens."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(hidden, hidden, bias=False))
        self.gate_proj = nn.Linear(hidden, 3 * hidden, bias=False)
        self.up_proj = nn.Linear(hidden, 3 * hidden, bias=False)
        self.down_proj = nn.Linear(3 * hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Each matrix once, with norms and residual connections."""
        y = nn.functional.rms_norm(x, x.shape[-1:])
        x = x + self.o_proj(torch.tanh(self.q_proj(y) * self.k_proj(y)) + self.v_proj(y))
        y = nn.functional.rms_norm(x, x.shape[-1:])
        return x + self.down_proj(torch.tanh(self.gate_proj(y)) * self.up_proj(y))


def make_model(num_layers: int, hidden: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.Sequential(*(Layer(hidden) for _ in range(num_layers)))
    return placed(model)


def placed(model: nn.Module) -> nn.Module:
    """The model as it is measured, and `ELSEWHERE` as large."""
    global ELSEWHERE
    ELSEWHERE = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.bfloat16, device=DEVICE)
    return model.to(DEVICE, torch.bfloat16)


def give_gradients(params: list[Tensor]) -> Callable[[], None]:
    grads = [torch.randn_like(p) * 1e-3 for p in params]

    def give() -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = g

    return give


class Masters:
    """torch's AdamW on fp32 masters of bf16 weights, written as lean as torch's public functions allow."""

    def __init__(self, params: list[Tensor], **kind: bool) -> None:
        self.params = params
        self.masters = [nn.Parameter(p.detach().float()) for p in params]
        self.inner = torch.optim.AdamW(self.masters, lr=1e-3, weight_decay=0.0, **kind)

    @torch.no_grad()
    def step(self) -> None:
        """Widen the gradients, step on the masters, write the weights."""
        for master, p in zip(self.masters, self.params, strict=True):
            master.grad = p.grad.float()
        self.inner.step()
        torch._foreach_copy_(self.params, self.masters)
        for master in self.masters:
            master.grad = None


def make_badam(model: nn.Module, blocks: list[list[str]], interval: int, **kind: bool):
    from badam import BlockOptimizer

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return BlockOptimizer(
            base_optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, **kind),
            named_parameters_list=list(model.named_parameters()),
            block_prefix_list=blocks,
            switch_block_every=interval,
            switch_mode="ascending",
            verbose=0,
        )


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call on an idle device, after something else has gone through the caches."""
    ELSEWHERE.add_(1.0)
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    """Until the device has done all it was told."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def in_turns(contestants: dict[str, Callable[[], float]], num_turns: int) -> dict[str, list[float]]:
    """Seconds of every contestant in every turn; each makes itself ready outside its own timing."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(num_turns + 3):
        for name, contestant in contestants.items():
            seconds = contestant()
            if turn >= 3:  # the first turns make the state
                times[name].append(seconds)
    return times


def ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def measure_steps(num_layers: int, hidden: int, num_turns: int) -> dict:
    """One ordinary step of each contestant on the same active tensors, and of fused AdamW on all tensors."""
    model = make_model(num_layers, hidden)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        misa = MISA(model, budget=BUDGET, interval=10**9)
    active = [f"{name}.weight" for name in misa.active]
    own = [model.get_parameter(name) for name in active]

    def contestant(params: list[Tensor], step: Callable[[], object]) -> Callable[[], float]:
        give = give_gradients(params)

        def call() -> float:
            give()
            return timed(step)

        return call

    def copy_of_active() -> list[Tensor]:
        return [p.detach().clone() for p in own]

    give_own, hook_seconds = give_gradients(own), [0.0]

    def norms() -> None:
        for p in own:
            for hook in p._post_accumulate_grad_hooks.values():
                hook(p)

    def misa_step() -> float:
        give_own()
        hook_seconds[0] = timed(norms)
        return timed(misa.step)

    def badam(**kind: bool) -> Callable[[], float]:
        other = make_model(num_layers, hidden)
        optimizer = make_badam(other, [active], 10**9, **kind)
        return contestant([other.get_parameter(name) for name in active], optimizer.step)

    fused, foreach = copy_of_active(), copy_of_active()
    everything = list(make_model(num_layers, hidden).parameters())
    contestants = {
        "fused AdamW": contestant(fused, Masters(fused, fused=True).step),
        "MISA": misa_step,
        "norms": lambda: hook_seconds[0],
        "foreach AdamW": contestant(foreach, Masters(foreach, foreach=True).step),
        "badam": badam(),
        "badam, fused": badam(fused=True),
        "fused AdamW, all parameters": contestant(everything, Masters(everything, fused=True).step),
    }
    times = in_turns(contestants, num_turns)
    times["MISA + norms"] = [a + b for a, b in zip(times["MISA"], times["norms"], strict=True)]
    return {
        "num_layers": num_layers,
        "hidden": hidden,
        "num_blocks": len(misa.blocks),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "active_tensors": len(active),
        "active_parameters": misa.active_numel,
        "median_ms": {name: 1e3 * statistics.median(values) for name, values in times.items()},
        "ratio_to_fused": {name: ratio(times, name, "fused AdamW") for name in times},
        "badam_to_misa": ratio(times, "badam", "MISA"),
        "badam_to_misa_with_norms": ratio(times, "badam", "MISA + norms"),
    }


def several_steps(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> list[float]:
    """Seconds of steps, each after a forward and backward pass over a few tokens."""
    hidden = model.layers[0].q_proj.in_features
    tokens = torch.randn(8, hidden, dtype=torch.bfloat16, device=DEVICE)
    seconds = []
    for _ in range(num_steps):
        model.layers(tokens).square().mean().backward()
        seconds.append(timed(optimizer.step))
        optimizer.zero_grad()
    return seconds


def around_switch(seconds: list[float]) -> tuple[float, float]:
    """Seconds of an ordinary step, and of the switch in the middle of these two rounds.

    The switch is what the last step of the first round and the first of the second cost beyond two ordinary ones.
    """
    middle = len(seconds) // 2
    ordinary = statistics.median(seconds[1 : middle - 1] + seconds[middle + 1 : -1])
    return ordinary, seconds[middle - 1] + seconds[middle] - 2 * ordinary


def measure_switch(num_layers: int, hidden: int, num_turns: int) -> dict:
    """A switch of MISA with matrix blocks against one of `badam` with the same matrices as its blocks."""
    interval = 6
    model, other = make_model(num_layers, hidden), make_model(num_layers, hidden)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        misa = MISA(model, budget=BUDGET, interval=interval)
    per_block = max(1, len(misa.active))
    names = [n for n, _ in other.named_parameters()]
    groups = [names[k : k + per_block] for k in range(0, len(names), per_block)]
    badam = make_badam(other, groups, interval)
    rounds: dict[str, list[tuple[float, float]]] = {"MISA": [], "badam": []}
    with contextlib.redirect_stdout(io.StringIO()):
        several_steps(other, badam, interval - 1)  # its first round is one step shorter
        for _ in range(num_turns):
            rounds["MISA"].append(around_switch(several_steps(model, misa, 2 * interval)))
            rounds["badam"].append(around_switch(several_steps(other, badam, 2 * interval)))
    if misa.num_skipped_steps:
        raise RuntimeError(f"{misa.num_skipped_steps} steps found a gradient that is not finite, and did nothing")
    step = {name: statistics.median(a for a, _ in values) for name, values in rounds.items()}
    switch = {name: statistics.median(b for _, b in values) for name, values in rounds.items()}
    return {
        "num_layers": num_layers,
        "hidden": hidden,
        "num_blocks": len(misa.blocks),
        "switch_ms": {name: 1e3 * value for name, value in switch.items()},
        "switch_in_steps": switch["MISA"] / step["MISA"],
        "badam_to_misa": switch["badam"] / switch["MISA"],
    }


def measure_registered(num_turns: int, num_active: int = 8, hidden: int = 128) -> dict:
    """A step with 2,000 registered blocks against one with 200, the same number of equal blocks being on."""

    def contestant(num_blocks: int) -> Callable[[], float]:
        model = nn.Module()
        model.layers = nn.ModuleList(
            nn.ModuleDict({"proj": nn.Linear(hidden, hidden, bias=False)}) for _ in range(num_blocks)
        )
        optimizer = MISA(placed(model), num_blocks=num_active, interval=10**9)
        give = give_gradients([p for p in model.parameters() if p.requires_grad])

        def call() -> float:
            give()
            return timed(optimizer.step)

        return call

    times = in_turns({"200": contestant(200), "2000": contestant(2000)}, num_turns)
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    return {"num_active": num_active, "median_ms": medians, "ratio": ratio(times, "2000", "200")}


def bars(results: dict) -> list[tuple[str, float, str, bool]]:
    """The promises: what, the worst value found, the limit, and whether it holds."""
    steps, switches = results["steps"], results["switches"]
    worst = [
        ("step / fused AdamW with masters", max(s["ratio_to_fused"]["MISA"] for s in steps), 1.10, 1),
        ("step with 2,000 blocks / with 200", results["registered"]["ratio"], 1.10, 1),
        ("switch, in steps", max(s["switch_in_steps"] for s in switches), 3.0, 1),
        ("badam's step / ours", min(s["badam_to_misa"] for s in steps), 1.8, -1),
        ("badam's step / ours with norms", min(s["badam_to_misa_with_norms"] for s in steps), 1.8, -1),
        ("badam's switch / ours", min(s["badam_to_misa"] for s in switches), 20.0, -1),
    ]
    return [
        (what, x, f"{'<=' if sign > 0 else '>='} {limit}", sign * x <= sign * limit) for what, x, limit, sign in worst
    ]


def markdown(results: dict) -> str:
    names = list(results["steps"][0]["median_ms"])
    machine = results["machine"]
    device = f"{machine['processor']}, {machine['num_threads']} threads"
    if results["device"] == "cuda":
        device = f"one {machine['gpu']} beside a {machine['processor']}"
    lines = [
        "# Time of an optimizer step",
        "",
        f"{device}; torch {results['torch']}; OMP_WAIT_POLICY {results['omp_wait_policy'] or 'not set'}; "
        f"medians, ratios of neighbouring calls. bf16 weights, fp32 masters for what is active, {BUDGET:.0%} active.",
        "",
        "| model | blocks | active | " + " | ".join(f"{n}, ms" for n in names) + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for s in results["steps"]:
        size = f"{s['num_layers']} x {s['hidden']} ({s['num_parameters'] / 1e6:.0f}M)"
        active = f"{s['active_tensors']} ({s['active_parameters'] / 1e6:.1f}M)"
        cells = (f"{s['median_ms'][n]:.2f} ({s['ratio_to_fused'][n]:.2f})" for n in names)
        lines.append(f"| {size} | {s['num_blocks']} | {active} | " + " | ".join(cells) + " |")
    lines += ["", "In brackets: ratio to fused AdamW on the active tensors.", ""]
    lines += ["| model | switch, ms | in steps | badam's switch, ms | ratio |", "|---|---|---|---|---|"]
    for s in results["switches"]:
        lines.append(
            f"| {s['num_layers']} x {s['hidden']} | {s['switch_ms']['MISA']:.2f} | {s['switch_in_steps']:.1f} | "
            f"{s['switch_ms']['badam']:.0f} | {s['badam_to_misa']:.0f} |"
        )
    lines += ["", "| promise | worst | limit | holds |", "|---|---|---|---|"]
    lines += [f"| {w} | {x:.2f} | {limit} | {'yes' if ok else '**no**'} |" for w, x, limit, ok in bars(results)]
    return "\n".join(lines) + "\n"


def main() -> int:
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--turns", type=int, default=100, help="timed calls of every contestant (100)")
    parser.add_argument("--sizes", choices=["small", "large", "both"], default="both", help="sizes of matrices")
    parser.add_argument("--output", type=Path, help="files without ending (benchmarks/results/optimizer_step[_gpu])")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=DEVICE, help="where to compute (%(default)s)")
    options = parser.parse_args()
    DEVICE = options.device
    if DEVICE == "cuda" and not torch.cuda.is_available():
        parser.error("device is cuda, but there is no CUDA device")
    name = "optimizer_step_gpu" if DEVICE == "cuda" else "optimizer_step"
    output = options.output or Path(__file__).parent / "results" / name
    models = {"small": SMALL, "large": LARGE, "both": SMALL + LARGE}[options.sizes]
    results = {
        "machine": describe_machine().model_dump(),
        "device": DEVICE,
        "torch": torch.__version__,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "num_turns": options.turns,
        "steps": [],
        "switches": [],
    }
    for num_layers, hidden in models:
        results["steps"].append(measure_steps(num_layers, hidden, options.turns))
        results["switches"].append(measure_switch(num_layers, hidden, max(5, options.turns // 10)))
        print(f"{num_layers} x {hidden} done", file=sys.stderr)
    results["registered"] = measure_registered(options.turns)
    text = markdown(results)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
