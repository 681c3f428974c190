"""The house stands from below: a package imports none of those above it."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Collection
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A docstring does not begin with these, but with a noun (and its article) or a verb.
NO_BEGINNING = re.compile(
    r"(After|As|At|Before|Besides|By|For|From|How|If|In|No|None|Nothing|Not|Of|One|Only|Ours?|So|Such"
    r"|That|The\s+same|Theirs?|Then|There|They|This|Those|To|Until|What|Whatever|When|Where|Whether"
    r"|Which|Who|Why|With|Within|Without)(?![\w-])"
)
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
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if error.name != 'lm_eval':  # of an extra
            raise
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


def modules() -> dict[str, Path]:
    """The file of each module, by its name; of a package, the one of its `__init__`."""
    found = {}
    for path in (path for package in FORBIDDEN for path in (ROOT / package).rglob("*.py")):
        *parents, name = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parents if name == "__init__" else (*parents, name))] = path
    return found


def imported(tree: ast.Module, known: Collection[str]) -> set[str]:
    """The known modules that one imports, wherever it does: in functions and for types only, too.

    Not the packages that these are in, though Python imports them with it.
    """
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                found |= {alias.name for alias in aliases}
            case ast.ImportFrom(module=module, names=aliases, level=0):
                names = {f"{module}.{alias.name}" for alias in aliases}
                found |= {name if name in known else module for name in names}
            case ast.ImportFrom():
                raise AssertionError(f"line {node.lineno}: imports are by full names here")
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.JoinedStr() as name]):
                prefix = name.values[0].value
                found |= {module for module in known if module.startswith(prefix)}
    return found & set(known)


def cycle(imports: dict[str, set[str]]) -> list[str] | None:
    """Modules of which each imports the next, the last one the first; None where there are none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return None


def test_no_modules_import_each_other():
    files = modules()
    imports = {name: imported(ast.parse(path.read_text()), files) for name, path in files.items()}
    assert {"launch.commands.train", "launch.commands.completion"} <= imports["launch.cli"]
    assert "sparsity.recipes.recipe_updater" in imports["sparsity.recipes.recipes"]
    assert cycle(imports) is None, " -> ".join(cycle(imports))


@pytest.mark.parametrize(
    "back",
    [
        "import a.one",
        "from a import one",
        "from a.one import thing",
        "def later():\n    from a.one import thing",
        "if TYPE_CHECKING:\n    from a.one import Thing",
        "importlib.import_module(f'a.{name}')",
    ],
)
def test_a_cycle_is_found_however_a_module_is_imported(back):
    known = {"a", "a.one", "a.three"}
    imports = {"a.one": imported(ast.parse("from a import two\nimport a.three"), known | {"a.two"})}
    imports |= {"a.two": imported(ast.parse(back), known), "a.three": set(), "a": set()}
    assert imports["a.one"] == {"a.two", "a.three"}
    assert set(cycle(imports)) == {"a.one", "a.two"}
    assert cycle(imports | {"a.two": set()}) is None


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_function_imports_upwards_later(package):
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            upper = {name.partition(".")[0] for name in names} & FORBIDDEN[package]
            assert not upper, f"{path.relative_to(ROOT)}:{node.lineno} imports {upper}"


def imports_of_tests(text: str, tests: Collection[str]) -> set[str]:
    """The test modules that a text imports, programs in its strings included."""
    words = re.findall(r"^\s*(?:from|import) +([\w.]+)(?: +import +(.*))?", text, re.MULTILINE)
    named = {name for module, names in words for name in re.findall(r"\w+", f"{module} {names}")}
    return named & set(tests)


def test_no_test_module_imports_another():
    """What several use stands in `helpers`, or is a fixture of a `conftest`."""
    tests = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
    assert imports_of_tests("CODE = '''\nfrom test_runs import TINY\n'''", tests) == {"test_runs"}
    assert imports_of_tests("from launch import test_runs", tests) == {"test_runs"}
    found = {name: imports_of_tests(path.read_text(), tests) for name, path in tests.items()}
    del found["test_layers"]  # names one, above
    assert not any(found.values()), found


@pytest.mark.parametrize(
    "docstring",
    ["What links give.", "Of the kernel.", "Those, too.", "The same once open.", "None."],
)
def test_a_docstring_that_needs_its_file_is_found(docstring):
    assert NO_BEGINNING.match(docstring)
    assert not NO_BEGINNING.match("One-shot pruning. What is kept stands in `a`.")


def test_names_of_test_modules_are_unique():
    """pytest imports them by name alone: of two of one name it collects one."""
    count = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, times in count.items() if times > 1] == []


def test_docstrings_begin_with_a_noun_or_a_verb():
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    bad = []
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text and NO_BEGINNING.match(text):
                place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
                bad.append(f"{place}: {text.splitlines()[0]}")
    assert not bad, "begin these with a noun or a verb:\n" + "\n".join(bad)
