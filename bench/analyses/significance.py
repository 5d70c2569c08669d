"""Whether a method's lead is more than chance, how large it is, and what is left after as many tests as were made.

    python -m bench.analyses.significance out/vtab/results.csv --method vpt-deep [--rivals full linear] [--out DIR]

Over the tasks, Wilcoxon's signed-rank test of each rival (Table 10 of the VPT paper); within a task, Welch's t-test of
the seeds (its Fig. 16). All tests are one-tailed: that the method is better.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from bench.analyses import accuracies, command, effects
from bench.analyses.errors import AnalysisError
from bench.tables import statistics
from bench.tables.layout import Entry, Layout
from bench.tables.measured import mean
from bench.tables.tasks import TASKS
from fastpeft._serve import serve

_LEVEL = 0.05
Seeds = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class OverTasks:
    """Wilcoxon's test against one rival.

    Attributes:
        rival: its name.
        tasks: that both have.
        wins: tasks with a higher mean.
        difference: mean over the tasks, in points.
        effect: the rank-biserial correlation.
        p: one-tailed, or None where no task differs.
        holm: p adjusted for all rivals, or None.
    """

    rival: str
    tasks: int
    wins: int
    difference: float
    effect: float
    p: float | None
    holm: float | None = None


@dataclass(frozen=True)
class OnTask:
    """Welch's test against one rival on one task.

    Attributes:
        rival: its name.
        task: its name.
        seeds: of the method and of the rival.
        difference: of the means, in points.
        interval: of the difference, 95 %; nan where there is no p.
        effect: Hedges' g; nan where there is no p.
        p: one-tailed, or None for fewer than two seeds or two samples that do not vary.
        holm: p adjusted for all rivals and tasks, or None.
    """

    rival: str
    task: str
    seeds: tuple[int, int]
    difference: float
    interval: tuple[float, float]
    effect: float
    p: float | None
    holm: float | None = None


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 2 for a request that cannot be served."""
    parser = command.parser("bench.analyses.significance", __doc__)
    parser.add_argument("results", type=Path, metavar="RESULTS.csv", help="of bench.tables")
    parser.add_argument("--method", default="vpt-deep", help="that should be better; default: vpt-deep")
    parser.add_argument("--rivals", nargs="+", metavar="METHOD", help="default: all others that the file has")
    parser.add_argument("--where", nargs="+", default=[], metavar="FIELD=VALUE", help="which rows of the file")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write the tables and a figure")
    options = parser.parse_args(arguments)
    return serve(lambda: _serve(options))


def _serve(options: argparse.Namespace) -> None:
    known = accuracies.read(options.results, options.where)
    ours = known.of(options.method)
    names = options.rivals or [name for name in known.by_method if name != options.method]
    if options.method in names:
        raise AnalysisError(f"--rivals: {options.method} cannot be its own rival")
    if not names:
        raise AnalysisError(f"{options.results}: {options.method} has no rival in it")
    rivals = {name: known.of(name) for name in dict.fromkeys(names)}
    over = over_tasks(ours, rivals)
    within = on_tasks(ours, rivals)
    if not within:
        raise AnalysisError(f"{options.results}: no rival has a task in common with {options.method}")
    tables = {"wilcoxon": _wilcoxon_table(options.method, over), "welch": _welch_table(options.method, within)}
    for name, table in tables.items():
        table.notes.insert(0, f"{known.setup}.")
        print(table.markdown())
        if options.out is not None:
            command.write(command.folder(options.out) / f"{name}.md", table.markdown())
            command.write(options.out / f"{name}.tex", table.latex())
    if options.out is not None:
        for suffix in (".png", ".svg"):
            command.draw(figure(options.method, within), options.out / f"welch{suffix}")
        print(f"tables and figures: {options.out}")


def over_tasks(ours: Seeds, rivals: Mapping[str, Seeds]) -> list[OverTasks]:
    """Wilcoxon's tests of a method against each rival, a family for Holm; rivals without a common task are left out."""
    found = []
    for name, theirs in rivals.items():
        tasks = [task for task in ours if task in theirs]
        if not tasks:
            continue
        first = {task: list(ours[task].values()) for task in tasks}
        second = {task: list(theirs[task].values()) for task in tasks}
        pairs = [(mean(first[task]), mean(second[task])) for task in tasks]
        test = statistics.wilcoxon(first, second)
        found.append(
            OverTasks(
                name,
                len(tasks),
                sum(a > b for a, b in pairs),
                fmean(a - b for a, b in pairs),
                effects.rank_biserial(*zip(*pairs, strict=True)),
                None if test is None else test.p,
            )
        )
    return _adjusted(found)


def on_tasks(ours: Seeds, rivals: Mapping[str, Seeds]) -> list[OnTask]:
    """Welch's tests of a method against each rival on each common task, all of them a family for Holm."""
    found = []
    for name, theirs in rivals.items():
        for task in (task for task in ours if task in theirs):
            first, second = list(ours[task].values()), list(theirs[task].values())
            test = statistics.welch(first, second)
            found.append(
                OnTask(
                    name,
                    task,
                    (len(first), len(second)),
                    fmean(first) - fmean(second),
                    effects.interval(first, second),
                    effects.hedges_g(first, second),
                    None if test is None else test.p,
                )
            )
    return _adjusted(found)


def _adjusted(found: list) -> list:
    tested = [one for one in found if one.p is not None]
    adjusted = dict(zip(map(id, tested), effects.holm([one.p for one in tested]), strict=True))
    return [type(one)(**{**vars(one), "holm": adjusted.get(id(one))}) for one in found]


def _wilcoxon_table(method: str, found: Sequence[OverTasks]) -> Layout:
    heading = ("rival", "tasks", "better on", "difference", "effect", "p", "p (Holm)")
    table = Layout(f"{method} against its rivals over the tasks, Wilcoxon signed-rank", heading)
    for one in found:
        entries = (
            str(one.tasks),
            str(one.wins),
            f"{one.difference:+.2f}",
            _number(one.effect),
            _p(one.p),
            _p(one.holm),
        )
        table.rows.append((one.rival, [Entry(text) for text in entries]))
    smallest = min(2.0**-one.tasks for one in found)
    table.notes += [
        "Pairs are the means over the seeds. Difference: their mean, in points. Effect: the rank-biserial correlation, "
        f"1 if all ranks favour {method}.",
        f"Holm's correction is for {len(found)} rivals. A p-value can be no smaller than {smallest:.2g} with that many "
        "tasks.",
    ]
    return table


def _welch_table(method: str, found: Sequence[OnTask]) -> Layout:
    heading = ("rival, task", "seeds", "difference", "95 % interval", "Hedges' g", "p", "p (Holm)")
    table = Layout(f"{method} against its rivals task by task, Welch's t", heading)
    for one in found:
        low, high = one.interval
        entries = (
            "{} / {}".format(*one.seeds), f"{one.difference:+.2f}",
            "-" if math.isnan(low) else f"{low:+.2f} to {high:+.2f}", _number(one.effect), _p(one.p), _p(one.holm),
        )  # fmt: skip
        table.rows.append((f"{one.rival}, {one.task}", [Entry(text) for text in entries]))
    tested = [one for one in found if one.p is not None]
    raw, kept = (sum(p < _LEVEL for p in ps) for ps in ([o.p for o in tested], [o.holm for o in tested]))
    table.notes += [
        f"Below {_LEVEL}: {raw} of {len(tested)} tests, {kept} after Holm's correction for all of them.",
        "Seeds are the sample: what is tested is the training's chance on this data, not other data.",
    ]
    if any(one.p is None and min(one.seeds) > 1 for one in found):
        table.notes.append(f"{statistics.CONSTANT} So it is with the interval and the effect.")
    return table


def _number(value: float) -> str:
    return f"{value:+.2f}" if math.isfinite(value) else "-"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def figure(method: str, found: Sequence[OnTask]) -> Figure:
    """Differences with their intervals, a panel a rival, a line a task; filled where Holm leaves a finding."""
    rivals = list(dict.fromkeys(one.rival for one in found))
    order = {task.name: number for number, task in enumerate(TASKS)}
    tasks = sorted({one.task for one in found}, key=lambda task: (order.get(task, len(order)), task))
    size = (1.6 + 2.0 * len(rivals), 1.5 + 0.28 * len(tasks))
    drawn = Figure(figsize=size, layout="constrained")
    panels = drawn.subplots(1, len(rivals), squeeze=False, sharey=True)[0]
    for axes, rival in zip(panels, rivals, strict=True):
        axes.axvline(0, color="0.6", linewidth=0.8)
        for one in found:
            if one.rival != rival:
                continue
            height = tasks.index(one.task)
            colour = "tab:blue" if one.difference >= 0 else "tab:red"
            if not math.isnan(one.interval[0]):
                axes.plot(one.interval, (height, height), color=colour, linewidth=1.2)
            filled = one.holm is not None and one.holm < _LEVEL
            axes.plot(
                one.difference, height, "o", color=colour, markersize=5, markerfacecolor=colour if filled else "w"
            )
        axes.set_title(rival, fontsize="medium")
        axes.grid(axis="x", color="0.92")
        axes.set_axisbelow(True)
    panels[0].set_yticks(range(len(tasks)), tasks, fontsize="small")
    panels[0].invert_yaxis()
    drawn.supxlabel(f"{method} minus rival, points, 95 % interval; filled: p (Holm) < {_LEVEL}", fontsize="small")
    return drawn


if __name__ == "__main__":
    sys.exit(main())
