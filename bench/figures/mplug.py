"""The mPLUG study's figures: score against share of the data, size, cost, and training's progress."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.figures.style import INK, PALETTE, look, panels, styled
from bench.mplug_study.measured import Cell, reference_size, share
from bench.mplug_study.methods import FULL
from bench.mplug_study.protocol import Protocol
from bench.tables.results import Line

_PANEL = (4.2, 3.0)


@styled
def sweeps(found: Sequence[Cell], protocol: Protocol, metric: str) -> Figure | None:
    """Score against share of the data, and against the module's parameters; where the output layer was trained too, the
    same again below. None where nothing was varied."""
    methods = [name for name in protocol.tunings if any(cell.method == name for cell in found)]
    if len(found) < 2:
        return None
    kinds = sorted({cell.classifier for cell in found})
    figure = Figure(figsize=(2 * _PANEL[0], len(kinds) * _PANEL[1] + 0.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    axes = figure.subplots(len(kinds), 2, squeeze=False, sharey=True)
    for (left, right), classifier in zip(axes, kinds, strict=True):
        own = [cell for cell in found if cell.classifier == classifier or cell.method == FULL]
        _by_share(left, own, found, protocol, methods)
        _by_size(right, own, found, methods)
        left.set_ylabel(f"{metric}{', output layer trained too' if classifier else ''}")
    axes[0][0].set_title("By share of the data")
    axes[0][1].set_title(f"By size of the module, {share(max(cell.ratio for cell in found))} of the data")
    axes[-1][0].set_xlabel("share of the training samples, %")
    # Where the module was never trained alone its own parameters are not known.
    alone = {(cell.method, cell.size) for cell in found if not cell.classifier}
    known = all((cell.method, cell.size) in alone for cell in found)
    axes[-1][1].set_xlabel("parameters of the module" if known else "trained parameters")
    _legend(figure, protocol, methods)
    return figure


def _by_share(
    axis: Axes, own: Sequence[Cell], found: Sequence[Cell], protocol: Protocol, methods: Sequence[str]
) -> None:
    for method in methods:
        size = reference_size(found, method, protocol.tunings[method].reference)
        shares = sorted(
            (cell for cell in own if (cell.method, cell.size) == (method, size)), key=lambda cell: cell.ratio
        )
        _line(axis, [100 * cell.ratio for cell in shares], shares, method, methods)
    axis.set_xscale("log")
    ticks: list[float] = []
    for ratio in sorted({cell.ratio for cell in found}, reverse=True):
        # Those that would touch the one behind are left out.
        if not ticks or 1.5 * ratio < ticks[-1]:
            ticks.append(ratio)
    axis.set_xticks([100 * ratio for ratio in ticks], [f"{100 * ratio:g}" for ratio in ticks])
    axis.minorticks_off()


def _by_size(axis: Axes, own: Sequence[Cell], found: Sequence[Cell], methods: Sequence[str]) -> None:
    most = max(cell.ratio for cell in found)
    # A module's own parameters, whatever is trained beside it.
    modules = {(cell.method, cell.size): cell.trained for cell in found if not cell.classifier}
    for method in methods:
        sizes = sorted(
            (cell for cell in own if (cell.method, cell.ratio) == (method, most)), key=lambda cell: cell.size
        )
        if method == FULL:
            for cell in sizes:
                axis.axhline(cell.mean, color=look(FULL, methods)["color"], linestyle=":", linewidth=1.2)
        else:
            across = [modules.get((method, cell.size), cell.trained) for cell in sizes]
            _line(axis, across, sizes, method, methods)
    axis.set_xscale("log")


@styled
def costs(found: Sequence[Cell], protocol: Protocol, metric: str) -> Figure | None:
    """Score against training samples times trained parameters; None where there is nothing to compare."""
    methods = [name for name in protocol.tunings if any(cell.method == name for cell in found)]
    if len(found) < 2:
        return None
    figure, (axis,) = panels(1, (6.0, 3.4), 0.4)
    for method in methods:
        for classifier in (False, True):
            own = [cell for cell in found if (cell.method, cell.classifier) == (method, classifier)]
            style = look(method, methods)
            axis.plot(
                [cell.cost for cell in own], [cell.mean for cell in own], linestyle="none",
                markerfacecolor="none" if classifier else style["color"], **style,
            )  # fmt: skip
    axis.set_xscale("log")
    axis.set_xlabel("training samples times trained parameters")
    axis.set_ylabel(metric)
    _legend(figure, protocol, methods, dots=True, both=any(cell.classifier for cell in found))
    return figure


@styled
def progress(lines: Sequence[Line], protocol: Protocol, methods: Sequence[str], metric: str) -> Figure | None:
    """A panel a method: validation score as it trained, a line for every size with all of the data (first seed).

    Args:
        lines: of the curves of one corpus.
    """
    runs: dict[str, dict[int, list[tuple[int, float]]]] = {}
    most = max((float(line["ratio"]) for line in lines), default=1.0)
    for line in lines:
        if not line["val_score"] or float(line["ratio"]) != most or line["classifier"] == "yes":
            continue
        if line["seed"] == min(other["seed"] for other in lines):
            point = (int(line["step"] or line["epoch"]), 100 * float(line["val_score"]))
            runs.setdefault(line["method"], {}).setdefault(int(line["size"]), []).append(point)
    shown = [name for name in methods if name in runs]
    if not shown:
        return None
    figure, axes = panels(len(shown), _PANEL)
    for axis, name in zip(axes, shown, strict=True):
        for number, (size, points) in enumerate(sorted(runs[name].items())):
            across, up = zip(*sorted(points), strict=True)
            label = f"{protocol.tunings[name].knob} {size}" if protocol.tunings[name].knob else None
            axis.plot(across, up, color=PALETTE[-1 - number % len(PALETTE)][0], marker=".", label=label)
        axis.set_title(protocol.tunings[name].title)
        axis.set_xlabel("step" if lines[0]["step"] else "epoch")
        axis.set_ylabel(f"{metric} on validation")
        if protocol.tunings[name].knob:
            axis.legend(loc="lower right")
    return figure


def _line(axis: Axes, across: Sequence[float], own: Sequence[Cell], method: str, methods: Sequence[str]) -> None:
    if own:
        axis.errorbar(
            across, [cell.mean for cell in own], yerr=[cell.spread for cell in own], capsize=2,
            linestyle=":" if method == FULL else "-", **look(method, methods),
        )  # fmt: skip


def _legend(
    figure: Figure, protocol: Protocol, methods: Sequence[str], *, dots: bool = False, both: bool = False
) -> None:
    handles = []
    for name in methods:
        stroke = "none" if dots else ":" if name == FULL else "-"
        handles.append(Line2D([], [], linestyle=stroke, label=protocol.tunings[name].title, **look(name, methods)))
    if both:
        hollow = {"linestyle": "none", "marker": "o", "markerfacecolor": "none"}
        handles.append(Line2D([], [], color=INK, label="hollow: output layer trained too", **hollow))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
