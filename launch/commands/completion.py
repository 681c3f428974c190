"""`torsion completion`: the completion script of a shell."""

from launch.argparse_internals import arguments, commands
from launch.commands.common import add_command


def add(to) -> None:
    completion = add_command(
        to,
        run,
        "completion",
        "print the completion script of a shell",
        'For bash: eval "$(torsion completion bash)"',
    )
    completion.add_argument("shell", choices=("bash", "zsh"))


def run(args, began: float) -> int:
    import shtab

    files = ("configs", "files", "tables", "traffic", "workload", "draw", "csv")
    kinds = dict.fromkeys(files, shtab.FILE)
    kinds |= {"run": shtab.DIRECTORY, "folder": shtab.DIRECTORY}
    for name, sub in commands(args.parser).items():
        for action in arguments(sub):
            if action.dest == "out":
                folder = name in ("train", "compress", "study")
                # argparse declares no such attribute; shtab reads it.
                action.complete = shtab.DIRECTORY if folder else shtab.FILE  # type: ignore[attr-defined]
            elif action.dest in kinds:
                action.complete = kinds[action.dest]  # type: ignore[attr-defined]  # shtab reads it
    print(shtab.complete(args.parser, args.shell))
    return 0
