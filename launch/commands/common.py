"""What the commands share: their parsers, the machine they run on, the run they read."""

import argparse
from collections.abc import Callable
from pathlib import Path

from pjit_train.errors import UserError

AXES = ("data", "fsdp", "sequence", "tensor")


def add_command(
    commands, run: Callable[..., int], name: str, help: str, description: str = ""
) -> argparse.ArgumentParser:
    """Adds a command to the sub-parsers `commands`; it is carried out by run(args, began)."""
    sub = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}. {description}",
    )
    sub.set_defaults(command=run)
    return sub


def add_machine(sub: argparse.ArgumentParser, default: str = "as configured") -> None:
    sub.add_argument(
        "--mesh",
        metavar="AXES",
        help=f"such as data=2,fsdp=2,tensor=2; -1 takes what is left (default: {default})",
    )
    sub.add_argument("--devices", type=int, metavar="N", help="emulate N CPU devices")


def trained_run(args):
    """The run of a run directory, on the mesh that the options say."""
    from launch.directory import config_file

    path = config_file(Path(args.run))
    mesh = mesh_bindings(",".join(f"{axis}=1" for axis in AXES)) + mesh_bindings(args.mesh)

    from launch import process

    process.prepare(args.devices)

    from launch.configure import build_run

    return build_run([str(path)], mesh)[0]


def mesh_bindings(mesh: str | None) -> list[str]:
    """Bindings for `data=2,fsdp=2`."""
    if mesh is None:
        return []
    sizes = {}
    for part in mesh.split(","):
        axis, _, size = part.partition("=")
        try:
            sizes[axis] = int(size)
        except ValueError:
            raise UserError(f"--mesh {mesh}: {part!r} is no AXIS=SIZE, such as fsdp=2") from None
        if axis not in AXES:
            raise UserError(f"--mesh {mesh}: no axis {axis!r}; use {', '.join(AXES)}")
    bindings = [f"sharding.MeshShape.{axis} = {size}" for axis, size in sizes.items()]
    return ["run.Run.mesh = @sharding.MeshShape()", *bindings]
