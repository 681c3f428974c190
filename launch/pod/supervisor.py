"""Supervisor of a run: attempt after attempt, with what failed replaced, until it is done.

An attempt is the run on all hosts from its newest good checkpoint, until it is done or anything
fails. Attempts are numbered, and the number outlives the driver: before one starts, all processes
of the one before are known to be gone, and what an older one still asks for is refused (`Fence`).
Whether something has failed is asked anew each time, of exit codes, of Ray, and of the clock; never
of the text of an error.
"""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launch.directory import steps_before
from launch.pod.attempt import Attempt, Failure, shown
from launch.pod.hosts import Hosts, check_mesh, traffic_of
from launch.pod.manager import Manager, smaller_shapes
from launch.pod.plan import Plan
from launch.pod.record import Record
from launch.pod.staff import Staff
from launch.pod.trainer import Fence
from pjit_train.errors import TrainingError, UserError
from pjit_train.waiting import told
from topology import Slice

_ANSWER = 300.0  # seconds in which the manager must answer, its start included
_FRUITLESS = 3  # attempts in a row that reach no new step, after which the run is given up


class Supervisor:
    """Runs a plan on the Ray that this process is connected to.

    Args:
      chips: real ones that a process takes, as `Staff` has it.

    Attributes:
      staff: the agents.
      manager: the actor that holds the fabric; `ask` asks it.
      done: the failures that were made, as texts.
      slow: what going around failed switches adds to a step, as a part of it.
      struck: `time.monotonic()` of the last failure that was made and is not yet found.
      begun: whether the attempt has come to a step, which can be saved.
      stopping: whether the run was asked to save and end.
    """

    def __init__(self, plan: Plan, record: Record, chips: dict[str, int] | None = None):
        self.plan, self.record = plan, record
        self._fence = Fence(plan.directory / "pod" / "attempt.json")
        self.staff = Staff(
            plan.standing_orders(),
            chips or {},
            plan.slice,
            self._say_wait,
        )
        # On this node: it is there as long as this process.
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        manager = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Manager)
        self.manager: Any = manager.options(scheduling_strategy=node).remote(
            str(plan.directory / "pod" / "fabric.json"), plan.blocks, plan.slice.pod
        )
        self.done = {event["fault"] for event in record.of("fault")}
        self.slow = 0.0
        self.struck: float | None = None
        self.begun = self.stopping = False

    def run(self) -> None:
        """Runs attempts until the run is done, or `stop` was called and it is saved.

        Raises:
          UserError: what was asked for cannot be done, as a trainer found.
          TrainingError: the loss is not finite; no slice can be had; attempts fail without a step.
          RayError: Ray's head is gone.
        """
        fruitless = 0
        while not self.stopping:
            best = self._best_step()
            failure = self._attempt()
            if failure is None:
                return
            self.record("failure", attempt=self._fence.current(), text=failure.text)
            self._replace(failure)
            fruitless = 0 if self._best_step() > best else fruitless + 1
            if fruitless >= _FRUITLESS:
                raise TrainingError(
                    f"{fruitless} attempts in a row came to no new step, the last because "
                    f"{failure.text}; see {self.plan.directory}/pod for what the processes said"
                )

    def stop(self) -> None:
        """Has the trainers save and end; `run` returns when they have. A signal may call it."""
        self.stopping = True

    def close(self) -> None:
        """Ends all that it started; returns when it is gone."""
        self.staff.close()
        ray.kill(self.manager)

    def ask(self, method: str, *args) -> Any:
        """Asks the pod manager, whom Ray starts again where it dies, and returns its answer.

        Raises:
          RayError: it raised an error, or does not answer in time.
        """
        with told("the pod manager to answer", say=self._say_wait):
            return ray.get(getattr(self.manager, method).remote(*args), timeout=_ANSWER)

    def _say_wait(self, text: str) -> None:
        self.record("waiting", text=text)

    def _attempt(self) -> Failure | None:
        """Runs an attempt; None where the run is over, and what ended it otherwise."""
        self.begun = False
        number = self._fence.current() + 1
        self._fence.raise_to(number)
        state = self._place()
        layout = self.plan.hosts(self.ask("placement").slice)
        self.record(
            "attempt",
            attempt=number,
            slice=state["slice"],
            blocks=state["blocks"],
            failed=state["failed"],
            processes=layout.processes,
        )
        hosts = self.staff.fill(layout.processes)
        port = hosts[0].ask("free_port")
        if port is None:
            return Failure("the host of process 0 is gone", lost=[hosts[0]])
        alone = len({host.where["machine"] for host in hosts}) == 1
        address = "127.0.0.1" if alone else hosts[0].where["address"]
        orders = self._orders(number, layout, f"{address}:{port}")
        if orders["memory"] is not None:
            self.record("part", text=f"checkpoint {orders['memory']} is in the hosts' memory")
        started = [
            host.agent.start.remote(number, orders | {"process": process})
            for process, host in enumerate(hosts)
        ]
        for host, ref in zip(hosts, started, strict=True):
            try:
                host.pid = ray.get(ref, timeout=60)
            except ray.exceptions.RayError as error:
                return Failure(f"a host is gone ({type(error).__name__})", lost=[host])
        return Attempt(self, number, layout, f"{address}:{port}").until_it_ends()

    def _orders(self, number: int, layout: Hosts, coordinator: str) -> dict[str, Any]:
        """Orders to an attempt's trainers, but for the number of each."""
        plan, sizes = self.plan, check_mesh(self.plan.run, layout.slice)
        order = layout.device_order(sizes, traffic_of(plan.run, sizes))
        return {
            "attempt": number,
            "coordinator": coordinator,
            "processes": layout.processes,
            "devices": layout.devices_per_process if plan.emulate else None,
            "axes": list(sizes),
            "order": order.tolist(),
            "coordinates": layout.coordinates.tolist(),
            "pauses": sorted({f.step for f in plan.faults if str(f) not in self.done}),
            "steps_before": steps_before(plan.directory),
            "slow": self.slow,
            "memory": self.staff.gather(self._newest_checkpoint()),
        }

    def _place(self) -> dict[str, Any]:
        """The manager's state with the slice placed, a smaller one where that is allowed."""
        smaller = []
        if self.plan.elastic:
            smaller = [slice for slice in smaller_shapes(self.plan.slice) if self._can_take(slice)]
        try:
            state = self.ask("place", self.plan.slice, smaller)
        except ray.exceptions.RayTaskError as error:
            hint = "" if self.plan.elastic else "; --elastic goes on on a smaller one"
            raise TrainingError(f"{error.cause}{hint}") from error
        breaks, makes, seconds = state["changes"]
        if breaks or makes:
            self.record(
                "switched",
                text=f"slice {state['slice']} on blocks {shown(state['blocks'])}: {breaks} "
                f"cross-connects broken, {makes} made, {seconds * 1e3:.0f} ms of switching",
            )
        return state

    def _can_take(self, slice: Slice) -> bool:
        try:
            check_mesh(self.plan.run, slice)
        except UserError:
            return False
        return True

    def _replace(self, failure: Failure) -> None:
        """Ends what is left of the attempt, and takes out of use what was lost with it."""
        self.staff.release(failure.lost, self._fence.current())
        for part in failure.parts:
            state = self.ask("fail", part)
        if failure.parts:
            parts, free = shown(failure.parts, 3), state["free"]
            self.record("part", text=f"out of use: {parts}; {free} blocks are free")
        if failure.notice:
            self.ask("drain", failure.notice)

    def _newest_checkpoint(self) -> int | None:
        names = [path.name for path in (self.plan.directory / "checkpoints").glob("*")]
        return max((int(name) for name in names if name.isdecimal()), default=None)

    def _best_step(self) -> int:
        return max((event["step"] for event in self.record.of("step")), default=0)
