"""Weights from and to Hugging Face folders: config.json and safetensors files.

`families` says how names and layouts of Hugging Face pair with those of Torsion.
"""

import contextlib
import functools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError
from safetensors.numpy import save_file

from pjit_train.data.tokenizers import Bytes, TokenizerJson
from pjit_train.errors import UserError
from pjit_train.files import check_sums, write_sums
from pjit_train.huggingface.config import (
    difference,
    read_config,
    read_json,
    some,
    write_config,
)
from pjit_train.huggingface.conventions import copy_conventions
from pjit_train.huggingface.families import Family, Tensor
from pjit_train.huggingface.stored import INDEX, WEIGHTS, StoredTensors, check_finite
from pjit_train.huggingface.tokenizer import write_tokenizer
from pjit_train.models.block_config import BlockConfig
from pjit_train.models.transformer import TransformerConfig
from pjit_train.sharding import Rules, has_mesh
from pjit_train.signals import unfinished
from pjit_train.step import split_model


class Packing(Protocol):
    """Packing of a quantized model: some tensors are written as several others.

    Attributes:
      config: `quantization_config` of config.json; None where nothing is quantized.
    """

    config: dict[str, Any] | None

    def tensors(
        self, name: str, tensor: Tensor, layer: int | None, array: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Returns, by name, what is written of one of Hugging Face's tensors."""

    def check(self, folder: Path) -> None:
        """Raises an error where the files in the folder are not what they should be."""


def load(
    folder: str | Path, config: BlockConfig | None = None, *, rules: Rules | None = None
) -> tuple[BlockConfig, dict[str, Any]]:
    """Reads a model of a folder that `transformers` or `save` wrote.

    Args:
      folder: holds config.json and model.safetensors, or its index and shards.
      config: None for that of the folder, in float32. Otherwise it must be the same model, and says
        the rest: param_dtype, how layers run, with rotary positions also max_len.
      rules: lay the parameters on the mesh where one is set (`jax.set_mesh`).

    Returns:
      The configuration, and the parameters as a nested dict like that of `config.build`: numpy
      arrays, or where a mesh is set jax arrays. One tensor of a file at a time is held besides.

    Raises:
      UserError: the folder is no such model, or not the one of `config`; a weight is not finite, a
        file is not the one of its SHA256SUMS; or the mesh does not divide a parameter.
    """
    folder, rules = Path(folder), rules or Rules()
    family, config = check(folder, config)
    check_sums(folder)
    params = abstract_params(config, rules)
    mesh = jax.sharding.get_mesh() if has_mesh() else None
    for path, param in params.items():
        if mesh is not None:
            rules.check(mesh, param.get_metadata("axes"), param.shape, path)

    stored = open_stored(folder, family, config)
    arrays: dict[str, Any] = {}
    for name, tensor, layer in tensors_of(family, params):
        shapes = layer_shapes(tensor, params, layer)
        for path, part in zip(tensor.paths, tensor.split(stored.read(name), shapes), strict=True):
            param = params[path]
            with np.errstate(over="ignore"):
                part = np.asarray(part, param.dtype)
            if param.dtype != np.float32:  # which may not hold it
                check_finite(part, f"{folder}: {name} as {param.dtype}")
            sharding = None
            if mesh is not None:
                sharding = NamedSharding(mesh, rules.spec(param.get_metadata("axes")))
            arrays[path] = _with_layer(arrays.get(path), part, layer, param, sharding)
    return config, unflatten_dict(arrays, sep=".")


def _with_layer(
    whole: Any,
    part: np.ndarray,
    layer: int | None,
    param: nnx.Param,
    sharding: NamedSharding | None,
) -> Any:
    """A parameter with its layer, or all of it where layer is None, set to `part`.

    Args:
      whole: with the layers before; None where there are none. It is used up.
      sharding: None for numpy arrays.
    """
    if sharding is None:
        if layer is None:
            return np.array(part)  # not a view of a file's tensor
        whole = np.empty(param.shape, param.dtype) if whole is None else whole
        whole[layer] = part
        return whole
    if layer is None:
        return jax.make_array_from_callback(param.shape, sharding, part.__getitem__)
    if whole is None:
        whole = jnp.zeros(param.shape, param.dtype, device=sharding)
    of_layer = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
    on_devices = jax.make_array_from_callback(part.shape, of_layer, part.__getitem__)
    return jax.block_until_ready(_set_layer(whole, on_devices, layer))


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(whole, part, layer):
    return jax.lax.dynamic_update_index_in_dim(whole, part, layer, 0)


def open_stored(folder: Path, family: Family, config: BlockConfig) -> StoredTensors:
    """The tensors of a folder, which are those of the model: their names, shapes and types.

    Raises:
      UserError: they are not, or a file is damaged.
    """
    params = abstract_params(config, Rules())
    stored = StoredTensors(folder, family)
    if config.num_layers > len(stored.names()):  # not to list what cannot be there
        raise UserError(
            f"{folder}: config.json has {family.keys['num_layers'].name}={config.num_layers} "
            f"and the files hold {len(stored.names())} tensors in all; it is not of these files"
        )
    wanted = {
        name: tensor.shape(layer_shapes(tensor, params, layer))
        for name, tensor, layer in tensors_of(family, params)
    }
    tied = None
    if getattr(config, "tie_head", False):
        tied = next(tensor.name for tensor in family.tensors if tensor.paths == ("embedding",))
    stored.check(wanted, tied=tied)
    return stored


def check(folder: str | Path, config: BlockConfig | None = None) -> tuple[Family, BlockConfig]:
    """The family of a folder's model, and `config` or else its own; reads config.json alone.

    Raises:
      UserError: the folder is no such model, or not the one of `config`.
    """
    folder = Path(folder)
    family, found = read_config(folder / "config.json")
    if config is None:
        return family, found
    if type(config) is not type(found):
        ours, theirs = type(config).__name__, type(found).__name__
        raise UserError(f"{folder}: holds a {theirs}, not a {ours}; name another folder")
    if field := difference(config, found):
        ours, theirs = getattr(config, field, None), getattr(found, field, None)
        raise UserError(f"{folder}: its model has {field}={theirs!r}, not {ours!r}; use {theirs!r}")
    return family, config


def save(
    folder: str | Path,
    config: BlockConfig,
    params: Mapping[str, Any],
    *,
    max_shard_bytes: int = 5 * 2**30,
    packing: Packing | None = None,
    tokenizer: Bytes | TokenizerJson | None = None,
    like: Path | None = None,
) -> None:
    """Writes a folder that `transformers` loads with `from_pretrained`.

    The folder appears when all of it is written, under its name, or not at all.

    Args:
      folder: new, or empty.
      params: as `config.build` has them, every array whole in this process.
      max_shard_bytes: more than this in parameters goes into several files, none larger unless it
        holds a single tensor; so much is held in memory besides.
      packing: of a quantized model; see `compressed_tensors.save`.
      tokenizer: of the text that the model was trained on; written beside it.
      like: a folder with the same tokenizer, whose chat template and tokens of begin and end the
        model keeps.

    Raises:
      UserError: the folder has something in it or cannot be written, the parameters are not those
        of the configuration, or `transformers` has no such model.
    """
    folder = check_new(folder)
    family, document = write_config(config)
    if packing is not None and packing.config is not None:
        document["quantization_config"] = packing.config
    if tokenizer is not None:
        separator = tokenizer.separator
        document |= {"bos_token_id": separator, "eos_token_id": separator}
    if like is not None:
        told = read_json(like / "config.json")
        document |= {name: told.get(name) for name in ("bos_token_id", "eos_token_id")}
    expected, flat = abstract_params(config, Rules()), flatten_dict(dict(params), sep=".")
    if odd := sorted(expected.keys() ^ flat.keys()):
        raise UserError(f"{folder}: parameters {some(odd)} are not both in model and config")
    for path, array in flat.items():
        if (array.shape, array.dtype) != (expected[path].shape, expected[path].dtype):
            raise UserError(
                f"{folder}: parameter {path} is {array.dtype}{list(array.shape)}; the "
                f"configuration has {expected[path].dtype}{list(expected[path].shape)}"
            )

    with new_folder(folder) as temporary:
        (temporary / "config.json").write_text(json.dumps(document, indent=2) + "\n")
        if tokenizer is not None and isinstance(config, TransformerConfig):
            write_tokenizer(temporary, tokenizer, config.max_len)
        if like is not None:
            copy_conventions(like, temporary)
        tensors = list(tensors_of(family, expected))
        _write_tensors(temporary, tensors, flat, max_shard_bytes, packing)
        if packing is not None:
            packing.check(temporary)
        write_sums(temporary)


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Gives a folder to write into, which gets the name `folder` when all is written.

    After an error, and after a signal, nothing is left.

    Raises:
      UserError: the folder has something in it already, or cannot be written.
    """
    folder = check_new(folder)
    temporary = folder.parent / f".{folder.name}.saving"
    try:
        with unfinished(temporary):
            shutil.rmtree(temporary, ignore_errors=True)  # what a killed process left
            temporary.mkdir(parents=True)
            yield temporary
            temporary.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written ({error}); nothing is left") from error


def tensor_shapes(family: Family, config: BlockConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of Hugging Face that a model has, by name, and the shape of each."""
    params = abstract_params(config, Rules())
    return {
        name: tensor.shape(layer_shapes(tensor, params, layer))
        for name, tensor, layer in tensors_of(family, params)
    }


def check_new(folder: str | Path) -> Path:
    """The folder, where it is new or empty; else a UserError."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: there is something already; name a new or an empty folder")
    return folder


def abstract_params(config: BlockConfig, rules: Rules) -> dict[str, nnx.Param]:
    state = nnx.to_flat_state(split_model(config, rules)[1])
    return {".".join(map(str, path)): param for path, param in state}


def tensors_of(
    family: Family, params: Mapping[str, nnx.Param]
) -> Iterable[tuple[str, Tensor, int | None]]:
    """Yields Hugging Face's tensors of the model: name, row of the table, and layer of each."""
    for tensor in family.tensors:
        if tensor.paths[0] in params:
            stacked = params[tensor.paths[0]].get_metadata("role").stacked
            layers = range(params[tensor.paths[0]].shape[0]) if stacked else [None]
            yield from ((tensor.name.format(layer), tensor, layer) for layer in layers)


def layer_shapes(
    tensor: Tensor, params: Mapping[str, nnx.Param], layer: int | None
) -> list[tuple[int, ...]]:
    """Shapes of the parameters of a tensor, without the axis of layers."""
    return [params[path].shape[0 if layer is None else 1 :] for path in tensor.paths]


def _write_tensors(
    folder: Path, tensors, params: Mapping[str, Any], max_bytes: int, packing: Packing | None
) -> None:
    sizes, total = {}, 0
    for name, tensor, layer in tensors:
        arrays = [params[path] for path in tensor.paths]
        sizes[name] = sum(a.nbytes // (1 if layer is None else a.shape[0]) for a in arrays)
    shards = split_sizes(list(sizes.values()), max_bytes)
    tensors = iter(tensors)
    weight_map: dict[str, str] = {}
    for number, count in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        held: dict[str, Any] = {}
        for _ in range(count):
            name, tensor, layer = next(tensors)
            parts = (
                params[path] if layer is None else params[path][layer] for path in tensor.paths
            )
            array = np.ascontiguousarray(tensor.join([np.asarray(x) for x in parts]))
            held |= (
                {name: array} if packing is None else packing.tensors(name, tensor, layer, array)
            )
        total += sum(x.nbytes for x in held.values())
        save_file(held, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # safetensors writes for one user
        weight_map |= dict.fromkeys(held, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def split_sizes(sizes: list[int], limit: int) -> list[int]:
    """Lengths of consecutive runs, each of a sum up to the limit or of a single size."""
    counts: list[int] = []
    total = 0
    for size in sizes:
        if not counts or total + size > limit:
            counts, total = [*counts, 0], 0
        counts[-1] += 1
        total += size
    return counts
