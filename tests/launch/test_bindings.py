"""Gin text as data: what is written is what gin reads, and names do not depend on imports."""

import gin
import hypothesis.strategies as st
from hypothesis import given, settings

from launch.bindings import Configurable, Key, Reference, format_bindings, parse_bindings

SAMPLES = Configurable("pjit_train.run", "Samples")
ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
)
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=5), inner, max_size=3),
    ),
    max_leaves=6,
)


@given(VALUES)
@settings(max_examples=60, deadline=None)
def test_gin_reads_back_the_value_that_was_written(value):
    gin.clear_config()
    text = format_bindings({Key(SAMPLES, "", "prompts"): value})
    gin.parse_config(text)
    read = gin.query_parameter("pjit_train.run.Samples.prompts")
    assert (read, repr(read)) == (value, repr(value))
    assert text.isascii()
    assert parse_bindings(text).values == {Key(SAMPLES, "", "prompts"): value}


def test_the_way_of_importing_does_not_matter():
    texts = [
        "from pjit_train import run\nrun.Run.data = [@run.Samples(), 1]",
        "from pjit_train import run as other\nother.Run.data = [@other.Samples(), 1]",
        "import pjit_train.run\npjit_train.run.Run.data = [@pjit_train.run.Samples(), 1]",
        "from pjit_train import run\nrun.Run:\n  data = [@run.Samples(), 1]",
    ]
    key = Key(Configurable("pjit_train.run", "Run"), "", "data")
    for text in texts:
        assert parse_bindings(text).values == {key: [Reference(SAMPLES, "", True), 1]}


def test_modules_of_the_same_last_name_are_told_apart():
    values = {
        Key(Configurable("a.text", "X"), "", "p"): 1,
        Key(Configurable("b.text", "X"), "scope", "p"): Reference(
            Configurable("c.text", "Y"), "s", False
        ),
    }
    text = format_bindings(values)
    assert text.splitlines() == [
        "from __gin__ import dynamic_registration",
        "from a import text",
        "from b import text as text2",
        "from c import text as text3",
        "",
        "text.X.p = 1",
        "",
        "scope/text2.X.p = @s/text3.Y",
    ]
    assert parse_bindings(text).values == values


def test_macros_are_replaced_by_their_values():
    parsed = parse_bindings(
        "from pjit_train import run\nwidth = 3\nboth = [%width, (%width,)]\n"
        "run.Run.a = %both\nrun.Run.b = {'k': %width}\nunused = 4"
    )
    values = {key.parameter: value for key, value in parsed.values.items()}
    assert values == {"a": [3, (3,)], "b": {"k": 3}}
    assert set(parsed.macros) - parsed.used_macros == {"unused"}
