"""Which sources of csrc/cpu this Python code calls, as a number.

What is handed to the native library has no types that a call could check, so a library of other sources than the ones
that belong to this code may do anything. setup.py therefore compiles the number of the sources into the library, and
`fastpeft._native` opens no other. It is computed, so there is nothing to count up and nothing to forget: in a checkout
from csrc/cpu itself, and in an installed package, which has no csrc, when it is built, into the file `RECORD`.

setup.py runs this file by its path: it imports nothing of fastpeft.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "csrc" / "cpu"
RECORD = Path(__file__).with_name("_sources.txt")

# Strings and characters first, since what looks like a comment in them is none.
_COMMENT = re.compile(
    r""" ("(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])+') | //[^\n]* | /\*.*?\*/ """, re.DOTALL | re.VERBOSE
)


def number(folder: Path) -> int:
    """64 bits that stand for all C++ files below a folder: their paths and what is in them, comments and layout aside.

    Raises:
        OSError: a file cannot be read.
    """
    found = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".cpp", ".h")):
        text = _COMMENT.sub(lambda match: match[1] or " ", path.read_text(encoding="utf-8"))
        lines = [" ".join(line.split()) for line in text.splitlines()]
        content = "\n".join(filter(None, lines))
        found.update(f"{path.relative_to(folder).as_posix()}\0{content}\0".encode())
    return int.from_bytes(found.digest(), "big")


def expected() -> int | None:
    """The number of the sources that belong to this Python code; None where there are neither they nor `RECORD`."""
    if FOLDER.is_dir():
        return number(FOLDER)
    return int(RECORD.read_text(), 16) if RECORD.exists() else None
