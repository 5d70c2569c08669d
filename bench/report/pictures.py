"""Pictures within a page: figures as SVG whose colours follow the reader's, files as data."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ET
from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure

from bench.figures import style
from bench.tables.errors import TableError

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".svg": "image/svg+xml"}
SUFFIXES = tuple(_KINDS)


def colours() -> list[tuple[str, str, str]]:
    """Names of the page's colours, with their values on light and on dark ground."""
    fixed = [("ink", style.INK, style.DARK_INK), ("rule", style.RULE, style.DARK_RULE)]
    return [*fixed, *((f"c{number}", light, dark) for number, (light, dark) in enumerate(style.PALETTE))]


def inline(figure: Figure, prefix: str, label: str) -> Markup:
    """A figure as an SVG element for HTML: colours by name, no identifier that another figure has too.

    Args:
        figure: of `bench.figures`.
        prefix: of identifiers, unique on the page.
        label: what a screen reader says.
    """
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    root = ET.fromstring(style.encode(figure, "svg", "none"))
    for element in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(element)
    for parent in list(root.iter()):
        # Its rules would hold for the whole page.
        for element in parent.findall(f"{{{_SVG}}}style"):
            parent.remove(element)
    _rename(root, prefix)
    by_value = {light: f"var(--{name})" for name, light, _ in colours()}
    pattern = re.compile("|".join(by_value))
    for element in root.iter():
        for name in ("style", "fill", "stroke"):
            if name in element.attrib:
                element.set(name, pattern.sub(lambda match: by_value[match[0]], element.get(name)))
    del root.attrib["height"]
    root.set("role", "img")
    root.set("aria-label", label)
    # ElementTree has escaped every text and attribute.
    return Markup(ET.tostring(root, encoding="unicode"))


def _rename(root: ET.Element, prefix: str) -> None:
    """Put a prefix before every identifier that is referred to, and drop the others."""
    href = f"{{{_XLINK}}}href"
    used = {element.get(href)[1:] for element in root.iter() if element.get(href, "").startswith("#")}
    for element in root.iter():
        for value in element.attrib.values():
            used.update(_REFERENCE.findall(value))
    for element in root.iter():
        if element.get("id") in used:
            element.set("id", f"{prefix}-{element.get('id')}")
        else:
            element.attrib.pop("id", None)
        if element.get(href, "").startswith("#"):
            element.set(href, f"#{prefix}-{element.get(href)[1:]}")
        for name, value in element.attrib.items():
            element.set(name, _REFERENCE.sub(rf"url(#{prefix}-\1)", value))


def data_uri(path: Path) -> str:
    """A picture's file as an address that holds it.

    Raises:
        TableError: the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TableError(f"{path}: cannot be read: {error.strerror or error}") from error
    return f"data:{_KINDS[path.suffix.lower()]};base64,{base64.b64encode(content).decode()}"
