"""A study of N:M recipes: what is trained, what it costs, and the table and figure of its losses.

All runs have the same model, data and budget. Two kinds of dense runs ask what sparsity is worth:
one that costs as many FLOPs as a sparse run, and a smaller model of as many bytes.
"""

import collections
import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pjit_train.errors import UserError
from pjit_train.markdown import markdown_table
from pjit_train.models.transformer import TransformerConfig
from pjit_train.run import Run
from pjit_train.sharding import Rules
from pjit_train.step import new_params
from pjit_train.tasks.language_modelling import language_model
from sparsity.ranges import Count, check_choice, check_fields
from sparsity.recipes import Recipe
from sparsity.recipes.patterns import Geometric, parse_pattern
from sparsity.recipes.recipe_updater import RecipeState

RECIPES = {
    "sr_ste": "SR-STE",
    "mask_decay": "mask decay",
    "structure_decay": "structure decay",
    "mdgf_linear": "MdGf-linear",
    "mdgf_exponential": "MdGf-exponential",
    "sdgf_stepwise": "SdGf-stepwise",
    "sdgf_geometric": "SdGf-geometric",
    "step": "STEP",
}
"""The recipes that can be studied, files of configs/recipes, and what tables call them."""

DENSE, EQUAL_FLOPS, EQUAL_BYTES = "dense", "dense_equal_flops", "dense_equal_bytes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeStudy:
    """Recipes, patterns and seeds that the study compares. Dense runs are always among those that
    are trained.

    Attributes:
      recipes: names in `RECIPES`.
      patterns: N:M, N weights kept of every M.
      seeds: how many; 0, 1, ... of parameters and data.
      layers: regular expression for the names of the kernels that are pruned.
    """

    recipes: Sequence[str] = tuple(RECIPES)
    patterns: Sequence[str] = ("2:4", "1:4", "1:8", "1:16", "1:32")
    seeds: Count = 3
    layers: str = "(attention|feed_forward)/.*kernel"

    def __post_init__(self):
        check_fields(self, UserError)
        for name in self.recipes:
            check_choice("study: recipe", name, RECIPES, UserError)
        for text in self.patterns:
            try:
                parse_pattern(text)
            except ValueError as error:
                raise UserError(f"study: {error}") from None
        if not self.patterns:
            raise UserError("study: patterns=() is empty; give one or more, such as '2:4'")


class Result(NamedTuple):
    """Result of a run of a study.

    Attributes:
      recipe: of `RECIPES`, or one of the dense ones.
      pattern: None for the dense run that all are compared with.
      loss: of the validation text at the end, in nats a token; of sparse runs with sparse weights.
      flops: of its training, by `training_flops`.
      bytes: of its parameters, by `parameter_bytes`.
    """

    recipe: str
    pattern: str | None
    seed: int
    steps: int
    loss: float
    flops: float
    bytes: float
    d_model: int
    d_ff: int


def build_updater(run: Run):
    """The updater of a run's recipe without a mesh, and the abstract parameters.

    Raises:
      UserError: the recipe does not fit the model.
    """
    params = abstract_params(run.model, run.rules)
    try:
        return run.build_updater(params), params
    except ValueError as error:
        raise UserError(f"study: {error}") from error


@functools.cache
def abstract_params(model: TransformerConfig, rules: Rules):
    """Returns a model's parameters as shapes and dtypes."""
    return jax.eval_shape(lambda: new_params(model, rules, 0))


def training_flops(run: Run, *, switched_at: int | None = None) -> float:
    """Floating-point operations of a whole run, on a machine that leaves out products with zeros.

    A matmul with a kernel of P weights is 2 P for each token in the forward pass, 2 P for the
    gradient of its input and 2 P for that of the kernel. Where a recipe reads pruned weights as
    zeros (D = 0), the first two are N/M of that; the third stays whole, since the next mask may
    keep another weight. In a dense phase, and where pruned weights are read as D W with D > 0, all
    three are whole. What is not a pruned kernel is as `Task.flops` counts.

    Args:
      switched_at: the first masked step of a run whose recipe has an AutoSwitch; -1 for none.
    """
    tokens = run.data.batch_size * run.positions
    total = run.steps * run.flops_per_step
    updater, _ = build_updater(run)
    if updater is None:
        return total
    steps = jnp.arange(run.steps)
    if switched_at is not None:
        steps = RecipeState(steps, None, jnp.full(run.steps, switched_at), None)
    settings = jax.vmap(updater.settings)(steps)
    for plan in filter(None, updater.plans):
        target = "{}:{}".format(*plan.target)
        n, m = (np.asarray(x, np.float64) for x in settings["patterns"][target])
        saved = np.where(np.asarray(settings["decay"]) > 0, 0, 1 - n / m)
        total -= 4 * tokens * math.prod(plan.shape) * saved.sum()
    return float(total)


def parameter_bytes(run: Run) -> float:
    """Bytes of a run's parameters, its pruned kernels as values and ceil(log2 M) bits for each."""
    updater, params = build_updater(run)
    leaves = jax.tree.leaves(params)
    plans = [None] * len(leaves) if updater is None else updater.plans
    total = 0.0
    for plan, leaf in zip(plans, leaves, strict=True):
        n, m = (1, 1) if plan is None else plan.target
        total += leaf.size * n / m * (leaf.dtype.itemsize + (m - 1).bit_length() / 8)
    return total


def steps_of_equal_flops(run: Run) -> int:
    """Dense steps that cost what a run costs which is sparse from its first step to its last."""
    assert isinstance(run.sparsity, Recipe)
    sparse = dataclasses.replace(run, sparsity=Recipe(layers=run.sparsity.layers))
    dense = dataclasses.replace(run, sparsity=None)
    return max(round(run.steps * training_flops(sparse) / training_flops(dense)), 1)


def model_of_equal_bytes(run: Run) -> TransformerConfig:
    """A smaller dense model with the bytes of a sparse run's packed parameters.

    As many layers and heads; d_model is the multiple of 2 num_heads that comes nearest with d_ff in
    proportion, then d_ff takes up the rest.
    """
    budget, model = parameter_bytes(run), language_model(run)
    dense = dataclasses.replace(run, sparsity=None)

    def shaped(d_model: int, d_ff: int) -> TransformerConfig:
        heads = model.num_heads
        return dataclasses.replace(model, d_model=d_model, d_ff=d_ff, head_dim=d_model // heads)

    def size(shape: TransformerConfig) -> float:
        return parameter_bytes(dataclasses.replace(dense, model=shape))

    unit = 2 * model.num_heads
    widths = range(unit, model.d_model + 1, unit)
    in_proportion = lambda width: shaped(width, max(model.d_ff * width // model.d_model, 1))
    width = min(widths, key=lambda width: abs(size(in_proportion(width)) - budget))
    one, two = size(shaped(width, 1)), size(shaped(width, 2))
    return shaped(width, max(round(1 + (budget - one) / (two - one)), 1))


def largest_geometric(run: Run) -> int:
    """The largest k of SdGf-Geometric, of 16, 8, 4, 2 and 1, whose groups all kernels can hold."""
    recipe = run.sparsity
    assert isinstance(recipe, Recipe)
    for k in (16, 8, 4, 2):
        pattern = Geometric(k=k)
        try:
            build_updater(
                dataclasses.replace(run, sparsity=dataclasses.replace(recipe, pattern=pattern))
            )
        except UserError:
            continue
        return k
    return 1


def describe(values: Sequence[float], *, sign: str = "") -> str:
    """Mean and standard deviation of values over seeds; the mean alone of one."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):{sign}.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def against_equal_flops(results: Sequence[Result]) -> dict[tuple[str, str], list[float]]:
    """Compares losses with those of dense training for as many FLOPs: {(recipe, pattern): by seed}.

    The latter is interpolated between the dense runs of the same seed, linearly over the logarithm
    of their FLOPs; there is one for the cost of each pattern from the first step to the last.
    """
    levels = collections.defaultdict(list)
    for result in results:
        if result.recipe in (DENSE, EQUAL_FLOPS):
            levels[result.seed].append((math.log(result.flops), result.loss))
    differences = collections.defaultdict(list)
    for result in results:
        if result.recipe in RECIPES and levels[result.seed]:
            at, losses = zip(*sorted(levels[result.seed]), strict=True)
            dense = float(np.interp(math.log(result.flops), at, losses))
            differences[result.recipe, result.pattern].append(result.loss - dense)
    return dict(differences)


def against_equal_bytes(results: Sequence[Result]) -> dict[tuple[str, str], list[float]]:
    """Compares losses with those of the dense model of as many bytes: {(recipe, pattern): by
    seed}."""
    small = {(r.pattern, r.seed): r.loss for r in results if r.recipe == EQUAL_BYTES}
    differences = collections.defaultdict(list)
    for r in results:
        if r.recipe in RECIPES and (r.pattern, r.seed) in small:
            differences[r.recipe, r.pattern].append(r.loss - small[r.pattern, r.seed])
    return dict(differences)


def make_table(study: RecipeStudy, results: Sequence[Result], notes: Sequence[str] = ()) -> str:
    """The three tables of a study, in Markdown; what has not been trained is a dash."""
    by_recipe = collections.defaultdict(list)
    for r in results:
        by_recipe[r.recipe, r.pattern].append(r)

    def losses(recipe: str, pattern: str | None) -> str:
        return describe([r.loss for r in by_recipe[recipe, pattern]])

    def share(recipe: str, pattern: str) -> str:
        whole = [r.flops for r in by_recipe[DENSE, None]]
        own = [r.flops for r in by_recipe[recipe, pattern]]
        return f" ({statistics.fmean(own) / whole[0]:.2f})" if own and whole else ""

    def shape(recipe: str, pattern: str, show) -> str:
        found = by_recipe[recipe, pattern]
        return show(found[0]) if found else "-"

    def differences(values) -> list[list[str]]:
        return [
            [name, *(describe(values.get((key, p), []), sign="+") for p in study.patterns)]
            for key, name in RECIPES.items()
            if key in study.recipes
        ]

    recipes = [(key, name) for key, name in RECIPES.items() if key in study.recipes]
    flops = differences(against_equal_flops(results))
    for row, (key, _) in zip(flops, recipes, strict=True):
        row[1:] = [cell + share(key, p) for cell, p in zip(row[1:], study.patterns, strict=True)]
    first = study.recipes[0] if study.recipes else ""
    sections = [
        "Validation loss at the end, in nats a token, of the sparse weights: mean and standard "
        "deviation over seeds.",
        markdown_table(
            ["", *study.patterns],
            [[name, *(losses(key, p) for p in study.patterns)] for key, name in recipes]
            + [["dense", losses(DENSE, None), *[""] * (len(study.patterns) - 1)]],
        ),
        "The loss minus that of a dense run of as many training FLOPs, which takes fewer steps; in "
        "brackets these FLOPs, as a share of those of the dense run of as many steps. FLOPs: a "
        "sparse phase takes N/M of the forward and input-gradient matmuls of pruned kernels and "
        "all of the weight-gradient ones; a phase that is dense, or reads pruned weights as D W "
        "with D > 0, takes all. Below, the dense runs for the cost of a pattern from the first "
        "step to the last; other costs are interpolated between them.",
        markdown_table(
            ["", *study.patterns],
            [
                *flops,
                ["dense loss", *(losses(EQUAL_FLOPS, p) for p in study.patterns)],
                [
                    "dense steps",
                    *(shape(EQUAL_FLOPS, p, lambda r: f"{r.steps:,}") for p in study.patterns),
                ],
            ],
        ),
        "The loss minus that of a smaller dense model whose parameters have the bytes of the "
        "packed sparse ones: kept values, and ceil(log2 M) bits for the place of each.",
        markdown_table(
            ["", *study.patterns],
            [
                *differences(against_equal_bytes(results)),
                ["dense loss", *(losses(EQUAL_BYTES, p) for p in study.patterns)],
                [
                    "dense d_model, d_ff",
                    *(
                        shape(EQUAL_BYTES, p, lambda r: f"{r.d_model}, {r.d_ff}")
                        for p in study.patterns
                    ),
                ],
                [
                    "dense bytes",
                    *(shape(EQUAL_BYTES, p, lambda r: f"{r.bytes:,.0f}") for p in study.patterns),
                ],
                [
                    "packed bytes",
                    *(shape(first, p, lambda r: f"{r.bytes:,.0f}") for p in study.patterns),
                ],
            ],
        ),
        *notes,
    ]
    return "\n\n".join(sections) + "\n"


def draw(study: RecipeStudy, results: Sequence[Result], path: Path) -> None:
    """Draws loss against sparsity, a line a recipe, with the standard deviation over seeds.

    Where a few losses are far above the others, they are written at the upper edge.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_recipe = collections.defaultdict(list)
    for r in results:
        by_recipe[r.recipe, r.pattern].append(r.loss)
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    places = np.arange(len(study.patterns))
    losses = [statistics.fmean(values) for values in by_recipe.values()]
    lowest, high = min(losses), float(np.quantile(losses, 0.9))
    top = min(high + 0.3 * (high - lowest), max(losses) + 0.05 * (max(losses) - lowest)) + 1e-3

    above: collections.Counter[Any] = (
        collections.Counter()
    )  # losses of a pattern that are written already

    def line(key: str, name: str, shift: float, **style) -> None:
        found = [(x, by_recipe[key, p]) for x, p in enumerate(study.patterns) if by_recipe[key, p]]
        if not found:
            return
        means = [statistics.fmean(values) for _, values in found]
        deviations = [statistics.stdev(v) if len(v) > 1 else 0.0 for _, v in found]
        at = [x + shift for x, _ in found]
        bars = axes.errorbar(at, means, deviations, label=name, capsize=2, linewidth=1.3, **style)
        for (x, _), mean in zip(found, means, strict=True):
            if mean > top:
                axes.annotate(
                    f"{mean:.2f} ↑",
                    (x, top),
                    (0, -2 - 11 * above[x]),
                    textcoords="offset points",
                    ha="center",
                    va="top",
                    fontsize=8,
                    color=bars.lines[0].get_color(),
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
                )
                above[x] += 1

    if dense := by_recipe[DENSE, None]:
        level = statistics.fmean(dense)
        axes.axhline(level, color="black", linewidth=1.3, label="dense")
        if len(dense) > 1:
            spread = statistics.stdev(dense)
            axes.axhspan(level - spread, level + spread, color="black", alpha=0.12, linewidth=0)
    line(EQUAL_FLOPS, "dense, fewer steps (FLOPs)", 0, color="black", linestyle=":", marker=".")
    line(EQUAL_BYTES, "dense, smaller (bytes)", 0, color="black", linestyle="--", marker=".")
    # Points of a pattern stand side by side, so that their error bars can be told apart.
    shifts = np.linspace(-0.2, 0.2, len(RECIPES))
    for (key, name), shift, marker in zip(
        RECIPES.items(), shifts, itertools.cycle("osD^vP*X"), strict=False
    ):
        line(key, name, shift, marker=marker, markersize=5)
    sparsity = [1 - n / m for n, m in map(parse_pattern, study.patterns)]
    labels = [f"{p}\n{100 * s:.3g} %" for p, s in zip(study.patterns, sparsity, strict=True)]
    axes.set_xticks(places, labels)
    axes.set_xlabel("pattern and sparsity of the pruned kernels")
    axes.set_ylabel("validation loss, nats a token")
    axes.set_ylim(top=top)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
