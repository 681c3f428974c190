"""`torsion check`: a Hugging Face folder computed by Torsion and by `transformers`."""

import dataclasses
import json

from launch.commands.common import add_command, real, whole


def add(commands) -> None:
    check = add_command(
        commands,
        run,
        "check",
        "compare the logits of a Hugging Face folder with those of transformers",
        "Both compute them in float32 on the same random tokens. The exit code is 1 where they "
        "differ by more than is allowed. Without transformers and torch the folder is only loaded "
        "and computed by Torsion.",
    )
    check.add_argument("folder", metavar="FOLDER", help="config.json and safetensors files")
    check.add_argument(
        "--tokens", type=whole(1), default=64, metavar="N", help="length of the sequence (64)"
    )
    check.add_argument("--seed", type=whole(), default=0, metavar="N", help="of the tokens (0)")
    check.add_argument(
        "--tolerance",
        type=real(0, 1e30),
        default=1e-4,
        metavar="X",
        help="largest difference, as a part of the largest logit, or of 1 (1e-4)",
    )
    check.add_argument("--json", action="store_true", help="one JSON document")


def run(args, began: float) -> int:
    from pjit_train.huggingface.check import NEEDED, compare

    found = compare(args.folder, tokens=args.tokens, seed=args.seed)
    good = found.within(args.tolerance)
    if args.json:
        said = {"tolerance": args.tolerance, "within": None if found.version is None else good}
        print(json.dumps({"folder": args.folder, **dataclasses.asdict(found), **said}))
        return 0 if good else 1
    what = "images" if found.tokens is None else "random tokens"
    print(f"{args.folder}: {found.architecture}, {found.parameters:,} parameters")
    print(f"logits of {found.positions} {what}: the largest is {found.largest:.4g}")
    if found.unseen is not None:
        longer = f"--tokens {found.unseen + 64} reaches it"
        print(f"the window of {found.unseen} tokens is not reached; {longer}")
    if found.version is None:
        print(
            f"not compared: {' and '.join(NEEDED)} are not installed here; "
            f"pip install {' '.join(NEEDED)}"
        )
        return 0
    print(
        f"transformers {found.version}: the largest difference is {found.difference:.2g}, "
        f"{'within' if good else 'MORE than'} {args.tolerance:g} of the largest logit; the "
        f"largest logit is the same at {found.agreeing} of {found.positions}"
    )
    return 0 if good else 1
