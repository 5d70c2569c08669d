"""What a study is, in facts; what it lacks; what failed in it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from bench.figures.studies import (
    SAMPLES,
    SAVED,
    Study,
    accuracies,
    base_task,
    diverged,
    finals,
    group_of,
    methods_of,
    numbers,
    searched,
    sizes_of,
    spread,
    tasks_of,
)  # fmt: skip
from bench.tables import cells
from bench.tables.protocol import ROWS, Protocol
from bench.tables.results import Line, point_of
from bench.tables.spec import VTAB
from bench.tables.tasks import TASKS

_PROTOCOL = re.compile(r"(paper|quick)-(\d+)")
_PAPERS_EPOCHS = (50, 100)
# Parts of a setting by what the paper's cost table calls them.
_PRINTED_AS = {"length": "p", "reduction": "r"}
_VTAB = tuple(task for task in TASKS if task.group in VTAB)


def facts(study: Study) -> dict[str, str]:
    """What was run on what, by name."""
    rows, own = study.rows, finals(study.rows)
    tasks = tasks_of(rows)
    known = [task for task in tasks if group_of(task) in VTAB]
    others = len(tasks) - len(known)
    seeds = sorted({int(row["seed"]) for row in own})
    dates = sorted({row["date"] for row in rows})
    tested = {(row["task"], row["setting"]) for row in own}
    sizes = sorted({size for place, size in sizes_of(rows).items() if place in tested})
    seconds = sum(numbers(rows, "seconds"))
    found = {
        "backbone": study.backbone,
        "image size": f"{study.image_size} px",
        "protocol": f"{study.protocol}: {_in_words(study)}",
        "tasks": f"{len(known)} of VTAB-1k's {len(_VTAB)}" + (f", {others} more" if others else ""),
        "methods": ", ".join(methods_of(rows)),
        "runs": f"{len(searched(rows)):,} in the search, {len(own):,} final",
        "seeds": ", ".join(map(str, seeds)) or "none yet",
        "training time": _duration(seconds),
        "device": ", ".join(sorted({row["device"] for row in rows})),
        "precision": ", ".join(sorted({row["precision"] for row in rows if row["precision"]})),
        "fastpeft": ", ".join(sorted({row["version"] for row in rows})),
        "date": dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}",
    }  # fmt: skip
    if len(sizes) > 1:
        found["training images"] = ", ".join(f"{size:,}" for size in sizes)
    return found


def _in_words(study: Study) -> str:
    found = _PROTOCOL.fullmatch(study.protocol)
    if not found:
        return "one of its own"
    grid = "a thinned grid" if found[1] == "quick" else "the paper's grid"
    return f"{grid}, {found[2]} epochs"


def _duration(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:,.0f} minutes"
    return f"{seconds / 3600:,.1f} hours"


def cautions(study: Study) -> list[str]:
    """Why the numbers are not to be held against the paper's, in sentences: a thinned protocol, few epochs."""
    found = _PROTOCOL.fullmatch(study.protocol)
    said = []
    if found is None:
        said.append(f"'{study.protocol}' is a protocol of its own, not the paper's.")
    elif found[1] == "quick":
        said.append(f"Quick protocol: a thinned grid and {found[2]} epochs.")
    elif int(found[2]) not in _PAPERS_EPOCHS:
        said.append(f"{found[2]} epochs instead of the paper's {_PAPERS_EPOCHS[1]}.")
    if found is None or found[1] == "quick":
        grids = [(len(own), _papers_settings(study, method)) for method, own in _points(study).items()]
        grids = [(own, papers) for own, papers in grids if papers]
        if grids:
            ours, papers = zip(*grids, strict=True)
            said.append(f"{_range(ours)} settings were tried for a method; the paper's grids have {_range(papers)}.")
    return said


def _range(values: Sequence[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _papers_settings(study: Study, method: str) -> int:
    row = ROWS.get(method)
    if row is None or row.missing:
        return 0
    return len(list(Protocol.of(study.backbone.partition("@")[0], False, 5).grid(row)))


def _points(study: Study) -> dict[str, set[str]]:
    """Settings that the search tried, by method."""
    found: dict[str, set[str]] = {}
    for row in searched(study.main):
        found.setdefault(row["method"], set()).add(row["point"])
    return found


def gaps(study: Study) -> list[str]:
    """What a complete study would have and this has not, in sentences."""
    rows = study.main
    tasks, methods = tasks_of(rows), methods_of(rows)
    said = []
    lacking = [task.name for task in _VTAB if task.name not in tasks]
    if lacking and len(lacking) < len(_VTAB):
        said.append(f"Tasks of VTAB-1k without a run: {', '.join(lacking)}.")
    unknown = [name for name, row in ROWS.items() if row.missing]
    if unknown:
        said.append(f"Methods that the library lacks: {', '.join(unknown)}.")
    absent = [name for name, row in ROWS.items() if name not in methods and not row.missing]
    if absent:
        said.append(f"Methods of the paper's tables without a run: {', '.join(absent)}.")
    most = max((len(_seeds(rows, method, task)) for method in methods for task in tasks), default=0)
    settings = _points(study)
    for method in methods:
        nothing, unfinished, few, thin = [], [], [], []
        for task in tasks:
            own = [row for row in rows if (row["method"], row["task"]) == (method, task)]
            seeds, tried = len(_seeds(rows, method, task)), len({row["point"] for row in searched(own)})
            if not own:
                nothing.append(task)
                continue
            if not seeds:
                unfinished.append(task)
            elif seeds < most:
                few.append(f"{task} ({seeds} of {most})")
            if tried < len(settings.get(method, ())):
                thin.append(f"{task} ({tried} of {len(settings[method])})")
        for what, where in (
            ("no run", nothing), ("searched, not yet tested", unfinished), ("fewer seeds than elsewhere", few),
            ("fewer settings tried than elsewhere", thin),
        ):  # fmt: skip
            if where:
                said.append(f"{method}: {what} on {', '.join(where)}.")
    return said


def _seeds(rows: Sequence[Line], method: str, task: str) -> set[str]:
    return {row["seed"] for row in finals(rows) if (row["method"], row["task"]) == (method, task)}


@dataclass(frozen=True)
class Failure:
    """Runs of a method whose loss was not finite at the end.

    Attributes:
        stage: "search", "final", or another that the results have.
        count: of them.
        runs: of the method in this stage.
        where: learning rates, or tasks with seeds.
    """

    method: str
    stage: str
    count: int
    runs: int
    where: str


def failures(study: Study) -> list[Failure]:
    """Runs that diverged, by stage and method, whatever stages there are."""
    found = []
    for stage in dict.fromkeys(("search", "final", *(row["stage"] for row in study.rows))):
        for method in methods_of(study.rows):
            own = [row for row in study.rows if (row["method"], row["stage"]) == (method, stage)]
            lost = [row for row in own if diverged(row)]
            if not lost:
                continue
            if stage == "search":
                rates = Counter(point_of(row["point"]).get("base_lr", 0.0) for row in lost)
                where = ", ".join(f"{rate:g} ({rates[rate]})" for rate in sorted(rates, reverse=True))
            else:
                where = ", ".join(f"{_place(row)} {_who(row)}" for row in lost)
            found.append(Failure(method, stage, len(lost), len(own), where))
    return found


def _who(row: Line) -> str:
    """The run's seed; of an ensemble, which has several, how many runs it asks."""
    members = point_of(row["point"]).get("members")
    return f"seed {row['seed']}" if members is None else f"{members:.0f} members"


def _place(row: Line) -> str:
    """A task, with its training set if that is not the task's own."""
    return f"{row['task']} {row['setting']}".rstrip()


@dataclass(frozen=True)
class Outcome:
    """A method on a task.

    Attributes:
        images: the training set by name, "" for the task's own.
        size: training images of the final runs, "" where nothing says it.
        setting: that the search chose.
        validation: its accuracy there in percent, or None.
        mean: test accuracy in percent.
        deviation: over the seeds.
        seeds: number.
        paper: its number, or "".
        trained: parameters, or None if every run diverged.
    """

    task: str
    method: str
    images: str
    size: str
    setting: str
    validation: float | None
    mean: float
    deviation: float
    seeds: int
    paper: str
    trained: int | None


def outcomes(study: Study) -> list[Outcome]:
    """Every method on every task that was tested, also with other training sets."""
    found = []
    places: dict[tuple[str, str, str], list[Line]] = {}
    for row in finals(study.rows):
        places.setdefault((row["task"], row["method"], row["setting"]), []).append(row)
    validated = {(row["task"], row["method"], row["setting"], row["point"]): row for row in searched(study.rows)}
    order, sizes = (tasks_of(study.rows), methods_of(study.rows), study.settings), sizes_of(study.rows)

    def place(key: tuple[str, str, str]) -> tuple[int, ...]:
        task, method, images = key
        return order[0].index(task), order[1].index(method), sizes.get((task, images), 0), order[2].index(images)

    for task, method, images in sorted(places, key=place):
        own = places[task, method, images]
        values = accuracies(own, method, task)
        point = own[0]["point"]
        search = validated.get((task, method, images, point))
        score = None if search is None else 100 * float(search["accuracy"])
        printed = cells.cell("vpt_table13", method=method, task=task, metric="accuracy")
        plain = images == "" and base_task(own[0]) == task
        size = next((f"{int(row[SAMPLES]):,}" for row in own if row[SAMPLES]), "")
        trained = numbers(own, "trained_parameters")
        found.append(
            Outcome(
                task, method, images, size, point.replace(";", ", "), score, fmean(values), spread(values),
                len(values), str(printed) if printed and plain else "", int(trained[0]) if trained else None,
            )
        )  # fmt: skip
    return found


@dataclass(frozen=True)
class Cost:
    """What a method's final runs cost: medians, and ranges where there is one.

    Attributes:
        trained: parameters.
        share: of the backbone's parameters, in percent.
        ms: an image of training.
        seconds: of a run.
        memory: peak, in MB.
        saved: for the backward pass, in MB.
        paper: milliseconds and memory in the paper's own units, or "".
    """

    method: str
    trained: str
    share: str
    ms: str
    seconds: str
    memory: str
    saved: str
    paper: str


def papers_marks(texts: Iterable[str]) -> str:
    """What stands behind some of the papers' numbers, explained in a sentence; "" where none has a mark."""
    texts = list(texts)
    said = [f"{mark} {why}" for mark, why in cells.MEANING.items() if any(mark in text for text in texts)]
    return f"Behind a number of the paper's: {', '.join(said)}." if said else ""


def costs(study: Study) -> list[Cost]:
    """Of every method that was tested."""
    found = []
    rows = finals(study.main)
    for method in methods_of(rows):
        own = [row for row in rows if row["method"] == method]
        trained = numbers(own, "trained_parameters")
        shares = [
            100 * float(row["trained_parameters"]) / float(row["backbone_parameters"])
            for row in own
            if not diverged(row)
        ]
        where = {"method": method, "setting": _printed_setting(own)}
        printed = [
            cells.cell("vpt_table12", **where, metric=metric) for metric in ("train_latency", "train_peak_memory")
        ]
        paper = " / ".join(str(cell) for cell in printed) if all(printed) else ""
        found.append(
            Cost(
                method, _middle(trained, ",.0f"), _middle(shares, ".2f"), _middle(numbers(own, "ms_per_image"), ".3g"),
                _middle(numbers(own, "seconds"), ",.0f"), _middle(numbers(own, "peak_memory_mb"), ",.0f"),
                _middle(numbers(own, SAVED), ",.1f"), paper,
            )
        )  # fmt: skip
    return found


def _printed_setting(rows: Sequence[Line]) -> str | None:
    """What the paper's cost table calls the setting that all rows have; None where they have several."""
    found = {
        ",".join(f"{short}={point[name]:g}" for name, short in _PRINTED_AS.items() if name in point)
        for point in (point_of(row["point"]) for row in rows)
    }
    return found.pop() if len(found) == 1 else None


def _middle(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    low, middle, high = (format(value, form) for value in (min(values), median(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"
