"""A language model to read: to evaluate or sample from, whichever place it comes from."""

import dataclasses
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh

from pjit_train.data.text import TextData
from pjit_train.data.tokenizers import Bytes, TokenizerJson
from pjit_train.errors import UserError
from pjit_train.evaluate import restore_weights
from pjit_train.huggingface import weights as huggingface
from pjit_train.huggingface.conventions import Conventions, read_conventions
from pjit_train.models.blocks import apart
from pjit_train.models.parameters import Dtype
from pjit_train.models.transformer import TransformerConfig
from pjit_train.program import Program
from pjit_train.run import Run
from pjit_train.sharding import MeshShape, Rules, make_mesh
from pjit_train.tasks.language_modelling import LanguageModelling, language_model


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A language model with its parameters on a mesh, and its tokenizer.

    Attributes:
      source: where it was read, for messages.
      rules: by which the parameters are laid out.
      params: nested dict, as `Program.weights` gives them.
      conventions: tokens of begin and end, and the form of a chat.
    """

    source: str
    config: TransformerConfig
    rules: Rules
    mesh: Mesh
    params: Any
    tokenizer: Bytes | TokenizerJson
    conventions: Conventions

    def encode(self, text: str, *, begins: bool = True) -> np.ndarray:
        """The ids of a text, int32 [tokens]; special tokens in it stand for themselves.

        Args:
          begins: whether the text is a beginning, before which the token of begin stands, where the
            tokenizer adds it; a text that spells it gets no second.
        """
        ids = self.tokenizer.encode_marked(text).astype(np.int32)
        begin = self.conventions.begin if self.conventions.adds_begin and begins else None
        if begin is None or ids[:1].tolist() == [begin]:
            return ids
        return np.concatenate([np.array([begin], np.int32), ids])

    def taken_apart(self) -> "LanguageModel":
        """The model with the parameters of each layer by themselves, to decode from.

        So a token reads them once and copies none. The parameters of this object are gone.
        """
        leaves, structure = jax.tree.flatten(self.params["blocks"])
        taken = []
        with jax.set_mesh(self.mesh):
            for leaf in leaves:  # each is deleted before the next is copied
                taken.append(jax.block_until_ready(jax.jit(apart)(leaf)))
                leaf.delete()
        blocks = jax.tree.unflatten(structure, taken)
        return dataclasses.replace(self, params={**self.params, "blocks": blocks})


def of_run(run: Run, directory: Path, *, step: int | None = None) -> LanguageModel:
    """The model of a run directory's newest good checkpoint, or of the step asked for.

    Raises:
      UserError: the run's model is none of language, or there is no such checkpoint.
    """
    if not isinstance(run.task, LanguageModelling):
        raise UserError(
            f"{directory} is a run of {run.task.title} and gives no text; use torsion eval"
        )
    program = Program(run, make_mesh(run.mesh))
    _, params = restore_weights(program, directory, step)
    tokenizer = cast(TextData, run.data).tokenizer
    separator = tokenizer.separator
    return LanguageModel(
        source=str(directory),
        config=language_model(run),
        rules=run.rules,
        mesh=program.mesh,
        params=params,
        tokenizer=tokenizer,
        conventions=Conventions(begin=separator, ends=(separator,), adds_begin=True),
    )


def of_folder(folder: Path, mesh: MeshShape, *, dtype: Dtype = "float32") -> LanguageModel:
    """The model of a Hugging Face folder.

    Args:
      mesh: to lay the parameters on.
      dtype: of parameters and activations.

    Raises:
      UserError: the folder is no language model that we have, or has no tokenizer that fits it.
    """
    _, config = huggingface.check(folder)
    if not isinstance(config, TransformerConfig):
        raise UserError(f"{folder}: holds a {type(config).__name__}, which is no language model")
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    tokenizer, conventions = read_conventions(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: tokenizer.json has ids up to {tokenizer.vocab_size - 1} and config.json "
            f"vocab_size={config.vocab_size}; they are not of one model"
        )
    rules, devices = Rules(), make_mesh(mesh)
    with jax.set_mesh(devices):
        config, params = huggingface.load(folder, config, rules=rules)
    assert isinstance(config, TransformerConfig)
    return LanguageModel(
        source=str(folder),
        config=config,
        rules=rules,
        mesh=devices,
        params=params,
        tokenizer=tokenizer,
        conventions=conventions,
    )


def empty_context(model: LanguageModel) -> int:
    """The token that stands before a text that has nothing before it: of begin, or else of end.

    Raises:
      UserError: the model names neither.
    """
    begin, ends = model.conventions.begin, model.conventions.ends
    if begin is None and not ends:
        raise UserError(f"{model.source} names no token of begin or end, to stand before a text")
    return ends[0] if begin is None else begin
