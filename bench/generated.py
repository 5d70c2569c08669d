"""Parts of a document that a command writes from committed results, between two marks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.record import RESULTS

PERFORMANCE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"


@dataclass(frozen=True)
class Section:
    """A generated part.

    Attributes:
        command: module that writes it with `--write-docs`.
    """

    command: str

    @property
    def begin(self) -> str:
        """The line before it."""
        return f"<!-- {self.command}: written by `python -m {self.command} --write-docs` -->\n"

    @property
    def end(self) -> str:
        """The line behind it."""
        return f"<!-- end of {self.command} -->\n"

    def of(self, document: str) -> str:
        """The part of a document.

        Raises:
            ValueError: it has none.
        """
        return document[document.index(self.begin) + len(self.begin) : document.index(self.end)].strip()

    def replaced(self, document: str, part: str) -> str:
        """A document with another part."""
        begin, end = document.index(self.begin) + len(self.begin), document.index(self.end)
        return f"{document[:begin]}\n{part}\n\n{document[end:]}"


def committed(name: str) -> dict[str, Mapping]:
    """What the result files of a name in bench/results hold, by folder."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"*/{name}"))}


def about(folder: str, name: str, held: Mapping, packages: tuple[str, ...]) -> str:
    """Machine, versions, dates and the file, in a line."""
    runs = held["runs"]
    versions = ", ".join(f"{one} {runs[-1]['versions'][one]}" for one in packages if one in runs[-1]["versions"])
    dates = sorted({run["date"][:10] for run in runs})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    where = f"[{folder}/{name}](../bench/results/{folder}/{name})"
    return f"{runs[-1]['device']}, {runs[-1]['cores']} cores; {versions}; {when}; {where}."
