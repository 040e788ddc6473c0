"""Peak memory of a training step by formula, beside the tracker's count.

For decoders of the LLaMA kind (RMS norms, rotary positions, grouped queries, gated feed-forward), trained whole, block
by block, or through LoRA adapters; further norms (Gemma), fused matrices (Phi-3) or experts (Mixtral) would keep
more than it says. T are the tokens of the batch, H the hidden size, F the feed-forward size, Q and K
the widths of queries and keys, N the query heads, V the vocabulary, w the bytes of a weight (2 for bf16). A layer that
is differentiated keeps:

==========================  ==========================================================================
term                        why
==========================  ==========================================================================
2 (4TH + 4T)                each norm keeps its input in fp32 and one fp32 factor a token
w TH for each trained norm  the normalized input, for the gradient of its weight
w TH                        the norm's output, if a matrix that reads it trains; q, k, v share one, gate and
                            up another
w T (2Q + 2K) + 4TN         queries, keys, values and output of the fused attention, and fp32 sums of each head
4T (Q + K) + 4T (N + M)     Qwen3's norms of queries and keys, as each norm; M are the key heads
3 w TF                      gate, up, and the activated gate
w TF                        the product of the two, if down trains
==========================  ==========================================================================

The lowest layer that trains keeps only what lies above its lowest trained matrix, the layers below nothing. A
checkpointed layer keeps its input, w TH, and all of the above while it is recomputed. On top come the final norm,
4TH + 4T, and the logits: 10 VT bytes at the end of the forward pass, 12 VT in the backward pass (fp32 log-probabilities
and their two gradients), or a chunk of them. While a layer's feed-forward is differentiated, three matrices of w TF and
one of w TH join. An fp32 adapter on bf16 weights keeps a copy of its input, 4 T(in); one of the weights' precision
keeps what a trained matrix keeps; with dropout either keeps what is left of its input, and a byte an element of mask.

Which of these are alive together differs between the loss, each layer's backward pass and the optimizer's step: the
formula is the largest of these sums.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from misa import inner as inner_rules
from misa.integration.chunked_loss import CHUNK_TOKENS
from misa.memory.scenario import Scenario
from misa.rounded import BLOCK, OTHER_CHUNK_NUMEL

# Bytes of a trained parameter's moments, by state format, and of the master copy of a weight that is not fp32.
_MOMENTS = {"fp32": 8, "bf16": 4, "8bit": 2 + 8 / BLOCK}
_MASTER = 4
# Bytes for each element of a piece of a tensor while it is updated without a master copy; what is fp32 is neither
# widened nor rounded.
_ROUNDING_BYTES = {2: {"fp32": 15, "bf16": 23, "8bit": 33}, 4: {"fp32": 0, "bf16": 18, "8bit": 32}}
_LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.(.+)$")
_QKV, _GATE_UP = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}
_METHODS = (
    *("adamw", "lora", "badam", "badam_official", "lisa", "lisa_official"),
    *("misa", "misa_uniform", "misa_official"),
)
# Options by which a step holds something else than AdamW's does, as that of `misa_paper`.
_OTHER_STEPS = {("variant", "paper"), ("inner", "sgd")}
_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Estimate:
    """What the formula says.

    Attributes:
        peak_bytes: The largest of `moments`.
        moments: Bytes at the loss, in the backward pass of each layer, at its end, and in the step.
        weights_bytes: Weights, adapters included.
        gradients_bytes: Gradients of all that trains.
        optimizer_bytes: Moments and master copies.
        saved_bytes: Activations kept for the backward pass.
    """

    moments: dict[str, int]
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    saved_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The largest of the moments."""
        return max(self.moments.values())

    @property
    def moment(self) -> str:
        """Name of the largest moment."""
        return max(self.moments, key=self.moments.__getitem__)


class ClosedForm:
    """The formula for one model and setting; the trained parameters are given to `estimate`.

    Args:
        config: A transformers configuration of the LLaMA kind.
        scenario: Batch, sequence, checkpointing, loss, precision, states, adapters.
        on_accelerator: Work in pieces as large as on a GPU; otherwise as on a CPU.

    Raises:
        ValueError: For a model or method the formula does not cover.
    """

    def __init__(self, config: Any, scenario: Scenario, on_accelerator: bool = True) -> None:
        if why := uncovered(scenario, config):
            raise ValueError(why)
        self.scenario = s = scenario
        self._piece_numel = inner_rules.OTHER_CHUNK_NUMEL if on_accelerator else inner_rules.CHUNK_NUMEL["cpu"]
        self.bytes = 4 if s.dtype == "float32" else 2
        self.tokens = s.batch_size * s.seq_len
        self.hidden, self.inner, self.vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
        self.heads, self.layers = config.num_attention_heads, config.num_hidden_layers
        head = getattr(config, "head_dim", None) or self.hidden // self.heads
        self.queries, self.keys = self.heads * head, config.num_key_value_heads * head
        self.tied = config.tie_word_embeddings
        self.drops = s.options.get("lora_dropout", 0.0) > 0
        has_bias = config.model_type == "qwen2"
        self.key_heads, self.norms_heads = config.num_key_value_heads, config.model_type == "qwen3"
        hidden, queries, keys, inner = self.hidden, self.queries, self.keys, self.inner
        matrices = hidden * (2 * queries + 2 * keys + 3 * inner) + (queries + 2 * keys if has_bias else 0)
        matrices += 2 * head * self.norms_heads
        ends = self.vocabulary * hidden * (1 if self.tied else 2) + hidden
        self.num_params = self.layers * (matrices + 2 * hidden) + ends
        self.widths = dict.fromkeys(_MATRICES, (hidden, inner)) | {
            "q_proj": (hidden, queries),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (queries, hidden),
            "down_proj": (inner, hidden),
        }

    def estimate(self, trained: Mapping[str, int]) -> Estimate:
        """Bytes of a step.

        Args:
            trained: Elements of each trained parameter, by dotted name.
        """
        s, w, tokens = self.scenario, self.bytes, self.tokens
        adapters = any("lora_" in name for name in trained)
        width = w if s.lean_adapters or not adapters else 4
        by_layer: dict[int, dict[str, int]] = {}
        outside = {"embed": 0, "head": 0, "norm": 0}
        for name, numel in trained.items():
            found = _LAYER.search(name)
            if found:
                modules = found[2].split(".")
                module = next((m for m in modules if m in self.widths or m.endswith("norm")), modules[0])
                layer = by_layer.setdefault(int(found[1]), {})
                layer[module] = layer.get(module, 0) + numel
            else:
                kind = "embed" if "embed" in name else "norm" if "norm" in name else "head"
                outside[kind] += numel
        num_trained = sum(trained.values())
        weights = self.num_params * w + (num_trained * width if adapters else 0)
        gradients = {i: width * sum(layer.values()) for i, layer in by_layer.items()}
        state = self._state_bytes(num_trained, width, bool(adapters))
        head_trains = bool(outside["head"] or (self.tied and outside["embed"]))
        lowest = 0 if outside["embed"] else min(by_layer, default=self.layers)

        saved: list[int] = []  # of each layer, while the forward pass goes on
        whole: list[int] = []  # of each layer, while it is differentiated
        first = s.checkpointing if s.checkpointing >= 0 else self.layers
        for i in range(self.layers):
            below = i > lowest or bool(outside["embed"])
            own = self._layer_bytes(by_layer.get(i, {}), below, width if adapters else None) if i >= lowest else 0
            whole.append(own)
            saved.append(w * tokens * self.hidden if lowest <= i < lowest + first else own)
        ends = 4 * tokens * (self.hidden + 1) if lowest < self.layers else 0
        ends += w * tokens * self.hidden * (bool(outside["norm"]) + (head_trains and s.loss == "full"))
        base = weights + state
        head_gradient = w * self.vocabulary * self.hidden if head_trains else 0
        moments: dict[str, int] = {}
        if s.loss == "full":
            logits = self.vocabulary * tokens
            moments["loss"] = base + sum(saved) + ends + 12 * logits
            moments["head"] = base + sum(saved) + ends + w * logits + head_gradient + w * tokens * self.hidden
        else:
            # In fp32 nothing is widened: logits, probabilities and gradients are one tensor.
            chunk = min(CHUNK_TOKENS, tokens) * self.vocabulary * (6 if w == 2 else 4)
            moments["loss"] = base + sum(saved) + ends + chunk + head_gradient + w * tokens * self.hidden
        live = base + head_gradient + w * outside["norm"]
        # Three matrices for the gradients of gate, up and their product; when they exist, what down kept is gone.
        is_lean = s.lean_activations and not adapters
        flow = w * tokens * ((2 if is_lean else 3) * self.inner + self.hidden)
        if adapters:
            flow += self.tokens * self.inner * (-w if width == w else 4 * self.drops)
        for i in reversed(range(lowest, self.layers)):
            passes = i > lowest or bool(outside["embed"]) or bool(set(by_layer.get(i, {})) - {"down_proj"})
            down = width * by_layer.get(i, {}).get("down_proj", 0)
            below = i > lowest or bool(outside["embed"])
            # A lean norm keeps the very input that checkpointing kept.
            again = w * tokens * self.hidden if saved[i] < whole[i] and not (s.lean_activations and below) else 0
            kept = sum(saved[:i]) + max(whole[i], saved[i]) + again
            moments[f"layer {i}"] = live + kept + down + (flow if passes else 2 * w * tokens * self.hidden)
            live += gradients.get(i, 0)
        embedding = w * self.vocabulary * self.hidden if outside["embed"] else 0
        moments["backward end"] = live + embedding + w * tokens * self.hidden
        total = live - base + embedding
        if s.accumulates:
            # What is differentiated later has its gradient of an earlier pass already.
            moments = {
                name: value + sum(gradients.get(j, 0) for j in range(int(name[6:]) + 1)) + embedding
                if name.startswith("layer ")
                else value + (total if name in ("loss", "head") else 0)
                for name, value in moments.items()
            }
        if s.step_in_backward:
            moments = {
                name: value - sum(gradients.get(j, 0) for j in range(int(name[6:]) + 1, self.layers))
                if name.startswith("layer ")
                else value
                for name, value in moments.items()
            }
            moments["backward end"] = base + max(gradients.values(), default=0) + embedding
        else:
            moments["step"] = base + total + self._step_bytes(trained)
        return Estimate(moments, weights, total, state, sum(saved) + ends)

    def _layer_bytes(self, trained: Iterable[str], below: bool, adapter_bytes: int | None) -> int:
        """What one layer keeps; `below` says whether its input is differentiated."""
        trains, w, tokens, lean = set(trained), self.bytes, self.tokens, self.scenario.lean_activations
        # Adapters that read a copy of their input, or what dropout left of it, keep that instead.
        reads = adapter_bytes is None or (adapter_bytes == w and not self.drops)
        read = w * tokens * self.hidden
        norm = read if lean else 4 * tokens * (self.hidden + 1)
        wide = w * tokens * self.inner
        kept = norm if below else 0
        flows = below
        if "input_layernorm" in trains:
            kept, flows = kept + (norm if lean and not below else 0 if lean else read), True
        if trains & _QKV and reads:
            kept += read
        flows = flows or bool(trains & _QKV)
        out = w * tokens * self.queries
        if flows:
            kept += w * tokens * (self.queries + 2 * self.keys) + out + 4 * tokens * self.heads
            kept += self._head_norm_bytes(trains)
        elif "o_proj" in trains and adapter_bytes is None:
            kept += out
        flows = flows or "o_proj" in trains
        kept += norm if flows else 0
        if "post_attention_layernorm" in trains:
            kept, flows = kept + (0 if lean and flows else read), True
        if trains & _GATE_UP and reads:
            kept += read
        gate, up = flows or "gate_proj" in trains, flows or "up_proj" in trains
        if lean and adapter_bytes is None:
            kept += 2 * wide * bool(gate or up or "down_proj" in trains)
        else:
            kept += wide * (2 * gate + up + ("down_proj" in trains and reads))
        if adapter_bytes is not None:
            kept += self._adapter_bytes(trains, adapter_bytes)
        return kept

    def _head_norm_bytes(self, trained: set[str]) -> int:
        """What the norms of queries and of keys keep, if there are any."""
        if not self.norms_heads:
            return 0
        if self.scenario.lean_activations:
            return self.tokens * self.bytes * (self.queries + self.keys)
        normalized = self.queries * ("q_norm" in trained) + self.keys * ("k_norm" in trained)
        return self.tokens * (4 * (self.queries + self.keys + self.heads + self.key_heads) + self.bytes * normalized)

    def _adapter_bytes(self, trained: set[str], width: int) -> int:
        """Copies of inputs in the adapters' precision, dropped inputs and their masks, and products of rank r."""
        rank, kept = self.scenario.options.get("lora_r", 16), 0
        copies = width != self.bytes or self.drops
        for module in trained & set(_MATRICES):
            kept += self.tokens * (width * rank + self.widths[module][0] * (width * copies + self.drops))
        return kept

    def _state_bytes(self, num: int, width: int, adapters: bool) -> int:
        s = self.scenario
        if adapters:
            return 2 * width * num
        if s.state_format in _MOMENTS:
            return int(_MOMENTS[s.state_format] * num)
        return (int(_MOMENTS["fp32"]) + (0 if self.bytes == 4 else _MASTER)) * num

    def _step_bytes(self, trained: Mapping[str, int]) -> int:
        s = self.scenario
        if s.state_format in _MOMENTS:
            return _ROUNDING_BYTES[self.bytes][s.state_format] * min(
                max(trained.values(), default=0), OTHER_CHUNK_NUMEL
            )
        if self.bytes == 4 or any("lora_" in name for name in trained):
            return 0
        return 4 * min(sum(trained.values()), self._piece_numel)


def uncovered(scenario: Scenario, config: Any) -> str | None:
    """Why there is no formula, in words, or None where there is one.

    Args:
        scenario: Method and options.
        config: A transformers configuration.
    """
    others = [f"{name}={value}" for name, value in scenario.options.items() if (name, value) in _OTHER_STEPS]
    if scenario.method in _METHODS and config.model_type in _MODEL_TYPES and not others:
        return None
    return (
        f"no closed form for method {' '.join([scenario.method, *others])} on {config.model_type} models; it covers "
        f"{', '.join(_METHODS)} on {', '.join(_MODEL_TYPES)} models"
    )


def trained_parameters(model: Any) -> dict[str, int]:
    """Elements of each parameter of a model that trains now, by name: what `ClosedForm.estimate` takes."""
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
