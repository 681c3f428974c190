"""The collectives of a compiled program, read from its text."""

import re
from collections import Counter

KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast"
COLLECTIVE = re.compile(rf" = (.*?) ({KINDS})(-start)?\(")


def collectives(text: str) -> Counter:
    """How often each (kind, sorted shape) stands in a program; scalars are left out."""
    found = Counter()
    for line in text.splitlines():
        if match := COLLECTIVE.search(line):
            assert not match[3], "an asynchronous collective: its tuple repeats the operands"
            for shape in re.findall(r"\w+\[([\d,]+)\]", match[1]):
                found[match[2], tuple(sorted(map(int, shape.split(","))))] += 1
    return found
