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
        "the layer by three dataflows: naive, the best unfused one (flex), and fused over tiles of "
        "rows (flat), with a lower bound, and utilisation against the size of the buffer. See "
        "docs/flat.md.",
    )
    dataflow.add_argument(
        "model",
        nargs="?",
        default="BERT",
        metavar="MODEL",
        help="BERT (default), TrXL, FlauBERT, T5 or XLM",
    )
    dataflow.add_argument("--sequence", type=whole(1), default=4096, metavar="N", help="(4096)")
    dataflow.add_argument("--batch", type=whole(1), default=64, metavar="N", help="sequences (64)")
    dataflow.add_argument(
        "--platform",
        default="cloud",
        metavar="NAME",
        help="cloud (default), edge, independent-cloud, independent-edge or tpu-v4, one of its "
        "cores",
    )
    dataflow.add_argument(
        "--buffer", metavar="SIZE", help="on chip, such as 512KiB (default: the platform's)"
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


def run(args, began: float) -> int:
    from launch.reports.dataflow import describe, draw, report
    from launch.reports.pictures import check_picture

    path = None if args.draw is None else check_picture(args.draw)
    found = report(
        args.model,
        sequence=args.sequence,
        platform=args.platform,
        buffer=args.buffer,
        batch=args.batch,
        softmax=args.softmax,
        steps=1 if path is None else 4,
    )
    if path is not None:
        draw(found, path)
    if path is not None and not args.json:  # the table with a row for each factor of four
        found["buffers"] = found["buffers"][::4]
        for of_scope in found["curves"].values():
            for name in of_scope:
                of_scope[name] = of_scope[name][::4]
    print(json.dumps(found) if args.json else describe(found))
    if path is not None and not args.json:
        print(f"wrote {path}")
    return 0
