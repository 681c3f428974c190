"""`torsion slice`: what the interconnect of a TPU slice gives, and how it looks."""

import json

from launch.commands.common import add_command, add_pod, pod_or_torus


def add(commands) -> None:
    slice = add_command(
        commands,
        run,
        "slice",
        "say what the interconnect of a TPU slice gives, and draw it",
        "Distances, bisection, and all-to-all throughput as an exact optimum with its proof.",
    )
    slice.add_argument(
        "shape", metavar="SHAPE", help="such as 4x4x8 or 4x4x8_twisted, or 8x16 with --pod v5e"
    )
    add_pod(slice, "slice it is", torus=True)
    slice.add_argument(
        "--failed-ocs",
        metavar="D,I,J",
        help="an optical switch that fails, such as x,0,0: dimension and in-face position",
    )
    slice.add_argument(
        "--failed",
        nargs="+",
        action="extend",
        default=[],
        metavar="PART",
        help="parts that fail: ocs:x,0,0 port:x,0,0,1 block:1 host:1,3 chip:1,0,1,3 "
        "link:1,0,1,3,+x, with blocks counted in the slice; on v5e and v6e chip:0,1 link:0,1,+x",
    )
    add_draw(slice, "SHAPE")
    slice.add_argument("--json", action="store_true", help="print one JSON document")


def add_draw(sub, name: str) -> None:
    sub.add_argument(
        "--draw",
        nargs="?",
        const="",
        metavar="PATH",
        help="write an interactive page and a picture, PATH.html and PATH.png (default: "
        f"{name}.html and {name}.png here)",
    )


def run(args, began: float) -> int:
    from launch.reports.slices import check_drawing, describe, draw, report

    check_drawing(args.draw)
    pod = pod_or_torus(args)
    found = report(args.shape, args.failed_ocs, args.failed, pod)
    if args.draw is not None:
        files = draw(args.shape, found, args.draw, args.failed_ocs, args.failed, pod)
        found["drawn"] = [str(file) for file in files]
    print(json.dumps(found) if args.json else describe(found))
    if args.draw is not None and not args.json:
        print(f"wrote {' and '.join(found['drawn'])}")
    return 0
