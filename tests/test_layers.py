"""The house stands from below: a package imports none of those above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "topology": {"sparsity", "pjit_train", "launch", "jax", "flax", "optax"},
    "sparsity": {"topology", "pjit_train", "launch"},
    "pjit_train": {"launch", "gin"},
    "launch": set(),
}
IMPORT_ALL = """
import importlib, pkgutil, sys
package, hidden = sys.argv[1], set(sys.argv[2].split(','))

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in hidden:
            raise ImportError(f'{name} is hidden')

sys.meta_path.insert(0, Hide())
root = importlib.import_module(package)
for module in pkgutil.walk_packages(root.__path__, package + '.'):
    importlib.import_module(module.name)
"""


@pytest.mark.slow
@pytest.mark.parametrize("package", FORBIDDEN)
def test_every_module_imports_with_the_upper_packages_hidden(package):
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, package, ",".join(FORBIDDEN[package])],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_function_imports_upwards_later(package):
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            upper = {name.partition(".")[0] for name in names} & FORBIDDEN[package]
            assert not upper, f"{path.relative_to(ROOT)}:{node.lineno} imports {upper}"
