"""The result file in words: on a terminal, and in the documentation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from bench import generated
from bench.cpu import goals
from bench.cpu.goals import MISSING, Parts
from bench.cpu.rows import FLOOR, MAIN, SAVED, TIMED

DOCUMENT = generated.PERFORMANCE
_SECTION, _FILE = generated.Section("bench.cpu"), "cpu.json"
_MACHINE = ("torch", "timm", "peft")
Lines = Sequence[Sequence[str]]


def text(heading: Sequence[str], lines: Lines) -> str:
    """A table for a terminal."""
    table = [heading, *lines]
    widths = [max(len(line[column]) for line in table) for column in range(len(heading))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
    )


def markdown(heading: Sequence[str], lines: Lines) -> str:
    """A table for a document."""
    table = [heading, ["---"] * len(heading), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def steps(parts: Parts) -> Lines:
    """Milliseconds an image of every row, and how many times as fast as its peer ours is."""
    found = []
    for shape, groups in TIMED:
        for group in groups:
            row = parts.get("steps", {}).get(f"{shape}/{group}", {})
            if group in goals.PEERS and "variants" in row:
                ours, peer = goals.PEERS[group]
                times = [f"{row['variants'][name]['median_ms'] / row['batch']:.1f}" for name in (ours, peer)]
                name = peer.split()[0]
                found.append(
                    (str(shape), group, times[0], f"{times[1]} ({name})", goals.speedup(parts, shape, group).said("{}"))
                )
    return found


def own(parts: Parts) -> Lines:
    """Own steps as multiples of F, with one thread and with two."""
    found = []
    for shape, groups in TIMED:
        row = parts.get("steps", {}).get(f"{shape}/own", {})
        if "own" not in groups or "variants" not in row:
            continue
        for name, figures in row["variants"].items():
            over = goals.ratio(parts, shape, "own", name, FLOOR)
            found.append((str(shape), name, f"{figures['median_ms'] / row['batch']:.1f}", over.said("{}")))
    return found


def memory(parts: Parts) -> Lines:
    """Saved bytes and peak memory."""
    found = []
    for variant in SAVED:
        key = f"{MAIN}/{variant}"
        saved, peak = (parts.get(part, {}).get(key, {}) for part in ("saved", "peak"))
        if "bytes_per_number" in saved or "peak_bytes" in peak:
            kept = f"{saved['bytes_per_number']:.1f}" if "bytes_per_number" in saved else MISSING
            most = f"{peak['peak_bytes'] / 2**20:,.0f}" if "peak_bytes" in peak else MISSING
            found.append((str(variant), kept, most))
    return found


def _all(parts: Parts) -> Iterator[tuple[str, Sequence[str], Lines]]:
    """Title, heading and lines of every table, the goals last."""
    yield "Against peers, ms/image", ("model", "row", "ours", "peer", "times as fast"), steps(parts)
    yield f"Own steps, ViT-B/16, batch {MAIN.batch}", ("model", "step", "ms/image", "F"), own(parts)
    heading = ("step", "saved, B a number", "peak MiB")
    yield f"Memory, ViT-B/16, batch {MAIN.batch}, bf16", heading, memory(parts)
    yield "Goals, ViT-B/16, batch 16, bf16, two threads unless said otherwise", goals.HEADING, goals.lines(parts)


def report(parts: Parts) -> str:
    """Everything, for a terminal; the goals are the last table."""
    return "\n\n".join(f"{title}\n{text(heading, lines)}" for title, heading, lines in _all(parts) if lines)


def rendered(results: Mapping[str, Mapping]) -> str:
    """The generated part of the documentation: goals first.

    Args:
        results: what the result files hold, by folder.
    """
    sections = []
    for folder, held in results.items():
        sections.append(f"{generated.about(folder, _FILE, held, _MACHINE)}\n\n{_sections(held['parts'])}")
    return "\n\n".join(sections) if sections else _sections({})


def _sections(parts: Parts) -> str:
    tables = list(_all(parts))
    tables = [tables[-1], *tables[:-1]]
    return "\n\n".join(f"{title}:\n\n{markdown(heading, lines)}" for title, heading, lines in tables if lines)


def committed() -> dict[str, Mapping]:
    """What the result files in bench/results hold, by folder."""
    return generated.committed(_FILE)


def documented(document: str) -> str:
    """The generated part of a document.

    Raises:
        ValueError: it has none.
    """
    return _SECTION.of(document)


def rewritten(document: str, part: str) -> str:
    """A document with another generated part."""
    return _SECTION.replaced(document, part)
