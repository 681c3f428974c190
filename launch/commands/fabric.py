"""`torsion fabric`: the blocks, slices and optical switches of a TPU pod."""

import json

from launch.commands.common import add_command, add_pod, pod_of
from launch.commands.slice import add_draw


def add(commands) -> None:
    fabric = add_command(
        commands,
        run,
        "fabric",
        "show the blocks, slices and optical switches of a TPU pod",
        "Places slices on its blocks, lets parts fail, says what that costs, and proves the "
        "cross-connects by following the light through them.",
    )
    fabric.add_argument(
        "--slices",
        nargs="+",
        action="extend",
        default=[],
        metavar="SHAPE",
        help="such as 4x4x8_twisted,8x8x8; 4x4x8@3,17 is on blocks 3 and 17",
    )
    fabric.add_argument(
        "--failed",
        nargs="+",
        action="extend",
        default=[],
        metavar="PART",
        help="parts that fail once the slices are there: block:12 host:12,3 chip:12,0,1,3 "
        "link:12,0,1,3,+x ocs:x,0,0 port:x,0,0,17",
    )
    add_pod(fabric, "pod it is")
    add_draw(fabric, "fabric")
    fabric.add_argument("--json", action="store_true", help="print one JSON document")


def run(args, began: float) -> int:
    from launch.reports.fabric import WIDTH, draw, place, report, show
    from launch.reports.slices import check_drawing

    check_drawing(args.draw)
    pod = place(args.slices, args.failed, pod_of(args.pod))
    found = report(pod)
    if args.draw is not None:
        found["drawn"] = [str(file) for file in draw(pod, found, args.draw)]
    if args.json:
        print(json.dumps(found))
        return 1 if found["checked"] else 0

    from rich.console import Console

    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)  # a narrow terminal wraps lines; nothing is cut off
    show(pod, found, console)
    if args.draw is not None:
        print(f"wrote {' and '.join(found['drawn'])}")
    return 1 if found["checked"] else 0
