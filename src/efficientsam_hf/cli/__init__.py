# SPDX-License-Identifier: Apache-2.0
"""The command `efficientsam`: one module per subcommand, each with `add_parser(subparsers)` and `run(args)`.

Input errors (`ValueError`, `OSError`, a missing extra) end as one line on stderr and exit code 2; anything else is a
defect and keeps its traceback. Subcommands import what is heavy inside `run`.
"""

import argparse
import io
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import __version__
from . import benchmark, convert, demo, evaluate, export, features, finetune, pretrain, push, segment


INPUT_ERROR = 2
INTERRUPTED = 130
LONGEST = 1000  # characters of an error on the terminal


class UsageError(ValueError):
    """The command line itself is wrong."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line that names the command, and whose options are written out."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code; `argv` is `sys.argv[1:]` unless given."""
    _print_anything()
    own_process = argv is None
    argv = _attach_negative_values(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in argv
    try:
        args = build_parser().parse_args(argv)
        args.argv = list(argv)
        args.own_process = own_process
        return args.run(args) or 0
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if show_traceback:
            raise
        print(f"efficientsam: error: {_one_line(error)}", file=sys.stderr)
        return INPUT_ERROR
    except KeyboardInterrupt:
        print("efficientsam: interrupted", file=sys.stderr)
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command with all its subcommands."""
    parser = Parser(
        prog="efficientsam", description="Segment anything with a click or a box; convert, evaluate, train."
    )
    parser.add_argument("--version", action="version", version=f"efficientsam-hf {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an input error came from")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for module in (segment, demo, convert, evaluate, finetune, pretrain, features, export, push, benchmark):
        module.add_parser(subparsers)
    return parser


def _attach_negative_values(argv: Sequence[str]) -> list[str]:
    """Join `--point -5,3` to `--point=-5,3`, which argparse would otherwise read as two options."""
    joined: list[str] = []
    for argument in argv:
        if joined and re.match(r"-[\d.]", argument) and re.fullmatch(r"--[a-z-]+", joined[-1]):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _print_anything() -> None:
    """Print what the terminal's encoding lacks as escapes, as Python does on stderr: a name is no reason to fail."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _one_line(error: BaseException) -> str:
    """An error's message in a line of sane length, what a terminal would obey escaped; its kind if it is empty."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > LONGEST:  # what is wrong stands in the beginning, what was expected often at the end
        text = f"{text[: LONGEST * 3 // 4]} ... {text[-LONGEST // 4 :]}"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
