"""Code that the commands share: their parsers, the machine they run on, the run they read."""

import argparse
import contextlib
import dataclasses
import difflib
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launch.argparse_internals import arguments
from pjit_train.errors import UserError

AXES = ("data", "fsdp", "sequence", "tensor", "slices")  # the last: of which data spans so many


def add_command(
    commands, run: Callable[..., int], name: str, help: str, description: str = "", **options: Any
) -> argparse.ArgumentParser:
    """Adds a command to the sub-parsers `commands`; it is carried out by run(args, began).

    Args:
      options: others of `argparse.ArgumentParser`.
    """
    sub = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}. {description}",
        **options,
    )
    sub.set_defaults(command=run)
    for name in (None, "store"):
        sub.register("action", name, _Once)
    return sub


class Parser(argparse.ArgumentParser):
    """Parser of arguments that reports a mistake in one line, with the nearest right word."""

    def error(self, message: str):
        if found := re.match(r"(.*invalid choice: '([^']*)') \(choose from ", message):
            known = [x for action in arguments(self) for x in action.choices or ()]
            if near := _nearest(found[2], known):
                message = found[1] + near
        elif found := re.match("unrecognized arguments: (-[^ =]*)", message):
            known = [option for action in arguments(self) for option in action.option_strings]
            message += _nearest(found[1], known)
        self.exit(2, f"torsion: {message}; see {self.prog} --help\n")

    def parse_known_args(self, args=None, namespace=None):
        """Parses as argparse does, but each command's parser refuses itself what it does not
        know."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


class _Once(argparse.Action):
    """An option that is given once, or again to the same effect: no value is silently lost."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._given = None

    def __call__(self, parser, namespace, values, option_string=None):
        if self.nargs is None and isinstance(values, list):  # argparse's own, of --option=--
            raise argparse.ArgumentError(self, "'--': want a value")
        if option_string is not None:
            if self._given not in (None, [values]):
                raise argparse.ArgumentError(
                    self, f"is given twice, as {self._given[0]} and as {values}; give it once"
                )
            self._given = [values]
        setattr(namespace, self.dest, values)


@dataclasses.dataclass(frozen=True)
class whole:
    """The `type` of an option that takes a whole number from `low` to `high`, in decimal digits."""

    low: int = 0
    high: int = 2**31 - 1

    def __call__(self, text: str) -> int:
        # The length first: Python takes long over a number of a million digits, or refuses.
        if not re.fullmatch(r"[+-]?[0-9]{1,20}", text) or not self.low <= int(text) <= self.high:
            wanted = f"want a whole number from {self.low} to {self.high}"
            raise argparse.ArgumentTypeError(f"{text[:40]!r}: {wanted}")
        return int(text)


@dataclasses.dataclass(frozen=True)
class real:
    """The `type` of an option that takes a number from `low` to `high`, in decimal digits."""

    low: float
    high: float

    def __call__(self, text: str) -> float:
        digits = re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text)
        if not digits or not self.low <= float(text) <= self.high:
            wanted = f"want a number from {self.low:g} to {self.high:g}".replace("e+", "e")
            raise argparse.ArgumentTypeError(f"{text[:40]!r}: {wanted}")
        return float(text)


PODS = ("v4", "v5p", "v5e", "v6e")


def add_failed(sub) -> None:
    """Adds --failed and --failed-one-way, of parts of a slice that traffic goes around."""
    sub.add_argument(
        "--failed",
        nargs="+",
        action="extend",
        default=[],
        metavar="PART",
        help="parts that fail and are gone around: ocs:x,0,0 port:x,0,0,1 link:1,0,1,3,+x, with "
        "blocks counted in the slice; on v5e and v6e link:0,1,+x",
    )
    sub.add_argument(
        "--failed-one-way",
        nargs="+",
        action="extend",
        default=[],
        metavar="LINK",
        help="links that fail in their own direction only: link:1,0,1,3,+x",
    )


def add_pod(sub: argparse.ArgumentParser, of: str, *, torus: bool = False) -> None:
    """Adds the option --pod, for `pod_of`.

    Args:
      torus: whether any torus will do, too, with --links, for `pod_or_torus`.
    """
    any_torus = ", or torus: a box of any sides, such as 5x7_wrap:x" if torus else ""
    sub.add_argument(
        "--pod",
        choices=(*PODS, "torus") if torus else PODS,
        default="v4",
        help=f"the generation of TPU whose {of}{any_torus} (default: v4)",
    )
    if torus:
        sub.add_argument(
            "--links",
            metavar="B[,B,B]",
            help="with --pod torus: GB/s of a link in one direction, or of links along x, y and z "
            "(those of TPU v4)",
        )


def pod_of(version: str):
    """The data of a pod that --pod names."""
    from topology import hardware

    return hardware.PODS[f"TPU {version}"]


def pod_or_torus(args):
    """The data of the pod that --pod, and --links, say; a torus of one's own with --pod torus."""
    from topology import hardware

    links = args.links
    if args.pod != "torus":
        if links is not None:
            raise UserError(f"--links {links}: those of TPU {args.pod} are known; give --pod torus")
        return pod_of(args.pod)
    try:
        bandwidths = [1e9 * real(1e-6, 1e9)(x) for x in links.split(",")] if links else []
        return hardware.any_torus(bandwidths or None)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise UserError(f"--links {links}: {error}") from error


def add_run(sub: argparse.ArgumentParser) -> None:
    """The options that say and change a run, for `run_bindings`."""
    sub.add_argument(
        "--gin",
        action="append",
        default=[],
        metavar="BINDING",
        help="change a parameter, such as 'run.Run.eval_every = 50'; may be repeated",
    )
    sub.add_argument("--steps", type=whole(1), metavar="N", help="updates of the whole run")
    sub.add_argument(
        "--log-every", type=whole(1), metavar="N", help="steps between rows of metrics"
    )
    sub.add_argument("--seed", type=whole(), metavar="N", help="of parameters, data and samples")
    sub.add_argument(
        "--out",
        metavar="DIR",
        help="run directory (default: runs/ and the name of the last CONFIG)",
    )


def run_bindings(args) -> list[str]:
    """The bindings of --gin, then of the options that are short for some; the last one holds.

    Raises:
      UserError: two --gin bind one parameter to two values, or a gin file is given twice.
    """
    from launch.bindings import check_said_once
    from launch.explain import IMPORT

    if twice := [file for file in args.configs if args.configs.count(file) > 1]:
        raise UserError(f"{twice[0]} is given twice; give it once, files bind in their order")
    imports = "\n".join(IMPORT.values())
    with contextlib.suppress(SyntaxError, tokenize.TokenError):  # which `build_run` explains
        check_said_once([f"{imports}\n{binding}" for binding in args.gin], "--gin")
    short = {"steps": args.steps, "log_every": args.log_every, "seed": args.seed}
    bindings = [f"run.Run.{name} = {value}" for name, value in short.items() if value is not None]
    return args.gin + bindings + mesh_bindings(args.mesh)


def add_step(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--step", type=whole(), metavar="N", help="checkpoint (default: the newest)")


def add_machine(sub: argparse.ArgumentParser, default: str = "as configured") -> None:
    sub.add_argument(
        "--mesh",
        metavar="AXES",
        help=f"such as data=2,fsdp=2,tensor=2; -1 takes what is left (default: {default})",
    )
    sub.add_argument("--devices", type=whole(1, 4096), metavar="N", help="emulate N CPU devices")


def add_model(sub: argparse.ArgumentParser) -> None:
    """The options that say a language model, for `opened_model`."""
    sub.add_argument(
        "run",
        metavar="RUN_OR_FOLDER",
        help="run directory, or Hugging Face folder, .gguf file or hf:OWNER/NAME",
    )
    add_step(sub)
    sub.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of a folder's parameters and matmuls (default: float32)",
    )
    add_machine(sub, "one device")


def is_folder(path: Path) -> bool:
    """Tells whether a path is a Hugging Face folder, or what becomes one, and no run directory."""
    from launch.directory import is_run

    if path.suffix == ".gguf" or str(path).startswith("hf:"):
        return True
    return (path / "config.json").is_file() and not is_run(path)


def opened_model(args):
    """The `language_model.LanguageModel` of a run directory or a Hugging Face folder."""
    path = Path(args.run)
    if not is_folder(path):
        if args.dtype is not None:
            raise UserError(f"--dtype is of a Hugging Face folder; {path} says its own")
        run = trained_run(args)

        from pjit_train.language_model import of_run

        return of_run(run, path, step=args.step)
    if args.step is not None:
        raise UserError(f"--step is of a run directory; {path} is a Hugging Face folder")
    sizes = dict.fromkeys(AXES, 1) | mesh_sizes(args.mesh)

    from launch import process

    process.prepare(args.devices)

    from pjit_train.huggingface.sources import folder_of
    from pjit_train.language_model import of_folder
    from pjit_train.sharding import MeshShape

    with shown_progress("importing") as progress:
        path = folder_of(args.run, progress=progress)
    return of_folder(path, MeshShape(**sizes), dtype=args.dtype or "float32")


@contextlib.contextmanager
def shown_progress(what: str, *, count: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Gives a function that is told (done, of all), and shows them on a terminal.

    Args:
      count: whether they are a number of things; else they are bytes.
    """
    if not sys.stderr.isatty():
        yield lambda done, of: None
        return
    from rich import progress
    from rich.console import Console

    of_bytes = progress.DownloadColumn(), progress.TransferSpeedColumn()
    numbers = (progress.MofNCompleteColumn(), progress.TimeRemainingColumn()) if count else of_bytes
    columns = progress.TextColumn(what), progress.BarColumn(), *numbers
    bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(what, total=None)

    def show(done: int, of: int) -> None:
        bar.start()  # at the first that is told: what goes before may show something itself
        bar.update(task, completed=done, total=of)

    try:
        yield show
    finally:
        bar.stop()


def trained_run(args):
    """The run of a run directory, on the mesh that the options say."""
    from launch.directory import check_is_run

    check_is_run(Path(args.run))
    mesh = mesh_bindings(",".join(f"{axis}=1" for axis in AXES)) + mesh_bindings(args.mesh)

    from launch import process

    process.prepare(args.devices)

    from launch.trained import read_run

    return read_run(Path(args.run), mesh)[0]


def mesh_bindings(mesh: str | None) -> list[str]:
    """Turns a text such as `data=2,fsdp=2` into bindings."""
    if mesh is None:
        return []
    bindings = [f"sharding.MeshShape.{axis} = {size}" for axis, size in mesh_sizes(mesh).items()]
    return ["run.Run.mesh = @sharding.MeshShape()", *bindings]


def mesh_sizes(mesh: str | None) -> dict[str, int]:
    """Sizes by axis of a text such as `data=2,fsdp=2`; empty for None."""
    sizes: dict[str, int] = {}
    for part in () if mesh is None else mesh.split(","):
        axis, _, size = part.partition("=")
        if not re.fullmatch(r"[+-]?[0-9]{1,10}", size):
            raise UserError(f"--mesh {mesh}: {part!r} is no AXIS=SIZE, such as fsdp=2")
        if axis not in AXES:
            raise UserError(f"--mesh {mesh}: no axis {axis!r}; use {', '.join(AXES)}")
        if axis in sizes:
            raise UserError(f"--mesh {mesh}: {axis} is given twice; give it one size")
        sizes[axis] = int(size)
    return sizes
