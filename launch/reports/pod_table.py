"""The table of `torsion study pod`, made of its results."""

from typing import Any

from pjit_train.markdown import markdown_table


def make_table(results: dict[str, Any]) -> str:
    """The results in Markdown, to be read on a terminal too."""
    year = results["year"]
    sections = [
        *_published(results["comparisons"]),
        "All-to-all without one switch, of the optimum with all of them: the optimum, and the "
        "wild-first reroute; and the latter of what single paths, and plain dimension order, give "
        "with all switches.",
        _failed_switches(results["failed_switch"]),
        "The best twist of every shape, of all that the wiring can make: its all-to-all, as GB/s "
        "that each chip sends with links of 50 GB/s, and that of the regular slice.",
        _twists(results["twists"]),
        "Goodput: closed form and Monte Carlo, with the standard error of the latter.",
        _goodput(results["goodput"]),
        f"A pod over {365 * year['years']:.0f} days: {year['jobs']} jobs, {year['outages']} "
        "outages.",
        _year(year["policies"]),
        *_checkpoints(results["checkpoints"]),
    ]
    return "\n\n".join(sections) + "\n"


def _published(rows):
    reasons = dict.fromkeys(r["why"] for r in rows if r["why"])
    numbered = {why: n for n, why in enumerate(reasons, 1)}

    def what(row):
        return row["what"] + (f" ({numbered[row['why']]})" if row["why"] else "")

    def published(value):
        return " .. ".join(map(_short, value)) if isinstance(value, tuple) else _short(value)

    cells = [
        (
            what(r),
            published(r["published"]),
            _short(r["ours"]),
            f"{r['difference']:+.4f}" if abs(r["difference"]) >= 5e-5 else "0",
            r["source"].split(" (")[0],
        )
        for r in rows
    ]
    yield "Published and computed."
    yield markdown_table(("figure", "published", "computed", "difference", "source"), cells)
    yield "\n".join(f"({n}) {why}." for why, n in numbered.items())


def _failed_switches(rows):
    kept = ("optimum", "wild_first", "of_single_path", "of_dimension_order")
    return markdown_table(
        ("slice", "switch of", "optimum", "wild-first", "of single paths", "of plain order"),
        [
            (r["slice"], r["dimension"], *(f"{r[k]:.4f}" if k in r else "" for k in kept))
            for r in rows
        ],
    )


def _twists(rows):
    return markdown_table(
        ("chips", "shape", "networks", "best", "GB/s", "regular", "gain"),
        [
            (
                f"{r['chips']}",
                r["shape"] + (", ships twisted" if r["shipped_gain"] else ""),
                f"{r['networks']}",
                r["best"].removeprefix(r["shape"]).lstrip("_") or "regular",
                f"{r['bytes_per_second_per_chip'] / 1e9:.1f}",
                f"{r['regular_bytes_per_second_per_chip'] / 1e9:.1f}",
                f"{r['gain']:.3f}",
            )
            for r in rows
        ],
    )


def _goodput(rows):
    return markdown_table(
        ("chips", "hosts up", "wiring", "closed form", "sampled", "error"),
        [
            (
                f"{r['chips']}",
                f"{r['host_availability']:.1%}",
                r["wiring"],
                f"{r['closed_form']:.5f}",
                f"{r['sampled']:.5f}",
                f"{r['standard_error']:.5f}",
            )
            for r in rows
        ],
    )


def _year(rows):
    return markdown_table(
        ("policy", "used", "goodput", "mean wait", "finished", "jobs hit", "how"),
        [
            (
                r["policy"],
                f"{r['utilisation']:.1%}",
                f"{r['goodput']:.1%}",
                f"{r['mean_wait_hours']:.0f} h",
                f"{r['finished_jobs']}",
                f"{r['interrupted_jobs']}",
                ", ".join(f"{n} {kind}" for kind, n in sorted(r["interruptions"].items())),
            )
            for r in rows
        ],
    )


def _checkpoints(found):
    yield (
        f"Checkpoints of a job on {found['chips']} chips with a failure each "
        f"{found['mtbf'] / 3600:.1f} h and {found['save']:.0f} s to save: Young's rule says to "
        f"save each {found['young'] / 60:.1f} min, Daly's {found['daly'] / 60:.1f}, the exact "
        f"optimum is {found['best'] / 60:.1f}. Part of its time that is work kept, over "
        f"{found['years']:g} years with {found['restarts']} restarts:"
    )
    yield markdown_table(
        ("minutes", "closed form", "simulated"),
        [
            (f"{r['interval'] / 60:.1f}", f"{r['closed_form']:.5f}", f"{r['simulated']:.5f}")
            for r in found["intervals"]
        ],
    )


def _short(value):
    return f"{value:.5f}" if 0.99 <= value < 0.99999 else f"{value:.4g}"
