"""Part `summary`: the goals, and what could be added to the proven implementations, from the rows that are there."""

from __future__ import annotations

from collections.abc import Mapping

from bench.device_parts import acceptance, proof
from bench.device_parts.rows import Results, Row
from bench.device_parts.settings import Settings


def rows(settings: Settings) -> list[Row]:
    """None: nothing is measured."""
    return []


def table(rows: Mapping[str, Mapping], results: Results) -> str:
    """Goals first."""
    return "\n".join([acceptance.table(results), "", *proof.lines(results)])
