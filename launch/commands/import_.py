"""`torsion import`: a pretrained model as a Hugging Face folder."""

from pathlib import Path

from launch.commands.common import add_command, shown_progress


def add(commands) -> None:
    import_ = add_command(
        commands,
        run,
        "import",
        "write a pretrained model as a Hugging Face folder (safetensors)",
        "A GGUF file is decoded, tensor by tensor, and its tokenizer and chat template are written "
        "as tokenizer.json and chat_template.jinja. Of a repository of the Hugging Face Hub the "
        "configuration, tokenizer and safetensors files are fetched; where that is broken off, the "
        "same command goes on. HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE hold.",
    )
    import_.add_argument(
        "source", metavar="SOURCE", help="a .gguf file, or hf:OWNER/NAME[@REVISION][:FILE.gguf]"
    )
    import_.add_argument("folder", metavar="OUT", help="folder to write; new, or empty")
    import_.add_argument(
        "--dtype",
        metavar="NAME",
        help="of the weights of a GGUF file: float32, bfloat16 or float16 (default: that in which "
        "each is exact)",
    )


def run(args, began: float) -> int:
    from pjit_train.huggingface.sources import import_source

    with shown_progress("importing") as progress:
        done = import_source(args.source, args.folder, dtype=args.dtype, progress=progress)
    if done is None:
        size = sum(path.stat().st_size for path in Path(args.folder).glob("*.safetensors"))
        print(f"{args.folder}: {args.source}, {size:,} bytes of safetensors")
        return 0
    types = ", ".join(f"{count} {kind}" for kind, count in done.types.most_common())
    text = f"{args.folder}: {done.tensors} tensors ({types}), {done.bytes:,} bytes"
    if done.rounding is None:
        text += ", every value exact"
    else:
        text += f" in {args.dtype}: {done.rounding.rounded:,} of {done.rounding.values:,} values "
        text += f"rounded, by at most {done.rounding.largest:.2g}"
    text += "; no tokenizer" if done.tokens is None else f"; {done.tokens:,} tokens"
    print(text)
    return 0
