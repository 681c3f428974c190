"""`torsion train`: trains a model, or goes on with its training."""

import dataclasses
import os
import sys
from pathlib import Path

from launch.commands.common import add_command, add_machine, add_run, run_bindings, whole

_NO_CONFIG = """\
torsion train: give it a configuration. A first run, a few minutes on a laptop:

  torsion train configs/quickstart.gin

It trains a tiny model on the text of Python's standard library, in runs/quickstart; stopped, it
goes on where it was when run again. Any parameter can be changed:

  torsion train configs/quickstart.gin --steps 50 --out runs/short \\
    --gin 'optimizers.AdamW.learning_rate = 1e-3'

Another model, and the shared defaults: torsion train configs/base.gin configs/models/gpt2.gin
All options: torsion train --help
"""


def add(commands) -> None:
    train = add_command(
        commands,
        run,
        "train",
        "train a model, or go on with its training",
        "The run is what the gin files describe, in their order, changed by --gin, changed by the "
        "other options. Files are looked for here, then among those that are shipped. "
        "Run again with the same --out, it resumes from its newest checkpoint.",
    )
    train.set_defaults(trains=True)
    train.add_argument("configs", nargs="*", metavar="CONFIG.gin", help="what to train")
    add_run(train)
    add_machine(train)
    group = train.add_argument_group(
        "several processes, alike but for their id; SLURM and several slices say them by variables"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--process-id", type=whole(), metavar="I", help="of this one, from 0")
    group.add_argument("--num-processes", type=whole(1), metavar="N", help="how many there are")


def run(args, began: float) -> int:
    if not args.configs:
        print(_NO_CONFIG, end="", file=sys.stderr)
        return 2
    from launch import process
    from launch.cluster import processes_of

    bindings = run_bindings(args)
    options = args.coordinator, args.process_id, args.num_processes
    processes = processes_of(os.environ, *options)
    process.check_processes(*processes)
    process.prepare(args.devices)

    from launch.configure import build_run
    from launch.directory import check_directory, restore_configuration, steps_before
    from pjit_train.record import to_train

    for file in args.configs:
        restore_configuration(file)
    run, config_text = build_run(args.configs, bindings)
    directory = Path(args.out or Path("runs") / Path(args.configs[-1]).stem)
    check_directory(directory, config_text)
    before = steps_before(directory)
    run = dataclasses.replace(run, data=to_train(run.data, directory))
    process.join(*processes)

    from pjit_train.loop import train

    train(run, directory, config_text=config_text, steps_before=before, began=began)
    return 0
