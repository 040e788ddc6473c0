"""The optimizer on a CUDA device: no waiting inside a round, the bytes it takes, the same promises as on a CPU."""

import copy
import gc

import pytest
import torch
from tiny import batch, llama, same

from misa.optimizer import LISA, MISA, BAdam

pytestmark = pytest.mark.gpu

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
PRESETS = pytest.mark.parametrize(
    ("preset", "options"),
    [(MISA, {"budget": 0.2}), (BAdam, {}), (LISA, {"num_blocks": 1})],
    ids=["misa", "badam", "lisa"],
)

FORMATS = pytest.mark.parametrize(
    ("dtype", "state_format"),
    [(torch.float32, "master"), *((torch.bfloat16, name) for name in ("master", "fp32", "bf16", "8bit"))],
)


def on_gpu(**options):
    return llama(**options).to("cuda")


def backward(model, seed):
    model(**{name: tensor.to("cuda") for name, tensor in batch(seed).items()}).loss.backward()


def train(model, optimizer, num_steps, first=0):
    for i in range(first, first + num_steps):
        backward(model, i)
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def deterministic(monkeypatch):
    """Kernels that give the same bits each time."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@FORMATS
@PRESETS
def test_no_step_inside_a_round_waits_for_the_device(preset, options, dtype, state_format):
    """CUDA itself raises at the first read by the host; the last step of a round, which draws anew, may read."""
    options = {**options, "state_format": state_format}
    model = on_gpu(dtype=dtype)
    optimizer = preset(model, interval=6, **options)
    train(model, optimizer, 7)  # one round and the first step of the next, which makes the state
    inputs = {name: tensor.to("cuda") for name, tensor in batch(7).items()}
    for _ in range(3):
        loss = model(**inputs).loss
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@DTYPES
@PRESETS
def test_bytes_the_device_gives_back_and_takes_are_those_the_optimizer_states(preset, options, dtype):
    """Between two steps the device holds the weights, what `state_bytes` says is on it, and nothing else."""
    model = on_gpu(dtype=dtype, hidden_size=512, intermediate_size=1024)
    inputs = {name: tensor.to("cuda") for name, tensor in batch(0).items()}
    # PyTorch takes a workspace for matrix products once, and keeps it.
    model(**inputs).loss.backward()
    model.zero_grad()
    gc.collect()
    weights = torch.cuda.memory_allocated()
    optimizer = preset(model, interval=3, **options)
    for _ in range(10):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        held = torch.cuda.memory_allocated() - weights
        stated = sum(num for kind, num in optimizer.state_bytes().items() if kind != "residual")
        # Step counters and gradient norms, of which each takes the allocator's smallest piece.
        assert 0 <= held - stated < 2**17


def test_full_budget_equals_torch_adamw_bit_for_bit():
    model, twin = on_gpu(), on_gpu()
    options = {"lr": 1e-3, "weight_decay": 0.01}
    optimizer = MISA(model, budget=1.0, always_on=("embeddings", "head", "norms"), interval=2, **options)
    # As on a CPU, parameters of one dimension get no weight decay.
    thin = {"params": [q for q in twin.parameters() if q.ndim == 1], "weight_decay": 0.0}
    plain = torch.optim.AdamW([{"params": [q for q in twin.parameters() if q.ndim > 1]}, thin], fused=True, **options)
    for i in range(6):
        backward(model, i)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()  # the very same gradients: backward kernels may add in another order
        optimizer.step()
        plain.step()
        optimizer.zero_grad()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0, msg=lambda text, n=name, i=i: f"step {i}, {n}: {text}")


@FORMATS
@PRESETS
def test_resumed_training_continues_bit_for_bit(preset, options, dtype, state_format, deterministic):
    options = {**options, "state_format": state_format}
    model = on_gpu(dtype=dtype)
    optimizer = preset(model, interval=3, **options)
    train(model, optimizer, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 6, first=5)
    resumed = on_gpu(dtype=dtype, seed=1)
    other = preset(resumed, interval=3, **options)
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(resumed, other, 6, first=5)
    assert other.active == optimizer.active
    assert same(model, resumed)


@DTYPES
def test_device_and_processor_draw_the_same_blocks_and_train_alike(dtype):
    """The generator is the optimizer's own, so that a run draws the same blocks on any device while scores agree."""
    model, twin = on_gpu(dtype=dtype), llama(dtype=dtype)
    optimizer, other = (MISA(m, lr=1e-3, budget=0.2, interval=2, eta=0.0) for m in (model, twin))
    for i in range(8):
        train(model, optimizer, 1, first=i)
        twin(**batch(i)).loss.backward()
        other.step()
        other.zero_grad()
        assert optimizer.active == other.active
    assert optimizer.scores == pytest.approx(other.scores, rel=0.05)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        # A gradient near zero may have another sign, which turns a step of AdamW around.
        assert (p.cpu() - q).abs().mean() < 2e-4


@pytest.mark.parametrize("policy", ["drop", "reset", "cpu", "keep"])
def test_state_policies_train_and_keep_state_where_they_say(policy):
    model = on_gpu(dtype=torch.bfloat16)
    optimizer = MISA(model, budget=0.2, interval=2, state_policy=policy)
    train(model, optimizer, 9)
    moments = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.ndim]
    assert moments
    assert all(moment.is_cuda for moment in moments)
    saved = [v for e in optimizer._entries.values() for v in (e.saved or {}).values() if torch.is_tensor(v) and v.ndim]
    assert bool(saved) == (policy in ("cpu", "keep"))
    assert all(tensor.is_cuda == (policy == "keep") for tensor in saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grad_scaler_skips_an_overflow_and_recovers(dtype):
    model = on_gpu(dtype=dtype)
    optimizer = MISA(model, budget=0.3, interval=4)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**4)
    inputs = {name: tensor.to("cuda") for name, tensor in batch(0).items()}
    for i in range(2):
        before = [p.detach().clone() for p in model.parameters()]
        loss = scaler.scale(model(**inputs).loss)
        (loss * (float("inf") if i == 0 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert any(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)) == (i == 1)
    assert optimizer.num_skipped_steps == 1


def test_step_in_backward_gives_the_weights_of_ordinary_steps(deterministic):
    model, twin = on_gpu(dtype=torch.bfloat16), on_gpu(dtype=torch.bfloat16)
    optimizer = MISA(model, budget=0.2, interval=3, step_in_backward=True)
    plain = MISA(twin, budget=0.2, interval=3)
    train(model, optimizer, 8)
    train(twin, plain, 8)
    assert same(model, twin)
