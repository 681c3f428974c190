"""The parts of argparse that are used and are no part of its interface, each with what it is for.

`tests/launch/test_internals.py` fails by name where a version of Python has changed one of them.
"""

import argparse


def arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Lists a parser's options and positional arguments: to propose and complete them."""
    return parser._actions


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a parser's commands, by name; none where it has no commands."""
    groups = [a for a in arguments(parser) if isinstance(a, argparse._SubParsersAction)]
    return groups[0].choices if groups else {}
