"""Mistakes on the command line."""

from launch.cli import main


def mistake(arguments, capsys) -> str:
    """The one line with which a command refuses its arguments: exit code 2, and no output."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    out, error = capsys.readouterr()
    assert (code, out) == (2, "")
    assert error.count("\n") == 1, error
    return error
