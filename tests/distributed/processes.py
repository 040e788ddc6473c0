"""What runs in each of several processes: in a module of its own, which new processes can import by its name."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def one_of_group(
    rank: int, size: int, store: str, folder: str, call: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """Call something as one process of a gloo group, and save what it returns."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(store, size), rank=rank, world_size=size
    )
    torch.save(call(*args), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def command(rank: int, size: int, port: int, name: str, words: list[str], kill: tuple[int, int] | None) -> None:
    """What torchrun does in each process; `kill` is a process and the step after which it is killed."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from misa import pretrain, train
    from misa.training.trainer import Schedule

    original = Schedule.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if (rank, state.global_step) == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, args, state, control, **kwargs)

    Schedule.on_step_end = on_step_end
    commands = {"train": train.main, "pretrain": pretrain.main, "plain Trainer": plain_trainer}
    sys.exit(commands[name](words))


def plain_trainer(words: list[str]) -> int:
    """Train with Hugging Face's own Trainer and state shared out; then again, from the checkpoint in the middle."""
    import transformers
    from cases import rows
    from tiny import llama

    import misa

    class Consolidate(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            if control.should_save:
                optimizer.optimizer.consolidate_state_dict()

    batch = rows(0)
    items = [{name: values[i] for name, values in batch.items()} for i in range(len(batch["labels"]))]
    weights = []
    for checkpoint in (None, f"{words[0]}/checkpoint-3"):
        arguments = transformers.TrainingArguments(
            words[0], use_cpu=True, max_steps=5, save_steps=3, per_device_train_batch_size=2, report_to=[],
            disable_tqdm=True,
        )  # fmt: skip
        options = {"lr": 1e-3, "budget": 0.3, "interval": 2, "shard_state": True}
        trainer = transformers.Trainer(
            llama(2), arguments, train_dataset=items, callbacks=[Consolidate()],
            optimizer_cls_and_kwargs=(misa.TrainerOptimizer, options),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
    saved = torch.load(f"{words[0]}/checkpoint-3/optimizer.pt")["state"]
    shapes = {name: p.shape for name, p in trainer.model.named_parameters()}
    assert saved
    assert all(held["exp_avg"].shape == shapes[name] for name, held in saved.items())
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))
    return 0
