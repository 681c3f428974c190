"""`torsion trace`: replays an execution trace of another tool on a slice, also with failures."""

import json
from pathlib import Path

from launch.commands.common import add_command, add_failed, add_pod, pod_or_torus


def add(commands) -> None:
    trace = add_command(
        commands,
        run,
        "trace",
        "replay an execution trace of MLCommons Chakra on a slice",
        "Runs a trace's computing and communication on the links of a slice, around what has "
        "failed: collectives by the schedules of `torsion collective`, those at the same time "
        "sharing links fairly. Says where the time goes, what holds each collective up, and a "
        "bound below every schedule. One file is that of all chips; several are a rank's each, by "
        "the last number in their names.",
    )
    trace.add_argument("files", nargs="+", metavar="FILE.et", help="or a folder of them")
    trace.add_argument("--slice", required=True, metavar="SHAPE", help="such as 8x8x8")
    trace.add_argument(
        "--groups",
        metavar="FILE",
        help='the ranks of process groups by name, in JSON: {"0": [0, 1, 2, 3]}',
    )
    add_failed(trace)
    add_pod(trace, "slice it is", torus=True)
    trace.add_argument("--timeline", metavar="FILE", help="write a timeline for Perfetto, in JSON")
    trace.add_argument("--json", action="store_true", help="print one JSON document")


def run(args, began: float) -> int:
    from launch.reports.traces import describe, report, write_timeline

    found, step = report(
        [Path(file) for file in args.files],
        args.slice,
        pod_or_torus(args),
        groups=None if args.groups is None else Path(args.groups),
        failed=args.failed,
        failed_one_way=args.failed_one_way,
        quiet=args.json,
    )
    if args.timeline is not None:
        write_timeline(Path(args.timeline), step)
    print(json.dumps(found) if args.json else describe(found))
    if args.timeline is not None and not args.json:
        print(f"wrote {args.timeline}; ui.perfetto.dev opens it")
    return 0
