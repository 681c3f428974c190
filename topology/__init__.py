"""TPU pods: chips, tori, optical switches, and the bandwidth and goodput that they give.

A library of its own: it needs numpy and scipy, and no JAX.
"""

from topology import collectives, embeddings, fabric
from topology.collectives.collectives import Cost, Network, collective_cost
from topology.collectives.degraded import degraded_cost
from topology.collectives.groups import Groups, groups_of_axes
from topology.collectives.layout import Layout, Traffic, lay_mesh, traffic_seconds
from topology.collectives.replay import replay
from topology.collectives.schedules import dimension_rings, hamiltonian_ring, schedule
from topology.fabric import light
from topology.fabric.fabric import Changes, Fabric, Placement
from topology.fabric.parts import SWITCHES, Part, Switch
from topology.fleet import availability, checkpoint_interval
from topology.fleet.pod_simulation import simulate as simulate_pod
from topology.fleet.policies import Policy
from topology.fleet.workload import FailureRates, Job, Outage
from topology.hardware import PODS, TPU_V3, TPU_V4, TPU_V5E, TPU_V5P, TPU_V6E, any_torus
from topology.routing import throughput
from topology.routing.throughput import all_to_all
from topology.torus.shapes import legal_shapes, nearest_shape, shipped_twist
from topology.torus.slices import DIRECTIONS, Slice
from topology.torus.twists import all_twists, ranked_twists

__all__ = [
    "DIRECTIONS",
    "PODS",
    "SWITCHES",
    "TPU_V3",
    "TPU_V4",
    "TPU_V5E",
    "TPU_V5P",
    "TPU_V6E",
    "Changes",
    "Cost",
    "Fabric",
    "FailureRates",
    "Groups",
    "Job",
    "Layout",
    "Network",
    "Outage",
    "Part",
    "Placement",
    "Policy",
    "Slice",
    "Switch",
    "Traffic",
    "all_to_all",
    "all_twists",
    "any_torus",
    "availability",
    "checkpoint_interval",
    "collective_cost",
    "collectives",
    "degraded_cost",
    "dimension_rings",
    "embeddings",
    "fabric",
    "groups_of_axes",
    "hamiltonian_ring",
    "lay_mesh",
    "legal_shapes",
    "light",
    "nearest_shape",
    "ranked_twists",
    "replay",
    "schedule",
    "shipped_twist",
    "simulate_pod",
    "throughput",
    "traffic_seconds",
]
