"""The subprocess that lowers a step and compiles it: python -m pjit_train.compiler.child JOB.

Where libtpu does not take a slice it ends its process, so nothing else runs in this one. JOB is a
JSON file: topology and its keywords, compiler options, and a function that lowers a step,
`module:function`, with its arguments; see `compile.Job`. The folder of JOB gets lowered.json (the
hash of the program), and program.txt.gz with memory.json, unless a program of that hash is in the
cache already. It ends when its standard input does: when whoever asked for it is gone.
"""

import gzip
import hashlib
import importlib
import json
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any


def main(job_file: str) -> None:
    threading.Thread(target=_end_with_input, daemon=True).start()
    folder, job = Path(job_file).parent, json.loads(Path(job_file).read_text())
    import jax
    from jax.experimental.topologies import get_topology_desc

    began = time.monotonic()
    keywords = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in job["keywords"].items()
    }
    slice_ = get_topology_desc(platform="tpu", topology_name=job["topology"], **keywords)
    module, _, function = job["function"].partition(":")
    devices: list[Any] = list(slice_.devices)  # jax's type of these says too little
    devices.sort(key=lambda device: device.id)
    lowered = getattr(importlib.import_module(module), function)(devices, **job["arguments"])
    # Places in the sources do not change a program.
    text = re.sub(r"loc\(.*?\)$", "", lowered.as_text(), flags=re.MULTILINE)
    key = {"program": text, "versions": job["versions"]}
    key |= {name: job[name] for name in ("topology", "keywords", "options")}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    _write(folder / "lowered.json", {"hash": digest, "seconds": time.monotonic() - began})
    if (Path(job["cache"]) / "programs" / digest).is_dir():
        return
    began = time.monotonic()
    compiled = lowered.compile(compiler_options=job["options"] or None)
    analysis = compiled.memory_analysis()
    sizes = ("argument_size", "output_size", "temp_size", "alias_size", "generated_code_size")
    fields = ["peak_memory_in_bytes", *(f"{size}_in_bytes" for size in sizes)]
    memory = {name: getattr(analysis, name, None) for name in fields}
    order = devices_in_order(compiled)
    with gzip.open(folder / "program.txt.gz", "wt", compresslevel=5) as file:
        file.write(compiled.as_text())
    memory |= {"compile_seconds": time.monotonic() - began, "jax": jax.__version__}
    _write(folder / "memory.json", memory | {"partitions": order})


def _end_with_input() -> None:
    while os.read(
        0, 4096
    ):  # not by sys.stdin: Python aborts where a thread waits for that at its end
        pass
    os._exit(1)


def devices_in_order(compiled) -> list[list[int]]:
    """Slice and coordinates of the device that runs each partition of the program."""
    import jax

    leaves = jax.tree.leaves(compiled.input_shardings)
    mesh = next(x.mesh for x in leaves if hasattr(x, "mesh"))
    return [[getattr(d, "slice_index", 0) or 0, *d.coords] for d in mesh.devices.flat]


def _write(path: Path, value) -> None:
    path.write_text(json.dumps(value))


if __name__ == "__main__":
    main(sys.argv[1])
