"""`torsion dataflow`: what attention costs on an accelerator, unfused and fused."""

import json

from launch.commands.common import add_command, whole


def add(commands) -> None:
    dataflow = add_command(
        commands,
        run,
        "dataflow",
        "say what attention costs on an accelerator, unfused and fused",
        "Time, utilisation, memory traffic, live buffer and energy of a layer's attention and of "
        "the layer by four dataflows: naive, the best unfused one (flex), fused over tiles of "
        "whole rows (flat), and over tiles of rows and columns (flash), with a lower bound, and "
        "utilisation against the size of the buffer. See docs/flat.md, which also says what the "
        "files hold.",
    )
    dataflow.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="BERT (default), TrXL, FlauBERT, T5 or XLM",
    )
    dataflow.add_argument(
        "--workload", metavar="FILE", help="an attention of a JSON file, in place of MODEL"
    )
    dataflow.add_argument("--sequence", type=whole(1), metavar="N", help="of MODEL (4096)")
    dataflow.add_argument("--batch", type=whole(1), metavar="N", help="sequences of MODEL (64)")
    dataflow.add_argument(
        "--causal", action="store_true", help="of MODEL: a query sees no later keys"
    )
    dataflow.add_argument(
        "--backward", action="store_true", help="of MODEL: the backward pass of the attention"
    )
    dataflow.add_argument(
        "--platform",
        metavar="NAME",
        help="cloud (default), edge, independent-cloud, independent-edge or tpu-v4, one of its "
        "cores",
    )
    dataflow.add_argument(
        "--accelerator", metavar="FILE", help="an accelerator of a JSON file, in place of NAME"
    )
    dataflow.add_argument(
        "--buffer", metavar="SIZE", help="on chip, such as 512KiB (default: the accelerator's)"
    )
    dataflow.add_argument(
        "--softmax",
        default="free",
        choices=("free", "overlapped", "in-turn"),
        help="whether the softmax costs time and traffic, and overlaps with the matmuls (free)",
    )
    dataflow.add_argument("--json", action="store_true", help="print one JSON document")
    dataflow.add_argument(
        "--draw", metavar="PATH", help="draw utilisation against buffer: .png, .svg or .pdf"
    )
    dataflow.add_argument(
        "--draw-rows",
        metavar="PATH",
        help="draw where tiles of whole rows are faster than tiles of fewer columns, by buffer and "
        "sequence",
    )


def run(args, began: float) -> int:
    from launch.reports.dataflow import asked, describe, draw, draw_rows, report
    from launch.reports.pictures import check_picture

    path = None if args.draw is None else check_picture(args.draw)
    rows_path = None if args.draw_rows is None else check_picture(args.draw_rows, "--draw-rows")
    wanted = asked(
        args.model,
        workload=args.workload,
        sequence=args.sequence,
        batch=args.batch,
        causal=args.causal,
        backward=args.backward,
        platform=args.platform,
        accelerator=args.accelerator,
        buffer=args.buffer,
        softmax=args.softmax,
    )
    found = report(wanted, steps=1 if path is None else 4)
    if path is not None:
        draw(found, path)
    if path is not None and not args.json:  # the table with a row for each factor of four
        found["buffers"] = found["buffers"][::4]
        for of_scope in found["curves"].values():
            for name in of_scope:
                of_scope[name] = of_scope[name][::4]
    print(json.dumps(found) if args.json else describe(found), flush=True)
    if rows_path is not None:
        draw_rows(wanted, rows_path)
    for written in (path, rows_path):
        if written is not None and not args.json:
            print(f"wrote {written}")
    return 0
