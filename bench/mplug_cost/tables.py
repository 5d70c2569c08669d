"""The result file in words: on a terminal, and in the documentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from bench import generated
from bench.cpu import goals
from bench.cpu.goals import MISSING, Figure, Goal, Parts
from bench.cpu.rows import FLOOR, ratios
from bench.cpu.tables import Lines, markdown, text
from bench.mplug_cost.cases import LITERAL, OURS, WHO, Case, cases

SECTION, FILE = generated.Section("bench.mplug_cost"), "mplug.json"
_MACHINE = ("torch", "timm")
# Of the goals: mPLUG-base, batch 8, bf16, two threads.
MAIN = tuple(cases())
COMPOSED = ("lora", "prefix", "serial", "parallel")
_STEPS = ("step", "F, ms", "literal, ms", "x F", "ours, ms", "x F", "times as fast")
_MEMORY = ("step", "saved by literal, MiB", "by ours", "share", "peak of literal, MiB", "of ours")


def figure(parts: Parts, case: Case, over: str, under: str) -> Figure | None:
    """How often `under` goes into `over`, two of F, literal and ours."""
    found = ratios(_row(parts, case), over, under)
    return None if found is None else Figure(*found)


def saved_share(parts: Parts, case: Case) -> Figure | None:
    """What ours keeps for its backward pass, over what literal keeps."""
    kept = _row(parts, case).get("saved_bytes")
    return None if kept is None else Figure(*[kept[OURS] / kept[LITERAL]] * 3)


def _row(parts: Parts, case: Case) -> Mapping:
    return parts.get("steps", {}).get(str(case), {})


def _held(parts: Parts) -> list[Case]:
    """The cases that the file holds figures of, the goals' first."""
    keys = [key for key, row in parts.get("steps", {}).items() if "variants" in row]
    found = [case for case in MAIN if str(case) in keys]
    others = [_case(key) for key in keys if key not in set(map(str, MAIN))]
    return found + others


def _case(key: str) -> Case:
    """The case of a row's key."""
    _, task, images, batch, dtype, threads, method = key.split("/")
    return Case(task, images, method, int(batch[1:]), dtype, int(threads[:-1]))


def steps(parts: Parts) -> Lines:
    """Milliseconds of every step, over F, and how many times as fast as literal ours is."""
    found = []
    for case in _held(parts):
        times = {name: f"{figures['median_ms']:.0f}" for name, figures in _row(parts, case)["variants"].items()}
        over = {who: figure(parts, case, who, FLOOR).said("{}") for who in WHO}
        speed = figure(parts, case, LITERAL, OURS).said("{}")
        found.append((str(case), times[FLOOR], times[LITERAL], over[LITERAL], times[OURS], over[OURS], speed))
    return found


def memory(parts: Parts) -> Lines:
    """Saved bytes and peak memory."""
    found = []
    for case in _held(parts):
        kept = _row(parts, case)["saved_bytes"]
        peaks = [parts.get("peak", {}).get(f"{case}/{who}", {}).get("peak_bytes") for who in WHO]
        most = [MISSING if peak is None else f"{peak / 2**20:,.0f}" for peak in peaks]
        share = saved_share(parts, case).said("{}")
        found.append((str(case), *(f"{kept[who] / 2**20:,.1f}" for who in WHO), share, *most))
    return found


def _worst(
    methods: tuple[str, ...], of: Callable[[Parts, Case], Figure | None], least: bool
) -> tuple[Callable[[Parts], Figure | None], Callable[[Parts], str]]:
    """The worst figure of some methods, and whose it is; only when all of their cases are there."""

    def worst(parts: Parts) -> tuple[Figure, Case] | None:
        found = [(of(parts, case), case) for case in MAIN if case.method in methods]
        if any(one is None for one, _ in found):
            return None
        return (min if least else max)(found, key=lambda one: one[0].value)

    def value(parts: Parts) -> Figure | None:
        found = worst(parts)
        return None if found is None else found[0]

    def which(parts: Parts) -> str:
        found = worst(parts)
        if found is None:
            return ""
        _, case = found
        return f", the {'least' if least else 'most'}: {case.task}, {case.images}, {case.method}"

    return value, which


def _speed(parts: Parts, case: Case) -> Figure | None:
    return figure(parts, case, LITERAL, OURS)


def _goals() -> Iterator[Goal]:
    for method in COMPOSED:
        yield Goal(f"{method}: speed over literal", 1.4, 2.0, True, "{}x", *_worst((method,), _speed, True))
    yield Goal("prompt: speed over literal", 1.0, None, True, "{}x", *_worst(("prompt",), _speed, True))
    for method in (*COMPOSED, "prompt"):
        saved = _worst((method,), saved_share, False)
        yield Goal(f"{method}: saved bytes over literal's", 0.6, None, False, "{}x", *saved)


GOALS = tuple(_goals())


def _all(parts: Parts) -> Iterator[tuple[str, tuple[str, ...], Lines]]:
    """Title, heading and lines of every table, the goals last."""
    yield "Steps", _STEPS, steps(parts)
    yield "Memory", _MEMORY, memory(parts)
    title = "Goals, mPLUG-base, batch 8, bf16, two threads; of both tasks, with tokens cached and images given"
    yield title, goals.HEADING, [goal.line(parts) for goal in GOALS]


def report(parts: Parts) -> str:
    """Everything, for a terminal; the goals are the last table."""
    return "\n\n".join(f"{title}\n{text(heading, lines)}" for title, heading, lines in _all(parts) if lines)


def rendered(results: Mapping[str, Mapping]) -> str:
    """The generated part of the documentation: goals first.

    Args:
        results: what the result files hold, by folder.
    """
    if not results:
        return _sections({})
    return "\n\n".join(
        f"{generated.about(folder, FILE, held, _MACHINE)}\n\n{_sections(held['parts'])}"
        for folder, held in results.items()
    )


def _sections(parts: Parts) -> str:
    tables = list(_all(parts))
    tables = [tables[-1], *tables[:-1]]
    return "\n\n".join(f"{title}:\n\n{markdown(heading, lines)}" for title, heading, lines in tables if lines)
