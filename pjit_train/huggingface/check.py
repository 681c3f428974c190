"""Logits of a Hugging Face folder by Torsion, against those of `transformers` where it is."""

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from pjit_train.errors import UserError
from pjit_train.huggingface import weights
from pjit_train.models.block_config import BlockConfig
from pjit_train.models.transformer import TransformerConfig
from pjit_train.models.vit import ViTConfig
from pjit_train.sharding import Rules
from pjit_train.step import split_model

NEEDED = ("torch", "transformers")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Findings of a comparison.

    Attributes:
      family: `model_type` of the folder.
      architecture: the class of `transformers` that has it.
      parameters: how many.
      positions: logits of so many positions (of a model of images: of images).
      tokens: of the sequence; None of a model of images.
      largest: the largest magnitude of a logit, by Torsion.
      unseen: window that is not shorter than the sequence, and so was not tried; or None.
      version: of `transformers`; None where it or torch is not installed, and nothing compared.
      difference: the largest, of any two logits.
      agreeing: positions at which both have the same largest logit.
    """

    family: str
    architecture: str
    parameters: int
    positions: int
    tokens: int | None
    largest: float
    unseen: int | None
    version: str | None = None
    difference: float | None = None
    agreeing: int | None = None

    def within(self, tolerance: float) -> bool:
        """Tells whether the logits differ by no more than a part of the largest, or of 1."""
        return self.difference is None or self.difference <= tolerance * max(1.0, self.largest)


def compare(folder: str | Path, *, tokens: int = 64, seed: int = 0) -> Comparison:
    """Computes the logits of a folder, in float32, on random tokens or images, by both.

    Args:
      folder: of `transformers`, or written by `huggingface.save`.
      tokens: length of the sequence; cut to the longest of the model.
      seed: of the tokens.

    Raises:
      UserError: the folder is no model that we have, or `transformers` does not load it.
    """
    folder = Path(folder)
    config, params = weights.load(folder)
    family, _ = weights.check(folder)
    ours, theirs = _inputs(config, tokens, seed)
    graph = split_model(config, Rules())[0]
    logits = np.asarray(jax.jit(lambda p, x: nnx.merge(graph, p)(x))(params, ours))
    parameters = config.num_params
    del params
    window = getattr(config, "window", None)
    length = ours.shape[1] if isinstance(config, TransformerConfig) else None
    found = Comparison(
        family=weights.read_json(folder / "config.json")["model_type"],
        architecture=family.architecture,
        parameters=parameters,
        positions=logits[..., 0].size,
        tokens=length,
        largest=float(np.abs(logits).max()),
        unseen=window if length is not None and (window or 0) >= length else None,
    )
    if not all(map(importlib.util.find_spec, NEEDED)):
        return found
    expected, version = _by_transformers(folder, config, theirs)
    if expected.shape != logits.shape:
        raise UserError(
            f"{folder}: transformers {version} gives logits of the shape {expected.shape}, and we "
            f"of {logits.shape}"
        )
    return dataclasses.replace(
        found,
        version=version,
        difference=float(np.abs(logits - expected).max()),
        agreeing=int(np.sum(logits.argmax(-1) == expected.argmax(-1))),
    )


def _inputs(config: BlockConfig, tokens: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs for Torsion's model, and for that of `transformers`."""
    draw = np.random.default_rng(seed)
    if isinstance(config, TransformerConfig):
        ids = draw.integers(config.vocab_size, size=(1, min(tokens, config.max_len)))
        return ids.astype(np.int32), ids
    assert isinstance(config, ViTConfig)
    size = config.image_size
    images = draw.normal(size=(2, size, size, config.channels)).astype(np.float32)
    return images, images.transpose(0, 3, 1, 2)


def _by_transformers(
    folder: Path, config: BlockConfig, inputs: np.ndarray
) -> tuple[np.ndarray, str]:
    """Logits, float32, and the version of `transformers`; no code of the folder is run."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the import: nothing is to be fetched
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind: Any = transformers.AutoModelForCausalLM
    if isinstance(config, ViTConfig):
        kind = transformers.AutoModelForImageClassification
    options = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    try:
        model = kind.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", **options
        )
        with torch.no_grad():
            logits = model.eval()(torch.from_numpy(inputs.copy())).logits.float().numpy()
    except Exception as error:  # of many kinds, of what it does not like
        said = " ".join(str(error).split())[:300]
        raise UserError(
            f"{folder}: transformers {transformers.__version__} does not load it: {said}"
        ) from error
    return logits, transformers.__version__
