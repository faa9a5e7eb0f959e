"""What the documents tell a reader to type: found in their fenced blocks, and run or only parsed.

The convention for README.md and docs/*.md:

- A document is read from top to bottom, in a fresh folder: what a block writes, the next one finds.
- Blocks of `python` share one namespace. In those of `bash` every line is one command (a backslash goes on in the next
  line, ` #` begins a comment). A block of `console` shows a command behind `$ ` and what it prints.
- A fence without a language holds no commands.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tyro

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the document that its text begins at."""

    language: str
    text: str
    line: int

    def commands(self) -> list[str]:
        """The command lines of a bash block, or those behind `$ ` of a console block, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        stripped = (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines)
        return [" ".join(line.split()) for line in stripped if line]

    def output(self) -> str:
        """What a console block with one command shows as its output."""
        return "\n".join(line for line in self.text.splitlines() if not line.startswith("$ "))


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    return [Block(match[1], match[2], text.count("\n", 0, match.start(2)) + 1) for match in FENCE.finditer(text)]


class Understood(BaseException):
    """The command's own parser has read its arguments; no `except Exception` on the way may keep it."""


@contextmanager
def parsing_only() -> Iterator[None]:
    """Whoever parses a command line with argparse or tyro gets no further than that."""
    parse_args, cli, subcommand_cli = (
        argparse.ArgumentParser.parse_args,
        tyro.cli,
        tyro.extras.subcommand_cli_from_dict,
    )

    def parsed(parser: argparse.ArgumentParser, *args: Any, **settings: Any) -> None:
        parse_args(parser, *args, **settings)
        raise Understood

    def parsed_by_tyro(target: Any, *args: Any, **settings: Any) -> None:
        if inspect.isfunction(target):  # tyro calls it with what it has parsed
            target = functools.wraps(target)(lambda *_, **__: None)
        cli(target, *args, **settings)
        raise Understood

    def parsed_by_subcommand(*args: Any, **settings: Any) -> None:
        subcommand_cli(*args, **settings)
        raise Understood

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parsed)
        patched.setattr(tyro, "cli", parsed_by_tyro)
        patched.setattr(tyro.extras, "subcommand_cli_from_dict", parsed_by_subcommand)
        yield


def python(words: list[str], *, only_parse: bool = False) -> None:
    """`python -m MODULE ...` or `python FILE ...`, in this process, as `words` without the `python`.

    Raises:
        AssertionError: when the command ends with another status than 0, or has no parser though `only_parse`.
    """
    run: Callable[..., Any] = runpy.run_path
    if words[0] == "-m":
        words, run = words[1:], functools.partial(runpy.run_module, alter_sys=True)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", list(words))
        warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)
        try:
            if only_parse:
                with parsing_only():
                    run(words[0], run_name="__main__")
                raise AssertionError(f"nothing parsed the arguments of {shlex.join(words)}")
            run(words[0], run_name="__main__")
        except Understood:
            pass
        except SystemExit as end:
            assert end.code in (0, None), f"{shlex.join(words)} ended with {end.code}"
