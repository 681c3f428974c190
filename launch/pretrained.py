"""Bindings of a run that starts from a pretrained model, whose folder says what they do not."""

import dataclasses
from pathlib import Path
from typing import Any

from launch.bindings import Bindings, Configurable, format_value
from launch.explain import IMPORT
from pjit_train.data.text import TextData
from pjit_train.data.tokenizers import TokenizerJson
from pjit_train.errors import UserError
from pjit_train.run import Run


def pretrained_bindings(bound: Bindings) -> list[str]:
    """Bindings of the model, and of the path of the tokenizer, of `run.Run.initial_weights`.

    The model's come where a run binds no `model`, and those of its fields that are not bound; the
    tokenizer's where it is a `TokenizerJson` without a path.

    Raises:
      UserError: the folder is no model that we have, or cannot be had; or none is named, and model
        and tokenizer are missing.
    """
    values = {(key.configurable, key.parameter): value for key, value in bound.values.items()}

    def get(cls: type, parameter: str) -> Any:
        return values.get((Configurable(cls.__module__, cls.__name__), parameter))

    source = get(Run, "initial_weights")
    wants_model = get(Run, "model") is None
    tokenizer = getattr(get(TextData, "tokenizer"), "configurable", None)
    named = Configurable(TokenizerJson.__module__, TokenizerJson.__name__)
    wants_tokenizer = tokenizer == named and get(TokenizerJson, "path") is None
    if source is None and wants_model and wants_tokenizer:
        raise UserError(
            "run.Run.initial_weights is missing; bind it to a Hugging Face folder, a .gguf file or "
            "hf:OWNER/NAME"
        )
    if not isinstance(source, str) or not (wants_model or wants_tokenizer):
        return []

    from pjit_train.huggingface.conventions import read_conventions
    from pjit_train.huggingface.sources import folder_of
    from pjit_train.huggingface.weights import check

    folder, found = folder_of(source), []
    if wants_model:
        _, config = check(folder)
        name = _short(type(config))
        found.append(f"run.Run.model = @{name}()")
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if value != field.default and get(type(config), field.name) is None:
                found.append(f"{name}.{field.name} = {format_value(value)}")
    if wants_tokenizer:
        file, _ = read_conventions(folder)
        path = str(Path(file.path).absolute())
        found.append(f"tokenizers.TokenizerJson.path = {format_value(path)}")
        if file.separator_token and get(TokenizerJson, "separator_token") is None:
            token = format_value(file.separator_token)
            found.append(f"tokenizers.TokenizerJson.separator_token = {token}")
    return found


def _short(cls: type) -> str:
    """The name of a class in bindings of the command line, such as run.Run."""
    module = cls.__module__.rpartition(".")[2]
    assert module in IMPORT, cls
    return f"{module}.{cls.__name__}"
