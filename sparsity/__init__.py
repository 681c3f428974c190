"""Sparse training in JAX: masks, algorithms and recipes around any optax optimizer.

The names of JaxPruner's interface (Lee et al., 2023) mean the same here; docs/jaxpruner.md lists
what differs.
"""

from sparsity import (
    decay,
    patterns,
    recipes,
    sparsity_distributions,
    sparsity_schedules,
    sparsity_types,
)
from sparsity.algorithms import (
    ACDC,
    SET,
    AdamBasedFisherPruning,
    GlobalMagnitudePruning,
    GlobalSaliencyPruning,
    IterativeNMPruning,
    MagnitudePruning,
    RandomPruning,
    RigL,
    SaliencyPruning,
    StaticRandomSparse,
    SteMagnitudePruning,
    SteRandomPruning,
    TopKAST,
)
from sparsity.api import (
    ALGORITHM_REGISTRY,
    ALGORITHMS,
    all_algorithm_names,
    create_updater_from_config,
    register_algorithm,
)
from sparsity.autoswitch import AutoSwitch, scale_by_step_adam
from sparsity.base_updater import BaseUpdater, NoPruning, SparseState, apply_mask
from sparsity.kernels import MaskedKernel, PackedKernel, dense, dense_tree
from sparsity.mask_calculator import get_topk_fn
from sparsity.nm import check_nm, nm_mask, nm_violations, transposable_mask
from sparsity.one_shot import sparsegpt, wanda_mask, wanda_scores
from sparsity.pruning import Pruning
from sparsity.recipes import Recipe
from sparsity.sparsity_distributions import erk, uniform
from sparsity.sparsity_schedules import (
    NoUpdateSchedule,
    OneShotSchedule,
    PeriodicSchedule,
    PolynomialSchedule,
)
from sparsity.sparsity_types import Block, Channel, NByM, SparsityType, Unstructured
from sparsity.topk import global_topk_masks, topk_mask
from sparsity.utils import summarize_intersection, summarize_sparsity

__all__ = [
    "ACDC",
    "ALGORITHMS",
    "ALGORITHM_REGISTRY",
    "SET",
    "AdamBasedFisherPruning",
    "AutoSwitch",
    "BaseUpdater",
    "Block",
    "Channel",
    "GlobalMagnitudePruning",
    "GlobalSaliencyPruning",
    "IterativeNMPruning",
    "MagnitudePruning",
    "MaskedKernel",
    "NByM",
    "NoPruning",
    "NoUpdateSchedule",
    "OneShotSchedule",
    "PackedKernel",
    "PeriodicSchedule",
    "PolynomialSchedule",
    "Pruning",
    "RandomPruning",
    "Recipe",
    "RigL",
    "SaliencyPruning",
    "SparseState",
    "SparsityType",
    "StaticRandomSparse",
    "SteMagnitudePruning",
    "SteRandomPruning",
    "TopKAST",
    "Unstructured",
    "all_algorithm_names",
    "apply_mask",
    "check_nm",
    "create_updater_from_config",
    "decay",
    "dense",
    "dense_tree",
    "erk",
    "get_topk_fn",
    "global_topk_masks",
    "nm_mask",
    "nm_violations",
    "patterns",
    "recipes",
    "register_algorithm",
    "scale_by_step_adam",
    "sparsegpt",
    "sparsity_distributions",
    "sparsity_schedules",
    "sparsity_types",
    "summarize_intersection",
    "summarize_sparsity",
    "topk_mask",
    "transposable_mask",
    "uniform",
    "wanda_mask",
    "wanda_scores",
]
