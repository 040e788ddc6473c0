"""BAdam: one layer at a time, in a cyclic order."""

from misa.methods.blockwise import method

METHOD = method(
    "badam",
    "all matrices and norms of one layer at a time, cyclic; gradient, fp32 master and moments of that layer only",
    {"interval": 50, "order": "shuffled", "num_blocks": 1, "always_on": ()},
)
