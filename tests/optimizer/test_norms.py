"""Gradient norms that stay on a device, as on a GPU: what a step launches, sums, skipped steps."""

import pytest
import torch
from tiny import backward, llama, moved, same, train, weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from misa import gradients, parameters
from misa.gradients import NormSums, gradient_norm
from misa.memory.fake import FakeMode
from misa.optimizer import MISA


class Operations(TorchDispatchMode):
    """Names of the operations of torch that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "aten":
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def on_device(monkeypatch):
    """Norms are tensors that nobody reads before the end of a round."""
    monkeypatch.setattr(parameters, "gradient_norm", lambda grad: torch.linalg.vector_norm(grad, dtype=torch.float32))


@pytest.mark.parametrize("num_blocks", [1, 4, 9])
def test_step_on_a_device_launches_few_kernels_whatever_is_on_and_reads_nothing(num_blocks):
    """Fake tensors are no numbers that the host could read, as on a GPU; memory and views are no kernels."""
    with FakeMode():
        model = nn.Module()
        model.layers = nn.ModuleList(
            nn.ModuleDict({"proj": nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)}) for _ in range(10)
        )
    optimizer = MISA(model, num_blocks=num_blocks, interval=100)
    for _ in range(3):
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.ones_like(p)
                for hook in p._post_accumulate_grad_hooks.values():
                    hook(p)
        with Operations() as operations:
            optimizer.step()
    look = ["stack", "_amp_foreach_non_finite_check_and_unscale_"]  # norms in one tensor; is any not finite?
    count = ["add_", "sub_"]
    adam = ["_foreach_copy_", "_fused_adamw_", "_foreach_copy_"]  # gradients widened, masters updated, weights written
    assert [name for name in operations.names if name != "empty"] == [*look, *count, *adam]


def test_norms_on_a_device_are_summed_by_the_blocks_of_each_step():
    """Experts without tokens have no gradient, others another time: as many gradients, of other blocks."""
    norms, tensors = [3.0, 4.0, 1.0], [torch.tensor(x) for x in (3.0, 4.0, 1.0)]
    sums = NormSums((0, 1), squared=True)
    for blocks in ([0, 0, 1], [0, 1, 1], [0, 1, -1]):
        assert sums.of_blocks(blocks, tensors).tolist() == pytest.approx(sums.of_blocks(blocks, norms))


def test_norms_on_several_devices_meet_on_the_first_without_being_read():
    with FakeMode():
        norms = [torch.empty((), device=f"cuda:{k}") for k in (1, 0, 1)]
        together = NormSums((4, 5), squared=True).of_blocks([4, 4, 5], norms)
        assert NormSums((4, 5, 6), squared=True).of_blocks([4, 5, 6], norms).device == together.device
    assert together.device == torch.device("cuda:1")


@pytest.mark.parametrize("squared", [True, False])
def test_norms_on_a_device_add_up_as_numbers_do_whenever_they_are_read(squared, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(gradients, "MOST_UNREAD", 4)
    monkeypatch.setattr(gradients, "NUM_FLAGS", 3)
    late, often, numbers = (NormSums((0, 1, 2), squared) for _ in range(3))
    for step in range(11):
        norms = torch.rand(4)
        if step % 3 == 0:
            norms[1] = torch.inf if step % 2 else torch.nan
        for sums, given in ((late, norms), (often, norms), (numbers, norms.tolist())):
            bad = sums.not_finite(given)
            assert bool(bad) == (step % 3 == 0)
            sums.add(given, bad)
        if step in (0, 5, 6):
            sums, num_good = often.read()
            assert len(sums) == (3 if step else 0)
            often.write(sums, num_good)
    assert late.read() == often.read() == numbers.read()
    assert late.read()[1] == 7


def test_scores_from_norms_on_a_device_are_those_of_norms_that_were_read(on_device, monkeypatch):
    optimizers = []
    for there in (True, False):
        if not there:
            monkeypatch.setattr(parameters, "gradient_norm", gradient_norm)
        model = llama()
        optimizers.append(MISA(model, lr=1e-3, budget=0.2, interval=3, eta=0.0))
        train(model, optimizers[-1], 7)
    one, other = optimizers
    assert one.active == other.active
    assert one.scores == pytest.approx(other.scores, rel=1e-5)


def test_bad_gradients_are_skipped_and_counted_without_reading_them(on_device):
    model = llama()
    optimizer = MISA(model, lr=1e-2, budget=0.2, interval=4)
    for step in range(9):
        backward(model, step)
        if step in (2, 4, 7):
            optimizer._on.entries[0].param.grad[0] = torch.nan
            optimizer._on.entries[0].norm = torch.tensor(torch.nan)
        before = weights(model)
        optimizer.step()
        optimizer.zero_grad()
        assert bool(moved(before, model)) == (step not in (2, 4, 7))
    assert optimizer.num_skipped_steps == 3
    optimizer.release()
    assert optimizer.num_skipped_steps == 3


def test_run_stopped_inside_a_round_continues_bit_for_bit(on_device):
    def run(stop):
        model = llama()
        optimizer = MISA(model, lr=1e-2, budget=0.2, interval=4, eta="auto")
        train(model, optimizer, stop)
        state, weights_then = optimizer.state_dict(), weights(model)
        twin = llama()
        twin.load_state_dict(weights_then)
        other = MISA(twin, lr=1e-2, budget=0.2, interval=4, eta="auto")
        other.load_state_dict(state)
        train(twin, other, 14 - stop, first=stop)
        return twin, other

    (model, whole), *stopped = [run(stop) for stop in (0, 3, 5, 10)]
    for twin, other in stopped:
        assert same(model, twin)
        assert whole.scores == other.scores
        assert whole.num_skipped_steps == other.num_skipped_steps == 0


def test_skipped_step_does_not_enter_the_mean_of_a_round():
    model, twin = llama(), llama()
    optimizer = MISA(model, budget=1.0, interval=2, lr=0.0, beta=0.0)
    backward(twin, 0)
    train(model, optimizer, 1)
    backward(model, 1, scale=float("nan"))
    optimizer.step()
    assert optimizer.round == 1
    for name, score in optimizer.scores.items():
        assert score == pytest.approx(twin.get_submodule(name).weight.grad.square().mean().item(), rel=1e-5)


def test_scores_on_a_device_with_something_always_on(monkeypatch):

    optimizers = []
    for there in (True, False):
        monkeypatch.setattr(
            parameters,
            "gradient_norm",
            (lambda grad: torch.linalg.vector_norm(grad, dtype=torch.float32)) if there else gradient_norm,
        )
        model = llama()
        optimizers.append(MISA(model, lr=1e-3, budget=0.2, interval=3, eta=0.0, always_on=("head", "norms")))
        train(model, optimizers[-1], 7)
    one, other = optimizers
    assert one.active == other.active
    assert one.scores == pytest.approx(other.scores, rel=1e-5)
