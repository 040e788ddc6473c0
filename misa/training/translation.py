"""Take a command line apart into flags of another program and the rest, and put it together in our options."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9}


def boolean(text: str) -> bool:
    """Read a truth value; a bare flag is true."""
    if text.lower() in ("", "true", "1", "yes", "y", "t"):
        return True
    if text.lower() in ("false", "0", "no", "n", "f"):
        return False
    raise ValueError("allowed is True or False")


def one_of(table: dict[str, str]) -> Callable[[str], str]:
    """Make a conversion that looks a word up, or leaves one of our own words as it is."""

    def convert(text: str) -> str:
        if text not in table and text not in table.values():
            raise ValueError(f"allowed is {', '.join(dict.fromkeys([*table, *table.values()]))}")
        return table.get(text, text)

    return convert


def share(text: str) -> str:
    """Read a share of the steps."""
    try:
        if 0 <= float(text) < 1:
            return text
    except ValueError:
        pass
    raise ValueError("allowed is a share of the steps, from 0 to below 1")


def whole(name: str, text: Any) -> int:
    """Read a whole number from 1 up.

    Raises:
        ValueError: Naming the option.
    """
    if not str(text).isdecimal() or int(text) < 1:
        raise ValueError(f"--{name} is {text!r}: allowed is a whole number from 1 up")
    return int(text)


def count(text: str) -> int:
    """Read a whole number of tokens, with K, M or B for thousands, millions and billions."""
    factor = SUFFIXES.get(text[-1:].upper(), 1)
    try:
        tokens = float(text[:-1] if factor > 1 else text) * factor
    except ValueError:
        tokens = math.nan
    if not tokens >= 1 or tokens != int(tokens):
        raise ValueError("allowed is a whole number, with K, M or B after it for thousands, millions, billions")
    return int(tokens)


def only_safetensors(text: str) -> str:
    """Accept the one thing done here."""
    if not boolean(text):
        raise ValueError("weights are only ever written as safetensors: allowed is True")
    return ""


@dataclass(frozen=True)
class Flag:
    """What a published flag means here.

    Attributes:
        option: Our option; "" if the flag changes nothing here; None if it is read together with others, below.
        convert: Turns the word into our option's value.
        default: The authors' default where a line in their style leaves the flag out, or None to keep ours.
        shared: Whether one of our options has the same name and meaning, though it is read together with others.
    """

    option: str | None
    convert: Callable[[str], Any] = str
    default: str | None = None
    shared: bool = False


class Line:
    """A command line, taken apart into the authors' flags and the rest.

    Args:
        words: Arguments after the program name.
        table: What the program's published flags mean.
    """

    def __init__(self, words: Sequence[str], table: dict[str, Flag]) -> None:
        self.table = table
        self.given: dict[str, Any] = {}
        self.own: dict[str, str] = {}
        self.rest: list[str] = []
        self.shown: list[str] = []
        self.ours: dict[str, Any] = {}
        self._from: dict[str, str] = {}
        words = list(words)
        while words:
            name, equals, value = words.pop(0).partition("=")
            values = [value] if equals else []
            while name.startswith("--") and words and not words[0].startswith("--"):
                values.append(words.pop(0))
            key = name.removeprefix("--").replace("-", "_")
            if key in table:
                self._take(key, " ".join(values))
            else:
                self.rest += [name, *values]
                self.own[key] = " ".join(values)

    def _take(self, name: str, text: str) -> None:
        flag = self.table[name]
        try:
            self.given[name] = flag.convert(text)
        except ValueError as error:
            raise ValueError(f"--{name} is {text!r}: {error}") from None
        if flag.option != name and not flag.shared:
            self.shown.append(f"--{name} {text}".strip())

    def says(self, name: str) -> bool:
        """Whether a truth value was given and is true."""
        return bool(self.given.get(name))

    def value(self, name: str) -> Any:
        """What was given, else the authors' default."""
        if name in self.given:
            return self.given[name]
        default = self.table[name].default
        return None if default is None else self.table[name].convert(default)

    def set(self, option: str, value: Any, flag: str) -> None:
        """Set one of our options.

        Raises:
            ValueError: If another flag has set it otherwise.
        """
        before = self.own.get(option, str(self.ours[option]) if option in self.ours else None)
        if before is None and f"no_{option}" in self.own:  # how a truth value of ours is switched off
            before = "False"
        if before is not None and before != str(value):
            raise ValueError(f"--{self._from.get(option, option)} {before} and --{flag} {value} contradict each other")
        if before is None:
            self.ours[option] = value
            self._from[option] = flag

    def words(self, in_their_style: bool) -> list[str]:
        """The line in our options, logging what the published flags were taken for.

        Args:
            in_their_style: Whether flags that were left out get the authors' defaults.
        """
        for name, flag in self.table.items():
            if not flag.option:
                continue
            if name in self.given:
                self.set(flag.option, self.given[name], name)
            elif in_their_style and flag.default is not None and flag.option not in {*self.own, *self.ours}:
                self.ours[flag.option] = self.value(name)
        translated = [word for option, value in self.ours.items() for word in (f"--{option}", str(value))]
        if self.shown:
            logger.info("published flags: %s = %s", " ".join(self.shown), " ".join(translated) or "nothing here")
        return [*self.rest, *translated]
