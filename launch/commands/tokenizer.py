"""`torsion tokenizer`: trains a tokenizer."""

from pathlib import Path

from launch.commands.common import add_command, whole
from pjit_train.errors import UserError


def add(commands) -> None:
    tokenizer = add_command(
        commands, run, "tokenizer", "train a byte-level BPE tokenizer on .txt and .jsonl files"
    )
    tokenizer.add_argument("files", nargs="+", metavar="FILE", help="paths, or globs in quotes")
    tokenizer.add_argument("--vocab-size", type=whole(1), required=True, metavar="N", help="tokens")
    tokenizer.add_argument(
        "--out", default="tokenizer.json", metavar="PATH", help="where to write (tokenizer.json)"
    )


def run(args, began: float) -> int:
    from pjit_train.data import TextFiles, train_tokenizer

    if Path(args.out).exists():
        raise UserError(f"{args.out} exists; remove it, or use another --out")
    # With validation files of its own, even none, a source has all of its text in "train".
    texts = TextFiles(train=args.files, validation=()).documents("train")
    trained = train_tokenizer(texts, vocab_size=args.vocab_size, path=args.out)
    print(
        f"{args.out}: {trained.vocab_size} tokens; to train with it: "
        "--gin 'text.TextData.tokenizer = @tokenizers.TokenizerJson()' "
        f"--gin 'tokenizers.TokenizerJson.path = \"{args.out}\"'"
    )
    return 0
