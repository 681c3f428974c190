"""Collectives on a slice: groups of a mesh, schedules, their replay, prices, layouts."""

from topology.collectives.collectives import (
    EFFICIENCIES,
    KINDS,
    BroadcastRound,
    Cost,
    Network,
    arrivals,
    broadcast_rounds,
    check_kind,
    collective_cost,
    lower_bounds,
    permute_pairs,
)

__all__ = [
    "EFFICIENCIES",
    "KINDS",
    "BroadcastRound",
    "Cost",
    "Network",
    "arrivals",
    "broadcast_rounds",
    "check_kind",
    "collective_cost",
    "lower_bounds",
    "permute_pairs",
]
