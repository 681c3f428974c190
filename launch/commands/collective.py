"""`torsion collective`: what a collective over the axes of a slice takes, and its lower bounds."""

import json

from launch.commands.common import add_command, add_failed, add_pod, pod_or_torus, real, whole


def add(commands) -> None:
    collective = add_command(
        commands,
        run,
        "collective",
        "say what a collective takes on a slice, beside bounds for every schedule",
        "The time of a schedule that `topology.schedule` makes, by its latencies and its fullest "
        "link, and lower bounds that hold for all schedules. Around failed parts traffic takes "
        "detours, in the parts that load the fullest link least.",
    )
    collective.add_argument(
        "kind",
        metavar="KIND",
        help="all_gather, reduce_scatter, all_reduce, all_to_all or permute (to the next member)",
    )
    collective.add_argument(
        "--bytes",
        required=True,
        metavar="SIZE",
        help="such as 64MiB: of the whole array of an all_gather (after), reduce_scatter (before) "
        "or all_reduce; what a chip sends in the others",
    )
    collective.add_argument(
        "--slice", required=True, metavar="SHAPE", help="such as 4x4x8 or 4x4x8_twisted"
    )
    collective.add_argument(
        "--axes", metavar="AXES", help="dimensions that it goes over, such as x,y (default: all)"
    )
    collective.add_argument(
        "--slices",
        type=whole(1, 4096),
        default=1,
        metavar="N",
        help="over so many slices alike, joined by the data-centre network (1)",
    )
    collective.add_argument(
        "--pieces", type=whole(1, 2**20), metavar="N", help="into which it is cut then (the best)"
    )
    collective.add_argument(
        "--dcn",
        type=real(1e-6, 1e6),
        metavar="GB/S",
        help="of a chip on that network, one way (its part of what is published of its host's)",
    )
    add_failed(collective)
    add_pod(collective, "slice it is", torus=True)
    collective.add_argument("--json", action="store_true", help="print one JSON document")


def run(args, began: float) -> int:
    from launch.reports.collectives import describe, report

    found = report(
        args.kind,
        args.bytes,
        args.slice,
        args.axes,
        pod_or_torus(args),
        failed=args.failed,
        failed_one_way=args.failed_one_way,
        slices=args.slices,
        pieces=args.pieces,
        dcn=args.dcn,
    )
    print(json.dumps(found) if args.json else describe(found))
    return 0
