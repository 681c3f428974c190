"""Sparse training in JAX: masks, algorithms and recipes around any optax optimizer.

The names of JaxPruner's interface (Lee et al., 2023) mean the same here; docs/jaxpruner.md lists
what differs.
"""

from sparsity import sparsity_distributions, sparsity_schedules, sparsity_types
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
from sparsity.base_updater import BaseUpdater, NoPruning, SparseState, apply_mask
from sparsity.mask_calculator import get_topk_fn
from sparsity.nm import check_nm, nm_mask, nm_violations, transposable_mask
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
    "BaseUpdater",
    "Block",
    "Channel",
    "GlobalMagnitudePruning",
    "GlobalSaliencyPruning",
    "IterativeNMPruning",
    "MagnitudePruning",
    "NByM",
    "NoPruning",
    "NoUpdateSchedule",
    "OneShotSchedule",
    "PeriodicSchedule",
    "PolynomialSchedule",
    "RandomPruning",
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
    "erk",
    "get_topk_fn",
    "global_topk_masks",
    "nm_mask",
    "nm_violations",
    "register_algorithm",
    "sparsity_distributions",
    "sparsity_schedules",
    "sparsity_types",
    "summarize_intersection",
    "summarize_sparsity",
    "topk_mask",
    "transposable_mask",
    "uniform",
]
