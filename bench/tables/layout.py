"""Tables as Markdown and as LaTeX: the best of a column in bold, the paper's number beside a cell."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """

    title: str
    heading: tuple[str, ...]
    rows: list[tuple[str, list[Entry]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def best(self) -> set[tuple[int, int]]:
        """Places of the best cells: of a column, over its rows, the largest."""
        found = set()
        for column in range(len(self.heading) - 1):
            values = [cells[column].value for _, cells in self.rows]
            there = [value for value in values if value is not None]
            if len(there) > 1:
                found |= {(row, column) for row, value in enumerate(values) if value == max(there)}
        return found

    def markdown(self) -> str:
        """The table in Markdown, notes below it."""
        best = self.best()

        def cell(entry: Entry, bold: bool) -> str:
            text = f"**{entry.text}**" if bold else entry.text
            return f"{text} ({entry.paper})" if entry.paper else text

        lines = [f"### {self.title}", "", _line(self.heading), _line(["---"] * len(self.heading))]
        for number, (name, cells) in enumerate(self.rows):
            shown = [cell(entry, (number, column) in best) for column, entry in enumerate(cells)]
            lines.append(_line([name, *shown]))
        lines += ["", *(f"{note}\n" for note in self.notes)]
        return "\n".join(lines).rstrip() + "\n"

    def latex(self) -> str:
        """The table in LaTeX, with booktabs' rules."""
        best = self.best()

        def cell(entry: Entry, bold: bool) -> str:
            text = rf"\textbf{{{_escape(entry.text)}}}" if bold else _escape(entry.text)
            return rf"{text} {{\scriptsize ({_escape(entry.paper)})}}" if entry.paper else text

        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_escape(self.title)}}}"]
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(self.heading) - 1)}}}", r"\toprule"]
        lines += [" & ".join(map(_escape, self.heading)) + r" \\", r"\midrule"]
        for number, (name, cells) in enumerate(self.rows):
            shown = [cell(entry, (number, column) in best) for column, entry in enumerate(cells)]
            lines.append(" & ".join([_escape(name), *shown]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
        lines += [rf"\\ {{\footnotesize {_escape(note)}}}" for note in self.notes]
        return "\n".join([*lines, r"\end{table}"]) + "\n"


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escape(text: str) -> str:
    for plain, escaped in (
        ("\\", r"\textbackslash{}"), ("&", r"\&"), ("%", r"\%"), ("_", r"\_"), ("#", r"\#"), ("$", r"\$"),
        ("±", r"$\pm$"), ("<", r"$<$"), (">", r"$>$"),
    ):  # fmt: skip
        text = text.replace(plain, escaped)
    return text
