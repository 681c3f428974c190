"""`torsion import`: a pretrained model as a Hugging Face folder."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from launch.commands.common import add_command
from pjit_train.errors import UserError


def add(commands) -> None:
    import_ = add_command(
        commands,
        run,
        "import",
        "write a pretrained model as a Hugging Face folder (safetensors)",
        "A GGUF file is decoded, tensor by tensor, and its tokenizer and chat template are written "
        "as tokenizer.json and chat_template.jinja.",
    )
    import_.add_argument("source", metavar="SOURCE", help="a .gguf file")
    import_.add_argument("folder", metavar="OUT", help="folder to write; new, or empty")
    import_.add_argument(
        "--dtype",
        metavar="NAME",
        help="of all weights: float32, bfloat16 or float16 (default: that in which each is exact)",
    )


def run(args, began: float) -> int:
    if Path(args.source).is_dir():
        raise UserError(f"{args.source}: is a folder; give a .gguf file")

    from pjit_train.huggingface.gguf_import import import_gguf

    with shown_progress("importing") as progress:
        done = import_gguf(args.source, args.folder, dtype=args.dtype, progress=progress)
    types = sorted(done.types.items(), key=lambda row: -row[1])
    text = f"{args.folder}: {done.tensors} tensors ("
    text += ", ".join(f"{count} {kind}" for kind, count in types)
    text += f"), {done.bytes:,} bytes"
    if done.rounding is None:
        text += ", every value exact"
    else:
        text += f" in {args.dtype}: {done.rounding.rounded:,} of {done.rounding.values:,} values "
        text += f"rounded, by at most {done.rounding.largest:.2g}"
    text += "; no tokenizer" if done.tokens is None else f"; {done.tokens:,} tokens"
    print(text)
    return 0


@contextlib.contextmanager
def shown_progress(what: str) -> Iterator:
    """Gives a function that is told (bytes done, bytes of all), and shows them on a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, of: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)
