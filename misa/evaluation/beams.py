"""Beam search in batches that gives the answers of `transformers` one by one, in a fraction of its time.

Four things save the time: a prompt is read once and not once for each beam, and what all prompts begin with once for
all; the beams of a document, and grouped query heads, attend together to its keys and values, which are held once;
beams that change places move only what they generated; and documents that are finished leave the batch.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SHARED_ATTENTION = "misa_shared"

# Score of a beam that is none.
WORTHLESS = -1e9

# Finished documents leave when they are this share of the batch: what stays has to be copied.
LEAVING_SHARE = 0.125

# Fields of a generation configuration that change nothing in a search of beams: it reads the end tokens itself, the
# others are given with each call, are for sampling, or say how transformers keeps and returns what it finds.
HARMLESS = frozenset(
    (
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
        *("_from_model_config", "transformers_version"),
        *("max_length", "max_new_tokens", "num_beams", "do_sample"),
        *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    )
)
# Fields that ask for nothing at 1; the others ask for nothing at 0, False or empty.
FACTORS = frozenset(("length_penalty", "repetition_penalty", "encoder_repetition_penalty", "num_return_sequences"))


def shared_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention in which beams and grouped query heads share keys and values.

    With one new token, the query heads that share a key head are queries of one attention, and so are the beams of a
    document: each is masked from what the others generated. So nothing is held or copied for each beam or head;
    `transformers` repeats keys and values of the whole context as soon as there is padding.

    Args:
        module: The attention layer.
        query: Shape [documents * beams, query heads, new tokens, size].
        key: Shape [documents, key heads, tokens, size].
        value: Like `key`.
        attention_mask: Shape [documents, 1, beams, tokens] with one new token, or None.
        **kwargs: What else `transformers` passes on, such as `scaling`.

    Returns:
        Shape [documents * beams, new tokens, query heads, size], and None in place of attention weights.
    """
    rows, heads, num_new, size = query.shape
    num_documents, num_groups = key.shape[:2]
    if num_new != 1 or kwargs.get("dropout"):
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output
    beams, grouped = rows // num_documents, heads // num_groups
    together = query.view(num_documents, beams, num_groups, grouped, size).transpose(1, 2).flatten(2, 3)
    if attention_mask is not None:
        attention_mask = attention_mask[:, :, :, None].expand(-1, -1, -1, grouped, -1).flatten(2, 3)
    attended = torch.nn.functional.scaled_dot_product_attention(
        together, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling")
    )
    return attended.unflatten(2, (beams, grouped)).transpose(1, 2).reshape(rows, 1, heads, size), None


AttentionInterface.register(SHARED_ATTENTION, shared_attention)
AttentionMaskInterface.register(SHARED_ATTENTION, sdpa_mask)


class BeamLayer(DynamicLayer):
    """Keys and values of one layer while beams are searched, in one buffer that is never grown.

    A document holds its prompt once, and behind it, for each generated place, the tokens of all its beams. Beams
    change places within their document only, so a change moves nothing but generated tokens, of the beams that move.

    Args:
        prompt: The layer after reading the prompts, one row for each document.
        num_beams: Beams of each document.
        num_new: Tokens that may be generated.
    """

    def __init__(self, prompt: DynamicLayer, num_beams: int, num_new: int) -> None:
        super().__init__()
        self.prompt_length, self.num_beams, self.num_generated = prompt.get_seq_length(), num_beams, 0
        self.dtype, self.device, self.is_initialized = prompt.keys.dtype, prompt.keys.device, True
        self.keys, self.values = (self._buffer(tensor, num_beams * num_new) for tensor in (prompt.keys, prompt.values))

    def _buffer(self, prompt: torch.Tensor, num_slots: int) -> torch.Tensor:
        documents, heads, length, size = prompt.shape
        buffer = prompt.new_empty(documents, heads, length + num_slots, size)
        buffer[:, :, :length] = prompt
        return buffer

    @property
    def _end(self) -> int:
        return self.prompt_length + self.num_generated * self.num_beams

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one new token of each beam behind the old ones; return views of all, [documents, heads, tokens, size].

        Args:
            key_states: Shape [documents * beams, heads, 1, size].
            value_states: Like `key_states`.
        """
        start = self._end
        self.num_generated += 1
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            buffer[:, :, start : self._end] = new.unflatten(0, (-1, self.num_beams)).squeeze(3).transpose(1, 2)
        return self.keys[:, :, : self._end], self.values[:, :, : self._end]

    def get_seq_length(self) -> int:
        """Return the number of tokens of each beam."""
        return self.prompt_length + self.num_generated

    def keep(self, documents: torch.Tensor) -> None:
        """Drop all documents but those with the given indices."""
        self.keys, self.values = self.keys[documents], self.values[documents]

    def move(self, parents: torch.Tensor) -> None:
        """Give each beam the generated tokens of its parent, another beam of the document, [documents, beams]."""
        documents, beams = (parents != torch.arange(self.num_beams, device=parents.device)).nonzero(as_tuple=True)
        parents = parents[documents, beams]
        for buffer in (self.keys, self.values):
            generated = buffer[:, :, self.prompt_length : self._end].unflatten(2, (-1, self.num_beams))
            # Indexing on the right makes a copy, so beams may change places.
            generated[documents, :, :, beams] = generated[documents, :, :, parents]


def can_search(model: Any) -> bool:
    """Say whether `beam_search` serves a model.

    It needs the attention above, keys and values of all tokens in every layer, without windows or other states, and a
    generation configuration without rules of its own, such as a penalty on repetitions.
    """
    asked = model.generation_config.to_diff_dict()
    if any(value != 1 if name in FACTORS else value for name, value in asked.items() if name not in HARMLESS):
        return False
    layers = DynamicCache(config=model.config).layers
    is_plain = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
    return is_plain and bool(model.config._attn_implementation == SHARED_ATTENTION)


@dataclass
class Beams:
    """State of the search: documents still searched, and of each the running and the finished beams, best first.

    Attributes:
        documents: Index of each document in the batch, shape [documents].
        tokens: Generated tokens of the running beams, shape [documents, beams, tokens].
        scores: Their summed log-probabilities, shape [documents, beams].
        finished: Generated tokens of the finished beams, shape [documents, beams, tokens].
        finished_scores: Their summed log-probabilities divided by their length; very small where there is none.
    """

    documents: torch.Tensor
    tokens: torch.Tensor
    scores: torch.Tensor
    finished: torch.Tensor
    finished_scores: torch.Tensor

    @classmethod
    def start(cls, num_documents: int, num_beams: int, num_new: int, fill: int, device: torch.device) -> Beams:
        """Return the state before the first token: all beams but the first are worth nothing, since they are equal."""
        tokens = torch.full((num_documents, num_beams, num_new), fill, device=device)
        scores = torch.full((num_documents, num_beams), WORTHLESS, device=device)
        running = scores.clone()
        running[:, 0] = 0.0
        return cls(torch.arange(num_documents, device=device), tokens, running, tokens.clone(), scores)

    def advance(self, log_probs: torch.Tensor, step: int, end_ids: torch.Tensor, is_last: bool) -> torch.Tensor:
        """Choose the next token of every beam.

        Args:
            log_probs: Of the next token, shape [documents, beams, vocabulary], float32.
            step: Tokens generated before, from 0.
            end_ids: Tokens that end a text.
            is_last: Whether every text ends here.

        Returns:
            For each new running beam the old one that it continues, shape [documents, beams].
        """
        num_beams, vocab_size = log_probs.shape[1:]
        # One more candidate for each beam and end token, so that enough go on when some end.
        num_candidates = max(2, 1 + len(end_ids)) * num_beams
        totals = (log_probs + self.scores[:, :, None]).flatten(1)
        values, indices = totals.topk(num_candidates)
        parents, chosen = indices // vocab_size, indices % vocab_size
        candidates = _take(self.tokens, parents)
        candidates[:, :, step] = chosen
        ends = torch.isin(chosen, end_ids) | is_last
        # Only the best candidates may end; the rest are there to go on.
        ending = torch.where(ends[:, :num_beams], values[:, :num_beams] / (step + 1), WORTHLESS)
        merged, order = torch.cat([self.finished_scores, ending], 1).topk(num_beams)
        self.finished = _take(torch.cat([self.finished, candidates[:, :num_beams]], 1), order)
        self.finished_scores = merged
        self.scores, order = torch.where(ends, WORTHLESS, values).topk(num_beams)
        self.tokens = _take(candidates, order)
        return parents.gather(1, order)

    def is_open(self, num_tokens: int) -> torch.Tensor:
        """Say of each document whether a running beam may still beat the worst finished one, shape [documents]."""
        return self.scores[:, 0] / num_tokens > self.finished_scores[:, -1]

    def keep(self, which: torch.Tensor) -> None:
        """Drop all documents but those with the given indices."""
        for name in ("documents", "tokens", "scores", "finished", "finished_scores"):
            setattr(self, name, getattr(self, name)[which])


def _take(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Pick along dimension 1: [documents, n, tokens] by [documents, m] gives [documents, m, tokens]."""
    return tensor.gather(1, indices[:, :, None].expand(-1, -1, tensor.shape[2]))


@torch.inference_mode()
def beam_search(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    num_beams: int,
    num_new: int,
    end_ids: list[int],
    pad_id: int,
) -> torch.Tensor:
    """Generate the best continuation of each prompt, as `model.generate(num_beams=..., do_sample=False)` does.

    The rules are those of `transformers` with its defaults (length penalty 1, `early_stopping=False`): the score of a
    finished text is its mean log-probability, and a document is done when no running beam beats the worst of
    `num_beams` finished ones.

    Args:
        model: A transformers causal LM, or a PEFT model over one, for which `can_search` holds.
        input_ids: Prompts, padded on the left, shape [documents, tokens].
        attention_mask: 0 where padded, same shape.
        num_beams: Beams for each document.
        num_new: Tokens to generate at most.
        end_ids: Tokens that end a text.
        pad_id: Token that fills what lies behind the end.

    Returns:
        Prompt and best continuation of each document, shape [documents, tokens + num_new].
    """
    num_documents, device = len(input_ids), input_ids.device
    ends = torch.tensor(end_ids, device=device)
    beams = Beams.start(num_documents, num_beams, num_new, pad_id, device)
    found = torch.full((num_documents, num_new), pad_id, device=device)
    done = torch.zeros(num_documents, dtype=torch.bool, device=device)
    lengths = attention_mask.sum(-1)
    logits, prompts, attention_mask = _read_prompts(model, input_ids, attention_mask)
    logits = logits[:, None].expand(-1, num_beams, -1)
    layers = [BeamLayer(layer, num_beams, num_new) for layer in prompts.layers]
    cache = Cache(layers=layers)
    # A beam sees its document's prompt and what it generated itself.
    own = torch.eye(num_beams, dtype=torch.bool, device=device).repeat(1, num_new)
    visible = torch.cat(
        [part.expand(num_documents, num_beams, -1) for part in (attention_mask[:, None].bool(), own)], 2
    )
    for step in range(num_new):
        is_last = step + 1 == num_new
        parents = beams.advance(logits.float().log_softmax(-1), step, ends, is_last)
        # The answer is taken the moment the rule says that a document is done: a later text might still beat it.
        ending = ~done & (~beams.is_open(step + 1) | is_last)
        found[beams.documents[ending]] = beams.finished[ending, 0]
        done = done | ending
        if done.all():
            break
        for layer in layers:
            layer.move(parents)
        if done.sum() >= LEAVING_SHARE * len(done):
            (left,) = (~done).nonzero(as_tuple=True)
            beams.keep(left)
            for layer in layers:
                layer.keep(left)
            visible, lengths, done = visible[left], lengths[left], done[left]
        logits = _last_logits(
            model,
            beams.tokens[:, :, step].reshape(-1, 1),
            visible[:, None, :, : layers[0].prompt_length + (step + 1) * num_beams],
            (lengths + step).repeat_interleave(num_beams)[:, None],
            cache,
        ).unflatten(0, (-1, num_beams))
    return torch.cat([input_ids, found], 1)


def _read_prompts(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
    """Read the prompts, what they all begin with only once.

    Args:
        model: The model.
        input_ids: Prompts, padded on the left, shape [documents, tokens].
        attention_mask: 0 where padded, same shape.

    Returns:
        Logits behind each prompt, shape [documents, vocabulary]; the cache; and the mask that fits it: the common
        beginning, then the padding, then the rest of each prompt.
    """
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
    cache = DynamicCache(config=model.config)
    # The last token of each prompt is kept apart, since its logits are needed.
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    if common:
        start = torch.tensor([prompts[0][:common]], device=input_ids.device)
        places = torch.arange(common, device=input_ids.device)[None]
        _last_logits(model, start, torch.ones_like(start), places, cache)
        cache.batch_repeat_interleave(len(prompts))
    longest = max(map(len, prompts)) - common
    rest = input_ids[:, -longest:]
    lengths = torch.tensor([len(prompt) - common for prompt in prompts], device=input_ids.device)
    is_rest = torch.arange(longest, device=input_ids.device) >= longest - lengths[:, None]
    mask = torch.nn.functional.pad(is_rest.long(), (common, 0), value=1)
    places = (mask.cumsum(-1) - 1)[:, common:]
    return _last_logits(model, rest, mask, places, cache), cache, mask


def _last_logits(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, positions: torch.Tensor, cache: Cache
) -> torch.Tensor:
    """Run the model over new tokens and return the logits of the last one, shape [rows, vocabulary]."""
    logits: torch.Tensor = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    return logits
