"""Files of the standard library that make a corpus of text: all its modules, without tests."""

import dataclasses
import hashlib
import json
import sysconfig
import tokenize
from pathlib import Path

from pjit_train.files import write_whole

VERSION = "1.0.0"  # raised when the choice of files changes

# Not the library's own modules, its tests and their data, or text in another form.
EXCLUDED_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "__phello__", "pydoc_data")
)
# Made when this Python was built or installed, so they describe a machine.
EXCLUDED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "config-", "sitecustomize", "license")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StdlibFile:
    """A file: its path from the library's folder, its text, and the sha256 of the text in UTF-8."""

    path: str
    text: str
    sha256: str

    @property
    def split(self) -> str:
        """Split by the hash of the file's path: "validation" for one file in twenty, else
        "train"."""
        in_validation = hashlib.sha256(self.path.encode()).digest()[0] * 20 < 256
        return "validation" if in_validation else "train"


def stdlib_dir() -> Path:
    """Returns the folder of the standard library of this Python."""
    return Path(sysconfig.get_path("stdlib"))


def select_files(root: Path) -> list[StdlibFile]:
    """Returns the corpus under `root`, sorted by path, of equal files only the first.

    Files of no text, and those that are not valid in the encoding they declare, are left out.
    """
    selected, seen = [], set()
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if EXCLUDED_FOLDERS.intersection(relative.parts[:-1]):
            continue
        if any(part.lower().startswith(EXCLUDED_PREFIXES) for part in relative.parts):
            continue
        try:
            with tokenize.open(path) as file:  # some files declare Latin-1
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(text.encode()).hexdigest()
        if text.strip() and digest not in seen:
            seen.add(digest)
            selected.append(StdlibFile(path=relative.as_posix(), text=text, sha256=digest))
    return selected


def write_manifest(files: list[StdlibFile], path: Path) -> None:
    """Writes the list of the files as JSON: path, split and sha256 of each."""
    rows = [{"path": f.path, "split": f.split, "sha256": f.sha256} for f in files]
    write_whole(path, json.dumps(rows, indent=1))
