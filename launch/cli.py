"""The command `torsion`.

Whatever is slow to import (JAX, gin, the data libraries) is imported by the command that needs it.
"""

import argparse
import functools
import os
import sys
import time

from launch import __version__
from launch.commands import (
    completion,
    compress,
    dataflow,
    evaluate,
    export,
    fabric,
    pod,
    sample,
    slice,
    study,
    tokenizer,
    train,
)
from pjit_train.errors import TrainingError, UserError

COMMANDS = (
    train,
    pod,
    evaluate,
    sample,
    export,
    compress,
    study,
    tokenizer,
    slice,
    dataflow,
    fabric,
    completion,
)

_DESCRIPTION = """\
Torsion trains sparse and quantized language models on a sharded mesh.

A first run, a few minutes on a laptop:

  torsion train configs/quickstart.gin

Stop it with Ctrl-C: it saves, and the same command goes on from there.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 (training failed), 2 (a mistake), 130 (^C)."""
    began = time.monotonic()
    args = parser().parse_args(argv)
    try:
        if argv is None and getattr(args, "trains", False):
            from launch.process import use_huge_pages

            use_huge_pages()
        return args.command(args, began)
    except (UserError, TrainingError) as error:
        print("torsion:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:  # whoever read the output, such as head, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as if by SIGPIPE
    except KeyboardInterrupt:
        print("torsion: interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, as every other is told."""

    def error(self, message: str):
        self.exit(2, f"torsion: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; the function of a command is `args.command`."""
    top = _Parser(
        prog="torsion",
        description=_DESCRIPTION,
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=32
        ),
        epilog="torsion COMMAND --help tells the options of a command.",
    )
    top.add_argument("--version", action="version", version=f"torsion {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return top
