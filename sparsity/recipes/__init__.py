"""Recipes: what is pruned, when and how, as data, and the updater that does it."""

from sparsity.recipes.recipes import (
    DEFAULT_LAYERS,
    Layers,
    Recipe,
    Variant,
    asp,
    mask_decay,
    mdgf_exponential,
    mdgf_linear,
    sdgf_geometric,
    sdgf_stepwise,
    sr_ste,
    step,
    structure_decay,
)

__all__ = [
    "DEFAULT_LAYERS",
    "Layers",
    "Recipe",
    "Variant",
    "asp",
    "mask_decay",
    "mdgf_exponential",
    "mdgf_linear",
    "sdgf_geometric",
    "sdgf_stepwise",
    "sr_ste",
    "step",
    "structure_decay",
]
