"""The private parts of libraries that are used are still what they are used as."""

import argparse
import ast
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import gin
import pytest
from jax._src import compilation_cache

from launch import argparse_internals, gin_internals, jax_internals
from launch.pod import ray_internals
from pjit_train.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def told_by(program: str, *args: str) -> dict:
    """What a Python program prints at its end as one JSON line, in a process of its own."""
    command = [sys.executable, "-c", program, *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# Gin.


@pytest.fixture
def gin_as_it_is():
    """Puts back what a test sets."""
    readers, pretty = list(gin.config._FILE_READERS), gin.config.pprint
    yield
    gin.config._FILE_READERS[:], gin.config.pprint = readers, pretty
    gin.clear_config()


def test_gin_opens_files_by_the_reader_that_it_is_given(tmp_path, gin_as_it_is):
    (tmp_path / "a.gin").write_text("ignored")
    gin_internals.read_files_by(lambda path: io.StringIO("A = 3\n"))
    gin.clear_config()
    gin.parse_config_file(str(tmp_path / "a.gin"))
    assert gin.query_parameter("%A") == 3


def test_gin_writes_dictionaries_in_their_order(gin_as_it_is):
    gin_internals.keep_the_order_of_dictionaries()
    gin.clear_config()
    gin.parse_config("A = {'z': 1, 'a': 2}\n")
    assert gin.config_str().strip().splitlines()[-1] == "A = {'z': 1, 'a': 2}"


# argparse.


def test_argparse_lists_what_a_parser_takes():
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument_group("more").add_argument("--steps", "-n")
    sub = parser.add_subparsers().add_parser("train")
    found = argparse_internals.arguments(parser)
    assert {"run", "steps"} <= {action.dest for action in found}
    assert ["--steps", "-n"] in [action.option_strings for action in found]
    assert argparse_internals.commands(parser) == {"train": sub}
    assert argparse_internals.commands(sub) == {}


# JAX.

ONE_OF_MANY = """
import json, os, socket, sys
import jax, psutil
from jax._src import distributed
from launch import jax_internals

if sys.argv[2] == "changed":
    jax_internals.every_process_caches()
    jax_internals.gloo_listens_on("127.0.0.2")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    coordinator = "127.0.0.1:%d" % probe.getsockname()[1]
jax.distributed.initialize(
    coordinator, num_processes=1, process_id=0, coordinator_bind_address=coordinator
)
jax.devices()
sockets = psutil.Process().net_connections("tcp")
distributed.global_state.process_id = 1
jax.jit(lambda x: 2 * x + 1)(3.0)
listens = sorted(s.laddr.ip.removeprefix("::ffff:") for s in sockets if s.status == "LISTEN")
print(json.dumps({"listens": listens, "cached": len(os.listdir(sys.argv[1]))}), flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_each_process_of_jax_caches_and_gloo_listens_where_it_is_told(tmp_path):
    found = told_by(ONE_OF_MANY, str(tmp_path), "changed")
    assert found["listens"] == ["127.0.0.1", "127.0.0.2"]  # the coordinator, and gloo
    assert found["cached"] == 1


@pytest.mark.slow
def test_by_itself_jax_does_neither(tmp_path):
    """Once it does, these internals are needed no more."""
    found = told_by(ONE_OF_MANY, str(tmp_path), "as it is")
    assert "127.0.0.2" not in found["listens"]
    assert found["cached"] == 0


def test_a_compilation_that_a_kill_cut_short_is_written_again(tmp_path):
    """JAX itself lets the half stand for good: it writes an entry once, where it is read."""
    jax_internals.write_compilations_whole()
    cache, _ = compilation_cache.get_file_cache(str(tmp_path))
    (tmp_path / "jit_step-0123-cache").write_bytes(b"wh")
    cache.put("jit_step-0123", b"whole")
    assert cache.get("jit_step-0123") == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["jit_step-0123-cache"]


# Ray.

RAY_OF_OWN = """
import json, os
from launch.pod import cluster, ray_internals

directory = cluster.private_directory()
with cluster.local(directory, dashboard=True) as dashboard:
    import ray

    @ray.remote
    class Actor:
        def parent(self):
            import psutil
            return psutil.Process(ray_internals.raylet()).name()

    told = {
        "dashboard": dashboard,
        "address": ray.util.get_node_ip_address(),
        "inside": any(directory.glob("session_*/logs/raylet.out")),
        "parent": ray.get(Actor.remote().parent.remote(), timeout=100),
    }
__import__("shutil").rmtree(directory, ignore_errors=True)
print(json.dumps(told), flush=True)
"""


@pytest.mark.slow
def test_a_ray_of_our_own_is_on_loopback_in_its_directory():
    found = told_by(RAY_OF_OWN)
    assert re.fullmatch(r"127\.0\.0\.1:\d+", found["dashboard"])
    assert found["address"] == "127.0.0.1"
    assert found["inside"]
    assert found["parent"] == "raylet"


def test_the_release_of_ray_that_is_required_is_the_one_that_is_known():
    [required] = re.findall(r'"ray\[.*\](.*)"', (ROOT / "pyproject.toml").read_text())
    assert required == f"=={ray_internals.RELEASE}.*"


@pytest.mark.parametrize(
    ("version", "known"), [("2.60.0", True), ("2.60.3", True), ("2.6.0", False)]
)
def test_a_ray_of_another_release_is_refused(version, known, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "__version__", version)
    if known:
        assert ray_internals.import_ray() is ray
        return
    with pytest.raises(UserError) as error:
        ray_internals.import_ray()
    wanted = "pods are made for Ray 2.60; pip install 'ray[default]==2.60.*'"
    assert str(error.value) == f"Ray {version} is installed and {wanted}"


# All of them.

PUBLIC = {"_exit", "_replace", "_asdict", "_fields", "_make"}  # of `os` and of named tuples


def private_names(tree: ast.Module):
    """(line, name) of what begins with an underscore and is not made in the module itself."""
    own = PUBLIC | {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            own |= {node.attr} if node.value.id in ("self", "cls") else set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name):
                names = [name]
            case ast.Import(names=aliases):
                names = [part for alias in aliases for part in alias.name.split(".")]
            case ast.ImportFrom(module=module, names=aliases):
                names = [*(module or "").split("."), *(alias.name for alias in aliases)]
            case ast.keyword(arg=str(name)):
                names = [name]
            case _:
                continue
        line = getattr(node, "lineno", 0)
        yield from ((line, n) for n in names if re.match("_[^_]", n) and n not in own)


@pytest.mark.parametrize("package", ["launch", "pjit_train", "sparsity", "topology"])
def test_what_is_private_of_a_library_is_used_in_the_internals_only(package):
    for path in (ROOT / package).rglob("*.py"):
        found = list(private_names(ast.parse(path.read_text())))
        internals = path.name.endswith("_internals.py")
        assert internals or not found, f"{path.relative_to(ROOT)}: (line, name) {found}"


def test_private_names_are_found():
    program = """
import ray._private.worker
from jax._src.lib import xla
ray.init(_temp_dir="x")
gin.config._readers = self._mine = __name__
other._mine
"""
    found = {name for _, name in private_names(ast.parse(program))}
    assert found == {"_private", "_src", "_temp_dir", "_readers"}
