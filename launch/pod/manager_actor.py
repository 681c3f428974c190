"""The pod manager as a Ray actor, whom Ray starts again where it dies, and how it is asked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launch.pod.manager import Impact, Manager, Placed, State
from pjit_train.waiting import told
from topology import Part, Placement, Slice
from topology.hardware import Pod

_ANSWER = 300.0  # seconds in which the manager must answer, its start included


class ManagerActor:
    """Handle of a `Manager` in a process of its own, on this node: it is there as long as this one.

    Args:
      file, blocks, pod: of `Manager`.
      say: called with a line on what is waited for.

    All that asks raises a RayError where the manager raised an error (a RayTaskError, whose `cause`
    that is) or does not answer in time.
    """

    def __init__(self, file: Path, blocks: int, pod: Pod, say: Callable[[str], None]):
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        manager = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Manager)
        self._actor: Any = manager.options(scheduling_strategy=node).remote(str(file), blocks, pod)
        self._say = say

    def place(self, wanted: Slice, smaller: list[Slice]) -> Placed:
        return self._ask("place", wanted, smaller)

    def fail(self, part: Part) -> Impact:
        return self._ask("fail", part)

    def repair(self, part: Part) -> Impact:
        return self._ask("repair", part)

    def would_place(self, wanted: Slice, smaller: list[Slice]) -> Slice:
        return self._ask("would_place", wanted, smaller)

    def drain(self, part: Part) -> None:
        self._ask("drain", part)

    def state(self) -> State:
        return self._ask("state")

    def placement(self) -> Placement:
        """The slice and its blocks, once it is placed."""
        return self.state().placement

    def kill(self) -> None:
        """Kills its process; Ray starts another."""
        ray.kill(self._actor, no_restart=False)

    def close(self) -> None:
        """Ends it for good."""
        ray.kill(self._actor)

    def _ask(self, method: str, *args) -> Any:
        with told("the pod manager to answer", say=self._say):
            return ray.get(getattr(self._actor, method).remote(*args), timeout=_ANSWER)
