"""`torsion study WHAT`: the studies that show what works, each resumable, each with its table."""

from pathlib import Path

from launch.commands.common import add_command, add_pod, pod_of, whole
from pjit_train.errors import UserError


def add(commands) -> None:
    study = add_command(
        commands,
        None,
        "study",
        "train and compare: the studies of the documentation",
        "torsion study WHAT --help tells the options of a study.",
    )
    studies = study.add_subparsers(title="studies", metavar="WHAT", required=True)
    _add_recipes(studies)
    _add_interplay(studies)
    _add_pod(studies)
    _add_flat(studies)
    _add_plan(studies)
    _add_embeddings(studies)


def _add_recipes(studies) -> None:
    _add_training_study(
        studies,
        _run_recipes,
        "recipes",
        "train and compare the published N:M recipes",
        "Each run of the study is a run directory in --out, named by recipe, pattern and seed. Run "
        "again with the same --out, it goes on where it was; several such commands at once share "
        "the runs. At the end, table.md, results.json and recipes.png are in --out.",
    )


def _run_recipes(args, began: float) -> int:
    from launch import process

    process.prepare()

    from launch import study

    return study.study_recipes(**_training_options(args, study.SIZES))


def _add_interplay(studies) -> None:
    _add_training_study(
        studies,
        _run_interplay,
        "interplay",
        "sparsify and quantize one model, in both orders, and compare",
        "Each run of the study is a run directory in --out, named by kind, pattern, format, "
        "order and seed. Run again with the same --out, it goes on where it was. At the end, "
        "table.md, results.json and interplay.png are in --out.",
    )


def _run_interplay(args, began: float) -> int:
    from launch import process

    process.prepare()

    from launch import interplay_study

    return interplay_study.study_interplay(**_training_options(args, interplay_study.SIZES))


def _add_training_study(studies, run, name: str, summary: str, details: str) -> None:
    study = add_command(studies, run, name, summary, details)
    study.set_defaults(trains=True)
    study.add_argument(
        "--size",
        default="small",
        metavar="SIZE",
        help="small (default), overnight, or a gin file like those in configs/studies",
    )
    study.add_argument(
        "--seeds", type=whole(1), metavar="N", help="runs of each kind (as configured)"
    )
    study.add_argument(
        "--table", action="store_true", help="train nothing: table and figure of what is there"
    )
    study.add_argument(
        "--out", metavar="DIR", help="of the runs (default: runs/study- and the gin file's name)"
    )


def _training_options(args, sizes: dict[str, str]) -> dict:
    file = sizes.get(args.size, args.size)
    if not file.endswith(".gin"):
        raise UserError(
            f"--size {file}: use {', '.join(sizes)}, or a gin file like {sizes['small']}"
        )
    out = Path(args.out or Path("runs") / f"study-{Path(file).stem}")
    return {"file": file, "out": out, "seeds": args.seeds, "only_table": args.table}


def _add_pod(studies) -> None:
    pod = add_command(
        studies,
        _run_pod,
        "pod",
        "put the published figures of the TPU v4 pod beside computed ones",
        "The gain of twisted slices, goodput, bisection, switches and their failures; then every "
        "twist that the wiring can make, Monte Carlo against closed forms, a year of a pod's "
        "events, and checkpoint intervals. A few minutes on two cores, and 2.4 GB of memory. "
        "table.md, results.json and "
        "figures are in --out.",
    )
    add_pod(pod, "published figures they are")
    pod.add_argument("--json", action="store_true", help="print one JSON document")
    pod.add_argument("--out", metavar="DIR", default="runs/study-pod", help="(runs/study-pod)")


def _run_pod(args, began: float) -> int:
    from launch.reports.pod_study import check_pod, study_pod

    check_pod(pod_of(args.pod))
    return study_pod(Path(args.out), as_json=args.json)


def _add_plan(studies) -> None:
    plan = add_command(
        studies,
        _run_plan,
        "plan",
        "put the step times that torsion plan predicts beside published ones",
        "Every record of a file is compiled by libtpu (a minute or two for each program, then "
        "kept; records of one program share it), priced and replayed. With --out, table.md, "
        "results.json and plan.png are there.",
    )
    plan.add_argument("--runs", required=True, metavar="FILE", help="a JSON list of records")
    plan.add_argument("--json", action="store_true", help="print one JSON document")
    plan.add_argument("--out", metavar="DIR", help="for the table and the picture (none)")
    plan.add_argument(
        "--time-limit", type=whole(1, 86400), default=1500, metavar="S", help="of a compilation"
    )
    plan.add_argument(
        "--workers", type=whole(1, 64), default=2, metavar="N", help="compilations at once (2)"
    )


def _run_plan(args, began: float) -> int:
    from launch.reports.plan_study import study_plan

    return study_plan(
        Path(args.runs),
        None if args.out is None else Path(args.out),
        seconds=args.time_limit,
        workers=args.workers,
        as_json=args.json,
    )


def _add_flat(studies) -> None:
    flat = add_command(
        studies,
        _run_flat,
        "flat",
        "put the published figures of the FLAT dataflow beside computed ones",
        "Speed and energy of fused attention over the best unfused one, with the softmax charged "
        "and not, the buffers that either needs, and what changes them. A minute or two. table.md, "
        "results.json and figures are in --out.",
    )
    flat.add_argument("--json", action="store_true", help="print one JSON document")
    flat.add_argument("--out", metavar="DIR", default="runs/study-flat", help="(runs/study-flat)")


def _run_flat(args, began: float) -> int:
    from launch.reports.flat_study import study_flat

    return study_flat(Path(args.out), as_json=args.json)


def _add_embeddings(studies) -> None:
    embeddings = add_command(
        studies,
        _run_embeddings,
        "embeddings",
        "put published figures of SparseCores beside computed ones, and weigh twists and pooling",
        "Speed of a recommendation model on TPU v3, v4, v4 without SparseCores and processors, by "
        "each reading of what sources leave open; then which models gain from twisted slices, and "
        "where vectors should be pooled. A minute or two. table.md, results.json and a figure are "
        "in --out.",
    )
    embeddings.add_argument("--json", action="store_true", help="print one JSON document")
    embeddings.add_argument(
        "--out", metavar="DIR", default="runs/study-embeddings", help="(runs/study-embeddings)"
    )


def _run_embeddings(args, began: float) -> int:
    from launch.reports.embeddings_study import study_embeddings

    return study_embeddings(Path(args.out), as_json=args.json)
