"""Tables as LaTeX, no wider than the text they stand in. A document needs the packages booktabs and graphicx."""

from __future__ import annotations

import math
import re
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.tables.layout import Entry, Layout

# Points of a character, of one in \scriptsize, and between two columns, in Computer Modern of 10 points.
_CHARACTER, _SMALL, _APART = 4.9, 3.7, 12.0
# Of a table: shrunk to the 345 points of an article's column, its letters have six points still; and rows of a page.
_WIDEST, _TALLEST = 600.0, 40
_FITTED = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
_ESCAPED = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}", "±": r"$\pm$", "<": r"$<$",
        ">": r"$>$", "†": r"\dag{}", "‡": r"\ddag{}", "§": r"\S{}", "→": r"$\to$",
        "\N{MULTIPLICATION SIGN}": r"$\times$", "\N{MINUS SIGN}": r"$-$",
    }
)  # fmt: skip
# A hyphen is no minus; that of an exponent or of a name stays.
_MINUS = re.compile(r"(?<![\w.)-])-(?=\.?\d)")


def table(layout: Layout) -> str:
    """A table, or one after the other the parts of one that is too tall, or illegible if it were shrunk to the text.

    Columns below one heading stay together where they fit. The notes stand below the last part.
    """
    parts = [(rows, columns) for rows in _pages(layout) for columns in _parts(layout)]
    best, floats = layout.best(), []
    for number, (rows, columns) in enumerate(parts, 1):
        title = layout.title if len(parts) == 1 else f"{layout.title} ({number} of {len(parts)})"
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{escape(title)}}}\smallskip", _FITTED]
        lines += [*_tabular(layout, rows, columns, best), "}"]
        if number == len(parts) and layout.notes:
            lines += [r"\par\smallskip", r"\parbox{\linewidth}{\footnotesize\raggedright"]
            lines += [*(rf"{escape(note)}\par" for note in layout.notes), "}"]
        floats.append("\n".join([*lines, r"\end{table}"]) + "\n")
    return "\n".join(floats)


def escape(text: str) -> str:
    """Text as LaTeX has it."""
    return _MINUS.sub("\N{MINUS SIGN}", text).translate(_ESCAPED)


def _tabular(layout: Layout, rows: range, columns: list[int], best: set[tuple[int, int]]) -> list[str]:
    """Lines of some rows and columns of the cells, the names before them."""
    lines = [rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule"]
    if layout.over:
        above = [number for number, (_, span) in enumerate(layout.over) for _ in range(span)]
        spans = [(layout.over[number][0], len(list(own))) for number, own in groupby(above[place] for place in columns)]
        lines.append(_row(["", *(rf"\multicolumn{{{span}}}{{c}}{{{escape(text)}}}" for text, span in spans)]))
        ends = [*accumulate((span for _, span in spans), initial=1)]
        lines.append(" ".join(rf"\cmidrule(lr){{{first + 1}-{last}}}" for first, last in pairwise(ends)))
    lines.append(
        _row([escape(name) for name in (layout.heading[0], *(layout.heading[1 + place] for place in columns))])
    )
    lines.append(r"\midrule")
    for number in rows:
        name, cells = layout.rows[number]
        if number in layout.sections:
            section = rf"\emph{{{escape(layout.sections[number])}}}"
            lines += [r"\midrule"] * (number > rows.start)
            lines.append(rf"\multicolumn{{{1 + len(columns)}}}{{l}}{{{section}}} \\")
        lines.append(_row([escape(name), *(_cell(cells[column], (number, column) in best) for column in columns)]))
    return [*lines, r"\bottomrule", r"\end{tabular}%"]


def _cell(entry: Entry, bold: bool) -> str:
    text = rf"\textbf{{{escape(entry.text)}}}" if bold else escape(entry.text)
    return rf"{text} {{\scriptsize ({escape(entry.paper)})}}" if entry.paper else text


def _row(cells: list[str]) -> str:
    # After the row before, a bracket or a star would belong to its end.
    guard = "{}" if cells[0].startswith(("[", "*")) else ""
    return guard + " & ".join(cells) + r" \\"


def _pages(layout: Layout) -> list[range]:
    """The rows of each part: as many as a page has room for, evenly."""
    count = len(layout.rows)
    pages = max(1, math.ceil(count / _TALLEST))
    ends = [round(page * count / pages) for page in range(pages + 1)]
    return [range(first, last) for first, last in pairwise(ends)]


def _parts(layout: Layout) -> list[list[int]]:
    """The columns of each part: as few parts as will do, and of these as even as they come."""
    widths = _widths(layout)
    left, count = _WIDEST - widths[0], len(widths) - 1
    ends = [*accumulate((span for _, span in layout.over), initial=0)] if layout.over else range(count + 1)
    blocks: list[list[int]] = []
    for first, last in pairwise(ends):
        group = list(range(first, last))
        # What is too wide by itself is divided.
        blocks += [group] if _sum(widths, group) <= left else [[column] for column in group]
    found = _packed(blocks, widths, left)
    evener = (_packed(blocks, widths, share * left / 20) for share in range(1, 20))
    return next((parts for parts in evener if len(parts) == len(found)), found)


def _packed(blocks: list[list[int]], widths: list[float], left: float) -> list[list[int]]:
    """Blocks one after the other, a new part where the last has no room."""
    parts: list[list[int]] = [[]]
    for block in blocks:
        if parts[-1] and _sum(widths, parts[-1] + block) > left:
            parts.append([])
        parts[-1] += block
    return parts


def _sum(widths: list[float], columns: list[int]) -> float:
    return sum(widths[1 + column] for column in columns)


def _widths(layout: Layout) -> list[float]:
    """Of every column in points, the rows' names first."""
    names = [_CHARACTER * len(name) for name in (layout.heading[0], *(name for name, _ in layout.rows))]
    found = [max(names) + _APART]
    for column, heading in enumerate(layout.heading[1:]):
        cells = [entries[column] for _, entries in layout.rows]
        wide = [_CHARACTER * len(one.text) + (_SMALL * (len(one.paper) + 3) if one.paper else 0) for one in cells]
        found.append(max([_CHARACTER * len(heading), *wide]) + _APART)
    return found
