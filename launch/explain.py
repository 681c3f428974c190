"""Explains gin's errors in one line, with the nearest right name for a wrong one."""

import contextlib
import dataclasses
import difflib
import importlib
import inspect
import re
import tokenize
from collections.abc import Callable, Collection, Iterator

from launch.bindings import Configurable
from pjit_train.errors import UserError

# What is bound by its last name (`run.Run.steps`) on the command line, without an import.
STANDARD = (
    "pjit_train.adapters",
    "pjit_train.checkpoint",
    "pjit_train.data.click_sources",
    "pjit_train.data.clicks",
    "pjit_train.data.conversations",
    "pjit_train.data.image_sources",
    "pjit_train.data.images",
    "pjit_train.data.sources",
    "pjit_train.data.text",
    "pjit_train.data.tokenizers",
    "pjit_train.distillation",
    "pjit_train.embeddings.row_optimizers",
    "pjit_train.embeddings.storage",
    "pjit_train.embeddings.tables",
    "pjit_train.loggers",
    "pjit_train.models.dlrm",
    "pjit_train.models.transformer",
    "pjit_train.models.vit",
    "pjit_train.optimizers",
    "pjit_train.run",
    "pjit_train.sharding",
    "pjit_train.tasks.image_classification",
    "pjit_train.tasks.language_modelling",
    "pjit_train.tasks.recommendation",
    "sparsity.numbers.formats",
    "sparsity.numbers.quantized",
    "sparsity.post_training.one_shot",
    "sparsity.pruning",
    "sparsity.recipes.autoswitch",
    "sparsity.recipes.decay",
    "sparsity.recipes.patterns",
    "sparsity.recipes.recipes",
)
IMPORT = {m.rpartition(".")[2]: "from {} import {}".format(*m.rsplit(".", 1)) for m in STANDARD}


def is_of(member: type, module: str) -> bool:
    """Tells whether a gin file finds a class in a module: it stands there, or is exported by it."""
    exported = getattr(importlib.import_module(module), "__all__", ())
    return member.__module__ == module or member.__name__ in exported


def classes_of(module: str) -> list[type]:
    """The classes that a gin file finds in a module, in their order there."""
    members = vars(importlib.import_module(module)).values()
    return [x for x in members if isinstance(x, type) and is_of(x, module)]


def known_parameters() -> list[str]:
    """Lists every parameter of the standard modules, as `run.Run.steps`."""
    return [
        f"{Configurable(name, member.__name__)}.{field.name}"
        for name in STANDARD
        for member in classes_of(name)
        if dataclasses.is_dataclass(member)
        for field in dataclasses.fields(member)
    ]


def kinds_of(base: type) -> list[Configurable]:
    """The classes that may stand where one is wanted: itself, or those made from it."""
    found: dict[type, Configurable] = {}
    for module in (*STANDARD, base.__module__):
        for member in classes_of(module):
            if issubclass(member, base) and not inspect.isabstract(member):
                found.setdefault(member, Configurable(module, member.__name__))
    others = [name for member, name in found.items() if member is not base]
    return others or list(found.values())


def nearest_parameter(name: str, in_use: Collection[str] = ()) -> str:
    """The known parameter that `name` is most like.

    One of the same class comes first where the names are alike (`CheckpointConfig.every` and
    `every_steps`); then the same parameter of another class; then the nearest of the class.

    Args:
      name: as it was written.
      in_use: configurables of this run (`optimizers.AdamW`): they come first where `name` ends in a
        parameter that several have.
    """
    known = known_parameters()
    owner, _, parameter = name.rpartition(".")
    owner, names = owner.rpartition(".")[2], {other.split(".")[1] for other in known}
    if owner not in names:  # a mistyped class still says which parameters are meant
        owner = next(iter(difflib.get_close_matches(owner, sorted(names), n=1, cutoff=0.8)), None)
    of_class = [other for other in known if other.split(".")[1] == owner]
    alike = [other for other in of_class if _alike(parameter, other.rpartition(".")[2])]
    same = [other for other in known if other.endswith("." + parameter)]
    same_in_use = [other for other in same if other.rpartition(".")[0] in in_use]
    for candidates in (alike, same_in_use or same, of_class):
        if candidates:
            return _nearest(parameter, candidates, key=lambda other: other.rpartition(".")[2])
    return _nearest(name, known)


def _alike(written: str, known: str) -> bool:
    """Tells whether two names of parameters are close, or one has all words of the other."""
    words, others = set(written.split("_")), set(known.split("_"))
    near = difflib.SequenceMatcher(None, written, known).ratio() >= 0.6
    return near or words <= others or others <= words


def nearest_configurable(name: str) -> str:
    """The known class that `name` is most like."""
    return _nearest(name, {parameter.rpartition(".")[0] for parameter in known_parameters()})


def _nearest(name: str, names: Collection[str], key: Callable[[str], str] = str) -> str:
    """The one of `names` whose key is most like `name`; the first of several, by their order."""
    return max(sorted(names), key=lambda x: difflib.SequenceMatcher(None, key(x), name).ratio())


def missing_parameters(configurable: Configurable, parameters: list[str]) -> str:
    """The message for parameters that have no default and that nothing binds."""
    names = ", ".join(f"{configurable}.{parameter}" for parameter in parameters)
    verb, hint = ("is", "bind it") if len(parameters) == 1 else ("are", "bind them")
    if str(configurable) == "run.Run":
        hint = "add configs/base.gin and a model of configs/models"
    return f"{names} {verb} missing; {hint}"


@contextlib.contextmanager
def explained(source: str, in_use: Collection[str] = ()) -> Iterator[None]:
    """Turns any error of gin, or of what it calls, into a UserError of one line.

    Args:
      source: what is being read: a file, or an option of the command line with its binding.
      in_use: see `nearest_parameter`.
    """
    try:
        yield
    except RecursionError as error:
        raise UserError(f"{source}: a file includes itself, or a macro uses itself") from error
    except Exception as error:  # gin raises whatever Python raises at that point
        raise UserError(_explain(error, source, in_use)) from error


def _explain(error: Exception, source: str, in_use: Collection[str]) -> str:
    text = str(error)
    first = (text.splitlines() or [type(error).__name__])[0]
    if isinstance(error, SyntaxError):
        return _explain_syntax(error, source)
    if isinstance(error, tokenize.TokenError):  # its second argument is (line, column)
        return f"{source}: {error.args[0]}"
    if isinstance(error, UserError):  # gin has added to it where it was raised
        return first
    if found := re.search(r"missing \d+ required keyword-only arguments?: (.*)", first):
        module, name = re.search(r"\(<class '(\S*)\.(\w+)'>\)", text).groups()
        return missing_parameters(Configurable(module, name), re.findall(r"'(\w+)'", found[1]))

    line = ""
    if place := re.search(r"\n  In (?:file \"(.*)\",|bindings string) line (\d+)\n    (.*)", text):
        source = f"{place[1]}:{place[2]}" if place[1] else source
        line = place[3]
    if isinstance(error, OSError):
        missing = re.search(r"Unable to open file: (.*?)\. Searched", first)
        what = f"included file {missing[1]} is missing" if missing else first
        return f"{source}: {what}"
    if found := re.match(r"No module named '(.*)'", first):
        return f"{source}: no module {found[1]}; did you mean {_nearest(found[1], STANDARD)}?"
    if found := re.match(r"Configurable '(.*)' doesn't have a parameter named '(.*)'", first):
        return _wrong_name(source, f"{found[1]}.{found[2]}", True, in_use)
    if found := re.match(r"No configurable matching '(.*)'", first):
        hint = "begin the file with: from __gin__ import dynamic_registration"
        return f"{source}: {found[1]} is unknown; {hint}"
    if found := re.match(r"No configurable matching reference '@([\w.]+/)*(\w+)\.(\w+)", first):
        module, hint = found[2], "from __gin__ import dynamic_registration"
        lines = hint if module not in IMPORT else f"{hint}, and {IMPORT[module]}"
        return f"{source}: {module}.{found[3]} is unknown; begin the file with the lines {lines}"
    if found := re.match(r"'(\w+)' was not provided by an import", first):
        if found[1] in IMPORT:
            return f"{source}: {found[1]} is not imported; add the line: {IMPORT[found[1]]}"
        return _wrong_name(source, *_written(found[1], line), in_use)
    if found := re.match(r"Couldn't resolve selector (.*?);", first):
        return _wrong_name(source, *_written(found[1], line), in_use)
    if found := re.match(r"No bindings specified for '(.*)/gin.macro'", first):
        return f"{source}: %{found[1]} is used and nothing sets it; add {found[1]} = ..."
    return f"{source}: {first}"


def _explain_syntax(error: SyntaxError, source: str) -> str:
    if error.filename and error.filename != "<tokenize>":
        source = f"{error.filename}:{error.lineno}"
    message = (error.msg or "").splitlines()[0]
    if token := re.search(r"Failed to parse token '(.*)'", error.msg or ""):
        message = f"{token[1]} is no value; a string needs quotes"
    elif message.startswith("Couldn't parse statement"):
        message = "cannot be parsed; a binding is written module.Class.parameter = value"
    return f"{source}: {message.rstrip('.')}"


def _written(part: str, line: str) -> tuple[str, bool]:
    """The dotted name in `line` that begins with `part`, and whether it is bound there."""
    found = re.search(rf"(?<![\w.])({re.escape(part)}[\w.]*)(\s*=)?", line)
    return (found[1], bool(found[2])) if found else (part, False)


def _wrong_name(source: str, name: str, is_parameter: bool, in_use: Collection[str]) -> str:
    kind = "parameter" if is_parameter else "configurable"
    near = nearest_parameter(name, in_use) if is_parameter else nearest_configurable(name)
    return f"{source}: {name}: no such {kind}; did you mean {near}?"
