"""GaLore (arXiv 2403.03507): AdamW on gradients projected to a low rank, by the package `pytorch-optimizer`.

Its optimizer keeps each projection in a Python object, which torch's safe loading refuses. The subclass here gives a
checkpoint tensors and numbers instead, and makes the objects again when it is loaded.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import nn

from misa.checks import check_number
from misa.methods.base import Hyperparameters, Method
from misa.optimizer import partition

_MATRIX, _LAST = "ortho_matrix", "last_svd_step"


@cache
def _classes() -> tuple[type[torch.optim.Optimizer], type[torch.optim.Optimizer]]:
    """GaLore with a plain state, and the same stepping in the backward pass; made when first needed."""
    from pytorch_optimizer.optimizer.galore import GaLore
    from pytorch_optimizer.optimizer.utils.galore import GaLoreProjector

    class PlainGaLore(GaLore):
        def state_dict(self) -> dict[str, Any]:
            content = super().state_dict()
            content["state"] = {key: _plain(state) for key, state in content["state"].items()}
            return content

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    if _MATRIX in state:
                        kind = {name: group[name] for name in ("rank", "update_proj_gap", "scale", "projection_type")}
                        state["projector"] = GaLoreProjector(**kind)
                        state["projector"].ortho_matrix = state.pop(_MATRIX)
                        state["projector"].last_svd_step = state.pop(_LAST)

        def state_bytes(self) -> dict[str, int]:
            sizes = {"moments": 0, "projections": 0}
            for state in self.state.values():
                for name, value in _plain(state).items():
                    if torch.is_tensor(value):
                        sizes["projections" if name == _MATRIX else "moments"] += value.nbytes
            return sizes

    class LayerwiseGaLore(PlainGaLore):
        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, **options)
            for i, group in enumerate(self.param_groups):
                for p in group["params"]:
                    # By number: loading a state makes new groups.
                    p.register_post_accumulate_grad_hook(partial(self._apply, i))

        def _apply(self, i: int, p: torch.Tensor) -> None:
            groups = self.param_groups
            self.param_groups = [groups[i]]
            try:
                super().step()
            finally:
                self.param_groups = groups
            p.grad = None

        def step(self, closure: Any = None) -> Any:
            # Everything was done in the backward pass.
            return None if closure is None else closure()

    return PlainGaLore, LayerwiseGaLore


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state with the projection as a tensor and a number."""
    plain = {name: value for name, value in state.items() if name != "projector"}
    if "projector" in state:
        plain |= {_MATRIX: state["projector"].ortho_matrix, _LAST: state["projector"].last_svd_step}
    return plain


class _Projected:
    """Factory: the matrices inside the layers are projected, everything else gets AdamW."""

    def __call__(
        self,
        model: nn.Module,
        projection: dict[str, Any],
        step_in_backward: bool,
        always_on_lr: float | None,
        **hyper: Any,
    ) -> torch.optim.Optimizer:
        inside = {p for block in partition(model, "matrix") for _, p in block.params if p.ndim == 2}
        rest = [p for p in model.parameters() if p.requires_grad and p not in inside]
        groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p in inside], **projection}]
        own = {} if always_on_lr is None else {"lr": always_on_lr}
        groups.append({"params": [p for p in rest if p.ndim >= 2], **own})
        groups.append({"params": [p for p in rest if p.ndim < 2], **own, "weight_decay": 0.0})
        plain, layerwise = _classes()
        if not step_in_backward:
            return plain([group for group in groups if group["params"]], **hyper)
        # A group counts the steps of all its parameters, so each needs its own.
        single = [{**group, "params": [p]} for group in groups for p in group["params"]]
        return layerwise(single, **hyper)


def _apply(
    model: nn.Module, hyper: Hyperparameters, options: dict[str, Any]
) -> tuple[nn.Module, tuple[Any, dict[str, Any]]]:
    for name, least in (("galore_r", 1), ("galore_update_every", 1)):
        if options[name] < least:
            raise ValueError(f"{name}={options[name]}: must be at least {least}")
    if options["always_on_lr"] is not None:
        check_number("always_on_lr", options["always_on_lr"])
    projection = {
        "rank": options["galore_r"],
        "update_proj_gap": options["galore_update_every"],
        "scale": options["galore_alpha"],
        "projection_type": "std",
    }
    kept = {name: options[name] for name in ("step_in_backward", "always_on_lr")}
    arguments = {**hyper.adam(), "projection": projection, **kept}
    return model, (_Projected, arguments)


# The MISA authors' baseline: rank 32, a new projection every 50 steps, scale 1.
_OPTIONS = {
    "galore_r": 32,
    "galore_alpha": 1.0,
    "galore_update_every": 50,
    "step_in_backward": False,
    "always_on_lr": None,
}
_WHAT = "AdamW on every parameter, on gradients projected to a low rank for the matrices inside the layers"
_KEPT = "projections, moments of the projected size, two full moments of the rest, in the precision of the weights"

METHOD = Method("galore", f"{_WHAT}; all gradients, {_KEPT}", _apply, _OPTIONS)
LAYERWISE = Method(
    "galore_layerwise",
    f"{_WHAT}, each applied and freed in the backward pass; one gradient at a time, {_KEPT}",
    _apply,
    {**_OPTIONS, "step_in_backward": True},
)
