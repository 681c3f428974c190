"""`torsion traffic`: what a traffic matrix puts on the links of a slice."""

import json

from launch.commands.common import add_command, add_failed, add_pod, pod_or_torus, real


def add_pattern(sub, files: bool) -> None:
    """Adds the options that say a slice and its traffic."""
    of_file = ", or a CSV FILE of N x N amounts or of rows source,destination,bytes"
    sub.add_argument(
        "--pattern",
        required=True,
        metavar="PATTERN",
        help="uniform, transpose, bit-complement, tornado, neighbour or hotspot, as Dally and "
        f"Towles define them{of_file if files else ''}",
    )
    sub.add_argument(
        "--slice", required=True, metavar="SHAPE", help="such as 4x4x8 or 4x4x8_twisted"
    )
    add_pod(sub, "slice it is", torus=True)
    sub.add_argument(
        "--hot",
        type=real(0, 1),
        metavar="PART",
        help="of hotspot: the part of what each chip sends that goes to chip 0 (0.1)",
    )


def add(commands) -> None:
    traffic = add_command(
        commands,
        run,
        "traffic",
        "say what a traffic pattern puts on each link, beside bounds for every routing",
        "Link loads under dimension-order routing, ties between shortest paths split evenly, and "
        "under the best routing up to 256 chips. A pattern's chips send one unit each.",
    )
    add_pattern(traffic, files=True)
    add_failed(traffic)
    traffic.add_argument(
        "--time-limit",
        type=real(0, 86400),
        default=20.0,
        metavar="S",
        help="seconds of the search for the best routing (20; 0: look for none)",
    )
    traffic.add_argument("--csv", metavar="FILE", help="write the load of every link")
    traffic.add_argument("--json", action="store_true", help="print one JSON document")
    traffic.add_argument(
        "--draw", metavar="PATH", help="draw the load of every link: .png, .svg or .pdf"
    )


def run(args, began: float) -> int:
    from launch.reports.failures import lost_links
    from launch.reports.pictures import check_picture, check_table
    from launch.reports.traffic import (
        describe,
        draw,
        read_demands,
        report,
        title,
        write_loads,
    )

    table = None if args.csv is None else check_table(args.csv)
    path = None if args.draw is None else check_picture(args.draw)
    demands = read_demands(args.pattern, args.slice, pod_or_torus(args), args.hot)
    lost = lost_links(demands.slice, args.failed, args.failed_one_way)
    if not args.json:
        print(title(demands), flush=True)
    found, loads = report(demands, args.time_limit, lost)
    print(json.dumps(found) if args.json else describe(found), flush=True)
    if table is not None:
        write_loads(demands.slice, loads, table)
    if path is not None:
        draw(found, demands.slice, loads, path)
    if not args.json:
        for file in filter(None, (table, path)):
            print(f"wrote {file}")
    return 0
