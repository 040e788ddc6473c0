"""LISA: random layers, with embeddings and head always on."""

from misa.methods.blockwise import method

METHOD = method(
    "lisa",
    "two random layers at a time and, always, embeddings, head and final norm; fp32 master and moments of these",
    {"interval": 20, "num_blocks": 2, "always_on": ("embeddings", "head", "norms")},
)
