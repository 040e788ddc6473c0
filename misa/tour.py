"""What the quick tour does live: a small model, some text, a bare training loop, and tables of what an optimizer holds.

Everything is small enough for a minute on one core, and nothing is fetched: the text is the documentation of an
installed package, its bytes are the tokens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import pandas as pd

Batch = dict[str, torch.Tensor]
_NUM_BYTES = 256


def small_model(seed: int = 0) -> Any:
    """Build a LLaMA of half a million parameters that reads bytes.

    Args:
        seed: Of its random weights.

    Returns:
        A transformers model of two layers.
    """
    from misa.models import build_model, model_config

    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return build_model(model_config("2m", vocab_size=_NUM_BYTES, num_hidden_layers=2, **tokens), seed)


def byte_batches(
    num_batches: int, batch_size: int = 16, seq_len: int = 32, seed: int = 0, package: str = "numpy"
) -> list[Batch]:
    """Cut the documentation strings of an installed package into batches of bytes, without repetition.

    Args:
        num_batches: Number of batches.
        batch_size: Sequences in a batch.
        seq_len: Bytes in a sequence.
        seed: Of their order.
        package: Name of the package.

    Returns:
        Keyword arguments of the model's forward pass.

    Raises:
        ValueError: If the package has too little text.
    """
    from misa.data.docstrings import file_docstrings, package_files

    needed = num_batches * batch_size * seq_len
    text = bytearray()
    for file in package_files(package):
        text += "\n\n".join(file_docstrings(file)).encode()
        if len(text) >= needed:
            break
    if len(text) < needed:
        raise ValueError(f"num_batches is {num_batches}; {package} has text for {len(text) // (batch_size * seq_len)}")
    sequences = torch.frombuffer(text[:needed], dtype=torch.uint8).long().view(-1, seq_len)
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": ids, "labels": ids} for ids in sequences[order].split(batch_size)]


def train(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    method: str,
    evaluate_every: int = 10,
) -> pd.DataFrame:
    """Train on every batch once: the loop of any PyTorch script, with the loss written down.

    Args:
        model: The model.
        optimizer: Any optimizer of its parameters.
        batches: One for each step.
        held_out: Batches for the evaluation loss.
        method: Name of the method in the table.
        evaluate_every: Steps between evaluations; the last step is evaluated in any case.

    Returns:
        The columns of `convergence.csv`, so that the figure of that name draws it.
    """
    import pandas as pd

    rows = []
    seconds = 0.0
    for step, batch in enumerate(batches, 1):
        start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - start
        if step % evaluate_every == 0 or step == len(batches):
            with torch.no_grad():
                loss = sum(float(model(**each).loss) for each in held_out) / len(held_out)
            rows.append((step, step * batch["input_ids"].numel(), seconds, "eval_loss", loss))
    table = pd.DataFrame(rows, columns=["step", "tokens", "time_s", "metric", "value"])
    return table.assign(
        kind="pretrain", data="documentation", machine="this one", run=f"tour-{method}", method=method, seed=0
    )


def block_table(optimizer: Any) -> pd.DataFrame:
    """Tell of every block whether it is on, how likely it was drawn, and its score for the next draw.

    Args:
        optimizer: A `misa.BlockCoordinateOptimizer`.

    Returns:
        One row for each block, those that are on first.
    """
    import pandas as pd

    table = pd.DataFrame(
        {
            "on": [block.name in optimizer.active for block in optimizer.blocks],
            "parameters": [block.numel for block in optimizer.blocks],
            "probability": optimizer.probabilities.values(),
            "score": optimizer.scores.values(),
        },
        index=pd.Index([block.name for block in optimizer.blocks], name="block"),
    )
    return table.sort_values("on", ascending=False, kind="stable")


def state_table(optimizers: Mapping[str, torch.optim.Optimizer]) -> pd.DataFrame:
    """Say what each optimizer trains in this step and what state it holds for it.

    Args:
        optimizers: By name.

    Returns:
        One row for each: trainable parameters and KiB of state.
    """
    import pandas as pd

    from misa.training.meter import num_active, optimizer_state_bytes

    rows = {
        name: {
            "trainable parameters": num_active(optimizer),
            "optimizer state (KiB)": sum(optimizer_state_bytes(optimizer).values()) / 1024,
        }
        for name, optimizer in optimizers.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def largest_difference(model: Any, other: Any) -> float:
    """Return the largest difference between the weights of two models of one shape."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((first - second).detach().abs().max()) for first, second in pairs)
