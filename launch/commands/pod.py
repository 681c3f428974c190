"""`torsion pod`: trains on a pod of hosts, emulated or real, and survives losing some."""

from pathlib import Path

from launch.commands.common import add_command, add_pod, add_run, real, run_bindings, whole


def add(commands) -> None:
    pod = add_command(
        commands,
        run,
        "pod",
        "train on a pod of hosts, and survive losing some",
        "Emulates the hosts of a TPU slice here, each group of them a process with emulated "
        "devices, or runs on those of a Ray cluster (--address). The run directory is that of "
        "`torsion train`; with the same --out, the run goes on. Ctrl-C saves and ends; a second "
        "one ends at once. See docs/pods.md.",
    )
    pod.add_argument("configs", nargs="+", metavar="CONFIG.gin", help="what to train")
    pod.add_argument("--slice", required=True, metavar="SHAPE", help="such as 4x4x8_twisted")
    add_pod(pod, "slice it is")
    pod.add_argument(
        "--hosts-per-process",
        type=whole(1),
        metavar="K",
        help="hosts (4 chips each) that share a process (default: at most 4 processes)",
    )
    add_run(pod)
    pod.add_argument(
        "--mesh", metavar="AXES", help="such as fsdp=8,tensor=2; -1 takes what is left"
    )
    pod.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="a Ray cluster to run on, or auto (default: emulate a pod here)",
    )
    pod.add_argument(
        "--dashboard", action="store_true", help="start Ray's dashboard too, on this machine only"
    )
    group = pod.add_argument_group("failures")
    group.add_argument(
        "--elastic",
        action="store_true",
        help="go on on a smaller slice where too few blocks are healthy",
    )
    group.add_argument(
        "--hang-after",
        type=real(5, 1e9),
        default=60.0,
        metavar="S",
        help="seconds without a step after which all start again (default: 60)",
    )
    group.add_argument(
        "--blocks", type=whole(1), metavar="N", help="blocks that the pod has (default: all)"
    )
    group.add_argument(
        "--fail",
        action="append",
        default=[],
        metavar="WHAT@step:N",
        help="make something fail after a step: process:1, host:3, node:0, block:0, ocs:x,0,0, "
        "hang:1, sigterm:1, manager, driver; may be repeated",
    )
    group.add_argument(
        "--repair",
        action="append",
        default=[],
        metavar="PART@step:N",
        help="bring back a part of the pod that failed, or a new block, after a step: block:1, "
        "host:1,3, ocs:x,0,0; a run that --elastic made smaller grows; may be repeated",
    )
    group.add_argument(
        "--chaos", metavar="RATES", help="random failures a step, such as host=0.01,hang=0.005"
    )
    group.add_argument("--chaos-seed", type=whole(), default=0, metavar="N", help="of --chaos")


def run(args, began: float) -> int:
    from launch.pod.keeper import keep

    own = ("command", "parser")  # of the command line
    options = {name: value for name, value in vars(args).items() if name not in own}
    return keep(
        options
        | {
            "bindings": run_bindings(args),
            "out": str(args.out or Path("runs") / Path(args.configs[-1]).stem),
        }
    )
