"""Inside TRL's SFTTrainer, by the same argument as in transformers' Trainer."""

import pytest
import torch
from tiny import llama, moved, weights

import misa

trl = pytest.importorskip("trl", reason="needs trl")


def make_trainer(folder, **arguments):
    from datasets import Dataset

    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 64, (8,), generator=generator).tolist() for _ in range(32)]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    settings = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "max_steps": 8,
        "save_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": 8,
        "seed": 3,
    }
    return trl.SFTTrainer(
        llama(2),
        trl.SFTConfig(str(folder), **{**settings, **arguments}),
        train_dataset=data,
        processing_class=tokenizer(),
        optimizer_cls_and_kwargs=(misa.TrainerOptimizer, {"lr": 1e-3, "budget": 0.3, "interval": 3}),
    )


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<pad>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, 64)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")


def test_sft_trainer_trains_and_resumes_bit_for_bit(tmp_path):
    trainer = make_trainer(tmp_path)
    before = weights(trainer.model)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, misa.MISA)
    assert optimizer.round == 2
    assert moved(before, trainer.model)
    after = weights(trainer.model)
    again = make_trainer(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert not moved(after, again.model)
