"""`torsion sample`: text from a trained run."""

from pathlib import Path

from launch.commands.common import (
    add_command,
    add_machine,
    add_step,
    real,
    trained_run,
    whole,
)


def add(commands) -> None:
    sample = add_command(commands, run, "sample", "text from a trained run")
    sample.add_argument("run", metavar="RUN", help="run directory")
    sample.add_argument(
        "--prompt", nargs="+", default=[""], metavar="TEXT", help="texts to continue (default: '')"
    )
    sample.add_argument("--tokens", type=whole(1), default=200, metavar="N", help="how many (200)")
    sample.add_argument(
        "--temperature",
        type=real(0, 1e30),
        default=0.8,
        metavar="T",
        help="0 takes the likeliest (0.8)",
    )
    sample.add_argument(
        "--top-k", type=whole(1), metavar="K", help="of the K likeliest tokens only"
    )
    sample.add_argument(
        "--seed", type=whole(), default=0, metavar="N", help="other seed, other text"
    )
    add_step(sample)
    add_machine(sample, "one device")


def run(args, began: float) -> int:
    run = trained_run(args)

    from pjit_train.sample import sample

    texts = sample(
        run,
        Path(args.run),
        prompts=args.prompt,
        tokens=args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        seed=args.seed,
        step=args.step,
    )
    print("\n\n".join(texts))
    return 0
