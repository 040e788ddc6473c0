"""Fake tensors against real ones, the closed form against the tracker, and the goal at full size."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MixtralConfig

from misa.memory.closed_form import ClosedForm, trained_parameters
from misa.memory.draws import Draws
from misa.memory.fit import batch_of, largest_batch, measure_worst, most_tokens, plan
from misa.memory.models import MODEL_NAMES, configuration
from misa.memory.scenario import ALL_LAYERS, Laboratory, Scenario, has_adapters, is_blockwise
from misa.memory.sizes import GIB, parse_bytes
from misa.memory.variants import VARIANTS
from misa.methods import METHODS

SMALL = {"model": "7m", "num_layers": 4, "batch_size": 2, "seq_len": 64}
BUDGET = {"budget": 0.1}


def options_of(method):
    return {name: value for name, value in BUDGET.items() if name in METHODS[method].defaults}


def forms():
    """Every method, and the forms that change what is held."""
    for method in METHODS:
        yield pytest.param({"method": method}, id=method)
        if has_adapters(method):
            yield pytest.param({"method": method, "lean_adapters": True}, id=f"{method}-lean")
    for name in ("fp32", "bf16", "8bit"):
        yield pytest.param({"method": "misa", "state_format": name}, id=f"misa-{name}")
    yield pytest.param({"method": "misa", "step_in_backward": True}, id="misa-in-backward")
    yield pytest.param({"method": "misa", "lean_activations": True, "accumulates": True}, id="misa-lean")
    yield pytest.param({"method": "adamw_bf16", "dtype": "float32"}, id="adamw_bf16-of-float32")


@pytest.fixture(scope="module", params=forms())
def laboratories(request):
    """The same training step on real tensors and on fake ones."""
    scenario = Scenario(**SMALL, **request.param, options=options_of(request.param["method"]))
    return [Laboratory(scenario, real, rounding_bytes=1) for real in (True, False)]


@pytest.mark.parametrize(("checkpointing", "loss"), [(0, "full"), (ALL_LAYERS, "full"), (2, "chunked")])
def test_fake_step_peaks_like_the_real_one(laboratories, checkpointing, loss):
    peaks = [laboratory.measure(checkpointing=checkpointing, loss=loss).peak for laboratory in laboratories]
    assert peaks[1].total_bytes == pytest.approx(peaks[0].total_bytes, rel=0.001)
    assert peaks[1].phase == peaks[0].phase


SHAPE = {"model": "llama3-8b", "num_layers": 4}


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "adamw"},
        {"method": "badam"},
        {"method": "lisa"},
        {"method": "badam_official"},
        {"method": "lisa_official"},
        {"method": "misa", "options": {"budget": 0.02}},
        {"method": "misa_official", "options": {"budget": 0.02}},
        {"method": "misa", "options": {"budget": 0.25}, "state_format": "bf16"},
        {"method": "misa", "options": {"budget": 0.05}, "state_format": "8bit", "step_in_backward": True},
        {"method": "lora", "options": {"lora_r": 8}},
        {"method": "lora", "options": {"lora_r": 32, "lora_dropout": 0.05}},
        {"method": "lora", "lean_adapters": True},
        {"method": "misa", "options": {"budget": 0.25}, "lean_activations": True, "accumulates": True},
        {"method": "badam", "lean_activations": True},
        {"method": "lora", "lean_adapters": True, "options": {"lora_dropout": 0.1}},
        {"method": "lora", "dtype": "float32"},
        {"method": "lora", "dtype": "float32", "options": {"lora_dropout": 0.1}},
        *(
            {"method": "misa", "options": {"budget": 0.25}, "dtype": "float32", "state_format": name}
            for name in ("master", "fp32", "bf16", "8bit")
        ),
    ],
    ids=str,
)
def test_closed_form_is_within_three_per_cent_of_the_tracker(fields):
    laboratory = Laboratory(Scenario(**SHAPE, **fields))
    for checkpointing in (0, 2, ALL_LAYERS):
        for loss in ("full", "chunked"):
            for batch_size, seq_len in ((1, 512), (2, 2048)):
                sizes = {"batch_size": batch_size, "seq_len": seq_len}
                setting = {**sizes, "checkpointing": checkpointing, "loss": loss}
                measured = laboratory.measure(**setting).peak.total_bytes
                form = ClosedForm(laboratory.config, replace(laboratory.scenario, **setting))
                estimate = form.estimate(trained_parameters(laboratory.model)).peak_bytes
                assert estimate == pytest.approx(measured, rel=0.03), setting


@pytest.mark.parametrize("state_format", ["master", "fp32", "bf16", "8bit"])
@pytest.mark.parametrize("on_accelerator", [True, False])
def test_closed_form_knows_what_a_step_takes_where_it_is_the_peak(state_format, on_accelerator, tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
    path = tmp_path / "llama.json"
    path.write_text(json.dumps({"model_type": "llama", "vocab_size": 1000, "num_hidden_layers": 4, **sizes}))
    options = {"num_blocks": 2 if state_format != "master" else 12}
    scenario = Scenario(str(path), "misa", options, 1, 64, state_format=state_format, checkpointing=ALL_LAYERS)
    laboratory = Laboratory(replace(scenario, loss="chunked"), on_accelerator=on_accelerator)
    laboratory.switch_to([i for i, b in enumerate(laboratory.blocks) if "mlp" in b.name][: options["num_blocks"]])
    peak = laboratory.measure().peak
    estimate = Draws(laboratory, 1).estimate(laboratory.active)
    assert (peak.phase, estimate.moment) == ("step", "step")
    assert estimate.peak_bytes == pytest.approx(peak.total_bytes, rel=0.001)


@pytest.mark.parametrize("method", ["adamw", "badam", "lora"])
def test_closed_form_knows_the_norms_of_queries_and_keys(method, tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 2}
    shape = {"model_type": "qwen3", "vocab_size": 4000, "num_hidden_layers": 4, "head_dim": 64, **sizes}
    path = tmp_path / "qwen3.json"
    path.write_text(json.dumps(shape))
    laboratory = Laboratory(Scenario(str(path), method, batch_size=2, seq_len=1024))
    for checkpointing in (0, ALL_LAYERS):
        measured = laboratory.measure(checkpointing=checkpointing).peak.total_bytes
        form = ClosedForm(laboratory.config, replace(laboratory.scenario, checkpointing=checkpointing))
        assert form.num_params == laboratory.num_params
        estimate = form.estimate(trained_parameters(laboratory.model)).peak_bytes
        assert estimate == pytest.approx(measured, rel=0.005)


def test_closed_form_knows_the_size_of_every_model():
    sizes = {"llama3-8b": 8_030_261_248, "llama2-7b": 6_738_415_616, "mistral-7b": 7_241_732_096}
    sizes |= {"qwen2.5-7b": 7_615_616_512, "tinyllama-1.1b": 1_100_048_384, "llama2-70b": 68_976_648_192}
    for name in MODEL_NAMES:
        form = ClosedForm(configuration(name), Scenario(model=name))
        assert form.num_params == sizes.get(name, form.num_params)
    laboratory = Laboratory(Scenario(model="qwen2.5-7b", num_layers=2))
    assert ClosedForm(laboratory.config, laboratory.scenario).num_params == laboratory.num_params


@pytest.mark.parametrize(
    ("config", "fields", "what"),
    [
        (GPT2Config(), {}, "misa on gpt2 models; it covers adamw"),
        (MixtralConfig(), {"method": "badam"}, "badam on mixtral models"),
        (LlamaConfig(), {"method": "misa_paper"}, "misa_paper on llama models"),
        (LlamaConfig(), {"options": {"variant": "paper"}}, "misa variant=paper on llama models"),
    ],
)
def test_closed_form_refuses_what_it_does_not_cover(config, fields, what):
    with pytest.raises(ValueError, match=f"no closed form for method {what}"):
        ClosedForm(config, Scenario(**fields))


@pytest.mark.slow
def test_goal_at_full_size_and_its_time():
    started = time.process_time()
    lean = {"lean_activations": True, "state_format": "8bit"}
    laboratory = Laboratory(Scenario("llama3-8b", "misa", {"budget": 0.03}, 1, 2048, ALL_LAYERS, "chunked", **lean))
    peak = measure_worst(laboratory).peak
    seconds = time.process_time() - started
    assert peak.by_category["weights"] == pytest.approx(14.96 * GIB, rel=1e-3)
    assert peak.total_bytes - peak.by_category["weights"] <= 1.5 * GIB
    assert seconds < 30
    # As many tokens as two of the longest sequences.
    assert measure_worst(laboratory, batch_size=2, seq_len=8192).peak.total_bytes <= 24 * GIB


def test_deeper_draws_keep_more_and_the_worst_draw_is_the_largest():
    laboratory = Laboratory(Scenario(**SMALL, options={"budget": 0.05}))
    setting = {"batch_size": 4, "seq_len": 512}
    peaks = []
    for layer in (0, 3):
        draw = [i for i, block in enumerate(laboratory.blocks) if block.name.endswith(f"{layer}.self_attn.q_proj")]
        laboratory.switch_to(draw)
        assert laboratory.active == tuple(draw)
        peaks.append(laboratory.measure(**setting).peak.total_bytes)
    assert peaks[0] > peaks[1]
    worst = measure_worst(laboratory, **setting).peak.total_bytes
    assert worst >= max(peaks)
    draws = Draws(laboratory, 50, **setting)
    assert draws.mean_bytes() <= 1.03 * worst
    budget = 0.05 * laboratory.num_params
    assert sum(laboratory.blocks[i].numel for i in laboratory.active) <= budget


def test_measuring_a_draw_leaves_the_sampler_and_random_state_alone():
    state = torch.random.get_rng_state()
    laboratory = Laboratory(Scenario(**SMALL, options=BUDGET))
    before = laboratory.active
    samples = laboratory.sample(5)
    measure_worst(laboratory)
    laboratory.switch_to(before)
    assert laboratory.active == before
    assert laboratory.sample(5) == samples
    assert torch.equal(torch.random.get_rng_state(), state)


def test_checkpointing_fewer_layers_keeps_more():
    laboratory = Laboratory(Scenario(**SMALL, options=BUDGET))
    laboratory.switch_to([0])
    peaks = [
        laboratory.measure(seq_len=512, checkpointing=num, loss="chunked").peak.total_bytes for num in (0, 1, 2, 4)
    ]
    assert peaks == sorted(peaks, reverse=True)
    again = laboratory.measure(seq_len=512, checkpointing=0, loss="chunked").peak.total_bytes
    assert again == pytest.approx(peaks[0], rel=1e-4)  # the norms of the steps before wait for the end of their round


@pytest.mark.parametrize("limit", [500, 4_000, 4_100, 33_333, 10**6])
def test_most_tokens_is_the_largest_multiple_that_fits(limit):
    asked = []

    def peak(num):
        asked.append(num)
        return max(300 + num // 2, 3 * num - 20_000, 8 * num - 90_000)

    found = most_tokens(peak, limit)
    assert found == max((n for n in range(128, 400_000, 128) if peak(n) <= limit), default=0)
    assert len(set(asked)) or found


def test_most_tokens_needs_few_measurements():
    asked = set()
    most_tokens(lambda num: asked.add(num) or max(16 * GIB + num * 2**20, 12 * GIB + num * 2**21), 24 * GIB)
    assert len(asked) < 20
    assert batch_of(16_384, 8192) == {"batch_size": 2, "seq_len": 8192}
    assert batch_of(640, None) == {"batch_size": 1, "seq_len": 640}


def test_tokens_that_fit_are_sequences_times_length(monkeypatch):
    monkeypatch.setattr("misa.memory.fit.most_tokens", lambda peak, limit, known: known.setdefault(640, 640))
    laboratory = SimpleNamespace(config=LlamaConfig(max_position_embeddings=250))
    sizes = {"num_tokens": 639, "batch_size": 3, "seq_len": 213}
    assert largest_batch(laboratory, GIB) == {**sizes, "peak_bytes": 640, "at_least": False}


def test_memory_budget_gives_up_the_cheapest_first_and_holds():
    scenario = Scenario(**SMALL, options={"budget": 0.05})
    free = measure_worst(Laboratory(scenario)).peak.total_bytes
    assert plan(scenario, free, ("budget",)).scenario == scenario
    tight = plan(scenario, int(0.85 * free), ("budget",))
    assert tight.peak.peak.total_bytes <= 0.85 * free
    assert tight.scenario.loss == "chunked"
    assert tight.reasons
    with pytest.raises(ValueError, match=r"memory_budget: .* is too little for 7m with 2 x 64 tokens; the least"):
        plan(scenario, free // 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "adam"}, "method is 'adam'; allowed: adamw"),
        ({"seq_len": 0}, "seq_len is 0; it must be at least 1"),
        ({"loss": "none"}, "loss is 'none'; allowed: full, chunked"),
        ({"state_format": "4bit"}, "state_format is '4bit'; allowed: master, fp32, bf16, 8bit"),
        ({"method": "lora", "state_format": "bf16"}, "belong to block methods; method lora is none"),
        ({"lean_adapters": True}, "method misa has none"),
        ({"checkpointing": -2}, "checkpointing is -2"),
    ],
)
def test_scenario_refuses_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Scenario(**fields)


def test_wrong_models_lengths_and_budgets_say_what_is_allowed():
    with pytest.raises(ValueError, match="model is 'llama4'; allowed: llama3-8b, llama2-7b"):
        Laboratory(Scenario("llama4"))
    with pytest.raises(ValueError, match="seq_len is 4097; llama2-7b allows at most 4096"):
        Laboratory(Scenario("llama2-7b", seq_len=4097))
    with pytest.raises(ValueError, match=r"budget=1e-06: no block fits .* needs budget >= "):
        Laboratory(Scenario(**SMALL, options={"budget": 1e-6}))
    with pytest.raises(ValueError, match="num_layers: cannot be changed without building anew"):
        Laboratory(Scenario(**SMALL, options=BUDGET)).measure(num_layers=2)


def test_amounts_of_memory():
    assert parse_bytes("24GiB") == 24 * 2**30
    assert parse_bytes("1.5 gb") == 1_500_000_000
    assert parse_bytes("2.GiB") == 4 * parse_bytes(".5GiB")
    for text in ("24", "GiB", "0GiB", ".GiB", "1.2.3GiB", "4 parsecs"):
        with pytest.raises(ValueError, match="must be an amount with a unit, such as 24GiB"):
            parse_bytes(text)


def test_variants_are_forms_of_methods():
    assert {variant.method for variant in VARIANTS.values()} <= set(METHODS)
    assert is_blockwise("misa")
    assert not is_blockwise("lora")
    assert all(variant.scenario().method == variant.method for variant in VARIANTS.values())
