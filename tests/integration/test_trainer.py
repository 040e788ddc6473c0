"""Inside a Hugging Face Trainer and an Accelerate loop."""

import json

import pytest
import torch
from tiny import llama, moved, same, weights
from torch.utils.data import Dataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

import misa


class Tokens(Dataset):
    def __init__(self, num_rows=64):
        self.rows = torch.randint(0, 64, (num_rows, 8), generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def make_trainer(folder, model=None, max_steps=10, options=None, **arguments):
    settings = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_steps": 1,
        "seed": 3,
        "use_cpu": True,
    }
    model = model or llama(2)
    options = {"lr": 1e-3, "budget": 0.3, "interval": 3} | (options or {})
    return Trainer(
        model,
        TrainingArguments(str(folder), max_steps=max_steps, **{**settings, **arguments}),
        train_dataset=Tokens(),
        eval_dataset=Tokens(8),
        optimizer_cls_and_kwargs=(misa.TrainerOptimizer, options),
    )


def test_trainer_trains_with_one_argument_and_no_subclass(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="no")
    before = weights(trainer.model)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, misa.MISA)
    assert optimizer.round == 3
    assert moved(before, trainer.model)
    logged = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    assert logged[0] == pytest.approx(1e-3)
    assert len(set(logged)) == len(logged)
    assert optimizer.param_groups[0]["lr"] == trainer.lr_scheduler.get_last_lr()[0]


OPTIONS = {
    "misa": {},
    "paper": {"variant": "paper"},
    "official": {"variant": "official"},
    "badam": {"preset": "badam", "budget": None},
    "lisa": {"preset": "lisa", "budget": None, "num_blocks": 1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_trainer_resumes_bit_for_bit_in_the_middle_of_a_round(tmp_path, name, dtype):
    trainer = make_trainer(tmp_path, llama(2, dtype), options=OPTIONS[name])
    trainer.train()
    for step in (4, 6):
        again = make_trainer(tmp_path, llama(2, dtype, seed=9), options=OPTIONS[name])
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same(trainer.model, again.model), step
        assert again.optimizer.optimizer.active == trainer.optimizer.optimizer.active


def test_trainer_resumes_without_any_callback_state(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    file = tmp_path / "checkpoint-5" / "trainer_state.json"
    state = json.loads(file.read_text())
    state["stateful_callbacks"] = {"TrainerControl": state["stateful_callbacks"]["TrainerControl"]}
    file.write_text(json.dumps(state))
    again = make_trainer(tmp_path, llama(2, seed=9))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert same(trainer.model, again.model)


def test_trainer_accumulates_micro_batches_into_one_step(tmp_path):
    one = make_trainer(tmp_path, save_strategy="no", max_steps=8)
    four = make_trainer(
        tmp_path, save_strategy="no", max_steps=8, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    for trainer in (one, four):
        trainer.train()
    assert one.optimizer.optimizer.round == four.optimizer.optimizer.round == 2
    assert four.optimizer.optimizer.scores == pytest.approx(one.optimizer.optimizer.scores, rel=1e-3)
    for p, q in zip(one.model.parameters(), four.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-4)


def test_saving_and_evaluating_in_between_changes_nothing(tmp_path):
    quiet = make_trainer(tmp_path, save_strategy="no")
    busy = make_trainer(tmp_path, eval_strategy="steps", eval_steps=2, save_steps=2, save_total_limit=1)
    for trainer in (quiet, busy):
        trainer.train()
    assert same(quiet.model, busy.model)


def test_record_has_every_round_once_after_a_resume(tmp_path):
    record = tmp_path / "rounds.jsonl"
    options = {"record": str(record), "interval": 2}
    trainer = make_trainer(tmp_path, options=options)
    trainer.train()
    whole = record.read_text()
    again = make_trainer(tmp_path, llama(2, seed=9), options=options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert [json.loads(line)["round"] for line in record.read_text().splitlines()] == [0, 1, 2, 3, 4]
    assert record.read_text() == whole


def test_trainer_with_checkpointing_trains_like_the_one_without_and_gives_it_back(tmp_path):
    plain = make_trainer(tmp_path, save_strategy="no")
    saving = make_trainer(tmp_path, save_strategy="no", gradient_checkpointing=True)
    for trainer in (plain, saving):
        trainer.train()
    for p, q in zip(plain.model.parameters(), saving.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    model = saving.model
    assert not model.get_input_embeddings()._forward_hooks
    saving.optimizer.optimizer.release()
    assert model.get_input_embeddings()._forward_hooks


def test_unknown_preset_is_refused_and_the_known_are_named():
    with pytest.raises(ValueError, match=r"preset='adam': must be one of misa, badam, lisa"):
        misa.TrainerOptimizer()(llama(1), preset="adam", lr=1e-3)


def test_learning_rate_must_be_given_where_a_trainer_passes_none_on():
    with pytest.raises(ValueError, match=r"^lr is missing: TrainingArguments' learning_rate"):
        misa.TrainerOptimizer()(llama(1), budget=0.3)


def test_class_of_the_optimizer_in_the_place_of_its_factory_is_refused_in_words(tmp_path):
    trainer = Trainer(
        llama(2),
        TrainingArguments(str(tmp_path), report_to=[], use_cpu=True),
        train_dataset=Tokens(8),
        optimizer_cls_and_kwargs=(misa.MISA, {"lr": 1e-3}),
    )
    with pytest.raises(ValueError, match=r"Trainers: misa.TrainerOptimizer"):
        trainer.train()


def test_trainer_without_that_argument_takes_an_optimizer_and_resumes_bit_for_bit(tmp_path):
    def make():
        model = llama(2)
        arguments = Seq2SeqTrainingArguments(
            str(tmp_path),
            max_steps=6,
            save_steps=1,
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            gradient_checkpointing=True,
        )
        optimizer = misa.MISA(model, lr=1e-3, budget=0.3, interval=3)
        return Seq2SeqTrainer(model, arguments, train_dataset=Tokens(24), optimizers=(optimizer, None))

    whole, resumed = make(), make()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert whole.optimizer.optimizer.round == 2
    assert same(whole.model, resumed.model)


def test_optimizer_made_before_the_adapters_says_so(tmp_path):
    from accelerate import Accelerator
    from peft import LoraConfig, get_peft_model

    base = llama(2)
    optimizer = misa.MISA(base, lr=1e-3, budget=0.3)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with pytest.warns(UserWarning, match="frozen by something else .* after it was made"):
        Accelerator(cpu=True).prepare(model, optimizer)


def test_accelerate_loop_equals_a_bare_loop():
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    def run(accelerated):
        model = llama(2)
        optimizer = misa.MISA(model, budget=0.3, interval=2)
        loader = DataLoader(Tokens(24), batch_size=4)
        if accelerated:
            accelerator = Accelerator(cpu=True)
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for rows in loader:
            loss = model(**rows).loss
            accelerator.backward(loss) if accelerated else loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    assert same(run(True), run(False))


def test_peft_model_in_a_trainer_trains_adapters_alone(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(2), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    before = weights(model)
    make_trainer(tmp_path, model, save_strategy="no").train()
    changed = moved(before, model)
    assert changed
    assert all("lora_" in name for name in changed)
