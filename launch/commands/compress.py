"""`torsion compress`: prunes and quantizes a trained run or a Hugging Face folder in one shot."""

import contextlib
import json
import sys
from pathlib import Path

from launch.commands.common import add_command, add_step, is_folder, real, trained_run, whole
from launch.commands.export import written
from pjit_train.errors import UserError


def add(commands) -> None:
    compress = add_command(
        commands,
        run,
        "compress",
        "prune and quantize a trained run or a Hugging Face folder in one shot",
        "Attention and feed-forward kernels are pruned where a pattern or a method is asked for, "
        "and quantized where a format is. A run is calibrated on its training text, and written as "
        "a new run directory: eval, sample and export read it, and train goes on from it with its "
        "zeros kept. A folder is calibrated on --calibration FILE, block by block in little "
        "memory, and written as a new folder with a certificate, which torsion verify checks; "
        "where it is interrupted, the same command goes on. "
        "A pattern is N:M, N weights kept of every M along the inputs, or the fraction to "
        "prune, such as 0.5. A format is a name such as int4, int8, fp8_e4m3, mxfp8_e4m3, "
        "mxfp4_e2m1, nvfp4, nf4 or hbfp6, with a block of its own after a colon: int4:128, "
        "int8:tensor; fp8_e4m3:128x128 by tiles; "
        "integers of 2 to 8 bits also with a zero point: int4:128:asym; or a scheme as "
        "llm-compressor names it, which may have a format of activations too: W4A16, W8A8, "
        "FP8_DYNAMIC.",
    )
    compress.add_argument(
        "run",
        metavar="RUN_OR_FOLDER",
        help="run directory, or Hugging Face folder, .gguf file or hf:OWNER/NAME",
    )
    compress.add_argument(
        "--method",
        metavar="NAME",
        help="of pruning: magnitude, wanda, sparsegpt (the default); or none to prune nothing",
    )
    compress.add_argument(
        "--pattern", metavar="N:M", help="or a fraction (default: 2:4 where --method is given)"
    )
    compress.add_argument(
        "--layers",
        nargs="+",
        action="extend",
        default=[],
        metavar="REGEX=PATTERN",
        help="patterns by name of kernel, such as feed_forward=1:4 attention/out=dense",
    )
    compress.add_argument(
        "--transposable", action="store_true", help="N:M along the outputs as well"
    )
    compress.add_argument("--format", metavar="NAME", help="of the weights (default: as they are)")
    compress.add_argument(
        "--format-layers",
        nargs="+",
        action="extend",
        default=[],
        metavar="REGEX=NAME",
        help="other formats, by name of kernel, such as attention/out=int8 head=dense",
    )
    compress.add_argument(
        "--quantizer", metavar="NAME", help="rtn (to nearest) or gptq (the default)"
    )
    compress.add_argument(
        "--activations", metavar="NAME", help="format of the inputs of the quantized kernels"
    )
    compress.add_argument(
        "--smooth",
        type=real(0, 1),
        metavar="A",
        help="SmoothQuant first, with this strength (0 to 1)",
    )
    compress.add_argument(
        "--order",
        metavar="ORDER",
        help="sparsify_then_quantize (the default) or quantize_then_sparsify",
    )
    compress.add_argument(
        "--finetune",
        type=whole(),
        default=0,
        metavar="STEPS",
        help="train what is pruned for some steps before it is quantized",
    )
    compress.add_argument(
        "--reconstruct",
        type=whole(),
        default=0,
        metavar="EPOCHS",
        help="of a folder: fit what is kept of each pruned block to the dense block's outputs, in "
        "so many passes over the calibration text",
    )
    compress.add_argument(
        "--sequences", type=whole(1), default=128, metavar="N", help="of calibration text (128)"
    )
    compress.add_argument(
        "--calibration", metavar="FILE", help="of a folder: the text that it is calibrated on"
    )
    compress.add_argument(
        "--sequence",
        type=whole(2),
        metavar="N",
        help="of a folder: tokens of a sequence (default: the longest, at most 2048)",
    )
    compress.add_argument(
        "--calibration-in",
        choices=("disk", "memory"),
        help="of a folder: where the text is between two blocks (disk)",
    )
    add_step(compress)
    compress.add_argument(
        "--out", metavar="DIR", help="directory to write (default: RUN-compressed-NAME)"
    )
    compress.add_argument(
        "--export", metavar="FOLDER", help="write a Hugging Face folder too, as export does"
    )
    compress.add_argument("--json", action="store_true", help="print one JSON object")
    compress.set_defaults(mesh=None, devices=None)


def run(args, began: float) -> int:
    pattern, patterns, formats = _asked(args)
    prunes, quantizes = bool(pattern or patterns), bool(args.format or formats)
    directory = Path(args.run)
    named = directory if directory.name else directory.resolve()
    method, quantizer = args.method or "sparsegpt", args.quantizer or "gptq"
    formatted = args.format or "formats"
    done = [method] * prunes + [formatted.replace(":", "_")] * quantizes
    out = Path(args.out or f"{named}-compressed-{'-'.join(done)}")
    if out.exists():
        raise UserError(f"{out} exists; remove it, or use another --out")
    if is_folder(directory):
        from launch.commands.compress_folder import compress_folder

        asked = lambda model: _compression(args, model, pattern, patterns, formats)
        return compress_folder(args, out, asked)
    for option in ("calibration", "sequence", "calibration_in"):
        if getattr(args, option) is not None:
            shown = option.replace("_", "-")
            raise UserError(f"--{shown} is of a Hugging Face folder; a run has text of its own")
    if args.reconstruct:
        raise UserError("--reconstruct is of a Hugging Face folder; a run has --finetune STEPS")
    run = trained_run(args)

    import dataclasses

    from launch.configure import build_run
    from launch.directory import configuration
    from pjit_train.compression.compress import compress
    from pjit_train.compression.kernels import quantized_kernels
    from pjit_train.huggingface import compressed_tensors

    compression = _compression(args, run.blocks, pattern, patterns, formats)
    formats, activations = compression.formats, compression.activations
    if args.export:
        rows = quantized_kernels(directory)
        kept = {name: (row["format"], row["activations"]) for name, row in rows.items()}
        given = {name: (format, activations) for name, format in formats.items()}
        compressed_tensors.check(args.export, run.blocks, kept | given)
    before, _ = configuration(directory)
    bindings = _bindings(run, before, compression)
    new_run, config_text = build_run([], bindings, text=before)
    new_run = dataclasses.replace(new_run, mesh=run.mesh, data=run.data)
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        report = compress(
            run,
            directory,
            new_run,
            out,
            config_text=config_text,
            compression=compression,
            step=args.step,
        )
        if args.export:
            exported = compressed_tensors.export(args.export, new_run, out)
            report["export"] = {"folder": args.export, **exported}
    if args.json:
        print(json.dumps({"out": str(out), **report}))
    else:
        done = [f"pruned by {method}"] * prunes
        done += [f"quantized to {formatted} by {quantizer}"] * quantizes
        _print(report, out, directory, done)
    return 0


def _compression(args, model, pattern, patterns, formats):
    """The `Compression` of a model that the options ask for; see `_asked`.

    Raises:
      UserError: a pattern or a format does not fit a kernel, or options contradict each other.
    """
    from pjit_train.compression.kernels import kernel_formats, kernel_patterns
    from pjit_train.compression.recipe import Compression
    from sparsity.masks.layers import KERNELS

    prunes, quantizes, activations = bool(pattern or patterns), bool(args.format or formats), None
    if prunes:
        if pattern:
            patterns.setdefault(KERNELS, pattern)
        patterns = kernel_patterns(model, patterns, transposable=args.transposable)
    if quantizes:
        if args.format:
            formats.setdefault(KERNELS, args.format)
        formats, activations = _without_schemes(formats, args.activations)
        formats = kernel_formats(model, formats)
    return Compression(
        patterns=patterns,
        method=(args.method or "sparsegpt") if prunes else "magnitude",
        transposable=args.transposable,
        formats=formats,
        quantizer=args.quantizer or "gptq",
        order=args.order or "sparsify_then_quantize",
        smooth=args.smooth,
        finetune=args.finetune,
        reconstruct=args.reconstruct,
        activations=activations,
        sequences=args.sequences,
    )


def _asked(args) -> tuple[str | None, dict[str, str], dict[str, str]]:
    """The pattern of all kernels, or None; and patterns and formats by regular expression.

    Nothing is pruned where no pattern, method or layers are asked for.

    Raises:
      UserError: an option contradicts another, or is of something that is not asked for.
    """
    if args.method not in (None, *(methods := ("magnitude", "wanda", "sparsegpt", "none"))):
        raise UserError(f"--method {args.method} is unknown; use {', '.join(methods)}")
    patterns = _by_regex("--layers", args.layers, "PATTERN, such as feed_forward=1:4")
    formats = _by_regex("--format-layers", args.format_layers, "NAME, such as feed_forward=int4")
    if args.method == "none":
        for option, given in (("--layers", args.layers), ("--pattern", args.pattern)):
            if given:
                raise UserError(f"{option}: --method none prunes nothing; leave one of them out")
        pattern = None
    else:
        pattern = args.pattern or ("2:4" if args.method else None)
    prunes, quantizes = bool(pattern or patterns), bool(args.format or formats)
    for option, given, needed, wanted, instead in (
        ("--activations", args.activations, quantizes, "--format", "give the weights one as well"),
        ("--quantizer", args.quantizer, quantizes, "--format", "give the weights one"),
        ("--transposable", args.transposable, prunes, "--pattern", "it is for N:M"),
        ("--finetune", args.finetune > 0, prunes, "--pattern", "it trains what pruning leaves"),
        ("--reconstruct", args.reconstruct > 0, prunes, "--pattern", "it fits what pruning leaves"),
    ):
        if given and not needed:
            raise UserError(f"{option} without {wanted}; {instead}")
    if args.order == "quantize_then_sparsify" and not (prunes and quantizes):
        raise UserError(f"--order {args.order} is of both; give a --pattern and a --format")
    return pattern, patterns, formats


def _without_schemes(
    formats: dict[str, str], activations: str | None
) -> tuple[dict[str, str], str | None]:
    """Formats of weights in place of schemes, and the format of activations that they have.

    Raises a UserError where they have different ones, or another than is asked for.
    """
    from sparsity.numbers.formats import find_scheme

    found = {} if activations is None else {f"--activations {activations}": activations}
    weights = {}
    for expression, text in formats.items():
        try:
            scheme = find_scheme(text)
        except ValueError as error:
            raise UserError(str(error)) from error
        weights[expression] = text if scheme is None else scheme[0]
        if scheme is not None:
            found[text] = scheme[1]
    if len({*found.values()}) > 1:
        said = ", ".join(f"{text} has {of or 'none'}" for text, of in found.items())
        raise UserError(
            f"all kernels share one format of activations: {said}; use one, or formats of weights "
            "and --activations"
        )
    return weights, next(iter(found.values()), None)


def _by_regex(option: str, entries: list[str], wanted: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in entries:
        expression, equals, value = entry.rpartition("=")
        if not equals:
            raise UserError(f"{option} {entry}: want REGEX={wanted}")
        if found.setdefault(expression, value) != value:
            raise UserError(f"{option} {entry}: {expression} was given {found[expression]} before")
    return found


def _bindings(run, config: str, compression) -> list[str]:
    """Lists the bindings of the compressed run that the run itself does not have."""
    from pjit_train.compression.kernels import kept_zeros
    from sparsity.post_training.one_shot import KeepZeros

    bindings = []
    if compression.patterns:
        patterns = kept_zeros(run) | compression.patterns
        kept = {f"^{name}$": pattern for name, pattern in patterns.items()}
    elif run.sparsity is not None and not isinstance(run.sparsity, KeepZeros):
        kept = {f"^{name}$": "0.0" for name in compression.formats}  # the zeros that there are
    else:
        kept = None
    if kept is not None:
        bindings.append(
            "from sparsity.post_training import one_shot\n"
            "run.Run.sparsity = @one_shot.KeepZeros()\n"
            f"one_shot.KeepZeros.layers = {kept}"
        )
    if compression.formats:
        # The checkpoint holds the values of the formats, which other dtypes may not hold.
        bindings.append("transformer.TransformerConfig.param_dtype = 'float32'")
    if compression.formats and (compression.activations or run.quantization is not None):
        bindings.append(_quantization_binding(run, config, compression))
    return bindings


def _quantization_binding(run, config: str, compression) -> str:
    """Gin's lines for what the compressed run quantizes as it goes: inputs of the named kernels.

    Their weights have the values of their formats already. What the run quantizes of other matmuls
    it goes on with.
    """
    from launch.bindings import Configurable, Key, Reference, format_value, parse_bindings
    from sparsity.numbers.quantized import Quantization

    scope, before, selector = "inputs", {}, "quantized.Quantization"
    if run.quantization is not None:
        bound = parse_bindings(config).values
        reference = bound[Key(Configurable("pjit_train.run", "Run"), "", "quantization")]
        if not isinstance(reference, Reference) or reference.configurable.name != "Quantization":
            raise UserError(
                f"config.gin: run.Run.quantization = {format_value(reference)}: its layers cannot "
                "be given other formats; bind it to @quantized.Quantization() and train the run so"
            )
        # A default that is no literal is not written.
        layers = Key(reference.configurable, reference.scope, "layers")
        before = bound.get(layers, Quantization().layers)
        selector = f"{reference.scope}/{selector}" if reference.scope else selector
        taken = {key.scope for key in bound}
        while scope in taken:  # by what this command wrote before
            scope += "_"
    inputs = f"@{scope}/quantized.MatmulFormats()" if compression.activations else "None"
    layers = [f"'^{name}$': {inputs}" for name in compression.formats]
    layers += [
        f"{pattern!r}: {format_value(formats)}"
        for pattern, formats in before.items()
        if pattern.strip("^$") not in compression.formats
    ]
    lines = [
        "from sparsity.numbers import quantized",
        f"run.Run.quantization = @{selector}()",
        f"{selector}.layers = {{{', '.join(layers)}}}",
    ]
    if compression.activations:
        lines.append(_activation_binding(compression.activations, scope))
    return "\n".join(lines)


def _activation_binding(text: str, scope: str) -> str:
    """Writes the gin lines for the format of activations.

    All else is bound too: a scope has what is bound outside of it.
    """
    import dataclasses

    from pjit_train.compression.kernels import parse_format
    from sparsity.numbers.formats import format_text
    from sparsity.numbers.quantized import MatmulFormats

    try:
        format = format_text(parse_format(text))
    except ValueError as error:
        raise UserError(f"--activations {text}: {error}") from error
    fields = {field.name: field.default for field in dataclasses.fields(MatmulFormats)}
    return "\n".join(
        f"{scope}/quantized.MatmulFormats.{name} = {value!r}"
        for name, value in {**fields, "activations": format}.items()
    )


def _print(report, out: Path, directory: Path, done: list[str]) -> None:
    print(f"{out}: step {report['step']} of {directory}, {' and '.join(done)}\n")
    kinds = ("sparsity", "quantization", "together")
    print(f"{'kernel':<32} pattern  zeros    violations  format       error of ", end="")
    print("  ".join(kinds))
    for name, row in report["kernels"].items():
        shown = {key: "-" if row[key] is None else row[key] for key in row}
        errors = [
            f"{row['errors'][kind]:.4f}".ljust(len(kind)) if kind in row["errors"] else "-"
            for kind in kinds
        ]
        line = (
            f"{name:<32} {shown['pattern']:<8} {row['sparsity']:<8.2%} {shown['violations']:<11} "
        )
        print((line + f"{shown['format']:<21} " + "  ".join(errors)).rstrip())
    stages = {"before": report["before"], **report["between"], "after": report["after"]}
    print("\n" + " " * 21 + " ".join(f"{stage:<9}" for stage in stages).rstrip())
    for name in report["before"]:
        row = " ".join(f"{figures[name]:<9.5g}" for figures in stages.values())
        print(f"{name:<20} {row}".rstrip())
    size = report["bytes"]
    print(f"\nparameters: {size['before']:,} bytes", end="")
    print(f", {size['zeros']:,} in these formats" if size["zeros"] != size["before"] else "")
    if "export" in report:
        print(f"{report['export']['folder']}: {written(report['export'])}")
