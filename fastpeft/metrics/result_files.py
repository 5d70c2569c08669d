"""Predictions as JSON: each rank writes its own, and one puts them together, each id once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpeft.data.entries import entries, read_json
from fastpeft.data.errors import DataError


@dataclass(frozen=True)
class Merged:
    """The predictions of all ranks.

    Attributes:
        records: In the order of ranks; of an id that several ranks have, the first.
        repeated: Records left out because their id was there before.
        differing: How many of these said something else.
    """

    records: list[dict[str, Any]]
    repeated: int
    differing: int


def rank_file(folder: str | Path, name: str, rank: int) -> Path:
    """Where a rank's predictions are."""
    return Path(folder) / f"{name}_rank{rank}.json"


def write_rank(folder: str | Path, name: str, rank: int, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write a rank's predictions; all ranks have to, those without any too."""
    return write_records(rank_file(folder, name, rank), records)


def write_records(path: str | Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write a list of records, so that the file is whole or not there."""
    return write_json(path, list(records))


def write_json(path: str | Path, values: Any) -> Path:
    """Write a JSON file that is whole or not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    unfinished.replace(path)
    return path


def merge_ranks(
    folder: str | Path,
    name: str,
    world: int,
    *,
    key: str = "question_id",
    expected: Iterable[Any] | None = None,
) -> Merged:
    """Put `<name>_rank<r>.json` of all ranks together as `<name>.json`, and remove them.

    Args:
        folder: Where they are.
        name: Without rank and ending.
        world: How many ranks wrote one.
        key: The field that tells records apart.
        expected: The ids that should be there, all of them and no others; None does not check.

    Raises:
        DataError: A rank's file is missing or malformed, or the ids are not the expected ones.
    """
    files = [rank_file(folder, name, rank) for rank in range(world)]
    merged = merge_records((read_records(file, key) for file in files), key)
    if expected is not None:
        check_coverage((record[key] for record in merged.records), expected, f"{Path(folder) / name}.json", key)
    write_records(Path(folder) / f"{name}.json", merged.records)
    for file in files:
        file.unlink()
    return merged


def merge_records(parts: Iterable[Iterable[Mapping[str, Any]]], key: str) -> Merged:
    """The records of several parts, each id once."""
    found: dict[Any, dict[str, Any]] = {}
    repeated = differing = 0
    for part in parts:
        for record in part:
            if record[key] not in found:
                found[record[key]] = dict(record)
                continue
            repeated += 1
            differing += found[record[key]] != record
    return Merged(list(found.values()), repeated, differing)


def read_records(path: str | Path, key: str, *fields: str) -> list[dict[str, Any]]:
    """The records of one file.

    Args:
        path: The file.
        key: The field that tells them apart, a whole number or a text.
        fields: Further fields, which are texts.

    Raises:
        DataError: The file is missing or malformed, or a record has not these fields.
    """
    records = []
    for entry in entries(path, read_json(path), "a list of records"):
        entry.get(key, (int, str), "a whole number or a text")
        for field in fields:
            entry.get(field, str, "a text")
        records.append(entry.values)
    return records


def check_coverage(given: Iterable[Any], expected: Iterable[Any], where: str, key: str) -> None:
    """Raise an error unless the ids that were given are the expected ones, each once.

    Args:
        given: Ids of predictions.
        expected: Ids that were asked for.
        where: Whose ids these are, for messages.
        key: What an id is called.
    """
    given, wanted = list(given), dict.fromkeys(expected)
    found = dict.fromkeys(given)
    problems = []
    for what, ids in (
        ("without a prediction", [number for number in wanted if number not in found]),
        ("that nobody asked for", [number for number in found if number not in wanted]),
    ):
        if ids:
            problems.append(f"{len(ids):,} {what} (the first is {ids[0]})")
    if len(found) < len(given):
        problems.append(f"{len(given) - len(found):,} more than once")
    if problems:
        raise DataError(f"{where}: expected each of {len(wanted):,} {key}s once: {', '.join(problems)}")
