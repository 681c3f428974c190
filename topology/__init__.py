"""The TPU v4 pod: its chips, its twisted tori, its optical switches, and what they give.

A library of its own: it needs numpy and scipy, and no JAX.
"""

from topology import fabric, light
from topology.fabric import Changes, Fabric, Placement
from topology.hardware import PODS, TPU_V3, TPU_V4, TPU_V5P
from topology.parts import SWITCHES, Part, Switch
from topology.shapes import legal_shapes, nearest_shape, shipped_twist
from topology.slices import DIRECTIONS, Slice
from topology.twists import all_twists, ranked_twists

__all__ = [
    "DIRECTIONS",
    "PODS",
    "SWITCHES",
    "TPU_V3",
    "TPU_V4",
    "TPU_V5P",
    "Changes",
    "Fabric",
    "Part",
    "Placement",
    "Slice",
    "Switch",
    "all_twists",
    "fabric",
    "legal_shapes",
    "light",
    "nearest_shape",
    "ranked_twists",
    "shipped_twist",
]
