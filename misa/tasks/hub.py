"""The paper's test sets from the hub: Parquet copies, put into the words that training has (`misa.data.formats`).

MAWPS has no entry: its 238 test problems are a selection that only LLM-Adapters has.
"""

from __future__ import annotations

from dataclasses import dataclass

from misa.data.sources import read_rows

# The branch on which the hub keeps a Parquet copy of a data set that has a loading script.
CONVERTED = "refs/convert/parquet"


@dataclass(frozen=True)
class Source:
    """Where a test set lies on the hub.

    Attributes:
        hub_id: Data set on the hub.
        config: Its configuration, or None.
        splits: Splits that make up the test set, in order.
        revision: Branch or commit.
    """

    hub_id: str
    config: str | None
    splits: tuple[str, ...]
    revision: str = "main"


def fetch_test(dataset: str) -> list[dict[str, str]]:
    """Fetch a test set from the hub, or from the cache of an earlier fetch.

    Args:
        dataset: A name of a benchmark.

    Returns:
        Records with instruction, input and answer.

    Raises:
        ValueError: If the hub has no copy of it, or cannot be reached, or a row is malformed.
    """
    from misa.tasks.benchmarks import BENCHMARKS, ORIGIN

    if dataset not in SOURCES:
        origin = f": {ORIGIN}/{BENCHMARKS[dataset].folder}" if dataset in BENCHMARKS else ""
        raise ValueError(f"{dataset} is on no hub; put it into a folder and name that as data_dir{origin}")
    source = SOURCES[dataset]
    import datasets

    records = []
    for split in source.splits:
        try:
            rows = datasets.load_dataset(source.hub_id, source.config, split=split, revision=source.revision)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{dataset}: cannot get {source.hub_id} (split {split}, revision {source.revision}) from the hub: "
                f"{str(error).splitlines()[0]}; with data_dir a local folder is read instead"
            ) from error
        records += read_rows(source.hub_id, split, rows, to_learn=False)
    return [{field: record[field] for field in ("instruction", "input", "answer")} for record in records]


SOURCES = {
    "gsm8k": Source("openai/gsm8k", "main", ("test",)),
    "svamp": Source("ChilleD/SVAMP", None, ("train", "test")),
    "aqua": Source("deepmind/aqua_rat", "raw", ("test",)),
    "boolq": Source("google/boolq", None, ("validation",)),
    "piqa": Source("ybisk/piqa", None, ("validation",), CONVERTED),
    "siqa": Source("allenai/social_i_qa", None, ("validation",), CONVERTED),
    "hellaswag": Source("Rowan/hellaswag", None, ("validation",), CONVERTED),
    "winogrande": Source("allenai/winogrande", "winogrande_xl", ("validation",), CONVERTED),
    "arc_easy": Source("allenai/ai2_arc", "ARC-Easy", ("test",)),
    "arc_challenge": Source("allenai/ai2_arc", "ARC-Challenge", ("test",)),
    "openbookqa": Source("allenai/openbookqa", "main", ("test",)),
}
