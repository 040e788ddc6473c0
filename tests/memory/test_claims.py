"""The table that stands beside the paper's claims."""

import pandas as pd
import pytest

from misa.memory.claims import crossings, largest_saving, savings


def grid():
    peaks = {"misa-1": [10, 20], "lora-r16": [20, 16], "badam": [10, 40]}
    return pd.DataFrame(
        [
            (variant, 1, length, checkpointing, "full", draw, category, share * num)
            for variant, nums in peaks.items()
            for length, num in zip((512, 4096), nums, strict=True)
            for checkpointing in (False, True)
            for draw, categories in (("worst", {"weights": 0.75, "logits": 0.25}), ("mean", {"total": 9.0}))
            for category, share in categories.items()
        ],
        columns=["variant", "batch_size", "seq_len", "checkpointing", "loss", "draw", "category", "bytes"],
    )


def test_savings_are_per_cent_of_the_other_method():
    table = savings(grid())
    assert table.loc[("misa-1", "lora-r16"), (False, 512)] == -50
    assert table.loc[("misa-1", "lora-r16"), (True, 4096)] == 25
    assert table.loc[("misa-1", "badam"), (False, 512)] == 0


def test_largest_saving_names_its_setting():
    row = largest_saving(grid()).loc[("misa-1", "lora-r16")]
    assert row["best (%)"] == pytest.approx(-50)
    assert row["best at"] == "512 tokens, no checkpointing"
    assert row["worst (%)"] == pytest.approx(25)


def test_crossing_is_where_the_saving_lasts_to_the_end():
    table = crossings(grid())
    assert table.loc[("misa-1", "badam", False), "less from (tokens)"] == 4096  # equal at 512
    assert table.loc[("misa-1", "badam", False), "difference there (%)"] == -50
    assert pd.isna(table.loc[("misa-1", "lora-r16", True), "less from (tokens)"])
    assert set(crossings(grid(), draw="mean")["longest (tokens)"]) == {4096}
    with pytest.raises(ValueError, match="draw is 'best'; allowed: worst, mean"):
        savings(grid(), draw="best")
