"""BAdam: one layer at a time, in a cyclic order; as its package does it, and as the MISA authors ran it."""

from misa.methods.blockwise import method

_HELD = "gradient, fp32 master and moments of that layer only"
_OPTIONS = {"interval": 50, "order": "shuffled", "num_blocks": 1}

METHOD = method(
    "badam",
    f"all matrices and norms of one layer at a time, in an order shuffled for each cycle; {_HELD}",
    _OPTIONS,
)
OFFICIAL = method(
    "badam_official",
    f"all matrices and norms of one layer at a time, from the first to the last (the MISA authors' baseline); {_HELD}",
    {**_OPTIONS, "order": "ascending"},
    preset="badam",
)
