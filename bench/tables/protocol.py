"""The VPT paper's protocol: what each row of a table trains, and the grid in which its settings are searched.

    actual learning rate = base_lr * batch / 256, warm-up 10 epochs, cosine, 100 epochs (50 for ViT-L and ViT-H)

A setting is chosen by the validation accuracy of the last epoch; of equals the smaller learning rate wins.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastpeft.methods import REGISTRY

_ADAMW = (0.005, 0.001, 0.0005, 0.0001)
_SGD = (50.0, 25.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05)
_SHALLOW = (1000.0, 500.0, 250.0, 100.0)
_DECAYS = (0.01, 0.001, 0.0001, 0.0)
LENGTHS = (200, 100, 50, 10, 5, 1)
# What --quick leaves of them.
_QUICK_ADAMW = (0.001, 0.0001)
_QUICK_SGD = (10.0, 1.0)
_QUICK_DECAYS = (0.0001,)
_QUICK_LENGTHS = (10,)
_QUICK_EPOCHS, _QUICK_WARMUP = 10, 2

SEEDS = (42, 44, 82, 100, 800)
Point = dict[str, float]


@dataclass(frozen=True)
class Row:
    """A method as a row of a table.

    Attributes:
        name: as in the papers' cells, and in the results.
        method: its fields, as `fastpeft.methods.from_dict` takes them, or those of the parts of a sum; {} where the
            library lacks it.
        optimizer: "sgd" or "adamw".
        batch_size: images of a step; of prompts in numbers from 100 on it is half, if `halved`.
        rates: base learning rates, for a batch of 256.
        searched: fields of the method that are searched besides, with their values.
        model: fields of a configuration's `model`.
        halved: whether many prompts halve the batch.
        search_as: name of the row that has the same search runs, with more settings besides; "" for its own. Grids of
            one value are never thinned.
        title: as a table prints it; "" for the name.
    """

    name: str
    method: Mapping[str, Any] | tuple[Mapping[str, Any], ...]
    optimizer: str
    batch_size: int
    rates: tuple[float, ...]
    searched: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    halved: bool = True
    search_as: str = ""
    title: str = field(default="", compare=False)

    @property
    def missing(self) -> bool:
        """Whether the library has no such method."""
        return not self.method

    @property
    def parts(self) -> tuple[Mapping[str, Any], ...]:
        """The methods of a sum; a method alone."""
        return self.method if isinstance(self.method, tuple) else (self.method,)

    @property
    def kind(self) -> str:
        """What decides the batch size: "linear", "partial", "prompts" or "deep"."""
        names = {part.get("name", "linear") for part in self.parts}
        if "vpt" in names:
            return "prompts"
        return "partial" if "partial" in names else "linear" if names <= {"linear", "mlp_head"} else "deep"


def of(name: str, like: str, **fields: Any) -> Row:
    """A further row: one of `ROWS` with other fields."""
    return dataclasses.replace(ROWS[like], name=name, **fields)


def held(name: str, like: str, **values: int) -> Row:
    """A row of `ROWS` with searched fields held, that shares its search."""
    title = f"{like}, p = {values['length']}" if "length" in values else ""
    return of(name, like, search_as=like, searched={key: (value,) for key, value in values.items()}, title=title)


ROWS = {
    row.name: row
    for row in (
        Row("full", {"name": "full"}, "adamw", 128, _ADAMW),
        Row("linear", {"name": "linear"}, "sgd", 2048, _SGD),
        Row("partial-1", {"name": "partial", "k": 1}, "adamw", 1280, _ADAMW),
        Row("mlp-3", {"name": "mlp_head", "k": 3}, "sgd", 2048, _SGD),
        Row("sidetune", {}, "sgd", 2048, _SGD),
        Row("bias", {"name": "bitfit"}, "adamw", 128, _ADAMW),
        Row("adapter", {"name": "adapter"}, "adamw", 128, _ADAMW, {"reduction": (256, 64, 8)}),
        Row("vpt-shallow", {"name": "vpt", "deep": False}, "sgd", 128, _SHALLOW + _SGD, {"length": LENGTHS}),
        Row("vpt-deep", {"name": "vpt"}, "sgd", 128, _SGD, {"length": LENGTHS}),
    )
}


@dataclass(frozen=True)
class Protocol:
    """How the rows of a table are searched and trained.

    Attributes:
        epochs: of every run.
        warmup_epochs: of these.
        quick: a thinned grid and few epochs.
        seeds: of the final runs.
    """

    epochs: int
    warmup_epochs: int
    quick: bool
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, backbone: str, quick: bool, seeds: int, epochs: int | None = None) -> Protocol:
        """The paper's for a backbone, or --quick's.

        Args:
            backbone: timm name.
            quick: thin grid and epochs.
            seeds: how many; the paper's, then the numbers after the last.
            epochs: instead of the protocol's.
        """
        usual = _QUICK_EPOCHS if quick else 50 if "large" in backbone or "huge" in backbone else 100
        count = usual if epochs is None else epochs
        chosen = tuple(itertools.islice(itertools.chain(SEEDS, itertools.count(SEEDS[-1] + 1)), seeds))
        return cls(count, min(_QUICK_WARMUP if quick else 10, count - 1), quick, chosen)

    @property
    def name(self) -> str:
        """In a word that goes into results, so that runs of different protocols are never taken for each other."""
        return f"{'quick' if self.quick else 'paper'}-{self.epochs}"

    def describe(self) -> str:
        """In a sentence."""
        grid = "a thinned grid" if self.quick else "the paper's grid"
        return f"{grid}, {self.epochs} epochs with {self.warmup_epochs} of warm-up, {len(self.seeds)} seeds"

    def grid(self, row: Row) -> Iterator[Point]:
        """Settings in the order of the search: learning rate descending, then weight decay, for each method's field."""
        rates, decays, searched = row.rates, _DECAYS, dict(row.searched)
        if self.quick:
            rates = _QUICK_ADAMW if row.optimizer == "adamw" else _QUICK_SGD
            decays = _QUICK_DECAYS
            searched = {key: _thinned(key, values) for key, values in searched.items()}
        for extra in itertools.product(*searched.values()):
            for rate, decay in itertools.product(rates, decays):
                yield dict(zip(searched, extra, strict=True)) | {"base_lr": rate, "weight_decay": decay}


def _thinned(key: str, values: tuple[float, ...]) -> tuple[float, ...]:
    return _QUICK_LENGTHS if key == "length" and len(values) > 1 else values[-1:]


def batch_size(row: Row, point: Point) -> int:
    """Images of a step."""
    return row.batch_size // 2 if row.halved and point.get("length", 0) >= 100 else row.batch_size


def method(row: Row, point: Point) -> dict[str, Any] | list[dict[str, Any]]:
    """The row's method with the searched fields; in a sum a field is the first part's that has it."""
    found = [dict(part) for part in row.parts]
    for key in row.searched:
        next(part for part in found if key in _fields(part["name"]))[key] = int(point[key])
    return found if isinstance(row.method, tuple) else found[0]


def _fields(name: str) -> set[str]:
    return {field.name for field in dataclasses.fields(REGISTRY[name])}


def best(found: list[tuple[Point, float]]) -> Point:
    """The setting with the highest accuracy; of equals the smaller learning rate, then the earlier."""
    return max(found, key=lambda pair: (pair[1], -pair[0]["base_lr"]))[0]
