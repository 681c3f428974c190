"""`torsion slice`: what the interconnect of a TPU v4 slice gives."""

import json

from launch.commands.common import add_command


def add(commands) -> None:
    slice = add_command(
        commands,
        run,
        "slice",
        "say what the interconnect of a TPU v4 slice gives",
        "Distances, bisection, and all-to-all throughput as an exact optimum with its proof.",
    )
    slice.add_argument("shape", metavar="SHAPE", help="such as 4x4x8 or 4x4x8_twisted")
    slice.add_argument(
        "--failed-ocs",
        metavar="D,I,J",
        help="an optical switch that fails, such as x,0,0: dimension and in-face position",
    )
    slice.add_argument("--json", action="store_true", help="print one JSON document")


def run(args, began: float) -> int:
    from launch.slices import describe, report

    found = report(args.shape, args.failed_ocs)
    print(json.dumps(found) if args.json else describe(found))
    return 0
