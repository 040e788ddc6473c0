"""LISA: some layers at a time, with embeddings and head always on; as its paper has it, and as the MISA authors ran it.

Their baseline takes the layers one after the other, so it is LISA in what it always trains, not in how it draws.
"""

from misa.methods.blockwise import method

METHOD = method(
    "lisa",
    "two random layers at a time and, always, embeddings, head and final norm; fp32 master and moments of these",
    {"interval": 20, "num_blocks": 2, "always_on": ("embeddings", "head", "norms")},
)
OFFICIAL = method(
    "lisa_official",
    "one layer at a time, from the first to the last, and, always, embeddings and head (the MISA authors' baseline); "
    "fp32 master and moments of these",
    {"interval": 50, "num_blocks": 1, "order": "ascending", "always_on": ("embeddings", "head")},
    preset="lisa",
)
