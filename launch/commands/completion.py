"""`torsion completion`: the completion script of a shell."""

from launch.commands.common import add_command


def add(commands) -> None:
    completion = add_command(
        commands,
        run,
        "completion",
        "print the completion script of a shell",
        'For bash: eval "$(torsion completion bash)"',
    )
    completion.add_argument("shell", choices=("bash", "zsh"))


def run(args, began: float) -> int:
    import shtab

    from launch.cli import parser  # which knows this command, too

    top = parser()
    [commands] = [action for action in top._actions if isinstance(action.choices, dict)]
    kinds = {"configs": shtab.FILE, "files": shtab.FILE}
    kinds |= {"run": shtab.DIRECTORY, "folder": shtab.DIRECTORY}
    for name, sub in commands.choices.items():
        for action in sub._actions:
            if action.dest == "out":
                folder = name in ("train", "compress", "study")
                action.complete = shtab.DIRECTORY if folder else shtab.FILE
            elif action.dest in kinds:
                action.complete = kinds[action.dest]
    print(shtab.complete(top, args.shell))
    return 0
