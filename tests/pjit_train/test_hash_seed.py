"""The compiled step does not depend on the seed of Python's string hashes, which every process has
its own of: processes of one run must compile the same program."""

import subprocess
import sys

import pytest
from helpers.processes import environment

PROGRAM = """
import re, jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
from helpers.tiny_models import LLAMA, make_batch, make_program
program = make_program(LLAMA, {"data": 2, "fsdp": 2, "sequence": 2})
text = program.compile_step(make_batch(program, 0)).as_text()
print(*re.findall(r"replica_groups=\\S+", text))
"""


@pytest.mark.slow
def test_processes_compile_the_same_collectives():
    outputs = set()
    for seed in "123":
        env = environment(PYTHONHASHSEED=seed)
        process = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=env, text=True,
            capture_output=True, check=True,
        )  # fmt: skip
        outputs.add(process.stdout)
    assert len(outputs) == 1
    assert "replica_groups" in outputs.pop()
