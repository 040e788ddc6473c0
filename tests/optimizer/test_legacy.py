"""Scripts written for the authors' class."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import batch, llama, moved, same, train, weights
from torch.optim import AdamW
from transformers import Adafactor, BertConfig, BertForSequenceClassification

from misa.optimizer import LISA, MISA, BAdam, BlockCoordinateDesentOptimizer


def legacy(model, base=None, **arguments):
    base = base or AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    return BlockCoordinateDesentOptimizer(base, list(model.named_parameters()), **arguments)


def test_script_of_the_readme_runs_unchanged(caplog):
    """The lines at the end of the authors' README, with the names they leave to the reader."""
    model = llama(12)
    args = SimpleNamespace(learning_rate=5e-5)

    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        base_optimizer = AdamW(model.parameters(), lr=args.learning_rate)

        optimizer = BlockCoordinateDesentOptimizer(
            base_optimizer=base_optimizer,
            named_parameters_list=list(model.named_parameters()),
            param_ratio_limit=0.03,  # The ratio of trainable parameters
        )

    before = weights(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for i in range(3):
        train(model, optimizer, 1, first=i)
        scheduler.step()
    assert moved(before, model)
    total = sum(p.numel() for p in model.parameters())
    assert optimizer.active_numel <= 0.03 * total
    assert optimizer.param_groups[0]["weight_decay"] == 0.01  # that of the base optimizer
    assert [r.message for r in caplog.records if "misa.MISA" in r.message]


def test_defaults_are_the_official_variant():
    model, twin = llama(4), llama(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        old, new = legacy(model), MISA(twin, lr=1e-3, variant="official")
    assert old.settings == new.settings
    train(model, old, 30)
    train(twin, new, 30)
    assert same(model, twin)


def test_every_argument_of_the_authors_class_is_known_in_its_place():
    model = llama(2)
    base = AdamW(model.parameters(), lr=1e-3)
    positional = (base, list(model.named_parameters()), 7, True, 1, 2.0, "misa", 0.5, "module", 0.3, 1, 4.0, False)
    settings = BlockCoordinateDesentOptimizer(*positional).settings
    assert (settings.interval, settings.eta, settings.budget, settings.sample_last) == (7, 2.0, 0.3, 1)
    assert (settings.score.beta, settings.score.clip) == (0.5, 4.0)
    assert settings.always_on == ("embeddings", "head")


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_layer_in_a_cyclic_order_is_badam(order):
    model, twin = llama(), llama()
    train(model, legacy(model, granularity="layer", update_order=order, interval_steps=2), 7)
    train(twin, BAdam(twin, interval=2, order=order), 7)
    assert same(model, twin)


def test_several_layers_in_turn_wrap_as_in_their_code():
    model = llama(3)
    optimizer = legacy(model, granularity="layer", update_order="ascending", activated_layers=2, interval_steps=1)
    following = 0
    for _ in range(7):  # theirs: the layers after the last one that was on, modulo their number
        assert set(optimizer.active) == {f"model.layers.{(following + k) % 3}" for k in range(2)}
        following += 2
        train(model, optimizer, 1)


def test_random_layers_with_embeddings_and_head_are_lisa():
    model, twin = llama(), llama()
    arguments = {"granularity": "layer", "update_order": "random", "include_embedding_and_lm_head": True}
    train(model, legacy(model, interval_steps=2, activated_layers=2, **arguments), 7)
    train(twin, LISA(twin, interval=2, num_blocks=2, always_on=("embeddings", "head")), 7)
    assert same(model, twin)


@pytest.mark.parametrize("order", ["misa", "random", "ascending", "descending"])
@pytest.mark.parametrize("granularity", ["module", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_order_and_granularity_trains(order, granularity, dtype):
    model = llama(3, dtype)
    optimizer = legacy(model, update_order=order, granularity=granularity, param_ratio_limit=0.2, interval_steps=2)
    before = weights(model)
    train(model, optimizer, 6)
    assert moved(before, model)


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, nesterov=True),
        lambda params: torch.optim.Adam(params, lr=1e-3, weight_decay=0.1),
        lambda params: AdamW(params, lr=1e-3, amsgrad=True),
    ],
    ids=["sgd", "adam", "amsgrad"],
)
def test_base_optimizer_decides_what_happens_inside_a_round(make):
    model, twin = llama(2), llama(2)
    optimizer = legacy(model, make(model.parameters()), param_ratio_limit=1.0, update_order="random", interval_steps=9)
    active = [twin.get_submodule(n).weight for n in optimizer.active]
    assert len(active) == 14
    expected = make(active)
    train(model, optimizer, 4)
    for i in range(4):
        train(twin, SimpleNamespace(step=expected.step, zero_grad=twin.zero_grad), 1, first=i)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("mix_lora", [False, True])
def test_lora_matrices_become_the_blocks(mix_lora):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(2), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    optimizer = legacy(model, mix_lora=mix_lora, param_ratio_limit=0.5, interval_steps=2)
    before = weights(model)
    train(model, optimizer, 6)
    assert len(optimizer.blocks) == 8
    changed = moved(before, model)
    assert changed
    assert all("lora_" in n for n in changed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"update_order": "best"}, "update_order='best': must be one of misa, random"),
        ({"granularity": "matrix"}, "granularity='matrix': must be one of module, layer"),
        ({"mix_lora": True}, "mix_lora=True: no parameter"),
        ({"param_ratio_limit": 1e-4}, "no block fits"),
    ],
)
def test_argument_out_of_range_raises_naming_it(arguments, message):
    with pytest.raises(ValueError, match=message):
        legacy(llama(2), **arguments)


def test_resumed_run_has_the_rates_of_a_scheduler_on_the_base():
    def make():
        model = llama()
        base = AdamW(model.parameters(), lr=1e-2)
        optimizer = legacy(model, base, interval_steps=3, param_ratio_limit=0.3)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(base, step_size=1, gamma=0.5)

    def go_on(model, optimizer, scheduler, first, last):
        rates = []
        for i in range(first, last):
            train(model, optimizer, 1, first=i)
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
        return rates

    parts, again = make(), make()
    go_on(*parts, 0, 4)
    for part, saved in zip(again, copy.deepcopy([part.state_dict() for part in parts]), strict=True):
        part.load_state_dict(saved)
    assert go_on(*parts, 4, 8) == go_on(*again, 4, 8) == [1e-2 * 0.5**i for i in range(4, 8)]
    assert same(parts[0], again[0])


def test_groups_of_the_base_keep_their_rates_and_decays():
    model = llama()
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    others = [p for n, p in model.named_parameters() if "norm" not in n]
    base = AdamW([{"params": norms, "lr": 1e-5, "weight_decay": 0.0}, {"params": others, "lr": 1e-3}], weight_decay=0.1)
    optimizer = legacy(model, base, granularity="layer", update_order="ascending")
    found = {(g["lr"], g["weight_decay"]): set(g["params"]) for g in optimizer.param_groups}
    assert found == {(1e-5, 0.0): set(norms), (1e-3, 0.1): set(others)}
    base.param_groups[1]["lr"] = 5e-4
    train(model, optimizer, 1)
    assert sorted(g["lr"] for g in optimizer.param_groups) == [1e-5, 5e-4]


def test_with_lora_the_classifier_and_asked_for_embeddings_train_too():
    config = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    lora = LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    model = get_peft_model(BertForSequenceClassification(config), lora)
    optimizer, before = legacy(model, interval_steps=2, param_ratio_limit=0.5), weights(model)
    for i in range(4):
        model(input_ids=batch(i)["input_ids"], labels=torch.tensor([0, 1, 1, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    classifier = "base_model.model.classifier.modules_to_save.default"
    assert {n for n in moved(before, model) if "lora" not in n} == {f"{classifier}.weight", f"{classifier}.bias"}
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    optimizer = legacy(model, interval_steps=2, param_ratio_limit=0.5, include_embedding_and_lm_head=True)
    before = weights(model)
    train(model, optimizer, 4)
    outside = {n.removeprefix("base_model.model.") for n in moved(before, model) if "lora" not in n}
    assert outside == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Adafactor(p, relative_step=True), "Adafactor has no learning rate"),
        (lambda p: torch.optim.LBFGS(p), "LBFGS.*needs a closure"),
    ],
)
def test_base_that_cannot_be_the_rule_of_a_round_is_refused(make, message):
    model = llama()
    with pytest.raises(ValueError, match=message):
        legacy(model, make(model.parameters()))
