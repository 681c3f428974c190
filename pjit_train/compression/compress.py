"""Compression of a trained run into a run directory of pruned and quantized parameters."""

import dataclasses
import functools
import json
import logging
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from pjit_train import record, signals
from pjit_train.checkpoint import Checkpoints
from pjit_train.compression.calibrate import (
    calibration_batches,
    change_kernels,
    input_maxima,
    text_of,
)
from pjit_train.compression.kernels import (
    REPORT,
    SCALES,
    as_matrices,
    kept_zeros,
    kernel_bytes,
    leaf,
    load_scales,
    parse_format,
    quantized_kernels,
    relative_error,
    smooth,
    squares,
    stored_scales,
    violations,
)
from pjit_train.compression.recipe import Compression
from pjit_train.errors import UserError
from pjit_train.evaluate import prepare, restore_weights, validate
from pjit_train.loop import train
from pjit_train.models.roles import Roles, param_roles
from pjit_train.program import Program
from pjit_train.run import Run, Samples
from pjit_train.sharding import make_mesh
from pjit_train.signals import unfinished
from pjit_train.step import new_state
from pjit_train.tasks.language_modelling import LanguageModelling
from sparsity.numbers.quantized_kernels import QuantizedKernel, unquantized
from sparsity.post_training.gptq import Scales
from sparsity.recipes.kernels import dense_tree

log = logging.getLogger("torsion")


def compress(
    run: Run,
    directory: Path,
    new_run: Run,
    out: Path,
    *,
    config_text: str,
    compression: Compression,
    step: int | None = None,
) -> dict[str, Any]:
    """Compresses the parameters of a run's checkpoint and writes a run directory of them.

    Of a run that was trained in number formats they are those that its optimizer holds, so that
    nothing is rounded twice; the metrics before are those of the run as it evaluates.

    It holds the parameters as a checkpoint of step 0, with the optimizer's state of a first step:
    training that resumes there repeats the run's schedule on what is left (as ASP does; Mishra et
    al., 2021). Quantized kernels hold the values of their format, and `SCALES` the scales, by which
    `compressed_tensors` finds the codes again. Kernels that an earlier compression of the run
    quantized, and this one does not, keep their formats and scales. The directory appears when all
    of it is written and read back, or not at all.

    Args:
      run: of `directory`, on a mesh of one device.
      new_run: the run of the new directory, on the same mesh; its recipe keeps the zeros, and with
        formats its parameters are float32.
      out: the new directory.
      config_text: the configuration of `new_run`.
      step: of the checkpoint; None for the newest good one.

    Returns:
      What `REPORT` in the new directory holds: what was asked for; under "kernels" for every kind
      of kernel its pattern, the fraction of zeros, the groups with more than N nonzeros (None where
      the pattern is a fraction), its format, its bytes, and under "errors" |X W - X W'| / |X W|
      over the calibration text and all layers, of "sparsity" alone, of "quantization" alone and
      "together", X the inputs that the kernel has when it is changed and W the kernel before
      anything but smoothing; after fine-tuning "together" is what quantizing adds to the trained
      kernel. Of a kernel that only an earlier compression changed they are the errors of that one.
      Under "before", "between" and "after" are the metrics of `validate`, those between by the name
      of what was just done, with inputs of the kernels in `formats` not quantized yet. "bytes"
      counts all parameters: see `kernel_bytes`; zeros stand in every file like other numbers, so
      none has the size of "packed". Zeros, violations and metrics after are those of the written
      checkpoint.

    Raises:
      UserError: there is no such checkpoint or too little text, weights are not finite or would
        leave a format that they were compressed to, training was stopped, or `out` exists or cannot
        be written.
    """
    if not isinstance(run.task, LanguageModelling):
        raise UserError(
            f"{directory} is a run of {run.task.title}; what is compressed is calibrated on text: "
            "give a run of language modelling"
        )
    if out.exists():
        raise UserError(f"{out} exists; remove it, or use another --out")
    mesh = make_mesh(run.mesh)
    program, new = Program(run, mesh), Program(new_run, mesh)
    batches = prepare(run, directory)
    text = calibration_batches(text_of(batches), compression.sequences)
    step, weights = restore_weights(program, directory, step)
    roles = param_roles(run.model)
    earlier = _earlier(directory, step, compression, roles)
    params = _as_in(new, _trained(program, weights))
    for name in {**compression.patterns, **compression.formats}:
        if not np.isfinite(np.asarray(leaf(params, name), np.float32)).all():
            raise UserError(
                f"compress: {directory}: {name} of step {step} has entries that are not finite; "
                "use the --step of an earlier checkpoint"
            )

    temporary = out.parent / f".{out.name}.saving"
    try:
        with unfinished(temporary):
            shutil.rmtree(temporary, ignore_errors=True)  # what a killed process left
            temporary.mkdir(parents=True)
            kept = record.read_if_whole(directory)
            record.write(
                temporary,
                new_run.data,
                config_text=config_text,
                corpus=batches.digest,
                folder=None if kept is None else kept.folder,
            )
            work = _Work(compression, earlier, run, new, batches, text, temporary)
            before = validate(new, weights, batches)
            params = work.compress(params)
            save_params(new, params, temporary)
            scales = work.scales | {
                name: load_scales(
                    directory, name, len(as_matrices(roles[name], leaf(params, name)))
                )
                for name in earlier
            }
            if scales:
                save_file(stored_scales(scales), temporary / SCALES)
            weights = restore_weights(new, temporary)[1]
            written = _trained(new, weights)
            asked = dataclasses.asdict(compression)
            del asked["patterns"], asked["formats"]  # each stands with its kernel
            report = {
                "run": str(directory),
                "step": step,
                **asked,
                **work.describe(written, np.dtype(run.blocks.param_dtype).itemsize),
                "before": before,
                "between": work.between,
                "after": validate(new, weights, batches),
            }
            (temporary / REPORT).write_text(json.dumps(report, indent=2) + "\n")
            temporary.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error}); nothing is left") from error
    return report


def _earlier(
    directory: Path, step: int, compression: Compression, roles: Roles
) -> dict[str, dict[str, Any]]:
    """Reports of an earlier compression on the kernels that stay in its formats.

    Raises a UserError where a weight of them has left its format, or would.
    """
    c, rows = compression, quantized_kernels(directory)
    rows = {name: row for name, row in rows.items() if name not in c.formats}
    for name, row in rows.items():
        for moved, what, instead in (
            (step > 0, f"training to step {step}", "use --step 0"),
            (c.smooth is not None and roles[name].norm is not None, "smoothing", "leave that out"),
            (c.finetune > 0, "fine-tuning", "leave that out"),
            (c.method == "sparsegpt" and name in c.patterns, "sparsegpt", "use magnitude or wanda"),
        ):
            if moved:
                raise UserError(
                    f"compress: {name} was compressed to {row['format']} before, and {what} moves "
                    f"its weights out of that; {instead}, or give it a format again"
                )
    return rows


class _Work:
    """The passes over a model and what is noted on the way.

    Attributes:
      earlier: see `_earlier`.
      reads: the quantizer of what goes on in its formats; None for none.
      reference: the parameters that errors together are measured against.
      errors: what `squares` gave for each layer, by kind of change and name of kernel.
      scales: of each layer, by name of quantized kernel.
      between: see `compress`.
    """

    def __init__(self, compression, earlier, run: Run, new: Program, batches, text, folder):
        self.compression, self.earlier, self.run, self.new = compression, earlier, run, new
        self.batches, self.text, self.folder = batches, text, folder
        self.roles = param_roles(run.model)
        self.names = list({**compression.patterns, **compression.formats})
        self.reference: dict[str, Any] = {}
        self.errors: dict[str, dict[str, list[Any]]] = {
            kind: defaultdict(list) for kind in ("sparsify", "quantize", "together")
        }
        self.scales: dict[str, list[Scales]] = defaultdict(list)
        self.between: dict[str, dict[str, float]] = {}
        self.reads = None
        if (quantization := new.run.quantization) is not None:
            layers: dict[str, Any] = {f"^{name}$": None for name in compression.formats}
            layers |= {p: given for p, given in quantization.layers.items() if p not in layers}
            quantization = dataclasses.replace(quantization, layers=layers)
            going_on = dataclasses.replace(new.run, quantization=quantization)
            with jax.set_mesh(new.mesh):
                self.reads = going_on.build_quantizer(new.abstract_state["params"], new.mesh)

    def compress(self, params: dict[str, Any]) -> dict[str, Any]:
        c = self.compression
        if c.smooth is not None:
            params = smooth(
                self.roles, params, input_maxima(self.new.graph, params, self.text), c.smooth
            )
            self._validate("smooth", params)
        self.reference = params
        for number, kind in enumerate(c.passes):
            last = number + 1 == len(c.passes)
            params = self._pass(kind, params, first=number == 0, last=last)
            finetuned = kind == "sparsify" and c.finetune > 0
            # Of the last pass the metrics are "after", but where activations are quantized there.
            if not last or finetuned or c.activations is not None:
                self._validate(kind, params)
            if finetuned:
                self.reference = params = self._finetune(params)
                self._validate("finetune", params)
                self._warn_of_finetuning()
        return params

    def _warn_of_finetuning(self) -> None:
        pruned, tuned = (self.between[what]["val_loss"] for what in ("sparsify", "finetune"))
        if not tuned <= pruned:
            log.warning(
                "compress: fine-tuning made the model worse: validation loss %.4f when pruned, "
                "%.4f after %d steps of training; use another number of steps, a lower learning "
                "rate, or finetune=0",
                pruned,
                tuned,
                self.compression.finetune,
            )

    def _pass(self, kind: str, params, *, first: bool, last: bool) -> dict[str, Any]:
        """Changes every kernel; in the first pass also notes what either change does alone."""
        layers: Counter[str] = Counter()
        chosen = {"sparsify": self.compression.patterns, "quantize": self.compression.formats}

        def change(name, kernel_IO, products_II):
            layer = layers[name]
            layers[name] += 1
            changed = kernel_IO
            if name in chosen[kind]:
                changed, scales = self.compression.apply(kind, name, kernel_IO, products_II)
                if scales is not None:
                    self.scales[name].append(scales)
            for alone in chosen if first else ():
                if name in chosen[alone]:
                    other = alone != kind
                    new = (
                        self.compression.apply(alone, name, kernel_IO, products_II)[0]
                        if other
                        else changed
                    )
                    self._note(alone, name, kernel_IO, new, products_II)
            if last:
                reference = leaf(self.reference, name)
                reference_IO = as_matrices(self.roles[name], reference)[layer]
                self._note("together", name, reference_IO, changed, products_II)
            return changed

        return change_kernels(self.new.graph, params, self.text, self.names, change)

    def _note(self, kind: str, name: str, before_IO, after_IO, products_II) -> None:
        found = squares(before_IO, after_IO, products_II)
        self.errors[kind][name].append(jax.device_get(found))

    def _validate(self, what: str, params) -> None:
        weights = _on_mesh(self.new, params)
        if self.reads is not None:
            with jax.set_mesh(self.new.mesh):
                weights = self.reads.weights(weights)
        self.between[what] = validate(self.new, weights, self.batches)

    def _finetune(self, params) -> dict[str, Any]:
        """The parameters after some more steps of the run, its schedule spanning those."""
        steps, folder = self.compression.finetune, self.folder / "finetune"
        run = dataclasses.replace(
            self.new.run,
            steps=steps,
            quantization=self.run.quantization,
            samples=Samples(tokens=0),
            eval_every=0,
            profile=None,
        )
        program = Program(run, self.new.mesh)
        save_params(program, params, folder)
        train(run, folder, config_text="", mesh=self.new.mesh)
        step, weights = restore_weights(program, folder)
        if step < steps:
            if (number := signals.obeyed()) is not None:
                signals.end(number)
            raise UserError(f"compress: stopped after {step} of {steps} steps; nothing is written")
        shutil.rmtree(folder)
        return _trained(program, weights)

    def describe(self, written: dict[str, Any], itemsize: int) -> dict[str, Any]:
        """The report on kernels and bytes; see `compress`.

        Args:
          written: the parameters.
          itemsize: bytes of a parameter of the run that was compressed.
        """
        c, kernels = self.compression, {}
        formats = {name: (row["format"], row["activations"]) for name, row in self.earlier.items()}
        formats |= {name: (format, c.activations) for name, format in c.formats.items()}
        kept = kept_zeros(self.new.run)
        total = sum(x.size for x in jax.tree.leaves(written)) * itemsize
        whole = {"before": total, "zeros": total, "packed": total}
        for name in dict.fromkeys([*self.names, *self.earlier]):
            kernel, pattern = leaf(written, name), kept.get(name)
            format, activations = formats.get(name, (None, None))
            parsed = None if format is None else parse_format(format)
            role = self.roles[name]
            size = kernel_bytes(role.matrix_shape(kernel.shape), parsed, pattern, itemsize)
            for how, count in size.items():
                whole[how] += count - kernel.size * itemsize
            kinds = {"sparsity": "sparsify", "quantization": "quantize", "together": "together"}
            errors = {
                shown: relative_error(self.errors[kind][name])
                for shown, kind in kinds.items()
                if self.errors[kind][name]
            }
            transposable = c.transposable and name in c.patterns
            kernels[name] = {
                "pattern": pattern,
                "sparsity": float(np.mean(kernel == 0)),
                "violations": pattern and violations(role, kernel, pattern, transposable),
                "format": format,
                "activations": activations,
                "bytes": {"before": kernel.size * itemsize, **size},
                "errors": errors or self.earlier[name]["errors"],
            }
        return {"kernels": kernels, "bytes": whole}


def save_params(program: Program, params, directory: Path) -> None:
    """Writes parameters as the checkpoint of step 0 of a run directory."""
    make = functools.partial(new_state, optimizer=program.optimizer, updater=program.updater)
    with jax.set_mesh(program.mesh):
        state = jax.jit(make)(_on_mesh(program, params))
    with Checkpoints(directory / "checkpoints", program.run.checkpoints) as checkpoints:
        checkpoints.save(0, state)


def _trained(program: Program, weights) -> dict[str, Any]:
    """The parameters as they are trained, masked but not quantized; arrays of numpy.

    Args:
      weights: what `Program.weights` gives.
    """
    is_kernel = lambda x: isinstance(x, QuantizedKernel)
    with jax.set_mesh(program.mesh):
        masters = dense_tree(jax.tree.map(unquantized, weights, is_leaf=is_kernel))
        return jax.tree.map(np.asarray, masters)


def _on_mesh(program: Program, params):
    return jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding), params, program.abstract_state["params"]
    )


def _as_in(program: Program, params):
    """The parameters in the dtypes of the program's."""
    like = program.abstract_state["params"]
    return jax.tree.map(lambda x, like: np.asarray(x).astype(like.dtype), params, like)
