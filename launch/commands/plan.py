"""`torsion plan`: how long a step takes, and what it needs, on a slice that one does not have."""

import argparse
import json
import sys
import time
from pathlib import Path

from launch.commands.common import (
    add_command,
    add_pod,
    mesh_bindings,
    mesh_sizes,
    pod_of,
    real,
    whole,
)
from pjit_train.errors import UserError

COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "permute")


def add(commands) -> None:
    plan = add_command(
        commands,
        run,
        "plan",
        "say how long a step of a run takes on a TPU slice, and what it needs, without one",
        "Google's compiler compiles the run's step for the slice (a minute or two on the first "
        "time, then kept), and the program that it schedules is priced and replayed on the "
        "slice's network. Needs libtpu: pip install 'torsion[plan]', on Linux; no TPU.",
    )
    plan.add_argument("configs", nargs="*", metavar="CONFIG.gin", help="the run, as of train")
    plan.add_argument("--slice", metavar="S", help="such as 4x4x8, or 16x16 with --pod v5e")
    plan.add_argument(
        "--chips", type=whole(1, 2**16), metavar="N", help="with --search: any slice of so many"
    )
    plan.add_argument(
        "--search",
        action="store_true",
        help="find the mesh (unless --mesh is given), the rematerialisation and, with --chips, "
        "the slice with which the step is shortest",
    )
    plan.add_argument(
        "--search-time",
        type=whole(1, 10**7),
        default=1800,
        metavar="S",
        help="for it, and to find what would fit where a step does not (1800)",
    )
    add_pod(plan, "slice it is")
    plan.add_argument("--slices", type=whole(1, 4096), default=1, metavar="N", help="how many (1)")
    plan.add_argument(
        "--mesh", metavar="AXES", help="on one slice, such as fsdp=16,tensor=4 (as configured)"
    )
    plan.add_argument(
        "--gin", action="append", default=[], metavar="BINDING", help="change a parameter"
    )
    plan.add_argument(
        "--hlo", metavar="FILE", help="plan this compiled program (HLO text), of any trainer"
    )
    plan.add_argument(
        "--xla", default="", metavar="FLAGS", help="compiler flags, as '--xla_a=true --xla_b=2'"
    )
    plan.add_argument(
        "--what-if",
        action="append",
        default=[],
        metavar="CHANGE",
        help="links=2, hbm=1.5, clock=2 or memory=2 times as fast or large; free=all_gather: a "
        "collective that costs nothing",
    )
    plan.add_argument(
        "--no-twin", action="store_true", help="leave the twisted slice of the same shape out"
    )
    plan.add_argument(
        "--tokens", type=real(1, 1e18), default=1e12, metavar="N", help="of a whole run (1e12)"
    )
    plan.add_argument(
        "--timeline", metavar="FILE", help="write the step's timeline, for ui.perfetto.dev"
    )
    plan.add_argument(
        "--time-limit", type=whole(1, 86400), default=1500, metavar="S", help="of a compilation"
    )
    plan.add_argument("--json", action="store_true", help="print one JSON document")


def run(args, began: float) -> int:
    from launch.reports import plan as reports
    from topology.torus.slices import Slice

    _check_slice(args)
    try:
        pod = pod_of(args.pod)
        slice = None if args.slice is None else Slice.parse(args.slice, pod)
        machine, free = _machine(pod, args.what_if)
    except ValueError as error:
        raise UserError(str(error)) from error
    how = {"machine": machine, "free": free, "slices": args.slices, "tokens": args.tokens}
    if args.hlo is not None:
        if args.configs or args.mesh or args.gin:
            raise UserError("--hlo: the program is whole; give no configuration, --mesh or --gin")
        from launch.plan import twin_of

        text = _text(Path(args.hlo))
        found, prediction = _reported(reports, slice, text, how, args.hlo)
        other = None if args.no_twin or args.slices > 1 else twin_of(slice)
        twin = None
        if other is not None:
            twin = _reported(reports, other, text, how, args.hlo)[0]
    elif args.search:
        found, prediction = _searched(args, slice, pod, how, reports)
        twin = None
    else:
        found, prediction, twin = _planned(args, slice, how, reports)
    if args.timeline is not None:
        reports.write_timeline(Path(args.timeline), prediction)
        found["timeline"] = args.timeline
    if twin is not None:
        found["twin"] = twin
    if args.json:
        print(json.dumps(found))
        return 0
    print(reports.describe(found))
    if "search" in found:
        print("\n" + reports.describe_search(found["search"]))
    if twin is not None:
        said = twin["error"] if "error" in twin else reports.describe_twin(found, twin)
        print(f"\n  {said}")
        if "error" not in twin:
            print("\n" + reports.describe_twist(found, twin))
        if args.hlo is not None:
            print("  (this program priced there; a compiler may choose other strategies for it)")
    if args.timeline is not None:
        print(f"wrote {args.timeline}")
    return 0


def _check_slice(args) -> None:
    """Refuses what does not say one slice, or a number of chips to search over."""
    if args.chips is not None and not args.search:
        raise UserError("--chips: it is for --search; give --slice")
    if (args.slice is None) == (args.chips is None):
        raise UserError("plan: give --slice, such as --slice 4x4x8, or --chips with --search")
    if args.search and args.hlo is not None:
        raise UserError("--search: a compiled program has one mesh; give a configuration")
    if args.search and args.slices > 1:
        raise UserError("--search: it is over one slice; leave --slices out")


def _options(args) -> dict:
    """The compiler's options. UserErrors where it, or a configuration, is not there."""
    if not args.configs:
        raise UserError(
            "plan: give it a configuration, such as configs/base.gin configs/models/gpt2.gin, or a "
            "compiled program with --hlo"
        )
    from pjit_train.compiler.compile import libtpu_version
    from pjit_train.compiler.records import options_of

    libtpu_version()
    options = options_of(args.xla)
    if args.xla.strip() and not options:
        raise UserError(
            f"--xla {args.xla!r}: want flags such as --xla_enable_async_all_gather=true"
        )
    return options


def _searched(args, slice, pod, how, reports):
    """(report, prediction) of the best way to run a step that a search finds."""
    from launch import plan_search

    slices = plan_search.slices_of(args.chips, pod) if slice is None else [slice]
    options = _options(args)
    mesh = None if args.mesh is None else mesh_sizes(args.mesh)
    ways = plan_search.trials(args.configs, args.gin, slices, how["machine"], mesh=mesh)
    predictions = {}

    def report(slice, compiled, planned):
        found, predictions[id(found)] = _reported_compiled(reports, slice, compiled, planned, how)
        return found

    best = plan_search.search(
        args.configs,
        ways,
        report,
        options=options,
        seconds=args.search_time,
        limit=args.time_limit,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    found = dict(best.report)
    found["search"] = {
        "best": {"slice": str(best.slice), "mesh": best.mesh, "remat": best.remat},
        "complete": all(way.status != "not reached" for way in ways),
        "tried": plan_search.table(ways),
    }
    return found, predictions[id(best.report)]


def _planned(args, slice, how, reports):
    """(report, prediction, report of the twin or None) of a configured run."""
    from pjit_train.compiler.target import target_of

    if args.configs:
        try:
            target_of(slice)
        except ValueError as error:
            raise UserError(str(error)) from error
    options = _options(args)
    from launch import plan, plan_search
    from pjit_train.compiler.compile import DoesNotFit

    planned = plan.planned_run(args.configs, args.gin + mesh_bindings(args.mesh), slice.num_chips)
    twin = None if args.no_twin or args.slices > 1 else plan.compiled_twin(slice)
    wanted = [slice] if twin is None else [slice, twin]
    compiled = plan.compile_for(
        planned, wanted, options=options, seconds=args.time_limit, progress=_progress()
    )
    if isinstance(compiled[0], DoesNotFit):
        nearest = plan_search.nearest_that_fits(
            args.configs,
            args.gin + mesh_bindings(args.mesh),
            slice,
            planned,
            options=options,
            seconds=args.search_time,
            limit=args.time_limit,
            say=lambda line: print(line, file=sys.stderr, flush=True) if _on_terminal() else None,
        )
        raise UserError(f"{compiled[0]}; {nearest}")
    if isinstance(compiled[0], UserError):
        raise compiled[0]
    found, prediction = _reported_compiled(reports, slice, compiled[0], planned, how)
    if twin is None:
        return found, prediction, None
    if isinstance(compiled[1], UserError):
        return found, prediction, {"slice": str(twin), "error": str(compiled[1])}
    beside, _ = _reported_compiled(reports, twin, compiled[1], planned, how)
    return found, prediction, beside


def _reported_compiled(reports, slice, compiled, planned, how):
    found, prediction = _reported(
        reports,
        slice,
        compiled.text,
        how | {"planned": planned, "peak_bytes": compiled.peak_bytes},
        "the compiled step",
        partitions=compiled.partitions,
    )
    found["compile_seconds"] = compiled.seconds
    found["cached"] = compiled.cached
    return found, prediction


def _reported(reports, slice, text: str, how, what: str, **more):
    try:
        return reports.report(slice, text, **how, **more)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error


def _text(path: Path) -> str:
    """The text of a program, which may be compressed by gzip."""
    import gzip

    data = path.read_bytes()
    try:
        return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no text of a program ({error})") from error


def _machine(pod, changes: list[str]):
    """The machine of a pod with the changes of --what-if, and the collectives that are free."""
    from topology.plan.machine import machine_of

    names = {"links": "link", "hbm": "hbm", "clock": "clock", "memory": "memory", "dcn": "dcn"}
    factors: dict[str, float] = {}
    free: list[str] = []
    for change in changes:
        name, _, value = change.partition("=")
        if name == "free" and value in COLLECTIVES:
            free.append(value)
        elif name in names:
            try:
                factors[names[name]] = real(1e-3, 1e3)(value)
            except argparse.ArgumentTypeError as error:
                raise UserError(f"--what-if {change}: {error}") from None
        else:
            raise UserError(
                f"--what-if {change}: use {', '.join(f'{n}=2' for n in names)}, or free= and one "
                f"of {', '.join(COLLECTIVES)}"
            )
    return machine_of(pod).what_if(**factors), tuple(free)


def _on_terminal() -> bool:
    return sys.stderr.isatty()


def _progress():
    """Says on a terminal, about once a second, how long the compiler has worked."""
    if not _on_terminal():
        return lambda gone: None
    last = [0.0]

    def show(gone: float) -> None:
        if time.monotonic() - last[0] > 0.9:
            last[0] = time.monotonic()
            print(f"\rcompiling, {gone:.0f} s ", end="", file=sys.stderr, flush=True)

    return show
