"""`torsion study WHAT`: the studies that show what works, each resumable, each with its table."""

from pathlib import Path

from launch.commands.common import add_command


def add(commands) -> None:
    study = add_command(
        commands,
        None,
        "study",
        "train and compare: the studies of the documentation",
        "torsion study WHAT --help tells the options of a study.",
    )
    studies = study.add_subparsers(title="studies", metavar="WHAT", required=True)
    _add_recipes(studies)


def _add_recipes(studies) -> None:
    recipes = add_command(
        studies,
        _run_recipes,
        "recipes",
        "train and compare the published N:M recipes",
        "Each run of the study is a run directory in --out, named by recipe, pattern and seed. Run "
        "again with the same --out, it goes on where it was; several such commands at once share "
        "the runs. At the end, table.md, results.json and recipes.png are in --out.",
    )
    recipes.set_defaults(trains=True)
    recipes.add_argument(
        "--size",
        default="small",
        metavar="SIZE",
        help="small (default), overnight, or a gin file like those in configs/studies",
    )
    recipes.add_argument("--seeds", type=int, metavar="N", help="runs of each kind (as configured)")
    recipes.add_argument(
        "--table", action="store_true", help="train nothing: table and figure of what is there"
    )
    recipes.add_argument(
        "--out", metavar="DIR", help="of the runs (default: runs/study- and the gin file's name)"
    )


def _run_recipes(args, began: float) -> int:
    from launch import process

    process.prepare()

    from launch import study

    file = study.SIZES.get(args.size, args.size)
    out = Path(args.out or Path("runs") / f"study-{Path(file).stem}")
    return study.study_recipes(file, out, seeds=args.seeds, only_table=args.table)
