"""How a model is split into blocks."""

import fnmatch

import pytest
import torch
import transformers
from tiny import llama
from torch import nn

from misa.optimizer import MISA, partition, rest
from misa.parameters import trainable

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

# family, settings, matrices of the first layer as they are called below it, and how many blocks there are in all
FAMILIES = [
    ("Llama", SMALL, ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"], 14),
    ("Qwen2", SMALL, ["self_attn.q_proj", "mlp.gate_proj"], 14),
    ("Qwen3", SMALL | {"head_dim": 8}, ["self_attn.o_proj"], 14),
    ("Mistral", SMALL, ["mlp.up_proj"], 14),
    ("Gemma3", SMALL | {"head_dim": 8}, ["self_attn.v_proj"], 14),
    ("Phi3", SMALL, ["self_attn.qkv_proj", "mlp.gate_up_proj"], 8),
    ("GPT2", GPT2, ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"], 8),
    ("OPT", SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32}, ["fc1", "self_attn.out_proj"], 12),
    ("Roberta", SMALL, ["attention.self.query", "attention.output.dense", "output.dense"], 12),
    ("Falcon", SMALL | {"num_kv_heads": 4}, ["self_attention.query_key_value", "mlp.dense_h_to_4h"], 8),
    ("Bloom", SMALL | {"n_layer": 2, "n_head": 4}, ["self_attention.dense"], 8),
    ("Mpt", {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4}, ["attn.Wqkv", "ffn.up_proj"], 8),
]


def on_meta(family, settings):
    config_class = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config_class(**settings))


@pytest.mark.parametrize(("family", "settings", "some", "num_blocks"), FAMILIES, ids=[f[0] for f in FAMILIES])
def test_partition_of_a_family_finds_every_matrix_of_every_layer(family, settings, some, num_blocks):
    blocks = partition(on_meta(family, settings))
    assert len(blocks) == num_blocks
    first_layer = [b.name.removeprefix(f"{b.layer}.") for b in blocks if b.layer == blocks[0].layer]
    assert set(some) <= set(first_layer)


@pytest.mark.parametrize("granularity", ["matrix", "half", "layer"])
@pytest.mark.parametrize("family", FAMILIES, ids=[f[0] for f in FAMILIES])
def test_partition_puts_every_parameter_in_one_block_or_in_the_rest(family, granularity):
    model = on_meta(*family[:2])
    blocks = partition(model, granularity)
    names = [n for b in blocks for n, _ in b.params] + [n for kind in rest(model, blocks).values() for n, _ in kind]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())


def test_layer_blocks_hold_whole_layers():
    model = llama(2)
    blocks = partition(model, "layer")
    assert [b.name for b in blocks] == ["model.layers.0", "model.layers.1"]
    assert blocks[0].numel == sum(p.numel() for p in model.model.layers[0].parameters())


def test_half_blocks_are_attention_and_mlp():
    blocks = partition(llama(2), "half")
    assert [b.name for b in blocks] == [f"model.layers.{i}.{half}" for i in (0, 1) for half in ("first", "second")]
    assert all("self_attn" in n for n, _ in blocks[0].params)
    assert all("mlp" in n for n, _ in blocks[1].params)


def test_blocks_are_ordered_by_depth_beyond_nine_layers():
    layers = [b.layer for b in partition(llama(12), "layer")]
    assert layers == [f"model.layers.{i}" for i in range(12)]


def test_matrix_block_holds_the_bias_of_its_matrix():
    block = next(b for b in partition(on_meta("GPT2", GPT2)) if b.name.endswith("h.0.attn.c_attn"))
    assert [n.rpartition(".")[2] for n, _ in block.params] == ["weight", "bias"]


def test_expert_tensors_are_one_block_each():
    settings = SMALL | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    names = [b.name for b in partition(on_meta("Qwen3Moe", settings))]
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert "model.layers.0.mlp.experts.down_proj" in names


def test_tied_head_is_counted_once_and_listed_with_the_embeddings():
    model = llama(2, tie_word_embeddings=True)
    others = rest(model, partition(model))
    assert [n for n, _ in others["embeddings"]] == ["model.embed_tokens.weight"]
    assert others["head"] == ()


def test_rest_names_the_kinds():
    model = llama(1)
    others = rest(model, partition(model))
    assert [n for n, _ in others["head"]] == ["lm_head.weight"]
    assert [n for n, _ in others["norms"]] == [
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    ]


def test_peft_model_is_split_into_its_adapter_matrices():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(2), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    blocks = partition(model)
    assert len(blocks) == 2 * 2 * 2
    assert all("lora_" in b.name for b in blocks)


def test_frozen_and_integer_parameters_are_in_no_block():
    model = llama(2)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    model.model.layers[0].self_attn.k_proj.weight = nn.Parameter(torch.zeros(16, 32, dtype=torch.int8), False)
    names = {n for b in partition(model) for n, _ in b.params}
    assert len(names) == 12
    assert not any("layers.0.self_attn.q_proj" in n or "layers.0.self_attn.k_proj" in n for n in names)


def test_second_optimizer_sees_the_model_as_its_owner_left_it():
    model = llama(2)
    model.lm_head.weight.requires_grad_(False)
    MISA(model, budget=0.3)
    assert len(partition(model)) == 14
    second = MISA(model, budget=0.3)
    assert len(second.blocks) == 14
    second.release()
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


def test_include_and_exclude_match_whole_paths():
    model = llama(12)
    names = [b.name for b in partition(model, include=["model.layers.1.*"], exclude=["*.mlp.*"])]
    assert names == [f"model.layers.1.self_attn.{x}_proj" for x in "qkvo"]


def test_include_of_a_matrix_outside_the_layers_makes_it_a_block():
    blocks = partition(llama(1), include=["lm_head", "*.q_proj"])
    assert [b.name for b in blocks] == ["model.layers.0.self_attn.q_proj", "lm_head"]


@pytest.mark.parametrize("field", ["include", "exclude"])
def test_pattern_that_matches_nothing_raises_and_names_the_nearest(field):
    with pytest.raises(ValueError, match=rf"{field}.*'model.layers.0.self_attn.q_prj'.*self_attn.q_proj"):
        partition(llama(1), **{field: ["model.layers.0.self_attn.q_prj"]})


def test_pattern_given_as_a_string_raises():
    with pytest.raises(ValueError, match="must be a list"):
        partition(llama(1), include="lm_head")


def test_unknown_granularity_raises():
    with pytest.raises(ValueError, match=r"granularity='module'.*matrix, half, layer"):
        partition(llama(1), "module")


def test_model_without_repeated_layers_raises_in_words():
    with pytest.raises(ValueError, match="no block found among 2 trainable parameters"):
        partition(nn.Linear(4, 4))


def test_parameters_without_names_raise():
    with pytest.raises(ValueError, match=r"give a model .* or \(name, parameter\) pairs"):
        partition(list(llama(1).parameters()))


def causal_families():
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return sorted(mapping)


@pytest.mark.slow
def test_every_causal_family_of_transformers_has_all_its_layer_matrices_in_blocks():
    failures, built = {}, []
    for family in causal_families():
        try:
            config = transformers.CONFIG_MAPPING[family]()
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config)
        except Exception:
            continue
        built.append(family)
        in_blocks = {n for b in partition(model) for n, _ in b.params}
        for name, p in trainable(model.named_parameters()):
            parts = name.split(".")
            number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
            if p.ndim >= 2 and number + 2 < len(parts) and name not in in_blocks:
                failures.setdefault(family, []).append(name)
    assert failures == {}
    assert len(built) >= 170, sorted(set(causal_families()) - set(built))


def test_wildcards_are_those_of_fnmatch():
    model = llama(2)
    pattern = "model.layers.[0]*.[qk]_proj"
    names = {b.name for b in partition(model, include=[pattern])}
    assert names == {b.name for b in partition(model) if fnmatch.fnmatchcase(b.name, pattern)}
    assert len(names) == 2


def test_parameter_of_the_layer_itself_is_in_its_layer():
    model = llama(2)
    for layer in model.model.layers:
        layer.gamma = nn.Parameter(torch.ones(32))
    assert "model.layers.1.gamma" in {n for n, _ in partition(model, "layer")[1].params}


def test_list_inside_a_layer_belongs_to_the_layer():
    model = llama(2)
    for layer in model.model.layers:
        layer.mlp.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(3))
    assert [b.name for b in partition(model, "layer")] == ["model.layers.0", "model.layers.1"]
    assert {b.layer for b in partition(model)} == {"model.layers.0", "model.layers.1"}


def test_lists_side_by_side_are_ordered_by_depth_together():
    def layers():
        return nn.ModuleList(nn.ModuleDict({"up": nn.Linear(2, 2)}) for _ in range(3))

    model = nn.ModuleDict({"one": nn.ModuleDict({"a": layers(), "b": layers()}), "two": nn.ModuleDict({"a": layers()})})
    names = [b.layer for b in partition(model, "layer")]
    assert names == ["one.a.0", "one.b.0", "one.a.1", "one.b.1", "one.a.2", "one.b.2", "two.a.0", "two.a.1", "two.a.2"]


@pytest.mark.parametrize("granularity", ["matrix", "half"])
def test_vectors_alone_are_no_block(granularity):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.ModuleDict({"q": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
            self.mlp = nn.ModuleDict({"up": nn.Linear(2, 2)})

    model = nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(2))})
    with pytest.raises(ValueError, match="no block found"):
        partition(model, granularity, include=["*.bias"])


def test_head_is_what_the_model_says():
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    model = BertForMaskedLM(config)
    others = rest(model, partition(model))
    assert "cls.predictions.decoder.weight" in [n for n, _ in others["head"]]
