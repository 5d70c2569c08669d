"""Rows: what a run of one comes to, and which are done."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fastpeft.ops.choose import BackendError

Row = tuple[str, Callable[[], dict[str, object]]]


@dataclass(frozen=True)
class Results:
    """All that a result file holds.

    Attributes:
        parts: part -> key -> row.
        chip: kind of device and compute capability, as in `fastpeft.ops.proven`; None if it was run in little.
    """

    parts: Mapping[str, Mapping[str, Mapping]]
    chip: tuple[str, int] | None = None

    def rows(self, part: str) -> Mapping[str, Mapping]:
        """Of a part, by key."""
        return self.parts.get(part, {})


class Unavailable(Exception):
    """What a row is about cannot run here; the message says why in one sentence."""


def outcome(run: Callable[[], dict[str, object]], trace: bool = False) -> dict[str, object]:
    """Run a row; a failure is a result too, under "error", and so is a reason not to run, under "unavailable".

    Args:
        run: the row.
        trace: write where it failed to the error stream.
    """
    try:
        return run()
    except (Unavailable, BackendError) as reason:
        return {"unavailable": _line(str(reason))}
    except ModuleNotFoundError as error:
        # An operator's kernels come in modules of their own, which a checkout may not have yet.
        if (error.name or "").startswith("fastpeft.kernels"):
            return {"unavailable": f"there is no module {error.name}"}
        return _failure(error, trace)
    except torch.OutOfMemoryError as error:
        return {"unavailable": f"out of memory: {_line(str(error))}"}
    except Exception as error:
        return _failure(error, trace)


def _failure(error: Exception, trace: bool) -> dict[str, object]:
    if trace:
        traceback.print_exception(error, file=sys.stderr)
    return {"error": _line(f"{type(error).__name__}: {error}")}


def _line(text: str) -> str:
    """The first line that says something."""
    return next((line.strip()[:400] for line in text.splitlines() if line.strip()), "")


def failed(row: Mapping[str, object]) -> bool:
    """Whether a row, or a variant in it, ended with an error or a wrong result."""
    if "error" in row or row.get("passed") is False:
        return True
    variants = row.get("variants")
    return isinstance(variants, Mapping) and any(failed(variant) for variant in variants.values())


def crashed(row: Mapping[str, object]) -> bool:
    """Whether a row, or a variant in it, ended with an error, which may have left the device in any state."""
    variants = row.get("variants")
    return "error" in row or (isinstance(variants, Mapping) and any(map(crashed, variants.values())))


def describe(row: Mapping[str, object]) -> str:
    """What kept a row from being a good one, in a line."""
    if "error" in row:
        return f"ERROR {row['error']}"
    if "unavailable" in row:
        return f"unavailable: {row['unavailable']}"
    if row.get("passed") is False:
        return f"WRONG {'; '.join(map(str, row.get('failed', [])))}"
    return "done"


def grouped(rows: Mapping[str, Mapping]) -> list[str]:
    """What kept rows from being good ones: those that are wrong or failed each, others by their reason."""
    lines = [f"{key}: {describe(row)}" for key, row in rows.items() if "error" in row or row.get("passed") is False]
    reasons: dict[str, list[str]] = {}
    for key, row in rows.items():
        if "unavailable" in row:
            reasons.setdefault(str(row["unavailable"]), []).append(key)
    for reason, keys in reasons.items():
        more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        lines.append(f"unavailable: {keys[0]}{more}: {reason}")
    return lines


def collect() -> None:
    """Give back memory that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def clean() -> None:
    """Forget what a row has left behind, compiled code too."""
    collect()
    torch.compiler.reset()
