"""Checkpoints: real files, real damage, real kills, other meshes and other numbers of processes."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from helpers.checkpoint_states import (
    P,
    abstract,
    assert_same,
    contents,
    files_of,
    make_mesh,
    make_state,
    put,
    restore,
)
from helpers.processes import environment, free_address

from pjit_train import orbax_internals
from pjit_train.checkpoint import CheckpointConfig, Checkpoints
from pjit_train.errors import UserError


@pytest.fixture
def mesh():
    return make_mesh()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A directory with the checkpoints 1 and 2 of `make_state(1)` and `make_state(2)`."""
    directory = tmp_path_factory.mktemp("written")
    with Checkpoints(directory, CheckpointConfig()) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, put(make_state(step), make_mesh()))
    return directory


@pytest.fixture
def two(written, tmp_path):
    """A copy of `written` of one's own."""
    return shutil.copytree(written, tmp_path / "two")


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# Saving and restoring


def test_nothing_there_is_none(tmp_path):
    assert restore(tmp_path / "new") is None


def test_restores_bit_for_bit_with_the_shardings_asked_for(two, mesh):
    step, state = restore(two)
    assert step == 2
    assert_same(state, make_state(2))
    wanted = abstract(make_state(), mesh)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert a.sharding == b.sharding
    assert_same(restore(two, step=1)[1], make_state(1))


@pytest.mark.parametrize("shape", [(2, 4), (8, 1), (2, 2), (1, 1)])
def test_restores_onto_other_meshes(two, shape):
    def turned(x):
        return P("tensor", "fsdp") if x.ndim == 2 else P("fsdp") if x.ndim == 1 else P()

    with Checkpoints(two, CheckpointConfig()) as checkpoints:
        step, state = checkpoints.restore(abstract(make_state(), make_mesh(*shape), turned))
        assert step == 2
        assert_same(state, make_state(2))
        assert len(state["mask"].sharding.device_set) == shape[0] * shape[1]
        checkpoints.save(3, state)  # and on from there
    assert_same(restore(two)[1], make_state(2))


def test_plain_orbax_reads_the_state(two):
    plain = ocp.StandardCheckpointer().restore(two / "2" / "state")
    np.testing.assert_array_equal(plain["mask"], make_state(2)["mask"])
    with ocp.CheckpointManager(two) as manager:
        assert manager.latest_step() == 2
        wanted = abstract(make_state(), make_mesh())
        args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
        assert_same(manager.restore(2, args=args).state, make_state(2))


def test_the_state_may_be_donated_at_once(tmp_path, mesh):
    change = jax.jit(
        lambda s: jax.tree.map(lambda x: (x * 0 + 1).astype(x.dtype), s), donate_argnums=0
    )
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        state = put(make_state(5), mesh)
        for step in (1, 2):
            checkpoints.save(step, state)
            state = change(state)
    assert_same(restore(tmp_path, step=1)[1], make_state(5))
    assert (np.asarray(restore(tmp_path)[1]["params"]["layers"][0]["w"]) == 1).all()


def test_a_step_is_written_once(two, mesh):
    with Checkpoints(two, CheckpointConfig()) as checkpoints:
        _, state = checkpoints.restore(abstract(make_state(), mesh))
        before = contents(two)
        checkpoints.save(2, state)
        checkpoints.wait()
        assert contents(two) == before
        checkpoints.save(3, state)
        checkpoints.save(3, state)
        assert checkpoints.steps() == [1, 2, 3]


# A part of the state

PART = ("step", "params")


def delete_arrays(checkpoint, prefix):
    """Deletes every array of a checkpoint whose path begins so, with its metadata."""
    store = {"driver": "ocdbt", "base": f"file://{checkpoint}/state/"}
    arrays = tensorstore.KvStore.open(store).result()
    deleted = [key for key in arrays.list().result() if key.startswith(prefix)]
    assert deleted
    for key in deleted:
        arrays[key] = None


def test_a_part_is_restored_alone_and_the_rest_is_not_read(two, mesh, caplog):
    for prefix in (b"opt.", b"mask", b"packed"):
        delete_arrays(two / "2", prefix)
    step, state = restore(two, only=PART)
    assert step == 2
    assert_same(state, {name: make_state(2)[name] for name in PART})
    wanted = abstract({name: make_state()[name] for name in PART}, mesh)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert a.sharding == b.sharding
    assert warnings_of(caplog) == []
    assert restore(two)[0] == 1  # whole, the newer one is broken
    assert "2 is broken: its state cannot be read" in caplog.text


@pytest.mark.parametrize(
    ("array", "seen"),
    [
        (lambda state: state["params"]["layers"][1]["w"], True),
        (lambda state: state["opt"][1][0].mu["layers"][1]["w"], False),
    ],
    ids=["parameter", "moment"],
)
def test_a_wrong_array_breaks_a_part_only_where_it_is_in_it(two, mesh, caplog, array, seen):
    wrong = make_state(2)
    array(wrong)[5, 7] += 1e-3
    shutil.rmtree(two / "2" / "state")
    with ocp.StandardCheckpointer() as plain:
        plain.save(two / "2" / "state", put(wrong, mesh))
    step, state = restore(two, only=PART)
    assert step == (1 if seen else 2)
    assert_same(state, {name: make_state(step)[name] for name in PART})
    assert ("params/layers/1/w differ from the digests" in caplog.text) == seen
    assert restore(two)[0] == 1


def test_a_part_of_a_different_model_is_refused_and_other_parts_may_differ(two):
    state = make_state()
    state["opt"] = {"another": np.ones((4, 4), np.float32)}
    assert restore(two, state, only=PART)[0] == 2
    del state["params"]["layers"][0]["b"]
    with pytest.raises(UserError, match="it has params/layers/0/b that the model lacks; use"):
        restore(two, state, only=PART)


def test_a_checkpoint_known_in_part_is_written_again(two, mesh):
    """Its other arrays may be broken, and a save must not take it for whole."""
    delete_arrays(two / "2", b"opt.")
    with Checkpoints(two, CheckpointConfig()) as checkpoints:
        checkpoints.restore(abstract(make_state(), mesh), only=PART)
        checkpoints.save(2, put(make_state(5), mesh))
    assert_same(restore(two)[1], make_state(5))


# When


def test_due_by_steps(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig(every_steps=4)) as checkpoints:
        assert [step for step in range(13) if checkpoints.due(step)] == [4, 8, 12]
    with Checkpoints(tmp_path, CheckpointConfig(every_steps=None)) as checkpoints:
        assert not any(checkpoints.due(step) for step in range(13))


def test_due_by_minutes(tmp_path, mesh, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("pjit_train.checkpoint.time.monotonic", lambda: now[0])
    config = CheckpointConfig(every_steps=None, every_minutes=0.5)
    with Checkpoints(tmp_path, config) as checkpoints:
        assert not checkpoints.due(1)
        now[0] += 30.0
        assert checkpoints.due(2)
        checkpoints.save(2, put(make_state(), mesh))
        assert not checkpoints.due(3)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("every_steps", 0), ("every_minutes", 0), ("keep_last", 0), ("keep_last", None)],
)
def test_config_names_the_wrong_number(name, wrong):
    with pytest.raises(UserError, match=f"CheckpointConfig.{name}={wrong}; use a "):
        CheckpointConfig(**{name: wrong})


# Which are kept


def test_keeps_the_last_and_the_best(tmp_path, mesh):
    state = put({"w": np.ones((8, 8), np.float32)}, mesh)
    losses = {1: 3.0, 2: 1.0, 3: None, 4: float("nan"), 5: 2.0, 6: 4.0, 7: None, 8: 5.0}
    config = CheckpointConfig(keep_last=2, keep_best=2)
    for steps in ((1, 2, 3, 4), (5, 6), (7, 8)):  # the best is remembered across runs
        with Checkpoints(tmp_path, config) as checkpoints:
            for step in steps:
                metrics = None if losses[step] is None else {"loss": losses[step], "step": step}
                checkpoints.save(step, state, metrics=metrics)
    with Checkpoints(tmp_path, config) as checkpoints:
        assert checkpoints.steps() == [2, 5, 7, 8]


def test_broken_ones_do_not_push_out_good_ones(two, mesh, caplog):
    wanted = abstract(make_state(), mesh)
    config = CheckpointConfig(keep_last=2, keep_best=0)
    with Checkpoints(two, CheckpointConfig()) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, put(make_state(step), mesh))
    for step in ("10", "20"):
        shutil.rmtree(two / step / "state")
    broken = contents(two / "10") | contents(two / "20")
    with Checkpoints(two, config) as checkpoints:
        step, state = checkpoints.restore(wanted)
        assert step == 2
        checkpoints.save(3, state)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3, 10, 20]
        assert contents(two / "10") | contents(two / "20") == broken
        checkpoints.save(10, put(make_state(11), mesh))  # the step is reached again
        checkpoints.wait()
        assert checkpoints.steps() == [3, 10, 20]
    aside = contents(two / "10.broken")
    assert [aside[two / "10.broken" / p.relative_to(two / "10")] for p in broken if "10" in p.parts]
    assert f"moved {two}/10 to {two}/10.broken" in caplog.text
    assert_same(restore(two, step=10)[1], make_state(11))
    assert restore(two)[0] == 10  # past the broken 20


# Damage


def is_harmless_or_seen(directory, caplog):
    """Restores; True if the newest was found broken, and asserts that nothing is silently wrong."""
    caplog.clear()
    before = contents(directory)
    step, state = restore(directory)
    assert contents(directory) == before  # left untouched
    assert_same(state, make_state(step))
    lines = warnings_of(caplog)
    if step == 2:
        assert lines == []
        return False
    assert step == 1
    assert len(lines) == 1
    assert lines[0].startswith(f"checkpoint {directory}/2 is broken: ")
    assert "\n" not in lines[0]
    assert len(lines[0]) < 600
    return True


@pytest.mark.slow
def test_flipped_bits_are_never_silent(two, caplog, capfd):
    rng = np.random.default_rng(0)
    seen = {}
    files = [path for path in files_of(two / "2") if path.stat().st_size]
    for i in range(48):
        path = files[i % len(files)]
        raw = path.read_bytes()
        damaged = bytearray(raw)
        damaged[rng.integers(len(raw))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        seen.setdefault(path.relative_to(two / "2").parts[:2], []).append(
            is_harmless_or_seen(two, caplog)
        )
        path.write_bytes(raw)
    assert all(seen[("digests", "metadata")])
    assert any(seen[("state", "d")] + seen.get(("state", "ocdbt.process_0"), []))
    assert not is_harmless_or_seen(two, caplog)
    noise = [line for line in capfd.readouterr().err.splitlines() if "is broken" not in line]
    assert noise == []


def test_a_wrong_array_that_orbax_accepts_is_named(two, mesh, caplog):
    wrong = make_state(2)
    wrong["params"]["layers"][1]["w"][5, 7] += 1e-6
    shutil.rmtree(two / "2" / "state")
    with ocp.StandardCheckpointer() as plain:
        plain.save(two / "2" / "state", put(wrong, mesh))
    assert is_harmless_or_seen(two, caplog)
    assert "broken: params/layers/1/w differ from the digests" in caplog.text


@pytest.mark.slow
def test_truncated_and_missing_files(two, caplog):
    needed = 0
    for path in files_of(two / "2"):
        raw = path.read_bytes()
        path.write_bytes(raw[: len(raw) // 2])
        needed += is_harmless_or_seen(two, caplog)
        path.unlink()
        is_harmless_or_seen(two, caplog)
        path.write_bytes(raw)
    assert needed >= 4


@pytest.mark.slow
def test_an_empty_checkpoint_and_all_broken(two, caplog):
    shutil.rmtree(two / "2")
    (two / "2").mkdir()
    assert is_harmless_or_seen(two, caplog)
    with pytest.raises(UserError, match="checkpoint 2 broken"):
        restore(two, step=2)
    (two / "1" / "digests" / "metadata").write_text("[]")
    with pytest.raises(UserError, match="all checkpoints broken"):
        restore(two)
    with pytest.raises(UserError, match=r"has no checkpoint 7; it has \[1, 2\]"):
        restore(two, step=7)


def test_digests_of_another_step_do_not_pass(two, caplog):
    shutil.copy(two / "1" / "digests" / "metadata", two / "2" / "digests" / "metadata")
    assert is_harmless_or_seen(two, caplog)


# A different model


def test_a_different_model_is_told_by_its_parameters(two):
    state = make_state()
    state["params"]["extra"] = np.ones((4, 4), np.float32)
    state["params"]["layers"][0]["w"] = state["params"]["layers"][0]["w"][:, :32]
    state["params"]["layers"][1]["b"] = state["params"]["layers"][1]["b"].astype(np.float32)
    del state["packed"]
    before = contents(two)
    with pytest.raises(UserError) as caught:
        restore(two, state)
    message = str(caught.value)
    assert "\n" not in message
    assert f"checkpoint {two}/2 is of a different model: it lacks params/extra; " in message
    assert "it has packed that the model lacks" in message
    assert "params/layers/0/w (float32[32, 64] there, float32[32, 32] in the model)" in message
    assert "params/layers/1/b (bfloat16[64] there, float32[64] in the model)" in message
    assert contents(two) == before
    with pytest.raises(UserError, match=r"other shapes or types: mask .* and \d+ more;"):
        restore(two, make_state(d_ff=32))


# Disks


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_an_unwritable_directory_is_one_line(tmp_path, where):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="; it must be a directory that can") as caught:
        Checkpoints(tmp_path / where, CheckpointConfig())
    assert "\n" not in str(caught.value)


IMPORTS = """
import logging, os, signal, sys
from pathlib import Path
import jax
import numpy as np
from helpers.checkpoint_states import abstract, files_of, make_mesh, make_state, put
from pjit_train.checkpoint import CheckpointConfig, Checkpoints
from pjit_train.errors import UserError
"""


def run(script, *arguments, **kwargs):
    command = [sys.executable, "-c", IMPORTS + script, *map(str, arguments)]
    pipe, env = subprocess.PIPE, environment()
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env, **kwargs)


FULL = """
import resource
jax.config.update("jax_num_cpu_devices", 8)
big = put({"w": np.random.default_rng(0).normal(size=(512, 128))}, make_mesh())
try:
    with Checkpoints(sys.argv[1], CheckpointConfig(keep_last=1)) as checkpoints:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        checkpoints.save(3, big)
        try:
            checkpoints.save(4, big)
        except UserError as error:
            print(error)
        print(checkpoints.steps())
        checkpoints.save(5, big)
except UserError as error:
    print(error)
"""


def test_a_full_disk_is_one_line_and_the_rest_is_whole(two):
    # A limit on the size of files fails the same write calls as a full disk.
    before = contents(two)
    out, err = (process := run(FULL, two)).communicate(timeout=60)
    assert process.returncode == 0, err
    lines = out.splitlines()
    reason = "could not be written: File too large; the ones before it are whole ([1, 2])"
    assert lines == [
        f"checkpoint {two}/3 {reason}",
        "[1, 2]",
        f"checkpoint {two}/5 {reason}",
    ]
    assert err == ""
    assert contents(two) == before
    assert restore(two)[0] == 2


# Kills

KILLED = """
import threading, time
jax.config.update("jax_num_cpu_devices", 8)
root, until = Path(sys.argv[1]), sys.argv[2]

def size():
    try:
        return sum(path.stat().st_size for path in files_of(root))
    except FileNotFoundError:
        return 0

def kill():
    start = size()
    while not (size() > start + int(until)):
        pass
    os.kill(os.getpid(), signal.SIGKILL)

with Checkpoints(root, CheckpointConfig()) as checkpoints:
    rng = np.random.default_rng(0)
    state = put({f"w{i}": rng.normal(size=(1024, 256)).astype(np.float32) for i in range(8)},
                make_mesh())
    threading.Thread(target=kill, daemon=True).start()
    checkpoints.save(3, state)
"""


def test_a_save_that_another_process_is_at_is_no_defect(two, caplog):
    half = two / "3.orbax-checkpoint-tmp"
    half.mkdir()
    assert restore(two, being_written=True)[0] == 2
    assert warnings_of(caplog) == []
    assert restore(two)[0] == 2
    said = f"checkpoint {half} is half-written: its save was cut off; ignored"
    assert warnings_of(caplog) == [said]


@pytest.mark.slow
@pytest.mark.parametrize("written_bytes", [0, 100_000, 4_000_000])
def test_a_killed_save_leaves_the_one_before(two, caplog, written_bytes):
    before = contents(two)
    _, err = (process := run(KILLED, two, written_bytes)).communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, err
    half = two / "3.orbax-checkpoint-tmp"
    assert half.exists()
    left = contents(two)
    step, state = restore(two)
    assert step == 2
    assert_same(state, make_state(2))
    assert warnings_of(caplog) == [
        f"checkpoint {half} is half-written: its save was cut off; ignored"
    ]
    assert contents(two) == left == left | before
    with Checkpoints(two, CheckpointConfig()) as checkpoints:
        checkpoints.save(3, state)
    assert restore(two)[0] == 3
    assert not half.exists()


# Processes

TWO_PROCESSES = """
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
logging.basicConfig(format="%(message)s")
with Checkpoints(sys.argv[1], CheckpointConfig(every_steps=None, every_minutes=60)) as checkpoints:
    step, state = checkpoints.restore(abstract(make_state(), make_mesh()))
    assert step == 1, step
    assert not checkpoints.due(1)
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(make_state(1))):
        for shard in leaf.addressable_shards:
            assert (np.asarray(shard.data) == expected[shard.index]).all()
    doubled = jax.jit(lambda s: jax.tree.map(lambda x: x + x, s), donate_argnums=0)
    checkpoints.save(2, doubled(state))
"""


@pytest.mark.slow
def test_one_process_writes_two_read_and_write_and_one_reads(two):
    (two / "2" / "state" / "_METADATA").write_text("{")  # both must agree that it is broken
    address = free_address()
    processes = [run(TWO_PROCESSES, two, address, i) for i in range(2)]
    ends = [process.communicate(timeout=90) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert f"checkpoint {two}/2 is broken: its state cannot be read: " in ends[0][1]
    assert "broken" not in ends[1][1]
    assert (two / "2.broken" / "state" / "_METADATA").read_text() == "{"
    step, state = restore(two)
    assert step == 2
    assert_same(state, jax.tree.map(lambda x: (x + x).astype(x.dtype), make_state(1)))
    body = json.loads((two / "2" / "digests" / "metadata").read_text())
    assert len(body["leaves"]) == len(jax.tree.leaves(state))


def test_what_is_saved_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """By the system calls: each file is synced while what came before it still stands."""
    synced, fsync = {}, os.fsync

    def note(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced[path] = sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdecimal())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    with Checkpoints(tmp_path, CheckpointConfig(keep_last=1, keep_best=0)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"x": jnp.full(4, step)})
    half, kept = tmp_path / f"2{orbax_internals.HALF_WRITTEN}", tmp_path / "2"
    files = {half / path.relative_to(kept) for path in kept.rglob("*") if path.is_file()}
    late = {path.name for path in files - synced.keys()}
    assert late <= {"_CHECKPOINT_METADATA", "commit_success.txt"}  # orbax's own, of the rename
    assert len(files) > 3
    assert synced[half] == [1]
    assert not (tmp_path / "1").exists()
    for name in late:
        (kept / name).write_bytes(b"")  # as if these were lost
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        like = {"x": jax.ShapeDtypeStruct((4,), jnp.int32, sharding=jnp.zeros(4).sharding)}
        assert checkpoints.restore(like)[0] == 2
