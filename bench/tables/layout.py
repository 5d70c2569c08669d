"""Tables as Markdown and as LaTeX: the best of a column in bold, the paper's number beside a cell."""

from __future__ import annotations

from dataclasses import dataclass, field

from bench.tables import latex

EMPTY = "-"


@dataclass(frozen=True)
class Entry:
    """A cell.

    Attributes:
        text: what was measured.
        value: by which the best of its column is found; None for a cell that does not compete.
        paper: the paper's number, or "".
    """

    text: str = EMPTY
    value: float | None = None
    paper: str = ""


@dataclass
class Layout:
    """A table.

    Attributes:
        title: above it.
        heading: of the columns; the first is the rows' names.
        rows: name and cells.
        notes: lines below it.
        over: a heading above the heading: text and the number of columns that it spans, for all but the first column.
        sections: labels by the number of the row that they stand above.
        best_of: what competes: the cells of a "column", of a "row", or "all".
    """

    title: str
    heading: tuple[str, ...]
    rows: list[tuple[str, list[Entry]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    over: tuple[tuple[str, int], ...] = ()
    sections: dict[int, str] = field(default_factory=dict)
    best_of: str = "column"

    def best(self) -> set[tuple[int, int]]:
        """Places of the best cells: the largest of those that compete."""
        places = [[(row, column) for row in range(len(self.rows))] for column in range(len(self.heading) - 1)]
        if self.best_of == "row":
            places = [list(line) for line in zip(*places, strict=True)]
        elif self.best_of == "all":
            places = [[place for line in places for place in line]]
        found: set[tuple[int, int]] = set()
        for line in places:
            values = {place: self.rows[place[0]][1][place[1]].value for place in line}
            there = [value for value in values.values() if value is not None]
            if len(there) > 1:
                found |= {place for place, value in values.items() if value == max(there)}
        return found

    def markdown(self) -> str:
        """The table in Markdown, notes below it."""
        best = self.best()

        def cell(entry: Entry, bold: bool) -> str:
            text = f"**{entry.text}**" if bold else entry.text
            return f"{text} ({entry.paper})" if entry.paper else text

        # Markdown has one heading: what stands above a column goes before its name.
        above = (
            ["", *(text for text, span in self.over for _ in range(span))] if self.over else [""] * len(self.heading)
        )
        heading = [f"{up}: {name}" if up else name for up, name in zip(above, self.heading, strict=True)]
        lines = [f"### {self.title}", "", _line(heading), _line(["---"] * len(heading))]
        for number, (name, cells) in enumerate(self.rows):
            if number in self.sections:
                lines.append(_line([f"*{self.sections[number]}*", *[""] * (len(heading) - 1)]))
            shown = [cell(entry, (number, column) in best) for column, entry in enumerate(cells)]
            lines.append(_line([name, *shown]))
        lines += ["", *(f"{note}\n" for note in self.notes)]
        return "\n".join(lines).rstrip() + "\n"

    def latex(self) -> str:
        """The table in LaTeX; see `bench.tables.latex`."""
        return latex.table(self)


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"
