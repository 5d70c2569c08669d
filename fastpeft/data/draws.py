"""Which images a smaller or larger training set holds: seeded draws, each of them the beginning of the larger ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastpeft.data.errors import DataError
from fastpeft.data.sources import Source

DRAWS = ("even", "random")


def drawn_order(labels: Sequence[int], seed: int, how: str) -> np.ndarray:
    """An order of images, of which a draw takes the first.

    Args:
        labels: One an image.
        seed: Of the order. RandomState draws it, because its stream never changes between NumPy versions.
        how: `random`; `even` shuffles each class and deals one image of each class in turn, so that every beginning has
            the classes as evenly as they allow.
    """
    shuffled = np.random.RandomState(seed).permutation(len(labels))
    if how == "random":
        return shuffled
    # Within a turn the shuffled order decides which class comes first.
    return shuffled[np.argsort(_turns(labels, shuffled)[shuffled], kind="stable")]


def drawn_share(total: int, percent: float, seed: int) -> np.ndarray:
    """A share of some samples, drawn over all of them: of one seed, a smaller share is part of every larger one.

    Args:
        total: How many there are: pairs of image and text, say, rather than images.
        percent: Share in percent, from above 0 to 100; at least one sample is drawn.
        seed: Of the draw.

    Returns:
        Their numbers, ascending.

    Raises:
        DataError: The share is out of range.
    """
    if not 0 < percent <= 100:
        raise DataError(f"data: a share of the training data is more than 0 and at most 100 percent, got {percent}")
    order = drawn_order(range(total), seed, "random")
    return np.sort(order[: max(1, round(total * percent / 100))])


def some_of_each_class(labels: Sequence[int], seed: int, count: int) -> np.ndarray:
    """The first `count` images of every class in a random order, ascending; all of a class that has fewer."""
    shuffled = np.random.RandomState(seed).permutation(len(labels))
    return np.flatnonzero(_turns(labels, shuffled) < count)


def _turns(labels: Sequence[int], shuffled: np.ndarray) -> np.ndarray:
    """For every image how many of its class come before it."""
    labels = np.asarray(labels)
    turn = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        turn[members] = np.arange(len(members))
    return turn


def draw_train_and_val(
    lists: Sequence[Source], pool: Source | None, sizes: tuple[int, int], seed: int, how: str
) -> tuple[list[Source], list[Source]]:
    """Training and validation images of given numbers, from lists of their own and from a pool that both share.

    Lists go first. Training images come from the beginning of the pool's order and validation images from its end, so
    that no image is in both, and a larger set holds every smaller one.

    Args:
        lists: Training and validation images.
        pool: Further images, or None.
        sizes: Images wanted of each.
        seed: Of the draw.
        how: One of `DRAWS`.

    Returns:
        The parts that training and validation consist of.

    Raises:
        DataError: There are not as many.
    """
    own = [min(size, len(source.labels)) for size, source in zip(sizes, lists, strict=True)]
    further = [size - have for size, have in zip(sizes, own, strict=True)]
    spare = 0 if pool is None else len(pool.labels)
    if sum(further) > spare:
        have = " and ".join(str(len(source.labels)) for source in lists)
        raise DataError(
            f"data: train_size {sizes[0]:,} and val_size {sizes[1]:,}: the lists have {have} images, and "
            + (f"the pool {spare:,} more" if pool is not None else "no pool was given")
        )
    parts: tuple[list[Source], list[Source]] = ([], [])
    for number, (source, size) in enumerate(zip(lists, own, strict=True)):
        # Another stream for each list: they may have come from the same labels.
        chosen = drawn_order(source.labels, seed + number, how)[:size]
        parts[number].append(source.subset(np.sort(chosen)))
    if pool is not None:
        order = drawn_order(pool.labels, seed + len(lists), how)
        for number, chosen in enumerate((order[: further[0]], order[spare - further[1] :])):
            if len(chosen):
                parts[number].append(pool.subset(np.sort(chosen)))
    return parts
