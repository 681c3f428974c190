"""`torsion packets`: latency of packets against the rate at which chips make them."""

import json

from launch.commands.common import add_command, pod_or_torus, whole
from launch.commands.traffic import add_pattern


def add(commands) -> None:
    packets = add_command(
        commands,
        run,
        "packets",
        "say how latency grows with the rate of packets, and where a slice saturates",
        "Simulates packets cycle by cycle under dimension-order routing, at rates up to what the "
        "fullest link can carry, or to saturation, and halves the interval in which it lies.",
    )
    add_pattern(packets, files=False)
    packets.add_argument(
        "--places", type=whole(1, 10**6), metavar="K", help="packets of a buffer (any number)"
    )
    packets.add_argument(
        "--cycles",
        type=whole(100, 10**6),
        metavar="N",
        help="of the window in which packets are counted (1000 to 4000, more on small slices)",
    )
    packets.add_argument("--seed", type=whole(), default=0, metavar="N", help="of the packets")
    packets.add_argument("--csv", metavar="FILE", help="write the curve")
    packets.add_argument("--json", action="store_true", help="print one JSON document")
    packets.add_argument("--draw", metavar="PATH", help="draw the curve: .png, .svg or .pdf")


def run(args, began: float) -> int:
    from launch.reports.packets import (
        check_sends,
        draw,
        report,
        row_text,
        summary,
        title,
        write_curve,
    )
    from launch.reports.pictures import check_picture, check_table
    from launch.reports.traffic import read_pattern

    table = None if args.csv is None else check_table(args.csv)
    path = None if args.draw is None else check_picture(args.draw)
    demands = read_pattern(args.pattern, args.slice, pod_or_torus(args), args.hot)
    check_sends(demands)
    if not args.json:
        print(title(demands), flush=True)

    def tell(row) -> None:
        if not args.json:
            print(row_text(row), flush=True)

    found = report(demands, places=args.places, cycles=args.cycles, seed=args.seed, tell=tell)
    print(json.dumps(found) if args.json else summary(found), flush=True)
    if table is not None:
        write_curve(found, table)
    if path is not None:
        draw(found, path)
    if not args.json:
        for file in filter(None, (table, path)):
            print(f"wrote {file}")
    return 0
