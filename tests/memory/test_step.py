"""A real training step of a small LLaMA with the real methods, counted."""

import json

import pandas as pd
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from misa import inner
from misa.memory.arguments import MemoryArguments
from misa.memory.command import COLUMNS, load, main, make_optimizer, measure_method
from misa.memory.step import MOMENTS, enable_checkpointing, measure_step, random_batch, rows, training_step
from misa.memory.tracker import CATEGORIES
from misa.methods import build

VOCABULARY, HIDDEN, LAYERS, BATCH, LENGTH = 512, 64, 3, 4, 32
TOKENS = BATCH * LENGTH


def tiny(dtype=torch.float32):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=172,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",  # the fused kernel's mask depends on values that fake tensors do not have
    )
    model = LlamaForCausalLM(config).train()
    return model if dtype == torch.float32 else model.to(dtype)  # fake tensors cannot be converted in place


def measure(name, dtype=torch.bfloat16, checkpointing=False, **options):
    torch.manual_seed(0)
    built = build(name, tiny(dtype), lr=1e-4, options=options)
    if checkpointing:
        enable_checkpointing(built.model)
    optimizer = make_optimizer(built)
    batch = random_batch(VOCABULARY, BATCH, LENGTH)
    training_step(built.model, optimizer, batch)
    return measure_step(built.model, optimizer, batch), built.model, optimizer


@pytest.mark.parametrize("chunk_numel", [2**22, 2**10], ids=["whole", "in pieces"])
def test_full_adamw_in_bf16_holds_two_bytes_of_weights_and_twelve_of_state_for_each_parameter(chunk_numel, monkeypatch):
    monkeypatch.setitem(inner.CHUNK_NUMEL, "cpu", chunk_numel)  # weights above it are updated in pieces
    memory, model, _ = measure("adamw")
    num = sum(p.numel() for p in model.parameters())
    end = memory.moments["backward_end"].by_category
    assert end["gradients"] == 2 * num
    # fp32 master, exp_avg and exp_avg_sq; step counters
    assert 12 * num <= end["optimizer"] <= 12 * num * 1.01
    assert end["weights"] == pytest.approx(2 * num, rel=0.001)  # and the rotary frequencies


def test_block_methods_hold_gradients_and_state_of_what_is_on_alone():
    memory, model, optimizer = measure("misa", budget=0.1)
    num = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < num <= 0.1 * sum(p.numel() for p in model.parameters())
    end = memory.moments["backward_end"].by_category
    assert end["gradients"] == pytest.approx(2 * num, rel=0.01)
    state = sum(bytes_ for name, bytes_ in optimizer.state_bytes().items() if name != "gradients")
    assert 12 * num <= end["optimizer"] <= 12 * num * 1.05
    assert state >= 12 * num


def test_logits_are_counted_as_such():
    memory, _, _ = measure("lora")
    # The loss saves its fp32 log-softmax; shifted labels and a few numbers come on top.
    fp32_logits = TOKENS * VOCABULARY * 4
    assert fp32_logits <= memory.moments["forward_end"].by_category["logits"] <= fp32_logits + 4 * TOKENS * 8
    # In the backward pass its gradient joins them, at the peak of a model this small.
    assert memory.peak.by_category["logits"] >= 2 * fp32_logits
    assert memory.moments["backward_end"].by_category["logits"] <= 8  # the loss


def test_checkpointing_holds_one_input_for_each_layer():
    plain, _, _ = measure("adamw", torch.float32)
    saving, _, _ = measure("adamw", torch.float32, checkpointing=True)
    hidden = TOKENS * HIDDEN * 4
    before = plain.moments["forward_end"].by_category["activations"]
    after = saving.moments["forward_end"].by_category["activations"]
    # What stays: the layers' inputs, the last norm's inputs, the head's input, masks, rotary tables, the batch.
    assert after < before / 4
    assert LAYERS * hidden <= after <= (LAYERS + 5) * hidden


@pytest.mark.parametrize("name", ["adamw", "lora", "badam", "lisa", "misa"])
def test_every_method_is_measured_and_its_rows_add_up(name):
    options = {"budget": 0.1} if name == "misa" else {}
    memory, _, _ = measure(name, **options)
    table = pd.DataFrame(rows(memory, method=name))
    assert set(table["moment"]) == set(MOMENTS)
    assert set(table["category"]) == set(CATEGORIES)
    assert table.loc[table["moment"] == "peak", "bytes"].sum() == memory.peak.total_bytes
    assert memory.peak.total_bytes >= max(m.total_bytes for m in memory.moments.values())
    assert memory.peak.phase in ("forward", "backward", "step")
    assert torch.isfinite(torch.tensor(memory.loss))


def test_fake_model_peaks_like_the_real_one():
    def peak():
        model = tiny()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        batch = random_batch(VOCABULARY, BATCH, LENGTH)
        training_step(model, optimizer, batch)
        return measure_step(model, optimizer, batch).peak

    real = peak()
    with FakeTensorMode():
        torch.manual_seed(0)
        fake = peak()
    assert fake.total_bytes == pytest.approx(real.total_bytes, rel=0.001)
    assert fake.phase == real.phase


def test_command_writes_the_tidy_table_and_the_result(tmp_path):
    words = ["--model_name_or_path", "2m", "--methods", "misa,badam", "--budget", "0.05", "--batch_size", "1"]
    assert main([*words, "--seq_len", "16", "--output_dir", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "memory.csv")
    assert tuple(table.columns) == COLUMNS
    assert set(table["method"]) == {"misa", "badam"}
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["kind"] == "memory"
    peaks = table[table["moment"] == "peak"].groupby("method")["bytes"].sum()
    assert result["peaks"]["misa/peak_bytes"] == peaks["misa"]
    assert result["config"]["per_method"]["misa"]["active"]


def test_blocks_named_are_those_measured_also_where_the_step_ends_their_round():
    settings = MemoryArguments(
        model_name_or_path="2m", output_dir="unused", interval=1, num_blocks=1, batch_size=1, seq_len=8
    )
    memory, detail = measure_method("misa", settings)
    sizes = {name.removesuffix(".weight"): p.numel() for name, p in load("2m", "bfloat16", 0).named_parameters()}
    num = sum(sizes[name] for name in detail["active"])
    # Draws of this seed differ in size from round to round.
    assert memory.moments["backward_end"].by_category["gradients"] == 2 * num


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model_name_or_path", "8t"], "model_name_or_path is '8t'"),
        (["--model_name_or_path", "2m", "--methods", "adam"], "methods is 'adam'; allowed, comma separated: adamw"),
        (["--model_name_or_path", "2m", "--seq_len", "100000"], "seq_len is 100000; 2m allows at most 1024"),
        (["--model_name_or_path", "2m", "--dtype", "int8"], "dtype is 'int8'; allowed: bfloat16, float32"),
        (["--model_name_or_path", "2m", "--methods", "lora", "--budget", "0.1"], "budget is given, but none of the"),
        (["--model_name_or_path", "2m", "--methods", "misa", "--eta", "big"], "eta is 'big'"),
        (["--model_name_or_path", "2m", "--loss", "chunkd"], "loss is 'chunkd'; allowed: full, chunked"),
        *(
            (
                ["--model_name_or_path", "2m", *words.split()],
                f"{words.split()[0][2:]} is given; it does nothing without",
            )
            for words in (
                *("--state_format 8bit", "--lean_activations", "--step_in_backward", "--lean_adapters", "--json"),
                *("--checkpoint_layers 2", "--method misa", "--compare", "--memory_budget 1GiB", "--fit 1GiB"),
                "--variants lora-r8",
            )
        ),
    ],
)
def test_wrong_input_ends_with_status_2_and_one_line(words, message, tmp_path, capsys):
    assert main([*words, "--output_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_folder_that_cannot_be_written_is_refused_before_measuring(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = ["--model_name_or_path", "2m", "--methods", "badam", "--seq_len", "8", "--output_dir"]
    assert main([*words, str(tmp_path / folder)]) == 2
    printed = capsys.readouterr()
    assert f"output_dir is '{tmp_path / folder}'; it must be a folder that can be written" in printed.err
    assert not printed.out
