"""Adapter folders of the library PEFT: adapter_config.json and adapter_model.safetensors."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pjit_train.errors import UserError
from pjit_train.files import read_json
from pjit_train.huggingface.config import some, write_config
from pjit_train.huggingface.weights import abstract_params, new_folder, tensors_of
from pjit_train.sharding import Rules

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save(folder: Path, config, adapters, trained: Any, base: str | None) -> None:
    """Writes trained adapters as PEFT does.

    Args:
      folder: new, or empty.
      adapters: `Adapters` of the model.
      trained: their parameters, as `Adapters.init` gives them.
      base: name of the model that they stand beside.

    Raises:
      UserError: PEFT has no such adapters, or the folder cannot be written.
    """
    lora = adapters.lora
    if lora.keep_zeros:
        raise UserError(
            f"{folder}: PEFT has no adapters that keep zeros; export the merged model instead"
        )
    flat, held = flatten_dict(trained, sep="/"), {}
    modules = set()
    for module, name, layer in _modules(config, adapters.kernels):
        down, up = (np.asarray(flat[f"{name}/{part}"]) for part in ("down", "up"))
        down, up = (x if layer is None else x[layer] for x in (down, up))
        a, b = (f"base_model.model.{module}.lora_{x}.weight" for x in "AB")
        held[a] = np.ascontiguousarray(down.reshape(-1, lora.rank).T)
        held[b] = np.ascontiguousarray(up.reshape(lora.rank, -1).T)
        modules.add(module.rpartition(".")[2])
    family, _ = write_config(config)
    document = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": family.architecture.startswith("GPT2"),
        "use_rslora": False,
        "inference_mode": True,
    }
    with new_folder(folder) as temporary:
        (temporary / CONFIG).write_text(json.dumps(document, indent=2) + "\n")
        save_file(held, temporary / WEIGHTS, metadata={"format": "pt"})


def load(folder: Path, config, adapters) -> Any:
    """The parameters of adapters that PEFT or `save` wrote, as `Adapters.init` gives them.

    Their scale is taken into "up", where it is another than the run's.

    Raises:
      UserError: the folder holds none, or those of another model, rank or set of kernels.
    """
    lora, what = adapters.lora, f"adapters: initial={str(folder)!r}"
    document = read_json(folder / CONFIG)
    rank, alpha = document.get("r"), document.get("lora_alpha")
    if document.get("peft_type") != "LORA" or type(rank) is not int or rank < 1:
        raise UserError(f"{what}: {CONFIG} is of no LoRA adapter; give one")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise UserError(f"{what}: lora_alpha={alpha!r} in {CONFIG} must be a number")
    if rank != lora.rank:
        raise UserError(f"{what} has rank {rank} and the run {lora.rank}; use rank = {rank}")
    odd = ("use_dora", "rank_pattern", "alpha_pattern")
    if told := [name for name in odd if document.get(name)]:
        raise UserError(f"{what}: {told[0]} in {CONFIG} is not supported; use one scale and rank")
    scale = alpha / (rank**0.5 if document.get("use_rslora") else rank)
    try:
        stored = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{what}: {WEIGHTS} cannot be read ({error})") from error
    made = {
        f"{name}/{part}": np.empty(shape, np.float32)
        for name, kernel in adapters.kernels.items()
        for part, (shape, _) in kernel.parts(rank).items()
    }
    for module, name, layer in _modules(config, adapters.kernels):
        for part, letter, factor in (("down", "A", 1.0), ("up", "B", scale / lora.scale)):
            key = f"base_model.model.{module}.lora_{letter}.weight"
            place = made[f"{name}/{part}"] if layer is None else made[f"{name}/{part}"][layer]
            array = stored.pop(key, None)
            matrix = place.reshape((-1, rank) if part == "down" else (rank, -1))
            if array is None or array.shape != matrix.T.shape:
                found = "is missing" if array is None else f"is {list(array.shape)}"
                wanted = list(matrix.T.shape)
                raise UserError(f"{what} is of another model: {key} {found}; it has to be {wanted}")
            if not np.isfinite(array.astype(np.float32)).all():
                raise UserError(f"{what}: {key} has numbers that are not finite")
            place[...] = (array.astype(np.float32).T * np.float32(factor)).reshape(place.shape)
    if stored:
        raise UserError(f"{what} adapts more than the run's layers do: {some(sorted(stored))}")
    return unflatten_dict(made, sep="/")


def _modules(config, kernels: Mapping[str, Any]) -> Iterator[tuple[str, str, int | None]]:
    """(module of `transformers`, name of the kernel, layer) of each kernel that is adapted."""
    family, _ = write_config(config)
    for name, tensor, layer in tensors_of(family, abstract_params(config, Rules())):
        ours = [path.replace(".", "/") for path in tensor.paths]
        if not any(path in kernels for path in ours):
            continue
        if len(ours) > 1:
            raise UserError(
                f"adapters: {name} holds {len(ours)} kernels in one; PEFT would give them one "
                "adapter, so export the merged model instead"
            )
        yield name.removesuffix(".weight"), ours[0], layer
