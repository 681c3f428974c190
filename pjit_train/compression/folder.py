"""Compression of a Hugging Face folder into another, block by block.

In memory are the token embedding at the start, and then one block in float32, the statistics of its
inputs, and one batch of activations. The folder appears when all of it is written and read back; a
process that is killed leaves what it has done beside it, and the same command goes on from there,
to the same bytes.
"""

import ctypes
import dataclasses
import functools
import hashlib
import json
import logging
import math
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjit_train.compression import certificate
from pjit_train.compression.calibrate import States, Walker, change_block, head_products
from pjit_train.compression.folder_source import FolderSource
from pjit_train.compression.kernels import (
    kernel_bytes,
    leaf,
    parse_format,
    relative_error,
    smooth,
    squares,
)
from pjit_train.compression.recipe import Compression
from pjit_train.compression.reconstruct import Reconstruction
from pjit_train.compression.states import StatesOnDisk
from pjit_train.compression.workplace import Workplace, write_shards
from pjit_train.errors import UserError
from pjit_train.files import json_sha256, write_sums
from pjit_train.huggingface.compressed_tensors import Packing, QuantizedWeights, input_scales
from pjit_train.huggingface.compressed_tensors_codes import scheme
from pjit_train.huggingface.conventions import read_conventions
from pjit_train.huggingface.families import Tensor
from pjit_train.huggingface.stored import INDEX, WEIGHTS, Place, check_finite
from pjit_train.huggingface.weights import check_new
from pjit_train.models.roles import param_roles
from sparsity.post_training.hessian import Hessian, add_grams, gram

log = logging.getLogger("torsion")
BATCH_TOKENS = 4096  # of a batch of calibration text, unless a sequence alone has more
SHARD_BYTES = 5 * 2**30
PASSES = ("sparsify", "quantize")
_SLACK = 2**20  # bytes of other files, on the disk


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Calibration text of a folder.

    Attributes:
      file: UTF-8 text, encoded as a whole and cut into windows of `sequence` tokens, of which
        `sequences` are taken, evenly spread from the first on.
      on_disk: whether what a block makes of the text is kept in a file, or in memory.
    """

    file: Path
    sequences: int = 128
    sequence: int | None = None
    on_disk: bool = True

    def tokens(self, source: FolderSource) -> tuple[np.ndarray, dict[str, Any]]:
        """int32 [batches, rows, tokens], and what is said of the text in the certificate.

        Raises:
          UserError: the text cannot be read, or is too short.
        """
        longest = source.config.max_len
        sequence = self.sequence or min(longest, 2048)
        if not 2 <= sequence <= longest:
            raise UserError(
                f"--sequence {sequence}: use 2 to {longest} tokens, the model's longest sequence"
            )
        try:
            content = self.file.read_bytes()
            text = content.decode("utf-8")
        except OSError as error:
            raise UserError(f"{self.file} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{self.file} is no UTF-8 text: byte {error.start:,}") from error
        tokenizer, _ = read_conventions(source.folder)
        ids = tokenizer.encode_marked(text).astype(np.int32)
        windows = len(ids) // sequence
        if windows < self.sequences:
            raise UserError(
                f"{self.file}: has {len(ids):,} tokens, {windows} sequences of {sequence}, and "
                f"{self.sequences} are asked for; use a longer text, fewer --sequences or a "
                "shorter --sequence"
            )
        if ids.max(initial=0) >= source.config.vocab_size:
            raise UserError(
                f"{source.folder}: tokenizer.json gives the id {ids.max()} and config.json has "
                f"vocab_size={source.config.vocab_size}; they are not of one model"
            )
        chosen = np.arange(self.sequences) * windows // self.sequences
        rows = next(
            rows
            for rows in range(max(1, BATCH_TOKENS // sequence), 0, -1)
            if self.sequences % rows == 0
        )
        taken = ids[: windows * sequence].reshape(windows, sequence)[chosen]
        said = {
            "file": self.file.name,
            "sha256": hashlib.sha256(content).hexdigest(),
            "sequences": self.sequences,
            "sequence": sequence,
        }
        return taken.reshape(-1, rows, sequence), said


def compress_folder(
    folder: Path,
    out: Path,
    compression: Compression,
    calibration: Calibration | None,
    *,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Compresses the model of a Hugging Face folder into a new one.

    Each block is pruned and quantized at once, given what the changed ones before it make of the
    text. Formats that compressed-tensors has are stored packed; of others, and of a model whose
    layers that library does not read, the values that the weights take are stored in float32.
    Without a format, tensors keep their dtypes. Everything else in the folder is copied.

    Args:
      out: new, or empty; see `workplace`.
      compression: its `patterns` and `formats` are by name of a kernel.
      calibration: None where nothing that is asked for reads text.
      progress: is told how many blocks of how many are done.

    Returns:
      The certificate; see `certificate`.

    Raises:
      UserError: the folder is no language model that we have, a weight is not finite, the text is
        too short, the disk too small, or the compressed folder cannot be written.
    """
    check_new(out)
    if calibration is None and compression.calibrated:
        raise UserError(
            f"compress: {compression.calibrated[0]} reads calibration text; give --calibration "
            "FILE, or use --method magnitude and --quantizer rtn"
        )
    source = FolderSource(folder)
    tokens, text = (None, None) if calibration is None else calibration.tokens(source)
    work = Workplace(out)
    source.check_finite()
    plan = {
        "torsion": version("torsion"),
        "versions": {name: version(name) for name in ("jax", "numpy", "safetensors")}
        | {"python": platform.python_version(), "machine": platform.machine()},
        "asked": _asked(compression),
        "model": {"folder": folder.resolve().name, "files": source.digests()},
        "calibration": text,
        "shards": max_shard_bytes,
    }
    on_disk = calibration is not None and calibration.on_disk
    _check_room(source, out, work.folder, compression, tokens if on_disk else None)
    with work.opened(plan):
        if not work.complete:
            making = _Making(source, work, compression, tokens, on_disk)
            rows = making.compress(progress)
            _assemble(source, work, making.packing, max_shard_bytes)
            certificate.write(work.folder, {"plan": json_sha256(plan), **plan}, rows)
            write_sums(work.folder)
        document, wrong = certificate.verify(work.folder)
        if wrong:
            shutil.rmtree(work.folder)
            raise UserError(f"{out}: what was written is read back otherwise: {wrong[0]}")
        work.finish()
    return document


def _asked(compression: Compression) -> dict[str, Any]:
    asked = dataclasses.asdict(compression)
    return {name: value for name, value in asked.items() if name not in ("finetune", "sequences")}


class _Making:
    """The way through the blocks.

    Attributes:
      packing: by which quantized kernels are stored.
      rows: of the certificate, by name.
    """

    def __init__(self, source, work, compression: Compression, tokens, on_disk: bool):
        self.source, self.work, self.compression = source, work, compression
        self.tokens, self.on_disk = tokens, on_disk
        self.roles = param_roles(source.config)
        self.names = list({**compression.patterns, **compression.formats})
        self.packing = self._packing()
        self.packed = self.packing.quantized
        self.rows: dict[str, dict[str, Any]] = {}
        self.states: States | None = None
        self.reconstruction = Reconstruction(source.block_graph(), compression.reconstruct)
        self.deficient: Counter[str] = Counter()
        self.raised = 0

    def _packing(self) -> Packing:
        c = self.compression
        parsed = {name: parse_format(text) for name, text in c.formats.items()}
        activations = None if c.activations is None else parse_format(c.activations)
        quantized = {
            name: QuantizedWeights(
                format=format,
                scales={},
                activations=activations,
                input_scales={} if activations is not None and activations.array_bits else (),
            )
            for name, format in parsed.items()
        }
        try:
            for weights in quantized.values():
                scheme(weights.format, activations)
            return Packing(self.source.config, quantized, family=self.source.family)
        except UserError as error:
            said = str(error).removeprefix("export: ").split("; use --dense")[0]
            log.warning("%s: the values that weights take are written as float32 numbers", said)
            return Packing(self.source.config, {}, family=self.source.family)

    def compress(self, progress: Callable[[int, int], None]) -> dict[str, dict[str, Any]]:
        """Does what is left to do, and returns the rows of the certificate."""
        layers = self.source.config.num_layers
        first = 0
        while first <= layers and (record := self.work.done(first)) is not None:
            self.rows |= record["rows"]
            first += 1
        if first:
            log.warning("%s: goes on after %d of %d blocks", self.work.folder, first, layers)
        maxima = self._reads_maxima
        measure, join = (_gram_and_maxima, _add_both) if maxima else (gram, add_grams)
        walker = Walker(self.source.block_graph(), measure, join)
        if self.tokens is not None and first <= layers:
            self._enter(walker, first)
        for layer in range(first, layers):
            progress(layer, layers)
            self._block(walker, layer)
            _trim()
        if first <= layers:
            self._rest(layers)
        if self.deficient:
            kernels, inputs = sum(self.deficient.values()), self.deficient.most_common(1)[0][0]
            log.warning(
                "calibration: the statistics of %d kernels are rank-deficient (such as %s): fewer "
                "independent inputs than the kernel has; damping stands in for what is missing",
                kernels,
                inputs,
            )
        if self.raised:
            log.warning(
                "formats: %d blocks are so small beside the greatest weight of their kernel that "
                "their scale rounds to 0; they have the least scale there is, with which they do "
                "not vanish",
                self.raised,
            )
        return self.rows

    @property
    def _reads_maxima(self) -> bool:
        activations = self.compression.activations
        scaled = activations is not None and parse_format(activations).array_bits > 0
        return self.tokens is not None and (scaled or self.compression.smooth is not None)

    def _enter(self, walker: Walker, first: int) -> None:
        """Makes the states before the block `first`; of those before it, from what is done."""
        entered = self.source.entered(self.tokens)
        shape = (*self.tokens.shape, self.source.config.d_model)
        if self.on_disk:
            name = lambda number: self.work.path(f"states-{number % 2}")
            _, rest = next(self.source.entered(self.tokens[:1]))
            self.states = StatesOnDisk(shape, rest, name, first)
            if self.states.whole:
                return
            self.states = StatesOnDisk(shape, rest, name, 0)
            self.states.write(x for x, _ in entered)
        else:
            self.states = States(list(entered))
        for layer in range(first):
            walker.advance(layer, self._stored_block(layer), self.states)

    def _stored_block(self, layer: int) -> dict[str, Any]:
        """A block that is done, as it is stored, in float32."""
        stored = {name: place.read() for name, place in self.work.tensors(layer).items()}
        block: dict[str, Any] = {}
        for name, tensor in self.source.tensors(layer):
            self._place(block, tensor, layer, self.packing.values(name, tensor, stored))
        return block

    def _place(self, block: dict[str, Any], tensor: Tensor, layer: int | None, array) -> None:
        """Puts the parameters of a Hugging Face tensor into a nested dict, in float32."""
        shapes = self.source.shapes(tensor, layer)
        for path, part in zip(tensor.paths, tensor.split(array, shapes), strict=True):
            *parents, last = path.removeprefix("blocks.").split(".")
            holder = functools.reduce(lambda tree, key: tree.setdefault(key, {}), parents, block)
            holder[last] = np.array(part, np.float32, order="C")

    def _block(self, walker: Walker, layer: int) -> None:
        block = self.source.read(layer)
        rows: dict[str, dict[str, Any]] = {}
        names = [name for name in self.names if name.startswith("blocks/")]
        change = functools.partial(self._change, layer, rows)
        if self.states is None:
            for name in names:
                self._change_leaf(block, name, change)
        else:
            products = walker.measure(layer, block, self.states)
            _trim()
            if self._reads_maxima:
                maxima = {name: np.asarray(found[1]) for name, found in products.items()}
                products = {name: found[0] for name, found in products.items()}
                self._scale_inputs(layer, maxima)
                if self.compression.smooth is not None:
                    block = self._smoothed(block, maxima)
                    products = walker.measure(layer, block, self.states)
                    products = {name: found[0] for name, found in products.items()}
            if self.compression.reconstruct:
                block = self._reconstructed(walker, layer, rows, block, products, names)
            else:
                change_block(block, products, names, change)
            del products
        tensors, block = self._store(layer, block)
        if self.states is not None and layer + 1 < self._last_block:
            walker.advance(layer, block, self.states)
        self.work.save(layer, tensors, {"rows": rows})
        self.rows |= rows

    def _reconstructed(
        self, walker: Walker, layer: int, rows, block: dict[str, Any], products, names: list[str]
    ) -> dict[str, Any]:
        """A block pruned, its kept weights fitted to what it made before, and then quantized."""
        dense = jax.tree.map(np.copy, block)
        prune = functools.partial(self._change, layer, rows, kinds=("sparsify",))
        change_block(block, products, names, prune)
        pruned = [name for name in names if name in self.compression.patterns]
        block, errors = self.reconstruction.fit(layer, dense, block, pruned, self.states)
        del dense
        if self.compression.formats:
            products = walker.measure(layer, block, self.states)
            if self._reads_maxima:
                products = {name: found[0] for name, found in products.items()}
            quantize = functools.partial(self._change, layer, rows, kinds=("quantize",))
            change_block(block, products, names, quantize)
        for name in pruned:
            before, after = errors[name.split("/")[1]]
            found = rows[self._row(layer, name)]["errors"]
            found |= {"output": before, "reconstructed": after}
        return block

    @property
    def _last_block(self) -> int:
        """The number of blocks that the text goes through."""
        return self.source.config.num_layers + ("head" in self.names)

    def _scale_inputs(self, layer: int, maxima: Mapping[str, np.ndarray]) -> None:
        """Notes the tensor scales of activations that are stored with weights."""
        for name, weights in self.packed.items():
            dense = name.removeprefix("blocks/").removesuffix("/kernel")
            if weights.activations is not None and weights.activations.array_bits:
                scale = input_scales(maxima[dense].max()[None])[0]
                noted = weights.input_scales
                assert isinstance(noted, dict)
                noted[layer] = scale

    def _smoothed(self, block: dict[str, Any], maxima: Mapping[str, np.ndarray]) -> dict[str, Any]:
        strength = self.compression.smooth
        assert strength is not None
        named = {f"blocks/{dense}/kernel": found[None] for dense, found in maxima.items()}
        stacked = {"blocks": jax.tree.map(lambda x: x[None], block)}
        smoothed = smooth(self.roles, stacked, named, strength)["blocks"]
        return jax.tree.map(lambda x: np.array(x[0]), smoothed)

    def _change_leaf(self, tree: dict[str, Any], name: str, change: Callable) -> None:
        """Changes a kernel without calibration."""
        *parents, last = name.removeprefix("blocks/").split("/")
        holder = functools.reduce(lambda tree, key: tree[key], parents, tree)
        _, inputs, outputs = self.roles[name].matrix_shape(holder[last].shape)
        new = np.asarray(change(name, holder[last].reshape(inputs, outputs), None))
        holder[last] = new.reshape(holder[last].shape)

    def _change(
        self, layer: int, rows, name: str, kernel_IO, products_II, kinds: tuple[str, ...] = PASSES
    ) -> np.ndarray:
        """Prunes and quantizes one kernel, and notes its row of the certificate.

        Args:
          kinds: of `Compression.passes`, those to do now.
        """
        c, changed, scales = self.compression, kernel_IO, None
        errors: dict[str, float] = {}
        chosen = {"sparsify": c.patterns, "quantize": c.formats}
        named = {"sparsify": "sparsity", "quantize": "quantization"}
        passes = [kind for kind in c.passes if name in chosen[kind] and kind in kinds]
        if not passes:
            return kernel_IO
        for number, kind in enumerate(passes):
            changed, found = c.apply(kind, name, changed, products_II)
            scales = scales if found is None else found
            error = relative_error([squares(kernel_IO, changed, products_II)])
            errors["together" if number else named[kind]] = error
        if products_II is not None and _is_deficient(products_II, self.tokens.size):
            self.deficient[name] += 1
        if scales is not None:
            self.raised += parse_format(c.formats[name]).raised(jnp.asarray(kernel_IO), 0)
        if scales is not None and name in self.packed:
            noted = self.packed[name].scales
            assert isinstance(noted, dict)
            noted[layer or 0] = scales
        row = self._row(layer, name)
        errors = rows.get(row, {}).get("errors", {}) | errors
        rows[row] = {
            "kernel": name,
            "pattern": c.patterns.get(name),
            "transposable": c.transposable and name in c.patterns,
            "format": c.formats.get(name),
            "activations": c.activations if name in c.formats else None,
            "errors": errors,
        }
        return np.asarray(changed, np.float32) + np.float32(0)  # no -0.0

    def _row(self, layer: int | None, name: str) -> str:
        """The name of a kernel's row in the certificate."""
        tensors = self.source.tensors(layer if name.startswith("blocks/") else None)
        rows = (row for full, tensor in tensors for row in certificate.kernel_names(tensor, full))
        return next(row for row, kernel in rows if kernel == name)

    def _store(self, layer: int, block: dict[str, Any]):
        """The tensors of a block as they are stored, and the block that they stand for."""
        tensors: dict[str, np.ndarray] = {}
        kept: dict[str, Any] = {}
        for name, tensor in self.source.tensors(layer):
            stored = self._stored(layer, name, tensor, block)
            self._place(kept, tensor, layer, self.packing.values(name, tensor, stored))
            tensors |= stored
        return tensors, kept

    def _stored(self, layer: int | None, name: str, tensor: Tensor, tree) -> dict[str, np.ndarray]:
        """Tensors that store one of Hugging Face's: itself, or what a quantized one consists of."""
        paths = [path.removeprefix("blocks.").replace(".", "/") for path in tensor.paths]
        joined = tensor.join([np.asarray(leaf(tree, path)) for path in paths])
        array = np.ascontiguousarray(joined)
        kernels = [path.replace(".", "/") for path in tensor.paths]
        if kernels[0] in self.packed:
            return self.packing.tensors(name, tensor, layer, array)
        valued = {*kernels} & self.compression.formats.keys()
        dtype = np.dtype(np.float32) if valued else self.source.dtype(name)
        with np.errstate(over="ignore"):
            stored = array.astype(dtype)
        check_finite(stored, f"{self.source.folder}: compressed, {name} as {dtype.name}")
        return {name: stored}

    def _rest(self, part: int) -> None:
        """Stores what is in no block as it is; the head is changed where that is asked for."""
        rows: dict[str, dict[str, Any]] = {}
        tensors: dict[str, np.ndarray] = {}
        for name, tensor in self.source.tensors(None):
            if tensor.paths == ("head",) and "head" in self.names:
                tree = self.source.read(None, ("head",))
                change = functools.partial(self._change, None, rows)
                if self.states is None:
                    self._change_leaf(tree, "head", change)
                else:
                    products_II = head_products(_Normed(self.source.final_norm()), self.states)
                    tree["head"] = change("head", tree["head"], products_II)
                tensors |= self._stored(None, name, tensor, tree)
            else:
                dtype = self.source.dtype(name)
                tensors[name] = self.source.stored.read(name).astype(dtype, copy=False)
            _trim()
        self.work.save(part, tensors, {"rows": rows})
        self.rows |= rows


@dataclasses.dataclass(frozen=True)
class _Normed:
    """A model as far as `head_products` knows one."""

    norm: Any


def _trim() -> None:
    """Gives freed memory back to the system; glibc keeps what lies between live blocks."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _gram_and_maxima(x_TI):
    return gram(x_TI), jnp.max(jnp.abs(x_TI.astype(jnp.float32)), axis=0)


def _add_both(a, b):
    return add_grams(a[0], b[0]), jnp.maximum(a[1], b[1])


def _is_deficient(products_II: Hessian, tokens: int) -> bool:
    """Tells whether X^T X is of lower rank than its size, where that is plain.

    It is where there are fewer tokens than inputs, where inputs were always 0, and where, as with a
    text of one repeated token, all rows are made of fewer than 32.
    """
    inputs, unit_II = len(products_II), products_II.unit_II
    if tokens < inputs or not np.diagonal(unit_II).all():
        return True
    # A random part of it is of its rank where that is less.
    draw = np.random.default_rng(0).normal(size=(inputs, min(32, inputs))).astype(np.float32)
    values = np.linalg.svd(draw.T @ (unit_II @ draw), compute_uv=False)
    return bool(values[-1] <= 1e-6 * values[0])


def _check_room(
    source: FolderSource, out: Path, place: Path, compression: Compression, tokens
) -> None:
    """Raises a UserError where the disk has no room for what is to be written.

    Tensors are written twice before the folder has its name, and states of the text twice.
    """
    size = 0
    for name in source.stored.names():
        shape, _ = source.stored.shape_and_dtype(name)
        size += math.prod(shape) * source.dtype(name).itemsize
    packed = 0
    roles = param_roles(source.config)
    for name, text in compression.formats.items():
        shape = roles[name].matrix_shape(leaf(source.abstract, name).shape)
        packed += math.prod(shape) * 2 - kernel_bytes(shape, parse_format(text), None, 4)["zeros"]
    needed = 2 * max(size - packed, size // 8) + _SLACK
    if tokens is not None:
        needed += 2 * tokens.size * source.config.d_model * 4
    existing = next(path for path in out.absolute().parents if path.exists())
    free = shutil.disk_usage(existing).free
    with_done = sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
    if needed > free + with_done:
        raise UserError(
            f"{out}: needs some {needed:,} bytes while it is made, and the disk has {free:,}; make "
            "room, or use --calibration-in memory or another --out"
        )


def _assemble(source: FolderSource, work: Workplace, packing: Packing, limit: int) -> None:
    """Writes the files of the folder from the parts that are done."""
    for path in work.folder.iterdir():
        if path.is_file():
            path.unlink()
    layers = source.config.num_layers
    tensors: dict[str, Place] = {}
    for part in (layers, *range(layers)):
        if work.done(part) is None:
            raise UserError(f"{work.folder}: part {part} was changed meanwhile; give it again")
        tensors |= work.tensors(part)
    for path in source.others():
        shutil.copyfile(path, work.folder / path.name)
    document = {k: v for k, v in source.document.items() if k != "quantization_config"}
    if packing.config is not None:
        document["quantization_config"] = packing.config
    (work.folder / "config.json").write_text(json.dumps(document, indent=2) + "\n")
    write_shards(work.folder, tensors, limit, WEIGHTS, INDEX)
