"""How figures look, and how they are written: the same rows give the same bytes."""

from __future__ import annotations

import contextlib
import functools
import io
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.tables import files

Parameters = ParamSpec("Parameters")

# A colour on white, and the same on near-black: each has a contrast of 3 to 1 or more with its ground.
INK, PAPER, RULE = "#1b1f24", "#ffffff", "#c9ced4"
DARK_INK, DARK_PAPER, DARK_RULE = "#e6e9ec", "#14171a", "#434a52"
PALETTE = (
    ("#5f6b76", "#aab4be"), ("#8a5a2b", "#d9a873"), ("#6f7300", "#c9cc4d"), ("#0a7f8f", "#45c8d8"),
    ("#6a4fc0", "#b39dff"), ("#1b7f4b", "#4fc98a"), ("#c25e00", "#ff9f45"), ("#b0307c", "#f07fc0"),
    ("#1f6fb4", "#6cb4f0"), ("#c22f2f", "#ff7b72"),
)  # fmt: skip
# Colour is never alone: a method has a shape as well.
_MARKERS = "sv^<>PXDoh"
# Rows of the papers' tables keep their colour from one page to the next; whatever else there is takes what is left.
_PLACES = (
    "full", "linear", "partial-1", "mlp-3", "sidetune", "bias", "adapter", "vpt-shallow", "vpt-deep", "lora",
)  # fmt: skip
# Above every figure that is drawn; "" for none.
_TITLE: ContextVar[str] = ContextVar("title", default="")
# Inches of a title's line, and of a character at the most.
_LINE, _CHARACTER = 0.17, 0.075
COLUMNS = 3
PANEL = (3.5, 2.6)

_SETTINGS = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.labelsize": 8.5,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    # Text stays text: it can be searched and read aloud. Names of elements depend on what is drawn alone.
    "svg.fonttype": "none",
    "svg.hashsalt": "fastpeft",
}
# What matplotlib would add of itself: dates and versions.
_NO_METADATA = {
    "svg": {"Date": None, "Creator": None, "Format": None, "Type": None},
    "png": {"Software": None},
}


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """matplotlib with these settings, whatever the user's own are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


@contextlib.contextmanager
def titled(text: str) -> Iterator[None]:
    """Figures that are drawn meanwhile have this text above them: what their numbers are of, by which protocol."""
    token = _TITLE.set(text)
    try:
        yield
    finally:
        _TITLE.reset(token)


def styled(draw: Callable[Parameters, Figure | None]) -> Callable[Parameters, Figure | None]:
    """A figure's function, run with these settings; its layout is settled once, for every format."""

    @functools.wraps(draw)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Figure | None:
        with settings():
            figure = draw(*args, **kwargs)
            if figure is not None:
                _entitle(figure, _TITLE.get())
                figure.get_layout_engine().execute(figure)
                figure.set_layout_engine("none")
            return figure

    return wrapped


def _entitle(figure: Figure, text: str) -> None:
    """A title that is as wide as the figure at the most, with room of its own."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(text, max(1, int(width / _CHARACTER)), break_on_hyphens=False)
    if lines:
        figure.set_size_inches(width, height + _LINE * len(lines))
        figure.suptitle("\n".join(lines), fontsize=8.5)


def look(method: str, methods: Iterable[str]) -> dict[str, str]:
    """Colour and marker of a method.

    Args:
        method: one of them.
        methods: all that there are, in order: those that no paper has share out the places that are free.
    """
    place = _place(method, methods)
    return {"color": PALETTE[place][0], "marker": _MARKERS[place]}


def _place(method: str, methods: Iterable[str]) -> int:
    if method in _PLACES:
        return _PLACES.index(method)
    methods = list(methods)
    free = [number for number, name in enumerate(_PLACES) if name not in methods] or list(range(len(_PLACES)))
    others = [name for name in methods if name not in _PLACES]
    # From the end: the first places are the papers' baselines.
    return free[-1 - others.index(method) % len(free)]


def panels(count: int, size: tuple[float, float] = PANEL, below: float = 0.0) -> tuple[Figure, list[Axes]]:
    """A figure of panels, row by row.

    Args:
        count: of panels.
        size: of one, width and height in inches.
        below: inches for a legend.
    """
    across = min(COLUMNS, count)
    down = -(-count // across)
    figure = Figure(figsize=(size[0] * across, size[1] * down + below), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for spare in axes[count:]:
        spare.set_axis_off()
    return figure, axes[:count]


def encode(figure: Figure, kind: str, ground: str = PAPER) -> bytes:
    """The figure as a file's bytes.

    Args:
        figure: of one of this package's functions.
        kind: "svg" or "png".
        ground: colour behind it, or "none".
    """
    buffer = io.BytesIO()
    with settings():
        figure.savefig(buffer, format=kind, dpi=160, facecolor=ground, metadata=_NO_METADATA[kind])
    return buffer.getvalue()


def write(figure: Figure, path: Path) -> list[Path]:
    """Write PATH.svg and PATH.png.

    Raises:
        TableError: they cannot be written.
    """
    written = []
    for kind in ("svg", "png"):
        target = path.with_name(f"{path.name}.{kind}")
        files.write(target, encode(figure, kind))
        written.append(target)
    return written
