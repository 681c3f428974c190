"""The algorithms of sparse training, by name in `sparsity.api`."""

from sparsity.algorithms.acdc import ACDC
from sparsity.algorithms.adam_fisher import AdamBasedFisherPruning
from sparsity.algorithms.global_pruners import GlobalMagnitudePruning, GlobalSaliencyPruning
from sparsity.algorithms.iterative_nm import IterativeNMPruning
from sparsity.algorithms.pruners import MagnitudePruning, RandomPruning, SaliencyPruning
from sparsity.algorithms.sparse_trainers import SET, RigL, StaticRandomSparse
from sparsity.algorithms.ste import SteMagnitudePruning, SteRandomPruning
from sparsity.algorithms.topkast import TopKAST

__all__ = [
    "ACDC",
    "SET",
    "AdamBasedFisherPruning",
    "GlobalMagnitudePruning",
    "GlobalSaliencyPruning",
    "IterativeNMPruning",
    "MagnitudePruning",
    "RandomPruning",
    "RigL",
    "SaliencyPruning",
    "StaticRandomSparse",
    "SteMagnitudePruning",
    "SteRandomPruning",
    "TopKAST",
]
