"""`torsion fleet`: a pod's jobs and failures over months, under policies of its scheduler."""

import json

from launch.commands.common import add_command, add_pod, pod_of


def add(commands) -> None:
    fleet = add_command(
        commands,
        run,
        "fleet",
        "say what a pod's scheduler makes of jobs and failures, event by event",
        "Jobs arrive, are hit by failures, move and finish; each policy meets the same jobs and "
        "failures. docs/architects.md says what WORKLOAD.json holds.",
    )
    fleet.add_argument(
        "workload",
        metavar="WORKLOAD.json",
        help="jobs, or how they are generated; failures, maintenance, costs and policies",
    )
    add_pod(fleet, "pod it is")
    fleet.add_argument("--json", action="store_true", help="print one JSON document")
    fleet.add_argument(
        "--draw", metavar="PATH", help="draw what became of the pod's time: .png, .svg or .pdf"
    )


def run(args, began: float) -> int:
    from launch.reports.fleet import draw, report, row_text, summary, title
    from launch.reports.fleet_workload import read_workload
    from launch.reports.pictures import check_picture

    path = None if args.draw is None else check_picture(args.draw)
    workload = read_workload(args.workload, pod_of(args.pod))
    if not args.json:
        print(title(workload), flush=True)

    def tell(row) -> None:
        if not args.json:
            print(row_text(workload, row), flush=True)

    found = report(workload, tell)
    print(json.dumps(found) if args.json else summary(found), flush=True)
    if path is not None:
        draw(found, path)
        if not args.json:
            print(f"wrote {path}")
    return 0
