"""Markdown that commands write, read back."""


def cells(text: str) -> list[list[str]]:
    """The rows of all tables in a text, headings and rules too."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
