"""The tracker against hand arithmetic on small models."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from misa.memory.reachable import reachable_tensors
from misa.memory.tracker import CATEGORIES, MemoryTracker

FLOAT = 4


def step(model, optimizer, inputs, forward=None):
    """One tracked step; returns the tracker."""
    tracker = MemoryTracker()
    tracker.watch_model(model)
    tracker.watch_optimizer(optimizer)
    tracker.watch("activations", inputs)
    with tracker:
        with tracker.phase("forward"):
            loss = (forward or model)(inputs).sum()
        with tracker.phase("backward"):
            loss.backward()
        with tracker.phase("step"):
            optimizer.step()
        optimizer.zero_grad()
    del loss
    return tracker


def test_linear_live_bytes_equal_known_bytes():
    model = nn.Linear(30, 20, bias=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs = torch.randn(8, 30)
    step(model, optimizer, inputs)
    tracker = step(model, optimizer, inputs)
    weights = (30 * 20 + 20) * FLOAT
    moments = 2 * weights + 2 * FLOAT  # exp_avg and exp_avg_sq, and one fp32 step counter for each parameter
    gc.collect()
    assert tracker.live_bytes == weights + moments + inputs.nbytes
    ends = tracker.phase_ends
    assert ends["backward"].by_category["gradients"] == weights
    assert ends["step"].by_category["optimizer"] == moments
    assert ends["step"].by_category["weights"] == weights


def test_linear_peak_matches_hand_arithmetic():
    model = nn.Linear(1000, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    inputs = torch.randn(2, 1000)
    tracker = step(model, optimizer, inputs)
    # Weight, input, output and loss; in the backward pass the gradient of the output is a view of the loss's gradient.
    peak = tracker.peak
    assert peak.by_category["weights"] == 1000 * FLOAT
    assert peak.by_category["gradients"] == 1000 * FLOAT
    assert peak.by_category["activations"] >= 2000 * FLOAT
    assert peak.phase == "backward"
    assert peak.total_bytes == sum(peak.by_category.values())
    assert 4000 * FLOAT <= peak.total_bytes <= 4010 * FLOAT


def test_exp_chain_saves_one_result_each_and_peaks_at_its_end():
    # exp saves its result: three results of n elements are alive at the end of the forward pass.
    n = 500
    weight = nn.ParameterList([nn.Parameter(torch.zeros(n))])
    optimizer = torch.optim.SGD(weight.parameters(), lr=0.1, foreach=False)
    tracker = step(weight, optimizer, torch.zeros(1), forward=lambda _: weight[0].exp().exp().exp())
    end = tracker.phase_ends["forward"]
    # The sum saves nothing but a size; the loss itself is alive.
    assert end.by_category["activations"] == 3 * n * FLOAT + FLOAT + FLOAT
    assert end.by_category["weights"] == n * FLOAT
    assert end.by_category["temporary"] == 0
    # In the backward pass one gradient of n elements joins while the third result still lives.
    assert tracker.peak.phase == "backward"
    assert tracker.peak.by_category["activations"] >= 3 * n * FLOAT


def test_frozen_parameters_hold_no_gradient_and_save_no_input():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([model[1].weight], lr=1e-3)
    inputs = torch.randn(16, 64)
    step(model, optimizer, inputs)
    tracker = step(model, optimizer, inputs)
    end = tracker.phase_ends["backward"]
    assert end.by_category["weights"] == 2 * 64 * 64 * FLOAT
    assert end.by_category["gradients"] == 64 * 64 * FLOAT
    # Saved: the input of the second layer alone; alive besides: the batch and the loss.
    assert tracker.phase_ends["forward"].by_category["activations"] == 2 * 16 * 64 * FLOAT + FLOAT


def test_all_frozen_but_no_crash_when_nothing_below_needs_gradients():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model[1].bias.requires_grad_(True)
    optimizer = torch.optim.SGD([model[1].bias], lr=0.1)
    tracker = step(model, optimizer, torch.randn(4, 8))
    assert tracker.phase_ends["backward"].by_category["gradients"] == 8 * FLOAT


def test_views_and_in_place_operations_add_nothing():
    tracker = MemoryTracker()
    base = torch.zeros(100)
    tracker.watch("temporary", base)
    with tracker:
        view = base.view(10, 10)[2:5]
        base.add_(1)
        assert view.shape == (3, 10)
    assert tracker.live_bytes == tracker.peak.total_bytes == 100 * FLOAT


def test_peak_counts_a_temporary_that_died():
    tracker = MemoryTracker()
    with tracker:
        kept = torch.zeros(10) + 1
        torch.zeros(1000)
        torch.zeros(5)
    assert tracker.peak.total_bytes == 1010 * FLOAT
    assert tracker.peak.operation == "aten.zeros.default"
    assert tracker.live_bytes == kept.nbytes


def test_gradient_consumed_by_an_optimizer_hook_is_still_a_gradient():
    # As optimizers that step in the backward pass do: the gradient is gone when the pass ends.
    model = nn.Linear(200, 200, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)

    def consume(parameter):
        parameter.grad = None

    model.weight.register_post_accumulate_grad_hook(consume)
    tracker = step(model, optimizer, torch.randn(2, 200))
    assert tracker.peak.by_category["gradients"] == 200 * 200 * FLOAT
    assert tracker.phase_ends["backward"].by_category["gradients"] == 0


def test_checkpointed_forward_holds_its_input_alone_and_recomputes_activations():
    n = 1000
    weight = nn.ParameterList([nn.Parameter(torch.zeros(n))])
    optimizer = torch.optim.SGD(weight.parameters(), lr=0.1, foreach=False)

    def forward(_):
        return checkpoint(lambda w: w.exp().exp().exp(), weight[0], use_reentrant=False)

    tracker = step(weight, optimizer, torch.zeros(1), forward=forward)
    assert tracker.phase_ends["forward"].by_category["activations"] < 2 * n * FLOAT
    # Recomputed in the backward pass, the saved results are activations there, not temporaries.
    assert tracker.peak.phase == "backward"
    assert tracker.peak.by_category["activations"] >= 3 * n * FLOAT


def test_logits_region_has_its_own_category():
    tracker = MemoryTracker()
    with tracker, tracker.phase("forward"):
        hidden = torch.zeros(10) + 1
        tracker.enter_logits()
        logits = hidden * torch.ones(50, 1)
    moment = tracker.phase_ends["forward"]
    assert moment.by_category["logits"] == logits.nbytes
    assert moment.by_category["activations"] == hidden.nbytes


def test_master_copy_is_optimizer_state_and_its_gradient_a_gradient():
    model = nn.Linear(10, 10, bias=False).bfloat16()
    master = nn.Parameter(model.weight.detach().float())
    optimizer = torch.optim.AdamW([master], lr=1e-3)
    tracker = MemoryTracker()
    tracker.watch_model(model)
    tracker.watch_optimizer(optimizer)
    with tracker, tracker.phase("backward"):
        master.grad = torch.ones_like(master)
    moment = tracker.phase_ends["backward"]
    assert moment.by_category["weights"] == 100 * 2
    assert moment.by_category["optimizer"] == 100 * FLOAT
    assert moment.by_category["gradients"] == 100 * FLOAT


@pytest.mark.parametrize("optimizer_options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_fake_tensors_are_counted_like_real_ones(optimizer_options):
    def measure():
        model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.LayerNorm(512), nn.Linear(512, 10))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **optimizer_options)
        inputs = torch.randn(32, 256)
        step(model, optimizer, inputs)
        return step(model, optimizer, inputs).peak

    real = measure()
    with FakeTensorMode():
        fake = measure()
    assert fake == real


def test_rounding_counts_each_storage_as_a_multiple():
    tracker = MemoryTracker(rounding_bytes=512)
    tensors = [torch.zeros(1), torch.zeros(128), torch.zeros(129)]
    tracker.watch("weights", tensors)
    assert tracker.live_bytes == 512 + 512 + 1024


def test_unknown_names_are_refused():
    tracker = MemoryTracker()
    with pytest.raises(ValueError, match="category is 'wieghts'; allowed: weights"):
        tracker.watch("wieghts", torch.zeros(1))
    with pytest.raises(ValueError, match="phase is 'back'; allowed: forward"), tracker.phase("back"):
        pass
    with pytest.raises(ValueError, match="rounding_bytes is 0"):
        MemoryTracker(0)


def test_tracker_does_not_keep_storages_alive():
    tracker = MemoryTracker()
    with tracker:
        tensor = torch.zeros(10) + 1
    reference = weakref.ref(tensor.untyped_storage())
    del tensor
    assert reference() is None
    assert tracker.live_bytes == 0


def test_state_given_up_in_the_step_is_gone_before_the_next_is_made():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    optimizer.state["master"] = torch.zeros(1000)
    tracker = MemoryTracker()
    tracker.watch_optimizer(optimizer)
    with tracker, tracker.phase("step"):
        del optimizer.state["master"]
        optimizer.state["master"] = torch.zeros(1000)
    assert tracker.peak.total_bytes == 1001 * FLOAT


def test_reachable_tensors_enters_objects_but_not_models():
    class Holder:
        __slots__ = ("inside",)

    holder = Holder()
    holder.inside = {"a": [torch.zeros(1)], "b": (torch.zeros(2), nn.Linear(2, 2))}
    assert sorted(t.numel() for t in reachable_tensors(holder)) == [1, 2]
    assert set(MemoryTracker().peak.by_category) == set(CATEGORIES)


@pytest.mark.parametrize("fake", [False, True])
def test_workspace_counts_while_its_storage_has_memory(fake):
    tracker = MemoryTracker()
    with FakeTensorMode() if fake else nullcontext():
        source, room = torch.zeros(100), torch.zeros(1000)
        view = room[:100]
        tracker.watch("optimizer", [source, room])
        room.untyped_storage().resize_(0)
        with tracker:
            with tracker.phase("forward"):
                kept = source + 1
            with tracker.phase("step"):
                room.untyped_storage().resize_(1000 * FLOAT)
                view.copy_(kept)
                room.untyped_storage().resize_(0)
    assert tracker.phase_ends["forward"].total_bytes == 200 * FLOAT
    # What was there at the first look is the peak: the room, before it was known to be empty.
    assert tracker.peak.total_bytes == 1200 * FLOAT
    assert tracker.peak.phase == "step"
