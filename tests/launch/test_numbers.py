"""Every number of a configuration and of the command line: none that is no number gets through.

Both tests walk over what there is, so that a new field or option is tested, or refused here.
"""

import collections.abc
import dataclasses
import importlib
import inspect
import math
import types
import typing
from typing import Annotated, Any, Literal

import pytest

from launch import argparse_internals
from launch.cli import main, parser
from launch.configure import build_run
from launch.explain import STANDARD, classes_of
from launch.pod.faults import Fault, parse_chaos
from pjit_train.data.image_sources import Digits
from pjit_train.data.sources import PythonStdlib
from pjit_train.data.text import TextData
from pjit_train.embeddings.tables import Table
from pjit_train.errors import UserError
from pjit_train.models.transformer import TransformerConfig
from sparsity.numbers import formats
from sparsity.post_training import one_shot
from sparsity.ranges import Range, check_fields, ranged_fields
from sparsity.recipes import patterns

MODULES = (*STANDARD, "pjit_train.study", "pjit_train.interplay_study")
MODULES += ("pjit_train.compression.compress", "sparsity.sparsity_schedules")
MODULES += tuple(
    f"sparsity.algorithms.{name}"
    for name in ("acdc", "global_pruners", "sparse_trainers", "topkast")
)
CLASSES = sorted(
    {
        member
        for module in MODULES
        for member in classes_of(module)
        if dataclasses.is_dataclass(member) and not inspect.isabstract(member)
    },
    key=str,
)
# Filled by the library itself, not by a configuration.
MADE = {"KeepZerosUpdater", "PruningUpdater", "Quantizer", "_Plan", "CycleSchedule"}
MADE |= {"_InMemory", "_OfFiles", "_OfRows", "Slot", "_Placed"}
# What an example needs beyond its numbers, by field, or class and field.
NEEDED = {
    "name": "a",
    "hotness": (1,),
    "DLRMConfig.rows": (4,),
    "SyntheticClicks.rows": (4,),
    "CriteoFiles.rows": (4,) * 26,
    "CriteoFiles.train": ("day_0",),
    "CriteoFiles.validation": ("day_1",),
    "ClickTable.rows": (4,),
    "ClickTable.train": ("a.parquet",),
    "ClickTable.validation": ("b.parquet",),
    "label": "clicked",
    "categorical": ("city",),
    "table": Table(name="a", rows=4, width=4),
    "Feature.hotness": 1,
    "num_heads": 2,
    "train": "corpus.txt",
    "sources": (PythonStdlib(),),
    "patterns": {"query": "2:4"},
    "vocab_size": 300,
    "source": Digits(),
    "path": "images",
    "data": TextData(),
    "model": TransformerConfig(
        vocab_size=300, max_len=4, d_model=4, num_layers=1, num_heads=2, d_ff=4
    ),
}


def plain_numbers(hint: Any) -> bool:
    """Whether an annotation has a number without a range."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return False
    if origin in (Literal, typing.Callable) or "Callable" in str(origin):
        return False
    return hint in (int, float) or any(map(plain_numbers, arguments))


def test_every_number_of_a_configuration_has_a_range():
    for kind in CLASSES:
        if kind.__name__ not in MADE:
            hints = typing.get_type_hints(kind, include_extras=True)
            bare = [f.name for f in dataclasses.fields(kind) if plain_numbers(hints[f.name])]
            assert not bare, f"{kind}: give {bare} a range of sparsity.ranges"


def example(hint: Any) -> Any:
    """A value that an annotation allows."""
    if typing.get_origin(hint) is Annotated:
        [within] = hint.__metadata__
        return 4 if hint.__origin__ is int and 4 in within else max(within.low, 0.5)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return example(typing.get_args(hint)[0])
    if dataclasses.is_dataclass(hint):
        if hint.__name__ == "Optimizer":
            hint = importlib.import_module(hint.__module__).AdamW
        return make(hint)
    raise AssertionError(f"no example of {hint}; add one to NEEDED")


def make(kind: type, **changes):
    hints = typing.get_type_hints(kind, include_extras=True)
    values = {}
    for field in dataclasses.fields(kind):
        missing = (field.default, field.default_factory) == (dataclasses.MISSING,) * 2
        needed = NEEDED.get(f"{kind.__name__}.{field.name}", NEEDED.get(field.name))
        if needed is not None and (missing or kind.__name__ == "Compression"):
            values[field.name] = needed
        elif missing:
            values[field.name] = example(hints[field.name])
    return kind(**values | changes)


def bad_values(hint: Any) -> list[Any]:
    """Values for a field that are no number of its range, in the form of the field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        [within] = hint.__metadata__
        bad = [math.nan, math.inf, -math.inf, True, "x", "1", [1], 10**400, -(10**400)]
        bad += [within.low] if within.above else [within.low - 1, within.low - 1e-3]
        bad += [within.high] if within.below else [within.high * 2 + 1]
        return [*bad, 1.5] if hint.__origin__ is int else bad
    if origin in (typing.Union, types.UnionType):
        ranged = next(part for part in arguments if "Range(" in str(part))
        allowed = [x for part in arguments for x in typing.get_args(part)]
        return [x for x in bad_values(ranged) if x not in allowed]
    if origin is tuple:
        good = [example(part) for part in arguments]
        return [0.5, good[1:]] + [
            (*good[:i], x, *good[i + 1 :])
            for i, part in enumerate(arguments)
            for x in bad_values(part)
        ]
    if origin is collections.abc.Mapping:
        return [0.5, *({("a", "kernel"): x} for x in bad_values(arguments[1]))]
    return [0.5, "0.5", *([x] for x in bad_values(arguments[0]))]


FIELDS = [
    pytest.param(kind, name, hint, id=f"{kind.__name__}.{name}")
    for kind in CLASSES
    for name, hint in ranged_fields(kind).items()
    if kind.__name__ not in MADE
]


@pytest.mark.parametrize(("kind", "name", "hint"), FIELDS)
def test_a_field_takes_no_number_without_a_meaning(kind, name, hint):
    make(kind)
    for value in bad_values(hint):
        with pytest.raises(ValueError, match=rf"{kind.__name__}\.{name}\b.*; use ") as caught:
            make(kind, **{name: value})
        assert len(str(caught.value)) < 200
        assert "\n" not in str(caught.value)


def test_ranges_say_and_hold_what_they_mean():
    @dataclasses.dataclass
    class Some:
        part: Annotated[float, Range(0, 1, above=True)] = 0.5
        count: Annotated[int, Range(2, 8)] | Literal["all"] | None = None

    for right in ({"part": 1}, {"part": 1e-9}, {"count": 2}, {"count": 8}, {"count": "all"}):
        check_fields(Some(**right))
    for wrong, says in (
        ({"part": 0}, "Some.part=0; use a number above 0 and to 1"),
        ({"count": 9}, "Some.count=9; use a whole number from 2 to 8 or 'all' or None"),
        ({"count": "none"}, "Some.count='none'; use a whole number from 2 to 8 or 'all' or None"),
    ):
        with pytest.raises(ValueError, match=says):
            check_fields(Some(**wrong))


# Gin files and bindings.


@pytest.mark.parametrize(
    ("binding", "says"),
    [
        ("optimizers.AdamW.learning_rate = 1e400", r"AdamW.learning_rate = inf: want a finite num"),
        ("optimizers.AdamW.b1 = -1e400", r"optimizers.AdamW.b1 = -inf: want a finite number"),
        ("text.TextData.weights = [1.0, 1e999]", r"text.TextData.weights = \[1.0, inf\]: want a f"),
        ("optimizers.AdamW.learning_rate = nan", "nan"),
        ("optimizers.AdamW.learning_rate = True", "AdamW.learning_rate = True: want a float"),
        ("optimizers.AdamW.learning_rate = '1e-3'", "AdamW.learning_rate = '1e-3': want a float"),
        ("optimizers.AdamW.learning_rate = 1e-60", "AdamW.learning_rate=1e-60; use a number"),
        ("run.Run.steps = 1e3", "run.Run.steps = 1000.0: want an int"),
        ("run.Run.steps = 9" + "9" * 30, "Run.steps=9999"),
        ("run.Run.steps = 9" + "9" * 5000, "run.Run.steps"),
        ("run.Run.seed = -1", "Run.seed=-1; use a whole number from 0"),
        ("text.TextData.cache_dir = 'a\\0b'", r"cache_dir = 'a\\x00b': want a text without NUL"),
    ],
)
def test_a_binding_of_no_number_is_told_as_such(binding, says):
    with pytest.raises(UserError, match=says) as caught:
        build_run(["configs/quickstart.gin"], [binding])
    assert "does not use" not in str(caught.value)
    assert len(str(caught.value)) < 300 + 3 * len(binding)


def test_a_file_that_binds_a_thing_twice_is_told_where(tmp_path):
    file = tmp_path / "mine.gin"
    head = (
        "from __gin__ import dynamic_registration\nfrom pjit_train import run\n"
        "include 'configs/quickstart.gin'\n"
    )
    file.write_text(f"{head}run.Run.steps = 3\nrun.Run:\n  seed = 1\n  steps = 3\n")
    assert build_run([str(file)])[0].steps == 3  # which overrides what it includes
    file.write_text(f"{head}run.Run.steps = 3\nrun.Run:\n  seed = 1\n  steps = 4\n")
    with pytest.raises(UserError, match=r"mine.gin:7: run.Run.steps is bound to 3 and to 4; bind"):
        build_run([str(file)])
    file.write_text(f"{head}run.Run.steps = %n\nn = 3\nn = 4\n")
    with pytest.raises(UserError, match=r"mine.gin:6: n is bound to 3 and to 4"):
        build_run([str(file)])
    head = head.replace("import run", "import optimizers")
    file.write_text(f"{head}optimizers.AdamW.b1 = 1e400\n")
    outer = tmp_path / "outer.gin"
    outer.write_text(f"include '{file}'\n")
    with pytest.raises(UserError, match=r"mine.gin:4: optimizers.AdamW.b1 = inf: want a finite"):
        build_run([str(outer)])


# The command line.

BAD_TEXTS = ("nan", "inf", "-inf", "1e400", "-1e400", "", " ", "x", "True", "1_0", "٣", "0x10")
BAD_TEXTS += ("1e", "--", "9" * 5000, "-" + "9" * 30, "1,5", "½", "1 2", "Infinity")


def numeric_options():
    """(words of the command, option, its converter) of every option that takes a number."""

    def walk(words, of):
        for name, sub in argparse_internals.commands(of).items():
            yield from walk((*words, name), sub)
        for action in argparse_internals.arguments(of):
            if action.type is not None:
                yield words, action, of

    return list(walk((), parser()))


@pytest.mark.parametrize(
    ("words", "action"),
    [
        pytest.param(words, action, id=" ".join((*words, action.option_strings[0])))
        for words, action, _ in numeric_options()
    ],
)
def test_an_option_takes_no_number_without_a_meaning(words, action, capfd):
    assert hasattr(action.type, "low"), "use whole or real of launch.commands.common"
    option = action.option_strings[0]
    low, high = action.type.low, action.type.high
    for good in (str(low), str(high)):
        assert action.type(good) in (low, high)
    is_whole = isinstance(action.type(str(high)), int)
    for text in (*BAD_TEXTS, *(["1.5", "1e3"] if is_whole else []), str(low - 1), f"{high:g}0"):
        if text == f"{high:g}0" and not is_whole:
            continue
        with pytest.raises(SystemExit) as caught:
            main([*words, f"{option}={text}"])
        assert caught.value.code == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith(f"torsion: argument {option}")
        assert "want a " in err
        assert err.count("\n") == 1
        assert len(err) < 300
    with pytest.raises(SystemExit):
        main([*words, f"{option}={low}", f"{option}={high}"])
    assert "is given twice" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("train quickstart.gin --mesh data=2,data=4", "data is given twice"),
        ("train quickstart.gin --mesh data=nan", "'data=nan' is no AXIS=SIZE"),
        ("train quickstart.gin --mesh data=1e2", "'data=1e2' is no AXIS=SIZE"),
        ("train quickstart.gin --mesh data=1_0", "'data=1_0' is no AXIS=SIZE"),
        ("train quickstart.gin --mesh data=" + "9" * 400, "is no AXIS=SIZE"),
        ("train quickstart.gin --mesh data=-2", "MeshShape.data=-2; use"),
        ("train quickstart.gin --mesh data=99999999", "needs 99999999 devices"),
        ("train quickstart.gin quickstart.gin", "quickstart.gin is given twice"),
        (
            "train quickstart.gin --gin run.Run.steps=3 --gin run.Run.steps=4",
            "--gin: run.Run.steps is bound to 3 and to 4; bind it once",
        ),
        ("slice 4x4xnan", "4x4xnan"),
        ("slice 4x4x-4", "4x4x-4"),
        ("slice 4x4x" + "9" * 400, "torsion: slice '4x4x9"),
        ("slice 4x4x4 --failed-ocs x,nan,0", "nan"),
        ("fabric --slices 4x4x4@nan", "4x4x4@nan"),
        ("fabric --failed block:nan", "nan"),
        ("fabric --failed block:-1", "-1"),
        ("dataflow --buffer nan", "--buffer nan"),
        ("dataflow --buffer -1", "--buffer -1"),
        ("dataflow --buffer 0", "buffer of 0 bytes is too small"),
        ("dataflow --buffer 1e400", "--buffer 1e400"),
        ("compress nowhere --layers a=2:4 a=1:4", "a was given 2:4 before"),
    ],
)
def test_a_number_within_a_text_is_told_too(argv, says, capfd, tmp_path, monkeypatch):
    (tmp_path / "quickstart.gin").write_text("include 'configs/quickstart.gin'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.process.prepare", lambda devices=None: None)
    try:
        code = main(argv.split())
    except SystemExit as end:
        code = end.code
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1
    assert len(err) < 900
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart.gin"]


@pytest.mark.parametrize(
    ("parse", "text", "says"),
    [
        (parse_chaos, "host=nan", "'host=nan' is no KIND=RATE"),
        (parse_chaos, "host=1_0e-2", "is no KIND=RATE"),
        (parse_chaos, "host=1e400", "is no KIND=RATE"),
        (parse_chaos, "host=-0.1", "is no KIND=RATE"),
        (parse_chaos, "host=0.1,host=0.2", "host is given twice"),
        (Fault.parse, "host:nan@step:1", "'nan' is no number"),
        (Fault.parse, "host:٣@step:1", "is no number"),
        (Fault.parse, "host:1@step:1e2", "want KIND:WHICH@step:N"),
        (Fault.parse, "host:1@step:0", "want KIND:WHICH@step:N"),
        (Fault.parse, "host:1@step:" + "9" * 400, "want KIND:WHICH@step:N"),
    ],
)
def test_failures_that_are_no_numbers(parse, text, says):
    with pytest.raises(UserError, match=says):
        parse(text)


@pytest.mark.parametrize(
    "text", ["nan:4", "2:4.0", "1_0:20", "٢:٤", "2:0", "-1:4", "2:" + "9" * 5000]
)
def test_patterns_that_are_no_numbers(text):
    for parse in (patterns.parse_pattern, one_shot.parse_pattern):
        with pytest.raises(ValueError, match="pattern") as caught:
            parse(text)
        assert "int_max_str" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["nan", "inf", "1e400", "-0.5", "1", "0_5e-1", "٠.٥", "True", "0.5.5"]
)
def test_fractions_that_are_none(text):
    with pytest.raises(ValueError, match="from 0 to below 1"):
        one_shot.parse_pattern(text)


@pytest.mark.parametrize("block", ["nan", "-1", "1e3", "1_0", "٣", "0", "9" * 12, "9" * 5000, ""])
def test_blocks_that_are_no_numbers(block):
    with pytest.raises(ValueError, match=r"block=.*; use a whole number from 1"):
        formats.get_format(f"int4:{block}")
