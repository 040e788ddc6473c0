"""From the words of a training command to its run: what `misa.train` and `misa.pretrain` have in common."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from misa.models import LoadingOptions
from misa.training.options import CommonTrainingOptions, MemoryOptions, MethodOptions, RunOptions, parse


def run_from_words(
    argv: Sequence[str] | None,
    *,
    prog: str,
    usage: str,
    description: str,
    own: type,
    translate: Callable[[Sequence[str]], list[str]],
    make_job: Callable[..., Any],
    defaults: dict[str, Any] | None = None,
) -> int:
    """Run a training command.

    Args:
        argv: Arguments after the program name; None takes them from the process.
        prog: Its name in messages.
        usage: Its usage line.
        description: First paragraph of its help text.
        own: Dataclass of the options that it does not share with the other.
        translate: Turns flags of the authors' commands into ours.
        make_job: Describes the run, from `RunOptions`, `own`, `MethodOptions`, `TrainingArguments`, argv,
            `LoadingOptions` and `MemoryOptions`.
        defaults: Its defaults of options of `TrainingArguments`.

    Returns:
        Exit status: 0 done, 1 the run failed, 2 something asked for is wrong, 130 interrupted.
    """

    def job() -> Any:
        run, chosen, method, memory, _, loading, training = parse(
            (RunOptions, own, MethodOptions, MemoryOptions, CommonTrainingOptions, LoadingOptions),
            translate(sys.argv[1:] if argv is None else argv),
            prog=prog,
            usage=usage,
            description=description,
            defaults=defaults,
        )
        return make_job(run, chosen, method, training, argv, loading, memory)

    from misa.training.run import run_command

    return run_command(prog, job)
