"""Markdown files as parts of a page: tables with their cells taken apart, and the prose around them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup, escape

from bench.report import pictures
from bench.tables.errors import TableError

# Of a cell that ends in brackets with a number the brackets hold the paper's.
_PAPER = re.compile(r"(?P<own>.+?) \((?P<paper>[-+<~]?\d[^()]*)\)")
_NUMBER = re.compile(r"[-+]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Cell:
    """A cell.

    Attributes:
        content: escaped.
        paper: the paper's number, or "".
        order: by which its column is sorted; "" if it has no number.
        best: whether it is in bold.
    """

    content: Markup
    paper: str = ""
    order: str = ""
    best: bool = False


@dataclass
class TablePart:
    """A table.

    Attributes:
        title: above it; "" if the file has none there.
        heading: of the columns.
        rows: cells; a row of one cell alone is a heading over those that follow.
        notes: paragraphs below it, escaped.
    """

    title: str
    heading: list[Markup]
    rows: list[list[Cell]] = field(default_factory=list)
    notes: list[Markup] = field(default_factory=list)

    @property
    def competes(self) -> bool:
        """Whether a cell is in bold."""
        return any(cell.best for row in self.rows for cell in row)

    @property
    def compared(self) -> bool:
        """Whether a cell has a paper's number."""
        return any(cell.paper for row in self.rows for cell in row)


@dataclass
class Document:
    """A Markdown file.

    Attributes:
        name: of the file, without its ending.
        parts: tables, and prose as escaped HTML, in order.
        latex: of the file beside it, or "".
    """

    name: str
    parts: list[TablePart | Markup]
    latex: str = ""

    @property
    def title(self) -> str:
        """Of its first table; else the file's name."""
        return next((part.title for part in self.parts if isinstance(part, TablePart) and part.title), self.name)

    @property
    def has_tables(self) -> bool:
        """Whether there is one."""
        return any(isinstance(part, TablePart) for part in self.parts)


def read(path: Path) -> Document:
    """A file's parts.

    Raises:
        TableError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        beside = path.with_suffix(".tex")
        latex = beside.read_text(encoding="utf-8") if beside.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise TableError(f"{path}: cannot be read: {error}") from error
    # HTML in the text is shown as text.
    reader = MarkdownIt("js-default", {"html": False, "linkify": False, "typographer": False})
    reader.add_render_rule("image", _image)
    return Document(path.stem, _parts(reader, reader.parse(text), {"folder": path.parent}), latex)


def _parts(reader: MarkdownIt, tokens: list[Token], environment: dict) -> list[TablePart | Markup]:
    parts: list[TablePart | Markup] = []
    title, at = "", 0
    while at < len(tokens):
        end = _end(tokens, at)
        block = tokens[at : end + 1]
        kind = block[0].type
        if kind == "table_open":
            parts.append(_table(reader, block, title, environment))
            title = ""
        elif kind == "heading_open":
            parts += _heading(title)
            title = block[1].content
        else:
            parts += _heading(title)
            title = ""
            html = Markup(reader.renderer.render(block, reader.options, environment))
            if kind == "paragraph_open" and parts and isinstance(parts[-1], TablePart):
                parts[-1].notes.append(html)
            else:
                parts.append(html)
        at = end + 1
    return parts + _heading(title)


def _heading(title: str) -> list[Markup]:
    return [Markup("<h4>{}</h4>").format(title)] if title else []


def _end(tokens: list[Token], start: int) -> int:
    """The place of the token that closes a block."""
    depth = 0
    for place in range(start, len(tokens)):
        depth += tokens[place].nesting
        if depth == 0:
            return place
    return len(tokens) - 1


def _table(reader: MarkdownIt, block: list[Token], title: str, environment: dict) -> TablePart:
    lines: list[list[str]] = []
    for token in block:
        if token.type == "tr_open":
            lines.append([])
        elif token.type == "inline":
            lines[-1].append(token.content)

    def show(text: str) -> Markup:
        return Markup(reader.renderInline(text, environment))

    table = TablePart(title, [show(text) for text in lines[0]])
    for line in lines[1:]:
        if line[0].startswith("*") and not any(line[1:]):
            table.rows.append([Cell(show(line[0]))])
        else:
            table.rows.append([_cell(text, number > 0, show) for number, text in enumerate(line)])
    return table


def _cell(text: str, compared: bool, show) -> Cell:
    found = _PAPER.fullmatch(text) if compared else None
    own, paper = (found["own"], found["paper"]) if found else (text, "")
    return Cell(show(own), paper, leading(own), own.startswith("**"))


def leading(text: str) -> str:
    """The first number of a text, by which it is sorted; "" if it has none."""
    number = _NUMBER.search(text)
    return number[0].replace(",", "") if number else ""


def _image(renderer, tokens, number: int, options, environment: dict) -> str:
    """A picture of the file's own folder as data; of any other address its words alone, as a page fetches nothing."""
    token = tokens[number]
    words = escape(token.content)
    root = environment["folder"].resolve()
    path = (root / str(token.attrGet("src"))).resolve()
    if path.suffix.lower() in pictures.SUFFIXES and path.is_relative_to(root) and path.is_file():
        return f'<img src="{pictures.data_uri(path)}" alt="{words}">'
    return str(words)
