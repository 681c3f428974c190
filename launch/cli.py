"""The command `torsion`.

Whatever is slow to import (JAX, gin, the data libraries) is imported by the command that needs it.
"""

import atexit
import os
import signal
import sys
import time

_COMMANDS = (
    "train",
    "pod",
    "evaluate",
    "lm_eval",
    "sample",
    "import_",
    "check",
    "export",
    "compress",
    "verify",
    "study",
    "tokenizer",
    "slice",
    "collective",
    "layout",
    "availability",
    "traffic",
    "packets",
    "fleet",
    "trace",
    "plan",
    "embeddings",
    "dataflow",
    "fabric",
    "completion",
)

_MOST = 1200  # characters of a message
_DESCRIPTION = """\
Torsion trains sparse and quantized language models on a sharded mesh.

A first run, a few minutes on a laptop:

  torsion train configs/quickstart.gin

Stop it with Ctrl-C: it saves, and the same command goes on from there.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 (training failed) or 2 (a mistake).

    SIGINT, SIGTERM and SIGHUP end the process at once with 130, 143 or 129, whatever it imports or
    computes, but where a command saves something first. Without `argv` the process is the command's
    own, and that holds until it has ended.
    """
    began = time.monotonic()
    if argv is None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of the next import
    from pjit_train import signals

    taken = signals.taken(signals.end_unless_saved)
    if argv is None:
        taken.__enter__()
        atexit.register(signals.ignore)  # registered first, so that it is the last to be called
        return _command(argv, began)
    with taken:
        return _command(argv, began)


def _command(argv: list[str] | None, began: float) -> int:
    from pjit_train.errors import TrainingError, UserError

    args = parser().parse_args(argv)
    try:
        if argv is None and getattr(args, "trains", False):
            from launch.process import use_huge_pages

            use_huge_pages()
        return args.command(args, began)
    except (UserError, TrainingError) as error:
        print("torsion:", _one_line(str(error)), file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:  # whoever read the output, such as head, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as if by SIGPIPE
    except OSError as error:  # a path that cannot be one, or a file system that refuses
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"torsion: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # that a library raises; a signal raises none
        print("torsion: interrupted", file=sys.stderr)
        return 130


def _one_line(text: str) -> str:
    """A message without control characters, cut in the middle: what it quotes may hold anything."""
    text = "".join(char if char.isprintable() else " " for char in text)
    return text if len(text) <= _MOST else f"{text[: _MOST * 2 // 3]} ... {text[-_MOST // 3 :]}"


def parser():
    """The argparse.ArgumentParser of the command line; `args.command` is a command's function,
    and `args.parser` this parser.
    """
    import argparse
    import functools
    import importlib

    from launch import __version__
    from launch.commands.common import Parser

    top = Parser(
        prog="torsion",
        description=_DESCRIPTION,
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=32
        ),
        epilog="torsion COMMAND --help tells the options of a command.",
    )
    top.add_argument("--version", action="version", version=f"torsion {__version__}")
    top.set_defaults(parser=top)  # which `completion` completes
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in _COMMANDS:
        importlib.import_module(f"launch.commands.{name}").add(commands)
    return top


if __name__ == "__main__":
    sys.exit(main())
