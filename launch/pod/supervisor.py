"""Supervisor of a run: attempt after attempt, with what failed replaced, until it is done.

An attempt is the run on all hosts from its newest good checkpoint, until it is done or anything
fails. Attempts are numbered, and the number outlives the driver: before one starts, all processes
of the one before are known to be gone, and what an older one still asks for is refused (`Fence`).
Whether something has failed is asked anew each time, of exit codes, of Ray, and of the clock; never
of the text of an error.
"""

from dataclasses import replace

import ray

from launch.directory import steps_before
from launch.pod import events
from launch.pod.attempt import Attempt, Outcome, make_repair, shown
from launch.pod.hosts import Hosts, check_mesh, traffic_of
from launch.pod.manager import Placed
from launch.pod.manager_actor import ManagerActor
from launch.pod.orders import Orders
from launch.pod.plan import Plan
from launch.pod.record import Record
from launch.pod.staff import Staff
from launch.pod.trainer import Fence
from pjit_train.errors import TrainingError

_FRUITLESS = 3  # attempts in a row that reach no new step, after which the run is given up


class Supervisor:
    """Runs a plan on the Ray that this process is connected to.

    Args:
      chips: real ones that a process takes, as `Staff` has it.
    """

    def __init__(self, plan: Plan, record: Record, chips: dict[str, int] | None = None):
        self._plan, self._record = plan, record
        self._fence = Fence(plan.directory / "pod" / "attempt.json")
        self._staff = Staff(plan.standing_orders(), chips or {}, plan.slice, self._say_wait)
        self._manager = ManagerActor(
            plan.directory / "pod" / "fabric.json", plan.blocks, plan.slice.pod, self._say_wait
        )
        self._attempt: Attempt | None = None
        self._slow = 0.0  # what going around failed switches adds to a step, as a part of it
        self._stopping = False

    @property
    def begun(self) -> bool:
        """True once the attempt has come to a step, which can be saved."""
        return self._attempt is not None and self._attempt.begun

    def run(self) -> None:
        """Runs attempts until the run is done, or `stop` was called and it is saved.

        Raises:
          UserError: what was asked for cannot be done, as a trainer found.
          TrainingError: the loss is not finite; no slice can be had; attempts fail without a step.
          RayError: Ray's head is gone.
        """
        fruitless = 0
        while not self._stopping:
            best = self._best_step()
            outcome = self._try()
            number = self._fence.current()
            if outcome.outgrown is not None:
                self._record(events.AttemptOutgrown(attempt=number, text=outcome.outgrown))
                self._replace(outcome)
                continue
            if outcome.failure is None:
                return
            self._record(events.AttemptFailed(attempt=number, text=outcome.failure))
            self._replace(outcome)
            fruitless = 0 if self._best_step() > best else fruitless + 1
            if fruitless >= _FRUITLESS:
                raise TrainingError(
                    f"{fruitless} attempts in a row came to no new step, the last because "
                    f"{outcome.failure}; see {self._plan.directory}/pod for what the processes said"
                )

    def stop(self) -> None:
        """Has the trainers save and end; `run` returns when they have. A signal may call it."""
        self._stopping = True

    def close(self) -> None:
        """Ends all that it started; returns when it is gone."""
        self._staff.close()
        self._manager.close()

    def _say_wait(self, text: str) -> None:
        self._record(events.Waiting(text=text))

    def _try(self) -> Outcome:
        """Runs an attempt from its start to its end."""
        self._attempt = None
        number = self._fence.current() + 1
        self._fence.raise_to(number)
        done = self._best_step()
        for repair in self._plan.repairs_to_make(self._record):
            if repair.step <= done:  # asked for when the run had ended for want of blocks
                make_repair(repair, self._manager, self._record, number)
        placed = self._place()
        layout = self._plan.hosts(placed.placement.slice)
        self._record(
            events.AttemptBegun(
                attempt=number,
                slice=str(placed.placement.slice),
                blocks=placed.placement.blocks,
                failed=tuple(map(str, placed.failed)),
                processes=layout.processes,
            )
        )
        hosts = self._staff.fill(layout.processes)
        port = hosts[0].ask("free_port")
        if port is None:
            return Outcome(failure="the host of process 0 is gone", lost=(hosts[0],))
        alone = len({host.where.machine for host in hosts}) == 1
        address = "127.0.0.1" if alone else hosts[0].where.address
        orders = self._orders(number, layout, f"{address}:{port}")
        if orders.memory is not None:
            text = f"checkpoint {orders.memory} is in the hosts' memory"
            self._record(events.PartChanged(text=text))
        started = [
            host.agent.start.remote(replace(orders, process=process))
            for process, host in enumerate(hosts)
        ]
        for host, ref in zip(hosts, started, strict=True):
            try:
                host.pid = ray.get(ref, timeout=60)
            except ray.exceptions.RayError as error:
                return Outcome(failure=f"a host is gone ({type(error).__name__})", lost=(host,))
        self._attempt = Attempt(
            self._plan,
            self._record,
            self._staff,
            self._manager,
            layout=layout,
            orders=orders,
            stopping=lambda: self._stopping,
        )
        return self._attempt.run()

    def _orders(self, number: int, layout: Hosts, coordinator: str) -> Orders:
        """Orders to an attempt's trainers, but for the number of each."""
        plan, sizes = self._plan, check_mesh(self._plan.run, layout.slice)
        order = layout.device_order(sizes, traffic_of(plan.run, sizes))
        return Orders(
            attempt=number,
            coordinator=coordinator,
            processes=layout.processes,
            devices=layout.devices_per_process if plan.emulate else None,
            axes=list(sizes),
            order=order.tolist(),
            coordinates=layout.coordinates.tolist(),
            pauses=sorted(
                {fault.step for fault in plan.faults_to_make(self._record)}
                | {repair.step for repair in plan.repairs_to_make(self._record)}
            ),
            steps_before=steps_before(plan.directory),
            slow=self._slow,
            memory=self._staff.gather(self._newest_checkpoint()),
        )

    def _place(self) -> Placed:
        """Has the slice placed, a smaller one where that is allowed."""
        try:
            placed = self._manager.place(self._plan.slice, self._plan.smaller())
        except ray.exceptions.RayTaskError as error:
            hint = "; --repair tells what has been mended"
            if not self._plan.elastic:
                hint = "; --elastic goes on on a smaller one" + hint.replace("; ", ", ")
            raise TrainingError(f"{error.cause}{hint}") from error
        if placed.breaks or placed.makes:
            held = placed.placement
            text = f"slice {held.slice} on blocks {shown(held.blocks)}: {placed.breaks} "
            text += f"cross-connects broken, {placed.makes} made, "
            text += f"{placed.seconds * 1e3:.0f} ms of switching"
            self._record(events.Switched(text=text))
        return placed

    def _replace(self, outcome: Outcome) -> None:
        """Ends what is left of the attempt, and takes out of use what was lost with it."""
        if outcome.slow is not None:
            self._slow = outcome.slow
        self._staff.release(outcome.lost, self._fence.current())
        for part in outcome.parts:
            free = self._manager.fail(part).free
        if outcome.parts:
            text = f"out of use: {shown(outcome.parts, 3)}; {free} blocks are free"
            self._record(events.PartChanged(text=text))
        if outcome.notice is not None:
            self._manager.drain(outcome.notice)

    def _newest_checkpoint(self) -> int | None:
        names = [path.name for path in (self._plan.directory / "checkpoints").glob("*")]
        return max((int(name) for name in names if name.isdecimal()), default=None)

    def _best_step(self) -> int:
        return max((event.step for event in self._record.of(events.Step)), default=0)
