"""Sparse training in JAX: masks, algorithms and recipes around any optax optimizer.

The names of JaxPruner's interface (Lee et al., 2023) mean the same here; docs/jaxpruner.md lists
what differs.
"""

from sparsity import recipes, sparsity_distributions, sparsity_schedules, sparsity_types
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
from sparsity.masks.mvue import mvue
from sparsity.masks.nm import check_nm, nm_mask, nm_violations
from sparsity.masks.topk import global_topk_masks, topk_mask
from sparsity.masks.transposable import transposable_mask
from sparsity.numbers import formats
from sparsity.numbers.encoding import Encoded, bits_per_element, decode, encode
from sparsity.numbers.formats import (
    FORMATS,
    FP8,
    HBFP,
    MX,
    NF4,
    NVFP4,
    Format,
    Int,
    TiledFP8,
    check_blocks,
    get_format,
)
from sparsity.numbers.hadamard import hadamard
from sparsity.numbers.quantization import block_scales, clipped, fake_quantize, quantize
from sparsity.numbers.quantized import MatmulFormats, Quantization, Quantizer
from sparsity.post_training.interplay import dot_interplay, lost_maxima, tensor_interplay
from sparsity.post_training.one_shot import sparsegpt, wanda_mask, wanda_scores
from sparsity.pruning import Pruning
from sparsity.recipes import decay, patterns
from sparsity.recipes.autoswitch import AutoSwitch, scale_by_step_adam
from sparsity.recipes.kernels import MaskedKernel, PackedKernel, dense, dense_tree
from sparsity.recipes.recipes import Recipe
from sparsity.sparsity_distributions import erk, uniform
from sparsity.sparsity_schedules import (
    NoUpdateSchedule,
    OneShotSchedule,
    PeriodicSchedule,
    PolynomialSchedule,
)
from sparsity.sparsity_types import Block, Channel, NByM, SparsityType, Unstructured
from sparsity.updater import Sparsity, Updater
from sparsity.utils import summarize_intersection, summarize_sparsity

__all__ = [
    "ACDC",
    "ALGORITHMS",
    "ALGORITHM_REGISTRY",
    "FORMATS",
    "FP8",
    "HBFP",
    "MX",
    "NF4",
    "NVFP4",
    "SET",
    "AdamBasedFisherPruning",
    "AutoSwitch",
    "BaseUpdater",
    "Block",
    "Channel",
    "Encoded",
    "Format",
    "GlobalMagnitudePruning",
    "GlobalSaliencyPruning",
    "Int",
    "IterativeNMPruning",
    "MagnitudePruning",
    "MaskedKernel",
    "MatmulFormats",
    "NByM",
    "NoPruning",
    "NoUpdateSchedule",
    "OneShotSchedule",
    "PackedKernel",
    "PeriodicSchedule",
    "PolynomialSchedule",
    "Pruning",
    "Quantization",
    "Quantizer",
    "RandomPruning",
    "Recipe",
    "RigL",
    "SaliencyPruning",
    "SparseState",
    "Sparsity",
    "SparsityType",
    "StaticRandomSparse",
    "SteMagnitudePruning",
    "SteRandomPruning",
    "TiledFP8",
    "TopKAST",
    "Unstructured",
    "Updater",
    "all_algorithm_names",
    "apply_mask",
    "bits_per_element",
    "block_scales",
    "check_blocks",
    "check_nm",
    "clipped",
    "create_updater_from_config",
    "decay",
    "decode",
    "dense",
    "dense_tree",
    "dot_interplay",
    "encode",
    "erk",
    "fake_quantize",
    "formats",
    "get_format",
    "get_topk_fn",
    "global_topk_masks",
    "hadamard",
    "lost_maxima",
    "mvue",
    "nm_mask",
    "nm_violations",
    "patterns",
    "quantize",
    "recipes",
    "register_algorithm",
    "scale_by_step_adam",
    "sparsegpt",
    "sparsity_distributions",
    "sparsity_schedules",
    "sparsity_types",
    "summarize_intersection",
    "summarize_sparsity",
    "tensor_interplay",
    "topk_mask",
    "transposable_mask",
    "uniform",
    "wanda_mask",
    "wanda_scores",
]
