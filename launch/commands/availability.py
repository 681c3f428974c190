"""`torsion availability`: what a pod whose hosts fail gives, with switches and static wiring."""

import json

from launch.commands.common import add_command, add_pod, pod_of, whole


def add(commands) -> None:
    availability = add_command(
        commands,
        run,
        "availability",
        "say how much of a pod whose hosts fail can be in slices of one size",
        "Goodput: the part of all blocks that is in slices when as many as can be are made of the "
        "blocks that are up; with optical switches, and with static wiring. Closed forms, or "
        "samples with their standard error.",
    )
    availability.add_argument(
        "--slice",
        required=True,
        metavar="SHAPES",
        help="shapes or numbers of chips, such as 8x8x16,2048; the shape of a number is the one "
        "nearest to a cube",
    )
    availability.add_argument(
        "--hosts-up",
        required=True,
        metavar="PARTS",
        help="parts of the time that a host is up, such as 0.99,0.999",
    )
    add_pod(availability, "slices they are")
    availability.add_argument(
        "--trials", type=whole(1000, 10**8), default=1_000_000, metavar="N", help="samples (10^6)"
    )
    availability.add_argument("--seed", type=whole(), default=0, metavar="N", help="of the samples")
    availability.add_argument("--json", action="store_true", help="print one JSON document")
    availability.add_argument(
        "--draw", metavar="PATH", help="draw goodput against hosts up: .png, .svg or .pdf"
    )


def run(args, began: float) -> int:
    from launch.reports.availability import describe, draw, read_hosts_up, read_slices, report
    from launch.reports.pictures import check_picture

    path = None if args.draw is None else check_picture(args.draw)
    pod = pod_of(args.pod)
    slices, parts = read_slices(args.slice, pod), read_hosts_up(args.hosts_up)
    found = report(slices, parts, pod, trials=args.trials, seed=args.seed)
    print(json.dumps(found) if args.json else describe(found), flush=True)
    if path is not None:
        draw(found, slices, pod, path)
        if not args.json:
            print(f"wrote {path}")
    return 0
