"""Make the data of the study: `python -m misa.data family|corpus|mix`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from misa.extras import exit_with
from misa.help_text import HelpFormatter


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program name; None takes them from the process.

    Returns:
        Exit status: 0 if the data is there afterwards, 2 if something asked for is wrong.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.make(arguments)
    except (ValueError, OSError) as error:
        print(f"misa.data: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m misa.data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="DATA")

    family = commands.add_parser(
        "family",
        help="questions about family relations, one word as the answer",
        description="Write generated family-relations questions as train.jsonl, test.jsonl and digest.json.",
        formatter_class=HelpFormatter,
    )
    family.add_argument("--num_train", type=int, default=2000, help="number of training records")
    family.add_argument("--num_test", type=int, default=500, help="number of test records, none of them in train")
    family.add_argument("--seed", type=int, default=0, help="seed; each gives other records")
    family.add_argument("--output_dir", required=True, help="folder to write", default=argparse.SUPPRESS)
    family.set_defaults(make=_make_family)

    corpus = commands.add_parser(
        "corpus",
        help="docstrings of installed packages, with a tokenizer",
        description="Write docstrings of installed packages as train.jsonl and validation.jsonl (field text), "
        "with tokenizer/ and digest.json, which lists versions and licences.",
        formatter_class=HelpFormatter,
    )
    corpus.add_argument(
        "--packages",
        default="numpy,scipy,pandas,sklearn,sympy,networkx,matplotlib",
        help="packages by import name, separated by commas",
    )
    corpus.add_argument("--vocab_size", type=int, default=8192, help="vocabulary of the tokenizer")
    corpus.add_argument("--validation_share", type=float, default=0.02, help="share of the documents held out")
    corpus.add_argument("--output_dir", required=True, help="folder to write", default=argparse.SUPPRESS)
    corpus.set_defaults(make=_make_corpus)

    mix = commands.add_parser(
        "mix",
        help="the training records of several real sets, shuffled",
        description="Write the training records of known sets as one train.jsonl, with digest.json.",
        formatter_class=HelpFormatter,
    )
    mix.add_argument("--sets", required=True, help="known sets, separated by commas", default=argparse.SUPPRESS)
    mix.add_argument("--data_dir", help="folder with local copies; without it, the hub is asked")
    mix.add_argument("--seed", type=int, default=0, help="seed of the order")
    mix.add_argument("--output_dir", required=True, help="folder to write", default=argparse.SUPPRESS)
    mix.set_defaults(make=_make_mix)
    return parser


def _make_family(arguments: argparse.Namespace) -> int:
    from misa.data.reasoning import make_family

    made = make_family(arguments.output_dir, arguments.num_train, arguments.num_test, arguments.seed)
    print(f"{arguments.output_dir}: {arguments.num_train} training and {arguments.num_test} test records", end="")
    print("" if made else " (already there)")
    return 0


def _make_corpus(arguments: argparse.Namespace) -> int:
    from misa.data.corpus import make_corpus

    packages = [name.strip() for name in arguments.packages.split(",") if name.strip()]
    made = make_corpus(arguments.output_dir, packages, arguments.vocab_size, arguments.validation_share)
    print(f"{arguments.output_dir}: docstrings of {', '.join(packages)}{'' if made else ' (already there)'}")
    return 0


def _make_mix(arguments: argparse.Namespace) -> int:
    from misa.data.mix import make_mix

    sets = [name.strip() for name in arguments.sets.split(",") if name.strip()]
    made = make_mix(arguments.output_dir, sets, arguments.data_dir, arguments.seed)
    print(f"{arguments.output_dir}: {', '.join(sets)}{'' if made else ' (already there)'}")
    return 0


if __name__ == "__main__":
    exit_with(main, "train")
