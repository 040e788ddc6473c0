"""Two models on the same documents: `--base`."""

from __future__ import annotations

import csv
import json

import pytest

from misa import evaluate
from misa.results import read_result


def test_two_models_are_compared_on_the_same_documents(known, words, tmp_path, capsys) -> None:
    """A model that learnt the six answers against itself before: right and wrong on each, so 2 / 2**6."""
    assert evaluate.main(words(base=known.untrained)) == 0
    with (tmp_path / "out" / "comparison.csv").open() as stream:
        rows = {row["metric"]: row for row in csv.DictReader(stream)}
    row = rows["exact_match"]
    assert (row["value"], row["base_value"], row["num_better"], row["num_worse"]) == ("1.0", "0.0", "6", "0")
    assert row["test"] == "mcnemar_exact"
    assert float(row["p_value"]) == pytest.approx(2 / 2**6)
    assert "p = 0.0312" in capsys.readouterr().out
    # The finished evaluation of the base can be named instead.
    assert evaluate.main(words(base=tmp_path / "out" / "base", output_dir=tmp_path / "again")) == 0
    assert (tmp_path / "again" / "comparison.csv").read_text() == (tmp_path / "out" / "comparison.csv").read_text()


def test_perplexities_are_compared_as_bits_of_all_bytes(known, words, tmp_path) -> None:
    """Value and difference are those of the two evaluations; a document without text counts for nothing."""
    data = tmp_path / "data"
    data.mkdir()
    text = (known.data / "validation.jsonl").read_text()
    (data / "validation.jsonl").write_text(text + '{"text": ""}\n')
    assert evaluate.main(words(tasks="perplexity", base=known.untrained, data_dir=data)) == 0
    with (tmp_path / "out" / "comparison.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    assert (row["metric"], row["test"], row["num_documents"]) == ("bits_per_byte", "permutation", "3")
    value, base_value = (
        read_result(folder).metrics["perplexity/bits_per_byte"] for folder in (tmp_path / "out", tmp_path / "out/base")
    )
    assert float(row["value"]) == pytest.approx(value)
    assert float(row["base_value"]) == pytest.approx(base_value)
    assert float(row["difference"]) == pytest.approx(value - base_value)
    samples = [
        json.loads((folder / "lm_eval.json").read_text())["samples"]["perplexity"]
        for folder in (tmp_path / "out", tmp_path / "out/base")
    ]
    lower = sum(one["bits_per_byte"][0] > other["bits_per_byte"][0] for one, other in zip(*samples, strict=True))
    assert (int(row["num_better"]), int(row["num_worse"])) == (lower, 3 - lower)


def test_comparison_weighs_documents_and_knows_what_is_better() -> None:
    import numpy as np

    from misa.evaluation.comparison import compare
    from misa.evaluation.scoring import perplexity_metrics

    row = compare("t", "bits_per_byte", [1.0, 2.0], [2.0, 2.0], [30, 10], higher_is_better=False)
    assert (row.value, row.base_value, row.difference) == (1.25, 2.0, -0.75)
    assert (row.num_better, row.num_worse) == (1, 0)
    # Against a base that costs nothing, the error of the difference is that of the model's own rate.
    texts = ["a" * 30, "b" * 10, "c" * 25]
    samples = [
        {"filtered_resps": [-nats], "doc": {"text": text}} for nats, text in zip((20, 9, 31), texts, strict=True)
    ]
    rates = [-sample["filtered_resps"][0] / np.log(2) / len(sample["doc"]["text"]) for sample in samples]
    error = perplexity_metrics(samples, 10)["bits_per_byte_stderr"]
    assert compare("t", "m", rates, [0.0] * 3, [30, 10, 25]).stderr == pytest.approx(error)
    plain = compare("t", "m", rates, [0.0] * 3)
    assert (plain.difference, plain.stderr) == (np.mean(rates), np.std(rates, ddof=1) / np.sqrt(3))


def test_other_documents_cannot_be_compared(known, words, capsys, tmp_path) -> None:
    """Another limit or no task in common is found before anything is scored, other questions afterwards."""
    three = tmp_path / "three"
    assert evaluate.main(words(limit=3, output_dir=three)) == 0
    for changes, message in (
        ({}, "not scored on the same prompts: it has 3 documents of misa_family, and with limit None there are 6"),
        ({"tasks": "perplexity", "limit": 3}, "has the tasks misa_family, and none of perplexity"),
    ):
        assert evaluate.main(words(base=three, **changes)) == 2
        assert f"error: base: {three / 'lm_eval.json'}" in (error := capsys.readouterr().err)
        assert message in error
        assert not (tmp_path / "out").exists()
    data = tmp_path / "data"
    data.mkdir()
    (data / "test.jsonl").write_text("".join(reversed((known.data / "test.jsonl").read_text().splitlines(True))))
    assert evaluate.main(words(base=three, data_dir=data, limit=3)) == 2
    assert "not scored on the same prompts" in capsys.readouterr().err
    (three / "lm_eval.json").write_text("{}")
    assert evaluate.main(words(base=three, output_dir=tmp_path / "again")) == 2
    assert "lm_eval.json holds no results of an evaluation: KeyError('results')" in capsys.readouterr().err


def test_evaluation_with_other_settings_cannot_be_compared(words, capsys, tmp_path) -> None:
    three = tmp_path / "three"
    assert evaluate.main(words(limit=3, output_dir=three)) == 0
    for changes, message in (
        ({"max_seq_length": 40}, "was scored with max_seq_length None, and here it is 40"),
        ({"max_length": 512}, "was scored with max_length None, and here it is 512"),
        ({"dtype": "bfloat16"}, "was scored with dtype float32, and here it is bfloat16"),
        ({"seed": 1}, "was scored with seed 0, and here it is 1"),
    ):
        assert evaluate.main(words(base=three, limit=3, **changes)) == 2
        assert f"error: base: {three / 'lm_eval.json'} {message}" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    result = json.loads((three / "result.json").read_text())
    result["config"]["task_digests"]["misa_family"] = "0" * 64
    (three / "result.json").write_text(json.dumps(result))
    assert evaluate.main(words(base=three, limit=3)) == 2
    assert "was scored by another version of the task misa_family; score it again" in capsys.readouterr().err
    (three / "result.json").unlink()
    assert evaluate.main(words(base=three, limit=3)) == 2
    assert "error: base: " in capsys.readouterr().err
