"""`torsion embeddings`: where the embedding tables of a recommendation model lie on a slice."""

import json

from launch.commands.common import add_command, add_pod, pod_of, real, whole


def add(commands) -> None:
    embeddings = add_command(
        commands,
        None,
        "embeddings",
        "lay the embedding tables of a recommendation model on a slice",
        "torsion embeddings plan --help tells the options.",
    )
    actions = embeddings.add_subparsers(title="actions", metavar="ACTION", required=True)
    plan = add_command(
        actions,
        run,
        "plan",
        "find the sharding of each table that makes a step shortest",
        "By rows, columns, whole tables, rows over a host, replicas, or hot rows replicated: the "
        "shardings of least step time that fit, beside a bound that no plan can be below, and "
        "TorchRec's greedy. See docs/embeddings_plan.md.",
    )
    plan.add_argument(
        "tables",
        metavar="TABLES.json",
        help="batch and tables with rows, width, hotness, ..., or dlrm_v2 (MLPerf's), or synthetic "
        "(1,000 tables)",
    )
    plan.add_argument(
        "--slice", required=True, metavar="SHAPE", help="such as 4x4x8 or 4x4x8_twisted"
    )
    add_pod(plan, "slice it is")
    plan.add_argument(
        "--batch", type=whole(1), metavar="N", help="samples of a step (as the tables' file says)"
    )
    plan.add_argument(
        "--skew",
        type=real(0, 4),
        metavar="S",
        help="exponent of Zipf's law by which rows are popular, in place of every table's",
    )
    plan.add_argument("--json", action="store_true", help="print one JSON document")


def run(args, began: float) -> int:
    from launch.reports.embeddings import describe, model_named, report

    model = model_named(args.tables, batch=args.batch, skew=args.skew)
    found = report(model, args.slice, pod_of(args.pod))
    print(json.dumps(found) if args.json else describe(found))
    return 0
