"""Which images train: VTAB-1k's lists, more of them or fewer, or some of each class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.tables.errors import TableError
from fastpeft.data.vtab import read_list

_POOL = "pool*.txt"


@dataclass(frozen=True)
class TrainingSet:
    """A training set as a column of a table.

    Training and validation images are four to one; the search trains on the former and is scored on the latter, the
    final runs train on both. They are drawn from train800 and val200 and, beyond these, from the images of the list
    `pool*.txt` in the task's folder, at random with one seed: every size holds the smaller ones.

    Attributes:
        size: training images; None for another rule.
        per_class: training images of each class, and as many for validation.
        fraction: of the training images; validation images stay.
    """

    size: int | None = None
    per_class: int | None = None
    fraction: float | None = None

    @property
    def name(self) -> str:
        """As the papers' cells have it; "" for the default split, which is that of 800 too."""
        if self.per_class is not None:
            return "one-shot" if self.per_class == 1 else f"{self.per_class}-shot"
        if self.fraction is not None:
            return f"fraction={self.fraction:g}" if self.fraction < 1 else ""
        return f"n_train={self.size}" if self.size not in (None, 800) else ""

    def fields(self, folder: Path) -> dict[str, Any]:
        """Fields of a configuration's `data`.

        Args:
            folder: the task's.

        Raises:
            TableError: the folder has several pools.
        """
        if not self.name:
            return {}
        if self.per_class is not None:
            return {"per_class": self.per_class}
        if self.fraction is not None:
            return {"train_fraction": self.fraction, "draw": "random"}
        pool = pool_of(folder)
        return {"train_size": self.size, "val_size": self.validating, "draw": "random"} | (
            {"pool": pool} if pool is not None else {}
        )

    @property
    def validating(self) -> int:
        """Validation images beside `size` of training."""
        return self.size // 4

    def lacking(self, folder: Path) -> str:
        """Why a task cannot have it, in words that follow its name; "" if it can."""
        if not self.name or self.size is None:
            return ""
        wanted = (self.size, self.validating)
        have = [len(read_list(folder, file).labels) for file in ("train800.txt", "val200.txt")]
        beyond = sum(max(0, need - own) for need, own in zip(wanted, have, strict=True))
        pool = pool_of(folder) if beyond else None
        spare = 0 if pool is None else len(read_list(folder, pool).labels)
        if beyond <= spare:
            return ""
        return f"{sum(wanted):,} images are needed, and there are {sum(have) + spare:,}"


DEFAULT = TrainingSet()
ONE_SHOT = TrainingSet(per_class=1)


def pool_of(folder: Path) -> str | None:
    """Name of the list of further images in a task's folder.

    Raises:
        TableError: there are several.
    """
    found = sorted(path.name for path in folder.glob(_POOL))
    if len(found) > 1:
        raise TableError(f"{folder}: one list of further images is expected, found {', '.join(found)}")
    return found[0] if found else None
