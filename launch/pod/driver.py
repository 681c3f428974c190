"""The process that holds Ray and supervises: `python -m launch.pod.driver OPTIONS`, as JSON.

A watchdog (`keeper`) starts it, and starts it again where it dies; it ends with its watchdog. It
leaves with ENDED plus an exit code of the command line, or RAY_LOST. What Ray and other libraries
print goes to `pod/driver.log`.
"""

import contextlib
import dataclasses
import json
import os
import sys
import traceback
from pathlib import Path

from launch.pod.keeper import ENDED, RAY_LOST
from launch.pod.trainer import end_with_parent
from pjit_train import signals
from pjit_train.errors import TrainingError, UserError
from pjit_train.lock import held

_RAY = 300.0  # seconds that Ray has to start, or a cluster to answer


def main() -> int:
    # The watchdog tells, and ends what is left; until there is something to save, at once.
    with signals.taken(lambda number: os._exit(128 + number)):
        return _main(json.loads(sys.argv[1]))


def _main(options: dict) -> int:
    end_with_parent(options["keeper"])
    # One that holds Ray needs no device, and must not take one from the trainers.
    os.environ["JAX_PLATFORMS"] = "cpu"
    out, problems = _duplicate(1), _duplicate(2)
    try:
        from launch import process

        process.prepare()
        with contextlib.ExitStack() as stack:
            _drive(options, out, problems, stack)
        return ENDED
    except (UserError, TrainingError) as error:
        print("torsion:", " ".join(str(error).splitlines()), file=problems, flush=True)
        return ENDED + (2 if isinstance(error, UserError) else 1)
    except Exception as error:
        traceback.print_exc()  # into the log, where there is one by now
        ray = sys.modules.get("ray")
        if ray is not None and isinstance(error, ray.exceptions.RayError):
            return RAY_LOST
        if not os.path.sameopenfile(2, problems.fileno()):
            traceback.print_exc(file=problems)
        return ENDED + 1


def _drive(options: dict, out, problems, stack: contextlib.ExitStack) -> None:
    from launch.commands.common import pod_of
    from launch.configure import build_run
    from launch.directory import check_directory
    from launch.pod import faults, timeline
    from launch.pod.plan import Plan, default_hosts_per_process
    from launch.pod.record import Record
    from launch.pod.view import View
    from launch.process import proxy_note
    from pjit_train.record import to_train
    from topology import Slice
    from topology.hardware import block_of

    run, text = build_run(options["configs"], options["bindings"])
    directory = Path(options["out"]).absolute()
    check_directory(directory, text)
    run = dataclasses.replace(run, data=to_train(run.data, directory))
    pod = pod_of(options["pod"])
    try:
        block_of(pod)  # of which others take the place of those that fail
    except ValueError as error:
        raise UserError(str(error)) from error
    try:
        slice = Slice.parse(options["slice"], pod)
    except ValueError as error:
        raise UserError(f"--slice {str(error).removeprefix('slice ')}") from error
    each = options["hosts_per_process"] or default_hosts_per_process(slice)
    named = [faults.Fault.parse(one, pod) for one in options["fail"]]
    if options["chaos"]:
        named += faults.chaos(
            faults.parse_chaos(options["chaos"], pod),
            steps=run.steps,
            processes=slice.num_hosts // each,
            hosts=slice.num_hosts,
            blocks=slice.num_blocks,
            pod=pod,
            seed=options["chaos_seed"],
        )
    repairs = tuple(faults.Repair.parse(one, pod) for one in options["repair"])
    plan = Plan(
        run=run,
        config=directory / "pod" / "run.gin",
        directory=directory,
        slice=slice,
        hosts_per_process=each,
        elastic=options["elastic"],
        blocks=options["blocks"] or pod.num_blocks,
        hang_seconds=options["hang_after"],
        faults=tuple(named),
        repairs=repairs,
        emulate=True,
    )
    if options["address"] is None:
        plan.check_memory()
    stack.enter_context(held(directory, "pod/driver.lock", "another torsion pod"))
    log = os.open(directory / "pod" / "driver.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    plan.config.write_text(text)
    record = stack.enter_context(contextlib.closing(Record(directory / "pod" / "events.jsonl")))
    view = stack.enter_context(contextlib.closing(View(plan, record, out)))
    with _ray(options, record, problems) as dashboard:
        from launch.pod import cluster, data
        from launch.pod.supervisor import Supervisor

        chips = {}
        if options["address"] is not None:
            chips = cluster.chips(each, pod.host.chips)
            plan = dataclasses.replace(plan, emulate=not chips)
        if options["dashboard"] or options["address"] is not None:
            from launch.pod.dashboard import publish

            publish(record)
        if dashboard:
            view.say(f"dashboard at http://{dashboard}")
        view.say(
            f"slice {slice}: {slice.num_chips} chips on {slice.num_hosts} hosts in "
            f"{plan.hosts(slice).processes} processes{proxy_note()}"
        )
        data.prepare(run.data, record, on_cluster=options["address"] is not None)
        supervisor = Supervisor(plan, record, chips)
        stack.enter_context(
            signals.taken(lambda n: supervisor.stop() if supervisor.begun else os._exit(128 + n))
        )
        try:
            supervisor.run()
        finally:
            supervisor.close()
            timeline.write(record.events, directory / "pod" / "timeline.html")
    view.close()
    for line in timeline.summary(record.events, run):
        view.say(line)


def _duplicate(fd: int):
    """Opens a duplicate of a file descriptor, to write to what it is now after it is replaced."""
    return os.fdopen(os.dup(fd), "w", buffering=1)


@contextlib.contextmanager
def _ray(options, record, problems):
    """Starts or joins the pod's Ray within a time limit, and reports what is waited for.

    Gives HOST:PORT of its dashboard, None where it has none.
    """
    from launch.pod import cluster
    from launch.pod.events import Waiting
    from launch.process import proxy_note
    from pjit_train.waiting import told

    if options["address"] is None:
        ray = cluster.local(Path(options["private"]), dashboard=options["dashboard"])
        what = f"Ray to start here{proxy_note()}"
    else:
        ray = cluster.joined(options["address"])
        what = f"the Ray at {options['address']} to take this process in{proxy_note()}"

    def in_vain() -> None:  # Ray has no limit of its own; the watchdog tries again, or says the end
        print(f"torsion: waited {_RAY:.0f} s in vain for {what}", file=problems, flush=True)
        os._exit(RAY_LOST)

    with contextlib.ExitStack() as stack:
        say = lambda text: record(Waiting(text=text))
        with told(what, say=say, limit=_RAY, in_vain=in_vain):
            dashboard = stack.enter_context(ray)
        yield dashboard


if __name__ == "__main__":
    sys.exit(main())
