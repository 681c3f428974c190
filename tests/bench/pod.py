"""What a pod takes to find a failure and to step again, and what a copy in memory saves.

python tests/bench/pod.py [recovery | memory]

`recovery` runs a pod of 4 processes in which a process or a host is killed 6 times, in turn, once
all hosts have a warm process again. `memory` restores a state of 100 MiB from disk and from memory,
alternating.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launch.pod.events import AttemptFailed, FaultMade, Step
from launch.pod.record import read_events

ROOT = Path(__file__).parents[2]
FAULTS = ["process:1", "host:2", "process:0", "host:1", "process:3", "host:0"]
EVERY = 60  # steps between two failures


def recovery() -> None:
    folder = Path(tempfile.mkdtemp(prefix="pod-"))
    options = ["--slice", "2x2x4", "--hosts-per-process", "1", "--mesh", "data=4,fsdp=4"]
    options += ["--gin", "run.Run.eval_every = 0", "--gin", "run.Samples.tokens = 0"]
    options += ["--gin", "checkpoint.CheckpointConfig.every_steps = 20"]
    options += ["--gin", "transformer.TransformerConfig.d_model = 48"]
    options += ["--gin", "transformer.TransformerConfig.d_ff = 128"]
    options += ["--gin", "text.TextData.seq_len = 64"]
    options += ["--steps", str(EVERY * (len(FAULTS) + 1)), "--out", str(folder / "run")]
    for n, fault in enumerate(FAULTS, start=1):
        options += ["--fail", f"{fault}@step:{EVERY * n}"]
    code = "import sys; from launch.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "pod", "configs/quickstart.gin", *options]
    subprocess.run(command, cwd=ROOT, check=True)
    found, stepped, made = [], [], None
    for event in read_events(folder / "run" / "pod" / "events.jsonl"):
        if isinstance(event, FaultMade):
            made = event.time
        elif isinstance(event, AttemptFailed):
            found.append(event.time - made)
        elif isinstance(event, Step) and made and len(found) > len(stepped):
            stepped.append(event.at - made)
    for what, seconds in (("found", found), ("first new step", stepped)):
        shown = ", ".join(f"{s:.2f}" for s in seconds)
        print(f"{what}: median {statistics.median(seconds):.2f} s after it ({shown})")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


def memory() -> None:
    os.environ["PJRT_NPROC"] = "64"
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    sys.path.insert(0, str(ROOT))
    from launch.pod import memory_copy
    from pjit_train.checkpoint import CheckpointConfig, Checkpoints

    mesh = jax.make_mesh((8,), ("fsdp",))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    keys = jax.random.split(jax.random.key(0), 25)
    state = {f"a{i}": jax.device_put(jax.random.normal(k, (1024, 1024)), sharding) for i, k in
             enumerate(keys)}  # fmt: skip
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=sharding), state
    )
    fd = memory_copy.new_memory()
    seconds = {"disk": [], "memory": [], "write to memory": []}
    with Checkpoints(tempfile.mkdtemp(prefix="pod-"), CheckpointConfig()) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        for _ in range(9):
            began = time.perf_counter()
            memory_copy.write(fd, 1, state)
            seconds["write to memory"].append(time.perf_counter() - began)
            for name, copy in (
                ("disk", None),
                ("memory", (1, lambda wanted: memory_copy.read(fd, wanted))),
            ):
                began = time.perf_counter()
                restored = checkpoints.restore(abstract, memory=copy)[1]
                jax.block_until_ready(restored)
                seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(s[1:]) for name, s in seconds.items()}
    for name, value in median.items():
        print(f"{name}: median {value:.3f} s for 100 MiB")
    print(f"disk / memory: {median['disk'] / median['memory']:.2f}")


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["recovery", "memory"]
    for name in chosen:
        {"recovery": recovery, "memory": memory}[name]()
