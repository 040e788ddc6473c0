"""MISA: matrix blocks drawn by importance under a budget; and the same with uniform draws."""

from misa.methods.blockwise import method

_OPTIONS = {
    "budget": 0.03,
    "interval": 50,
    "eta": 1.0,
    "granularity": "matrix",
    "always_on": (),
    "variant": "default",
    "first_pass": None,
    "sample_last": None,
    "probe_every": 0,
    "state_policy": None,
    "state_format": "master",
    "residual": "cpu",
}
_HELD = "gradient, fp32 master and moments of the drawn matrices only"

METHOD = method("misa", f"weight matrices drawn by importance, a budget of parameters at a time; {_HELD}", _OPTIONS)
UNIFORM = method(
    "misa_uniform",
    f"weight matrices drawn uniformly, a budget of parameters at a time (MISA at eta 0); {_HELD}",
    {**_OPTIONS, "eta": 0.0},
    preset="misa",
)
