"""Rows of the tables of families: how keys of config.json and tensors pair with Torsion's names."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pjit_train.errors import UserError
from pjit_train.models.block_config import BlockConfig

REQUIRED = object()
ABSENT = object()


@dataclasses.dataclass(frozen=True)
class Key:
    """Key of config.json, and how its value is read.

    Attributes:
      name: dots lead into objects.
      kind: int, float, bool, or Hugging Face's name of each choice -> Torsion's; a tuple of values
        is that of the keys in it.
      default: what `transformers` takes where the key is absent.
      nullable: whether null means None, and not that the key is absent.
    """

    name: str
    kind: type | Mapping[str, Any] = int
    default: Any = REQUIRED
    nullable: bool = False

    def read(self, document: Mapping[str, Any]) -> Any:
        """Torsion's value of the key in a document.

        Raises:
          UserError: there is none and there has to be, or it is of another kind.
        """
        value = find(document, self.name)
        if value is None and self.nullable:
            return None
        if value is None or value is ABSENT:
            if self.default is REQUIRED:
                raise UserError(f"{self.name} is missing")
            if self.default is None:
                return None
            value = self.default
        if isinstance(self.kind, Mapping):
            if not isinstance(value, str) or value not in self.kind:
                known = ", ".join(self.kind)
                raise UserError(f"{self.name}={value!r} is not supported; {known} are")
            ours = self.kind[value]
            return tuple(part.read(document) for part in ours) if isinstance(ours, tuple) else ours
        kinds = (int, float) if self.kind is float else (self.kind,)
        if type(value) not in kinds or (self.kind is int and value < 1):
            wanted = {int: "a positive integer", float: "a number", bool: "true or false"}
            raise UserError(f"{self.name}={value!r} must be {wanted[self.kind]}")
        return self.kind(value)

    def write(self, value: Any) -> dict[str, Any]:
        """Returns Hugging Face's keys and values for a value of Torsion's.

        Raises:
          UserError: Hugging Face has no such choice; the message names the choices there are.
        """
        if not isinstance(self.kind, Mapping):
            return {self.name: value}
        for theirs, ours in self.kind.items():
            if isinstance(ours, tuple) and isinstance(value, tuple) and len(ours) == len(value):
                parts = zip(ours, value, strict=True)
                return {self.name: theirs} | {part.name: x for part, x in parts}
            if ours == value:
                return {self.name: theirs}
        raise UserError(f"use {', '.join(str(x) for x in self.kind.values())}")


def find(document: Mapping[str, Any], name: str) -> Any:
    """The value at a dotted name; ABSENT where there is none."""
    found: Any = document
    for part in name.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return ABSENT
        found = found[part]
    return found


@dataclasses.dataclass(frozen=True)
class Derived:
    """Fields of Torsion's configuration that several keys of config.json say together.

    Attributes:
      fields: names of the fields.
      keys: of config.json that `read` takes into account.
      read: document -> fields and their values; a UserError names the key that is wrong.
      write: configuration -> (dotted) keys and their values; a UserError says what cannot be said.
    """

    fields: tuple[str, ...]
    keys: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a Hugging Face folder and the parameters of Torsion that it holds.

    Attributes:
      name: "{}" stands for the number of the layer, and the parameters then have a leading axis of
        layers.
      layout: axes of a parameter -> axes of the tensor, each the product of those it lists ("1"
        lists none): "dhk -> hk,d" is a tensor [heads * head_dim, d_model].
      paths: the parameters; more than one are joined along an axis of the tensor.
      axis: of the tensor, along which they are joined; they may differ in size along it.
    """

    name: str
    layout: str
    paths: tuple[str, ...]
    axis: int = -1

    def shape(self, ours: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Shape of the tensor of one layer.

        Args:
          ours: of each parameter in it.
        """
        shapes = [list(self._shape(shape)) for shape in ours]
        joined = shapes[0]
        joined[self.axis] = sum(shape[self.axis] for shape in shapes)
        return tuple(joined)

    def join(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Makes the tensor of one layer from its parameters."""
        order = self._order()
        parts = [x.transpose(order).reshape(self._shape(x.shape)) for x in ours]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=self.axis)

    def split(self, theirs: np.ndarray, ours: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """Splits the tensor of one layer into its parameters.

        Args:
          ours: shape of each of them.
        """
        order = self._order()
        back = np.argsort(order)
        ends = np.cumsum([self._shape(shape)[self.axis] for shape in ours])[:-1]
        parts = np.split(theirs, ends, axis=self.axis)
        return [
            part.reshape([shape[i] for i in order]).transpose(back)
            for part, shape in zip(parts, ours, strict=True)
        ]

    def _shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(math.prod(ours[i] for i in group) for group in self._groups())

    def _order(self) -> list[int]:
        return [i for group in self._groups() for i in group]

    def _groups(self) -> list[list[int]]:
        ours, theirs = self.layout.split(" -> ")
        return [[ours.index(a) for a in group if a != "1"] for group in theirs.split(",")]


@dataclasses.dataclass(frozen=True)
class Family:
    """Family of models, by `model_type` of `transformers`, in the terms of Torsion.

    Attributes:
      architecture: the class of `transformers` that has these tensors.
      ours: fields of Torsion's configuration that are the same in all of the family.
      keys: other fields -> keys of config.json.
      theirs: keys of config.json that must have these values where they are present.
      base: the prefix of names that files of the model without its head leave out.
      derived: fields that follow from several keys.
      modern: document -> one whose older and implicit spellings are those of the table.
      harmless: keys of this family's config.json that change nothing that is computed.
      heads_divide: whether `transformers` refuses num_heads that do not divide d_model.
    """

    architecture: str
    config: type[BlockConfig]
    ours: dict[str, Any]
    keys: dict[str, Key]
    theirs: dict[str, Any]
    base: str
    tensors: tuple[Tensor, ...]
    derived: tuple[Derived, ...] = ()
    modern: Callable[[dict[str, Any]], dict[str, Any]] = dict
    harmless: tuple[str, ...] = ()
    heads_divide: bool = False

    @property
    def names(self) -> set[str]:
        """Names of config.json, without what is within objects, that say what is computed."""
        names = {key.name for key in self.keys.values()} | set(self.theirs)
        names |= {name for part in self.derived for name in part.keys}
        return {name.split(".")[0] for name in names}

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of Torsion's configuration that config.json says."""
        return (*self.keys, *(field for part in self.derived for field in part.fields))


def linear(path: str, name: str, kernel: str = "io -> o,i", bias: str = "o -> o"):
    """Rows of a linear layer."""
    return (
        Tensor(f"{name}.weight", kernel, (f"{path}.kernel",)),
        Tensor(f"{name}.bias", bias, (f"{path}.bias",)),
    )


def norm(path: str, name: str, layout: str = "d -> d"):
    """Rows of a norm."""
    return (
        Tensor(f"{name}.weight", layout, (f"{path}.scale",)),
        Tensor(f"{name}.bias", layout, (f"{path}.bias",)),
    )


def attention(query: str, key: str, value: str, out: str):
    """Rows of the four matmuls of attention."""
    names = {"query": query, "key": key, "value": value}
    projections = [
        linear(f"blocks.attention.{ours}", theirs, "dhk -> hk,d", "hk -> hk")
        for ours, theirs in names.items()
    ]
    return (*sum(projections, ()), *linear("blocks.attention.out", out, "hkd -> d,hk"))
