"""Base of the configurations of models: all that a run asks of one, whatever it is a model of."""

import abc
from typing import Any

import jax

from pjit_train.sharding import Rules


class ModelConfig(abc.ABC):
    """Base of all models' configurations, which are frozen dataclasses."""

    @property
    @abc.abstractmethod
    def num_params(self) -> int:
        """Elements of all parameters of the built model."""

    @abc.abstractmethod
    def build(self, key: jax.Array, rules: Rules) -> Any:
        """The model with random parameters, made sharded by the rules."""

    def embeddings(self, rules: Rules, mesh: Any) -> Any:
        """The `Embeddings` that a model looks up in on a mesh; None where it has none."""
        return None

    def bags(self, batch: Any) -> dict[str, Any]:
        """The `Bags` of a batch that the embeddings of a model look up, by feature."""
        return {}
