"""A prediction: a program's text and a slice in, seconds of a step and where they go out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from topology.plan.hlo import UnknownDialect, parse
from topology.plan.machine import STRAGGLE, Machine, machine_of
from topology.plan.pricing import Pricing
from topology.plan.replay import Interval, replay
from topology.plan.tree import Tree, tree_of
from topology.torus.slices import Slice


@dataclass(frozen=True)
class Prediction:
    """The time that a program takes on a slice.

    Attributes:
      low, high: seconds of a step: without transfers that queue for a link, and with.
      interval: the replays that these are of.
      not_understood: what of the program has no rule, and how often it was met.
    """

    low: float
    high: float
    interval: Interval
    not_understood: Counter[str]

    @property
    def seconds(self) -> float:
        return (self.low + self.high) / 2


def read(text: str) -> Tree:
    """The tree of a scheduled program. `hlo.UnknownDialect` where it is none."""
    try:
        return tree_of(parse(text))
    except (KeyError, IndexError) as error:
        raise UnknownDialect(f"HLO that is cut off or damaged: {error} is not there") from error


def predict(
    program: str | Tree,
    slice: Slice,
    *,
    machine: Machine | None = None,
    partitions: Sequence[Sequence[int]] | None = None,
    free: tuple[str, ...] = (),
) -> Prediction:
    """Predicts the step of a program on a slice as it is wired.

    Args:
      machine: of the slice's pod, unless given.
      partitions: [slice, x, y, z] of the chip that runs each partition; by default row-major.
      free: kinds of `topology.collectives` that cost nothing, to see what they cost.

    Raises:
      ValueError: the program is for another number of chips.
    """
    tree = read(program) if isinstance(program, str) else program
    machine = machine_of(slice.pod) if machine is None else machine
    chips = slices = None
    if partitions is not None:
        places = np.asarray(partitions)
        inside = (places[:, 1:] >= 0).all() and (places[:, 1:] < slice.shape).all()
        if not inside:
            raise ValueError(f"slice {slice}: the program lies on chips outside it")
        slices, chips = places[:, 0], slice.index(places[:, 1:])
    pricing = Pricing(tree.module, slice, machine, chips=chips, slice_of=slices, free=free)
    interval = replay(tree, pricing)
    return Prediction(
        interval.low.seconds,
        interval.high.seconds,
        interval,
        tree.not_understood + pricing.not_understood,
    )


def across_slices(
    prediction: Prediction, slices: int, *, gradient_bytes: float, machine: Machine
) -> tuple[float, float]:
    """(low, high) seconds of a step on several slices, of its program on one.

    Each chip sums its shard of the gradients with its peers of the other slices, over its part of
    its host's network: a ring's 2 (n - 1) / n times the bytes. What of it the backward pass hides
    is not known from the program of one slice: nothing is hidden in the upper end, half in the
    lower. Every doubling of the slices adds a part of the step for the slowest of them.

    Args:
      gradient_bytes: of a chip's shard.
    """
    if slices <= 1:
        return prediction.low, prediction.high
    sent = 2 * (slices - 1) / slices * gradient_bytes / machine.dcn
    behind = 1 + STRAGGLE.value * float(np.log2(slices))
    return (
        prediction.low * behind + sent / 2,
        prediction.high * behind + sent,
    )


def summary(prediction: Prediction) -> dict[str, Any]:
    """The figures of a prediction as JSON: seconds, and where they go, of the upper replay."""
    step = prediction.interval.high
    found = sorted(step.collectives.values(), key=lambda c: -c.seconds)
    return {
        "step_seconds": {"low": prediction.low, "high": prediction.high},
        "compute_seconds": step.computing,
        "matmul_seconds": step.matmuls,
        "network_seconds": step.network,
        "exposed_network_seconds": step.exposed,
        "copy_wait_seconds": step.waits,
        "recomputed_by_compiler_seconds": step.recomputed,
        "collectives": [
            {
                "kind": c.kind,
                "strategy": c.strategy,
                "members": c.members,
                "rule": c.rule,
                "count": c.count,
                "bytes": c.bytes,
                "seconds": c.seconds,
                "exposed_seconds": c.exposed,
                "hidden_seconds": c.hidden,
            }
            for c in found
        ],
        "compute": dict(sorted(step.compute.items(), key=lambda item: -item[1])),
        "rules": dict(step.rules),
        "not_understood": dict(prediction.not_understood),
    }
