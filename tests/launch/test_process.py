"""Processes of commands: what they do not print."""

import subprocess
import sys

SEVERAL_FAIL = """
import asyncio, gc
from launch import process

process.prepare()

async def write(i):
    raise ValueError(f"RESOURCE_EXHAUSTED: {i}")

async def save():
    tasks = [asyncio.ensure_future(write(i)) for i in range(3)]
    await asyncio.wait(tasks)
    await tasks[0]

try:
    asyncio.run(save())
except ValueError as error:
    print(error)
gc.collect()
"""


def test_errors_of_a_save_besides_the_first_print_no_traceback():
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL_FAIL], capture_output=True, text=True, check=True
    )
    assert done.stdout == "RESOURCE_EXHAUSTED: 0\n"
    assert done.stderr == ""
