"""Quantized training: which matmuls read which number formats, composed with any sparsity recipe.

The numbers are emulated, unless asked otherwise: each operand takes the values of its format,
exactly, and the matmul itself is one of ordinary floating point. A native matmul, in the forward
pass, multiplies the codes.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import jax

from sparsity.masks.layers import KERNELS, assign, listed, names
from sparsity.numbers.blocks import check_block
from sparsity.numbers.formats import Format, check_blocks, find_scheme, format_name, get_format
from sparsity.numbers.native import Matmul, check_formats, check_matmul
from sparsity.numbers.quantization import clipped
from sparsity.numbers.quantized_kernels import Formats, Order, QuantizedKernel, figures, losses
from sparsity.numbers.rounding import ROUNDINGS, Rounding
from sparsity.ranges import check_choice
from sparsity.recipes.kernel_plan import Contraction, cuts, shards_of
from sparsity.recipes.kernels import dense

DEFAULT_LAYERS = {KERNELS: "mxfp8_e4m3"}
_PURPOSE = 3  # keeps random bits apart from those of parameters and samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulFormats:
    """The number formats of one matmul's operands; each a name, an object of `formats`, or None.

    Attributes:
      weights: of the kernel, blocks along the inputs.
      activations: of the inputs, blocks along the features of one token.
      gradients: of the outputs' gradients. With it the two products of the backward pass read
        numbers of formats as well, all blocks along the axis that each sums over: for the gradient
        of the inputs, gradients and weights along the outputs; for that of the kernel, gradients
        and activations along the tokens of a sequence. Without it, the backward pass reads the
        weights and activations of the forward pass, and gradients as they are.
      rounding: of weights and activations; "stochastic" rounds to even in evaluation.
      gradient_rounding: of gradients.
      matmul: "emulated", or "native": the forward pass multiplies codes of 8 bits, on hardware that
        does, and the scales after it; the backward pass is the same either way. For weights and
        activations of symmetric `Int`, or of `FP8`, with one scale to an output and to a token;
        see `native`.

    Raises:
      ValueError: an unknown format, rounding or matmul; formats without a native matmul.
    """

    weights: str | Format | None = None
    activations: str | Format | None = None
    gradients: str | Format | None = None
    rounding: Rounding = "even"
    gradient_rounding: Rounding = "even"
    matmul: Matmul = "emulated"

    def __post_init__(self) -> None:
        self.resolved()
        for name in ("rounding", "gradient_rounding"):
            check_choice(f"MatmulFormats: {name}", getattr(self, name), ROUNDINGS)
        check_choice("MatmulFormats: matmul", self.matmul, ("emulated", "native"))
        if self.matmul == "native":
            formats = self.resolved()
            check_formats(formats.weights, formats.activations)

    def resolved(self) -> Formats:
        """Returns the format objects in place of their names."""
        given = (self.weights, self.activations, self.gradients)
        weights, activations, gradients = (f if f is None else get_format(f) for f in given)
        return Formats(
            weights=weights,
            activations=activations,
            gradients=gradients,
            rounding=self.rounding,
            gradient_rounding=self.gradient_rounding,
            matmul=self.matmul,
        )

    def __str__(self) -> str:
        return str(self.resolved())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """Choice of the matmuls of a model that are quantized, and of their formats.

    Attributes:
      layers: formats by regular expression over the names of parameters; see `layers.assign`. A
        string such as "mxfp8_e4m3" is the format of weights and activations; one such as "W4A16" is
        a scheme of `formats.SCHEMES`. A matmul that no pattern matches reads what it always did.
      order: with a recipe, whether masks are made of the weights and what they keep is quantized;
        or masks are made of the quantized weights, and applied to those. Magnitudes that are equal
        then are kept by their index. Of gradients of pruned weights the recipe says the same.
      attention: format of queries, keys and values where the two products of attention read them,
        for each token and head along head_dim; None leaves them. Probabilities are never quantized.

    Raises:
      ValueError: an unknown format or order.
    """

    layers: Mapping[str, str | MatmulFormats | None] = dataclasses.field(
        default_factory=lambda: dict(DEFAULT_LAYERS)
    )
    order: Order = "sparsify_then_quantize"
    attention: str | Format | None = None

    def __post_init__(self) -> None:
        orders = ("sparsify_then_quantize", "quantize_then_sparsify")
        check_choice("quantization: order", self.order, orders)
        for pattern, formats in self.layers.items():
            try:
                _formats(formats)
            except ValueError as error:
                raise ValueError(f"quantization: layers: {pattern!r}: {error}") from None
        if self.attention is not None:
            try:
                get_format(self.attention)
            except ValueError as error:
                raise ValueError(f"quantization: attention: {error}") from None

    def build(
        self,
        params: Any,
        *,
        contraction: Contraction | None = None,
        seed: int = 0,
        activation_ways: Callable[[str], tuple[int, int]] = lambda name: (1, 1),
        tokens: tuple[int, int] | None = None,
        attention_operands: Collection[str] = (),
    ) -> "Quantizer":
        """Builds the `Quantizer` of a tree of parameters.

        Args:
          params: tree of arrays or of `jax.ShapeDtypeStruct`, with their shardings.
          contraction: (name, shape) -> the axes that a kernel's matmul sums over, negative and
            adjacent, or None for a parameter of no matmul; see `Recipe.build`.
          seed: of stochastic rounding.
          activation_ways: name -> shards that features of (inputs, outputs) are cut into.
          tokens: (tokens of a sequence, shards that they are cut into), for gradients.
          attention_operands: names of the kernels that give queries, keys and values.

        Raises:
          ValueError: a pattern matches no matmul; blocks do not divide an axis or its shards; a
            format of `attention`, and no kernel that gives its operands.
        """
        treedef: Any
        leaves, treedef = jax.tree.flatten(params)
        given = treedef.flatten_up_to(assign(params, self.layers))
        products = None if self.attention is None else get_format(self.attention)
        plans: list[_Plan | None] = []
        matmuls: list[str] = []
        for name, leaf, formats in zip(jax.tree.leaves(names(params)), leaves, given, strict=True):
            shape = tuple(leaf.shape)
            axes = -2 if contraction is None else contraction(name, shape)
            if axes is None or len(shape) < 2:
                plans.append(None)
                continue
            matmuls.append(name)
            axes = (axes,) if isinstance(axes, int) else tuple(axes)
            operand = products if name in attention_operands else None
            chosen = _formats(formats)
            plan = None
            if chosen is not None or operand is not None:
                plan = _Plan(name, chosen or Formats(), axes, operand)
                plan.check(leaf, activation_ways(name), tokens)
            plans.append(plan)
        for pattern in self.layers:
            if not any(re.search(pattern, name) for name in matmuls):
                raise ValueError(
                    f"quantization: layers: {pattern!r} matches no matmul; use names of "
                    + ", ".join(matmuls)
                )
        if products is not None and not any(plan and plan.products for plan in plans):
            raise ValueError(
                f"quantization: attention={self.attention!r} and no kernel gives queries, keys or "
                "values (attention_operands); use attention=None"
            )
        return Quantizer(
            quantization=self,
            treedef=treedef,
            plans=tuple(plans),
            matmuls=tuple(matmuls),
            seed=seed,
        )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Plan of the quantization of one kernel's matmul."""

    name: str
    formats: Formats
    axes: tuple[int, ...]  # of the contraction
    products: Format | None

    @property
    def rank(self) -> int:
        """Number of axes of one layer's kernel: its inputs lead, save in a transposed table."""
        return max(-self.axes[0], 2)

    def clipped(self, w: jax.Array, format: Format) -> jax.Array:
        """bool, 1 where a weight of [stacked layers, ...] is clipped by its format."""
        first, inputs = w.ndim + self.axes[0], len(self.axes)
        flat = w.reshape(*w.shape[:first], -1, *w.shape[first + inputs :])

        def of_layer(w: jax.Array) -> jax.Array:
            return clipped(w, format, axis=self.axes[-1])

        return jax.vmap(of_layer)(flat) if w.ndim > self.rank else of_layer(flat)

    def check(
        self, leaf: Any, activation_ways: tuple[int, int], tokens: tuple[int, int] | None
    ) -> None:
        """Raises a ValueError where blocks do not divide what they lie along, or its shards."""
        shape, shards = tuple(leaf.shape), shards_of(leaf)
        outputs = tuple(axis for axis in range(-self.rank, 0) if axis not in self.axes)
        f = self.formats
        pieces = {axes: cuts(shape, shards, axes) for axes in (self.axes, outputs)}

        def check(what: str, format: Format | None, axes: tuple[int, ...], ways: int) -> None:
            if format is not None:
                size = math.prod(shape[a] for a in axes)
                check_blocks(format, size, ways=ways, name=f"quantization: {self.name}: {what}")

        def check_weights(what: str, along: tuple[int, ...], across: tuple[int, ...]) -> None:
            check(what, f.weights, along, pieces[along])
            tile = 1 if f.weights is None else f.weights.output_block
            if tile > 1 and pieces[across] > 1:  # a last tile may be smaller, but none is cut
                size = math.prod(shape[a] for a in across)
                name = f"quantization: {self.name}: {what}, tiles across"
                check_block(tile, size, ways=pieces[across], name=name)

        check_weights("weights", self.axes, outputs)
        check("activations", f.activations, self.axes, activation_ways[0])
        check("the operands of attention", self.products, (-1,), 1)
        if f.matmul == "native":
            size = math.prod(shape[a] for a in self.axes)
            try:
                check_matmul(*check_formats(f.weights, f.activations), size, _device(leaf))
            except ValueError as error:
                raise ValueError(f"quantization: {self.name}: {error}") from None
        if f.gradients is None:
            return
        check_weights("weights along outputs", outputs, self.axes)
        check("gradients", f.gradients, outputs, activation_ways[1])
        if tokens is not None:
            for what, format in (("gradients", f.gradients), ("activations", f.activations)):
                name = f"quantization: {self.name}: {what} along tokens"
                if format is not None:
                    check_blocks(format, tokens[0], ways=tokens[1], name=name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantizer:
    """A quantization at work on the parameters of a model; see `Quantization.build`.

    Attributes:
      treedef: of the parameters.
      plans: for each of their leaves, what is quantized, or None.
      matmuls: names of all parameters of matmuls.
    """

    quantization: Quantization
    treedef: jax.tree_util.PyTreeDef
    plans: tuple[_Plan | None, ...]
    matmuls: tuple[str, ...]
    seed: int

    def formats(self, name: str) -> Formats | None:
        """Formats of the kernel `name`; None where its matmul is not quantized."""
        found = (plan.formats for plan in self.plans if plan is not None and plan.name == name)
        return next(found, None)

    def weights(self, tree: Any, clock: jax.Array | None = None) -> Any:
        """The tree with a `QuantizedKernel` in place of each kernel that is quantized.

        Gradients are to be taken through it.

        Args:
          tree: the parameters, or what a recipe's `weights` made of them.
          clock: int32 [], a number that no other forward pass of the run has, such as the step:
            random bits are a function of it, the seed and the name of the kernel. None is for
            evaluation, where what would be stochastic is rounded to even.
        """
        return self._map(lambda plan, kernel: self._wrapped(plan, kernel, clock), tree)

    def scored(self, params: Any) -> Any:
        """Arrays from which a recipe makes its masks, in place of the parameters."""
        if self.quantization.order == "sparsify_then_quantize":
            return params
        return self._map(lambda plan, w: self._wrapped(plan, w, None).dense(), params)

    def errors(self, tree: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Measures (|q(w) - w| / |w|, fraction of weights clipped) by kernel, float32 scalars.

        A weight is clipped where it is greater than the greatest value of its block.

        Args:
          tree: as `weights` takes it. Of pruned weights w is what a recipe reads in their place.
        """
        found = {}

        def measure(plan: _Plan, kernel: Any) -> Any:
            if (format := plan.formats.weights) is not None:
                w = dense(kernel)
                q = self._wrapped(plan, kernel, None).dense()
                found[plan.name] = figures(losses(w, q, plan.clipped(w, format)))
            return kernel

        self._map(measure, tree)
        return found

    def describe(self, titles: Mapping[str, str] = MappingProxyType({})) -> str:
        """Says in one line which matmuls are quantized and to what, and which are not.

        Args:
          titles: what people call a kernel, by its name, where that is not its name.
        """
        chosen, dense = {}, []
        plans = {plan.name: plan for plan in self.plans if plan is not None}
        for name in self.matmuls:
            formats = str(plans[name].formats) if name in plans else ""
            shown = titles.get(name, name)
            if formats:
                chosen[shown] = formats
            else:
                dense.append(re.sub("^blocks/|/kernel$", "", shown))
        parts = [listed(chosen)] if chosen else []
        if self.quantization.attention is None:
            dense.append("the products of attention")
        else:
            parts.append(f"{format_name(self.quantization.attention)} queries, keys and values")
            dense.append("the probabilities of attention")
        return f"quantized: {'; '.join(parts) or 'nothing'}; in full precision: {', '.join(dense)}"

    def _wrapped(self, plan: _Plan, kernel: Any, clock: jax.Array | None) -> QuantizedKernel:
        return QuantizedKernel(
            kernel=kernel,
            key=self._keys(plan, kernel.shape[: kernel.ndim - plan.rank], clock),
            formats=plan.formats,
            axes=plan.axes,
            rank=plan.rank,
            order=self.quantization.order,
            products=plan.products,
        )

    def _keys(
        self, plan: _Plan, stacked: tuple[int, ...], clock: jax.Array | None
    ) -> jax.Array | None:
        """Makes the `QuantizedKernel.key` of a forward pass."""
        if clock is None or not plan.formats.random:
            return None
        key = jax.random.fold_in(jax.random.key(self.seed), _PURPOSE)
        key = jax.random.fold_in(jax.random.fold_in(key, clock), zlib.crc32(plan.name.encode()))
        return jax.random.key_data(jax.random.split(key, stacked) if stacked else key)

    def _map(self, function: Callable[[_Plan, Any], Any], tree: Any) -> Any:
        """`function(plan, leaf)` for the kernels that are quantized; other leaves stay."""
        leaves = [
            leaf if plan is None else function(plan, leaf)
            for plan, leaf in zip(self.plans, self.treedef.flatten_up_to(tree), strict=True)
        ]
        return self.treedef.unflatten(leaves)


def _device(leaf: Any) -> jax.Device:
    """Device that holds a parameter, or will hold it: that of the least id."""
    sharding = getattr(leaf, "sharding", None)
    return jax.devices()[0] if sharding is None else min(sharding.device_set, key=lambda d: d.id)


def _formats(given: str | MatmulFormats | None) -> Formats | None:
    """The formats, as objects, that a value of `Quantization.layers` stands for."""
    if given is None or given == "dense":
        return None
    if isinstance(given, str):
        weights, activations = find_scheme(given) or (given, given)
        given = MatmulFormats(weights=weights, activations=activations)
    if not isinstance(given, MatmulFormats):
        raise ValueError(f"{given!r}; use the name of a format, MatmulFormats(...), or None")
    return given.resolved()
