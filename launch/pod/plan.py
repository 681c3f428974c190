"""Plan of a pod: what it is to do and whether the machine can, checked before it starts."""

import os
from dataclasses import dataclass
from pathlib import Path

from launch.pod.agent import log_file
from launch.pod.events import FaultMade, RepairMade
from launch.pod.faults import Fault, Repair
from launch.pod.hosts import Hosts, check_mesh
from launch.pod.manager import smaller_shapes
from launch.pod.orders import StandingOrders
from launch.pod.record import Record
from pjit_train.errors import UserError
from pjit_train.run import Run
from topology import Slice

MiB, GiB = 2**20, 2**30
# Measured, shared pages in parts: a trainer that waits, imported JAX and all, and what it takes
# more to compile; an agent; a local Ray with the driver and the manager.
_WARM, _COMPILING, _AGENT, _RAY = 250 * MiB, 150 * MiB, 80 * MiB, 750 * MiB
_DEVICE = 1.5 * MiB  # that XLA:CPU takes for an emulated device, beside what is computed
# Activations in multiples of d_model, by XLA:CPU's analysis of compiled steps: (a layer, once) for
# the backward pass under each `remat`, and of a validation.
_KEPT = {"none": (30, 0), "dots": (11, 25), "full": (1, 38)}
_VALIDATION = 16


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Plan of a run on a slice of a pod.

    Attributes:
      config: a file with the run's operative configuration.
      directory: the run directory.
      elastic: whether the run goes on on a smaller slice when too few blocks are healthy.
      blocks: of the pod that may be used.
      hang_seconds: without a step after which an attempt is given up.
      faults: what is made to fail.
      repairs: what comes back, or new to the pod.
      emulate: whether devices are emulated CPU devices, or those that hosts have.
    """

    run: Run
    config: Path
    directory: Path
    slice: Slice
    hosts_per_process: int
    elastic: bool
    blocks: int
    hang_seconds: float
    faults: tuple[Fault, ...]
    repairs: tuple[Repair, ...]
    emulate: bool

    def __post_init__(self):
        there = self.slice.pod.num_blocks
        if not self.slice.num_blocks <= self.blocks <= there:
            raise UserError(
                f"--blocks {self.blocks}: slice {self.slice} takes {self.slice.num_blocks} and the "
                f"pod has {there}; use a number between"
            )
        if not self.hang_seconds >= 5:
            raise UserError(f"--hang-after {self.hang_seconds}: use 5 seconds or more")
        check_mesh(self.run, self.slice)
        hosts = self.hosts(self.slice)
        for fault in self.faults:
            fault.check(
                processes=hosts.processes,
                hosts=self.slice.num_hosts,
                blocks=self.slice.num_blocks,
            )

    def hosts(self, slice: Slice) -> Hosts:
        """The hosts of the slice, or of a smaller one in its place."""
        each = min(self.hosts_per_process, slice.num_hosts)
        while slice.num_hosts % each:
            each -= 1
        return Hosts(
            slice=slice, hosts_per_process=each if slice != self.slice else self.hosts_per_process
        )

    def faults_to_make(self, record: Record) -> list[Fault]:
        """The faults that, by the record, were not yet made."""
        made = {event.fault for event in record.of(FaultMade)}
        return [fault for fault in self.faults if str(fault) not in made]

    def repairs_to_make(self, record: Record) -> list[Repair]:
        """The repairs that, by the record, were not yet made."""
        made = {event.repair for event in record.of(RepairMade)}
        return [repair for repair in self.repairs if str(repair) not in made]

    def smaller(self) -> list[Slice]:
        """Slices to go on on where the pod has too few blocks for `slice`, the largest first."""
        if not self.elastic:
            return []
        return [slice for slice in smaller_shapes(self.slice) if self._can_take(slice)]

    def _can_take(self, slice: Slice) -> bool:
        try:
            check_mesh(self.run, slice)
        except UserError:
            return False
        return True

    def standing_orders(self) -> StandingOrders:
        devices = self.hosts(self.slice).devices_per_process
        env = {"JAX_PLATFORMS": "cpu"} if self.emulate else {}
        if "TORSION_CACHE" in os.environ:  # a cluster's hosts do not have it from this command
            env["TORSION_CACHE"] = os.environ["TORSION_CACHE"]
        return StandingOrders(
            config=str(self.config),
            directory=str(self.directory),
            devices=devices if self.emulate else None,
            log=log_file(self.directory),
            cwd=os.getcwd(),
            env=env,
        )

    def memory(self) -> int:
        """Bytes that the emulated pod takes, to first order: of processes, and of arrays.

        Each device holds its shard of the parameters, their gradients and two moments, and while it
        computes all parameters of its `tensor` part, and the activations of a part of the batch, of
        which `accumulate` make one, or of a validation's whole batch; each process waits with
        another one beside it.
        """
        hosts, sizes = self.hosts(self.slice), check_mesh(self.run, self.slice)
        processes = hosts.processes
        parameters = 4 * self.run.model.num_params
        gathered = parameters / sizes["tensor"]
        run, model = self.run, self.run.blocks
        logits = run.task.logits(model)
        # In unrolled layers XLA:CPU undoes what `remat` asks for.
        kept, once = _KEPT[model.remat if model.layers == "scan" else "none"]
        trained = (kept * model.num_layers + once) * model.d_model + 3 * logits
        trained /= run.accumulate
        validated = _VALIDATION * model.d_model + logits if run.eval_every else 0
        positions = run.data.batch_size * run.positions / self.slice.num_chips
        activations = 4 * positions * max(trained, validated)
        per_device = gathered + 4 * gathered / sizes["fsdp"] + activations + _DEVICE
        arrays = int(self.slice.num_chips * per_device)
        return _RAY + (processes + 1) * (_AGENT + _WARM) + processes * (_WARM + _COMPILING) + arrays

    def check_memory(self, free: int | None = None) -> None:
        """Raises a UserError where the emulated pod would not fit into `free` bytes of memory."""
        free = free_memory() if free is None else free
        needed = self.memory()
        if self.emulate and needed > free:
            hosts = self.slice.num_hosts
            raise UserError(
                f"--slice {self.slice}: {hosts} hosts in {self.hosts(self.slice).processes} "
                f"processes need about {needed / GiB:.1f} GiB and {free / GiB:.1f} GiB are free; "
                "use more --hosts-per-process, a smaller slice, or a larger run.Run.accumulate"
            )


def default_hosts_per_process(slice: Slice) -> int:
    """Number of hosts a process, such that there are at most four processes."""
    hosts = slice.num_hosts
    return next(n for n in range(1, hosts + 1) if hosts % n == 0 and hosts // n <= 4)


def free_memory() -> int:
    """Bytes that new processes can have: of the machine, or of the control group if fewer."""
    import psutil

    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        most = int((group / "memory.max").read_text())
        free = min(free, most - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such group, or "max"
        pass
    return free
