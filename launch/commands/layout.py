"""`torsion layout`: which chip takes which place of a mesh, so that given traffic costs least."""

import json

from launch.commands.common import add_command, add_failed, add_pod, pod_or_torus


def add(commands) -> None:
    layout = add_command(
        commands,
        run,
        "layout",
        "lay a mesh on a slice, so that given traffic takes least",
        "Tries the factorisations of the slice's dimensions to the mesh's axes, in several orders, "
        "and on twisted slices every box as which they can be read. Times are beside those of "
        "JAX's own order of devices, and bounds for every schedule.",
    )
    layout.add_argument(
        "--mesh",
        required=True,
        metavar="AXES",
        help="names and sizes, such as data=16,tensor=8; -1 takes what is left",
    )
    layout.add_argument(
        "--traffic",
        required=True,
        metavar="FILE",
        help='JSON: [{"kind": "all_reduce", "axes": ["data"], "bytes": "64MiB", "count": 2}, ...]; '
        "count and strategy may be left out",
    )
    layout.add_argument(
        "--slice", required=True, metavar="SHAPE", help="such as 4x4x8 or 4x4x8_twisted"
    )
    add_failed(layout)
    add_pod(layout, "slice it is", torus=True)
    layout.add_argument("--json", action="store_true", help="print one JSON document")


def run(args, began: float) -> int:
    from launch.reports.failures import lost_links
    from launch.reports.layout import describe, read_slice, read_traffic, report, title

    slice, mesh = read_slice(args.slice, args.mesh, pod_or_torus(args))
    traffic = read_traffic(args.traffic, mesh)
    lost = lost_links(slice, args.failed, args.failed_one_way)
    if not args.json:
        print(title(slice, mesh), flush=True)
    found = report(slice, mesh, traffic, lost)
    print(json.dumps(found) if args.json else describe(found))
    return 0
