"""Pictures and tables of commands: where they can be written, and writing them whole."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from launch.reports.slices import check_folder
from pjit_train.errors import UserError
from pjit_train.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")


def check_picture(path: str, option: str = "--draw") -> Path:
    """The path of a picture that can be written.

    Args:
      option: that gives it, for the message.

    Raises:
      UserError: its ending is no format, its folder is missing or cannot be written.
    """
    found = Path(path)
    if found.suffix.lower() not in FORMATS:
        raise UserError(f"{option} {path}: must end in {', '.join(FORMATS)}")
    check_folder(path, found.parent, option)
    return found


def check_table(path: str) -> Path:
    """The path of a table that can be written; else raises UserError."""
    check_folder(path, Path(path).parent, "--csv")
    if Path(path).is_dir():
        raise UserError(f"--csv {path}: is a folder; give a file")
    return Path(path)


@contextlib.contextmanager
def written(path: Path, option: str = "--draw") -> Iterator[Path]:
    """Gives a path to write to; the file then is there whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    try:
        with replacing(path) as new:
            yield new
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror})") from error


def chart(width: float, height: float) -> "tuple[Figure, Axes]":
    """An empty figure of so many inches, and its axes with a grid."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def save(figure: "Figure", path: Path) -> None:
    """Writes a figure; UserError where it cannot be written."""
    with written(path) as new:
        figure.savefig(new, dpi=110, format=path.suffix.lstrip(".").lower())
