"""Tables in Markdown."""

from collections.abc import Sequence

_NUMBERS = set("+-.,%h 0123456789")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Writes a table, its columns aligned; those of numbers stand to the right.

    Args:
      rows: each with a cell of every column; the last ones may be left out.
    """
    rows = [[*row, *[""] * (len(head) - len(row))] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(head, *rows, strict=True)]
    right = [all(set(row[c]) <= _NUMBERS for row in rows) for c in range(len(head))]

    def line(cells):
        aligned = zip(cells, widths, right, strict=True)
        return "| " + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in aligned) + " |"

    rule = [("-" * (w - 1) + ":") if r else "-" * w for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(head), line(rule), *map(line, rows)])
