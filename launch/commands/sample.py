"""`torsion sample`: text from a trained run or a Hugging Face folder; and a chat with it."""

import sys

from launch.commands.common import add_command, add_model, opened_model, real, whole
from pjit_train.errors import UserError


def add(commands) -> None:
    sample = add_command(
        commands,
        run,
        "sample",
        "text from a trained run or a Hugging Face folder",
        "A single continuation is printed as it is made. With --chat each line that is typed is a "
        "message to the model, and so is each --prompt.",
    )
    add_model(sample)
    sample.add_argument(
        "--prompt", nargs="+", metavar="TEXT", help="texts to continue (default: '')"
    )
    sample.add_argument("--chat", action="store_true", help="converse, by the model's template")
    sample.add_argument("--system", metavar="TEXT", help="of a chat: what the model is told first")
    sample.add_argument(
        "--tokens", type=whole(1), default=200, metavar="N", help="the most of a text (200)"
    )
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
        "--top-p",
        type=real(0, 1),
        metavar="P",
        help="of the fewest likeliest tokens that have this probability together",
    )
    sample.add_argument(
        "--repetition-penalty",
        type=real(1e-3, 1e3),
        default=1.0,
        metavar="X",
        help="makes tokens that were there before less likely (1: not)",
    )
    sample.add_argument(
        "--stop", nargs="+", action="extend", default=[], metavar="TEXT", help="end before these"
    )
    sample.add_argument(
        "--cut", action="store_true", help="drop the beginning of prompts that are too long"
    )
    sample.add_argument(
        "--seed", type=whole(), default=0, metavar="N", help="other seed, other text"
    )


def run(args, began: float) -> int:
    if args.system is not None and not args.chat:
        raise UserError("--system is of --chat")
    model = opened_model(args)

    from pjit_train.models.sampler import Choice
    from pjit_train.sample import TextSampler

    choice = Choice(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
    )
    if args.chat:
        model.conventions.chat([{"role": "user", "content": ""}])  # refuses a model that has none
    sampler = TextSampler(model, tokens=args.tokens, choice=choice, stop=args.stop, cut=args.cut)
    if args.chat:
        return _chat(sampler, args)
    prompts = args.prompt or [""]
    if len(prompts) > 1:
        print("\n\n".join(sampler(prompts, seed=args.seed)))
        return 0
    pieces = sampler.stream(prompts[0], seed=args.seed)  # which may refuse the prompt
    _say(prompts[0])
    for piece in pieces:
        _say(piece)
    print()
    return 0


def _chat(sampler, args) -> int:
    """Answers each message, until there are no more."""
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    turns: list[dict[str, str]] = []
    for number, text in enumerate(_messages(args.prompt)):
        turns.append({"role": "user", "content": text})
        while len(turns) > 1 and not sampler.fits(system + turns):
            del turns[:2]  # the oldest message and its answer
        answer = ""
        for piece in sampler.answer(system + turns, seed=args.seed + number):
            _say(piece)
            answer += piece
        print()
        turns.append({"role": "assistant", "content": answer.strip()})
    return 0


def _messages(prompts: list[str] | None):
    """Yields the messages of the options, or else the lines of the input."""
    if prompts is not None:
        yield from prompts
        return
    asks = sys.stdin.isatty()
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            if asks:
                print(file=sys.stderr)
            return
        if line.strip():
            yield line.strip()


def _say(text: str) -> None:
    print(text, end="", flush=True)
