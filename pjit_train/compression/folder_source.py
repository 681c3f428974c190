"""A Hugging Face folder read block by block, as one-shot compression goes through it."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from pjit_train.compression.calibrate import enter
from pjit_train.errors import UserError
from pjit_train.files import SUMS, check_sums, read_json
from pjit_train.huggingface import weights as huggingface
from pjit_train.huggingface.families import Tensor
from pjit_train.huggingface.stored import DTYPES, INDEX, shard_files
from pjit_train.models.transformer import TransformerConfig
from pjit_train.sharding import Rules
from pjit_train.step import split_model
from pjit_train.tasks.language_modelling import LanguageModelling


class FolderSource:
    """A language model in a folder, of which a block at a time is in memory, in float32.

    Attributes:
      config: of the model, in float32, layers unrolled.
      document: what config.json holds.
      graph, abstract: of the whole model, as `split_model` gives them, a nested dict.

    Raises:
      UserError: the folder is no language model that we have, or a file is damaged or incomplete.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.family, config = huggingface.check(folder)
        if not isinstance(config, TransformerConfig):
            raise UserError(
                f"{folder}: holds a {type(config).__name__}; language models are compressed"
            )
        check_sums(folder)
        self.config = dataclasses.replace(config, layers="unroll")
        self.document = read_json(folder / "config.json")
        self.stored = huggingface.open_stored(folder, self.family, self.config)
        self.graph, state = split_model(self.config, Rules())
        self.abstract = nnx.to_pure_dict(state)
        self._params = huggingface.abstract_params(self.config, Rules())
        self._tensors: dict[int | None, list[tuple[str, Tensor]]] = {}
        for name, tensor, layer in huggingface.tensors_of(self.family, self._params):
            self._tensors.setdefault(layer, []).append((name, tensor))

    def tensors(self, layer: int | None) -> list[tuple[str, Tensor]]:
        """Hugging Face's tensors of a block, or of all that is in none."""
        return self._tensors[layer]

    def shapes(self, tensor: Tensor, layer: int | None) -> list[tuple[int, ...]]:
        """Shapes of the parameters in a tensor of one layer."""
        return huggingface.layer_shapes(tensor, self._params, layer)

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor in the folder; of a quantized one the dtype of the model."""
        if not self.stored.is_quantized(name):
            return np.dtype(DTYPES[self.stored.shape_and_dtype(name)[1]])
        said = self.document.get("dtype") or self.document.get("torch_dtype") or "float32"
        known = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
        return np.dtype(DTYPES[known.get(str(said).removeprefix("torch."), "F32")])

    def read(self, layer: int | None, paths: tuple[str, ...] | None = None) -> dict[str, Any]:
        """Parameters in float32, of their own memory, as a nested dict.

        Args:
          layer: of a block, whose parameters are named without "blocks"; None for what is in none.
          paths: the parameters of those in no block that are wanted; None for all.
        """
        found: dict[str, np.ndarray] = {}
        for name, tensor in self._tensors[layer]:
            if paths is not None and not {*paths} & {*tensor.paths}:
                continue
            array = self.stored.read(name)
            for path, part in zip(
                tensor.paths, tensor.split(array, self.shapes(tensor, layer)), strict=True
            ):
                found[path.removeprefix("blocks.")] = np.array(part, np.float32, order="C")
        return unflatten_dict(found, sep=".")

    def block_graph(self) -> nnx.GraphDef:
        """The graph of one block, for `calibrate.Walker`."""
        return nnx.graphdef(nnx.merge(self.graph, self.abstract).blocks)

    def entered(self, batches: np.ndarray) -> Iterator[tuple[jax.Array, list[dict[str, Any]]]]:
        """Inputs of the first block for each batch of tokens, and the other inputs by layer.

        Args:
          batches: int32 [batches, rows, tokens].
        """
        used, places = np.unique(batches, return_inverse=True)  # of the embedding these rows alone
        [(name, _)] = [t for t in self._tensors[None] if t[1].paths == ("embedding",)]
        rows = self.stored.read(name)[used].astype(np.float32)
        tables = {"embedding": rows} | self.read(None, ("position_embedding",))
        # What is not read stays abstract.
        model = nnx.merge(self.graph, {**self.abstract, **tables})
        for tokens in places.reshape(batches.shape).astype(np.int32):
            yield enter(LanguageModelling(), model, {"inputs": tokens})

    def final_norm(self):
        """The norm before the head."""
        return nnx.merge(self.graph, {**self.abstract, **self.read(None, _NORM)}).norm

    def check_finite(self) -> None:
        """Raises a UserError where a weight is not finite; reads all of them."""
        for tensors in self._tensors.values():
            for name, _ in tensors:
                self.stored.read(name)

    def digests(self) -> dict[str, str]:
        """SHA-256 of config.json and of the files of weights."""
        files = [self.folder / "config.json", *shard_files(self.folder)]
        found = {}
        for path in files:
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        return found

    def others(self) -> list[Path]:
        """The folder's files besides weights, of any kind, and what is written of them anew."""
        return sorted(
            path
            for path in self.folder.iterdir()
            if path.is_file() and path.name not in _ANEW and path.suffix not in _WEIGHTS
        )


_ANEW = ("config.json", INDEX, SUMS, "torsion.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".gguf", ".h5", ".onnx")
_NORM = ("norm.scale", "norm.bias")
