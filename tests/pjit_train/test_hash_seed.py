"""The compiled step does not depend on the seed of Python's string hashes, which every process has
its own of: processes of one run must compile the same program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import re, jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
from test_sharding import LLAMA, make_batch, make_program
program = make_program(LLAMA, {"data": 2, "fsdp": 2, "sequence": 2})
text = program.compile_step(make_batch(program, 0)).as_text()
print(*re.findall(r"replica_groups=\\S+", text))
"""


@pytest.mark.slow
def test_processes_compile_the_same_collectives():
    outputs = set()
    for seed in "123":
        env = os.environ | {"PYTHONHASHSEED": seed}
        process = subprocess.run(
            [sys.executable, "-c", PROGRAM], cwd=Path(__file__).parent, env=env, text=True,
            capture_output=True, check=True,
        )  # fmt: skip
        outputs.add(process.stdout)
    assert len(outputs) == 1
    assert "replica_groups" in outputs.pop()
