"""Failures that are asked for: by name, and by rates and a seed."""

import re

import numpy as np
import pytest

from launch.pod.faults import CHAOS, Fault, Repair, chaos, parse_chaos
from pjit_train.errors import UserError
from topology import TPU_V5P

POD = {"processes": 4, "hosts": 16, "blocks": 2}


def test_names_are_read_and_written_alike():
    for text in ("process:1@step:40", "host:3@step:7", "ocs:x,0,3@step:9", "manager@step:2"):
        assert str(Fault.parse(text)) == text
    assert Fault.parse("ocs:x,0,3@step:9").what == "x,0,3"


@pytest.mark.parametrize(
    "text",
    [
        "host:3",
        "host@step:3",
        "manager:1@step:3",
        "cat:1@step:3",
        "host:x@step:3",
        "ocs:w,0,0@step:1",
        "ocs:x,0,4@step:2",
        "host:3@step:0",
        "host:-1@step:2",
        "process:1@step:1.5",
        "",
    ],
)
def test_what_is_no_failure_is_one_line(text):
    with pytest.raises(UserError, match="--fail") as error:
        Fault.parse(text)
    assert "\n" not in str(error.value)


def test_repairs_are_of_parts_of_the_pod():
    for text in ("block:63@step:80", "host:1,3@step:7", "ocs:x,0,3@step:9"):
        assert str(Repair.parse(text)) == text
    for text, says in (
        ("block:1", "want PART@step:N, such as block:1@step:80"),
        ("block:1@step:0", "want PART@step:N"),
        ("block:64@step:2", "'64' is no block; there are 0 .. 63"),
        ("process:1@step:2", "process"),
        ("link:0,0,0,0,+x@step:2", "want one of block, host, ocs"),
    ):
        with pytest.raises(UserError, match=f"^--repair {re.escape(text)}: .*{says}"):
            Repair.parse(text)


def test_a_failure_is_of_something_that_is_there():
    Fault.parse("process:3@step:1").check(**POD)
    Fault.parse("block:1@step:1").check(**POD)
    for text in ("process:4@step:1", "host:16@step:1", "block:2@step:1", "hang:9@step:1"):
        with pytest.raises(UserError, match=r"one of 0 \.\."):
            Fault.parse(text).check(**POD)


def test_chaos_is_a_matter_of_the_seed():
    rates = parse_chaos("process=0.05,host=0.02,ocs=0.01")
    first = chaos(rates, steps=400, seed=3, **POD)
    assert first == chaos(rates, steps=400, seed=3, **POD)
    assert first != chaos(rates, steps=400, seed=4, **POD)
    assert [f.step for f in first] == sorted(f.step for f in first)
    for fault in first:
        fault.check(**POD)
        assert Fault.parse(str(fault)) == fault


def test_chaos_keeps_its_rates_and_more_steps_change_nothing_before():
    """A rate of 0.05 over 4000 steps: 200 expected, standard deviation 14."""
    found = chaos({"host": 0.05}, steps=4000, seed=0, **POD)
    assert abs(len(found) - 200) < 5 * 14
    which = np.bincount([int(f.what) for f in found], minlength=16)
    assert which.min() > 0
    for kind in CHAOS:
        assert chaos({kind: 0.0}, steps=100, seed=0, **POD) == []


def test_switches_fail_where_their_wiring_is_known():
    for read in (
        lambda: Fault.parse("ocs:x,0,0@step:2", TPU_V5P),
        lambda: parse_chaos("ocs=0.1", TPU_V5P),
    ):
        with pytest.raises(UserError, match=r"--(fail|chaos).*wired is not published"):
            read()
    assert Fault.parse("block:0@step:2", TPU_V5P).kind == "block"
    assert chaos({"host": 0.5}, steps=9, seed=0, pod=TPU_V5P, **POD)


@pytest.mark.parametrize("text", ["host", "host=2", "cat=0.1", "host=-0.1", "host=x", "host=0.1,,"])
def test_rates_that_make_no_sense_are_one_line(text):
    with pytest.raises(UserError, match="--chaos"):
        parse_chaos(text)
