"""Which image is seen when: a function of seed, epoch and position, so that a position is all a resumed run needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy
import torch
from torch.utils.data import DataLoader, Dataset

from fastpeft.errors import FastPEFTError

# Streams of random numbers that must not overlap although they share the run's seed.
SHUFFLE, STEP, INIT = 1, 2, 3


def mix(*numbers: int) -> int:
    """A 63-bit seed from several integers; nearby inputs give unrelated seeds."""
    return int(numpy.random.SeedSequence(numbers).generate_state(1, numpy.uint64)[0] >> numpy.uint64(1))


@dataclass(frozen=True)
class Deal:
    """How the images of an epoch are dealt to optimizer steps, ranks and micro-batches.

    Attributes:
        size: Images of the training split.
        batch_size: Images of a step over all ranks and micro-batches.
        seed: The run's seed.
        drop_last: Whether a smaller last batch is left out.
        parts: Micro-batches of a step over all ranks: world size times accumulation.
    """

    size: int
    batch_size: int
    seed: int
    drop_last: bool
    parts: int

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return self.size // self.batch_size if self.drop_last else math.ceil(self.size / self.batch_size)

    def steps_of(self, epoch: int) -> int:
        """Optimizer steps of one of the epochs."""
        return self.steps

    def seen(self, epochs: int) -> int:
        """Samples of so many epochs."""
        return epochs * min(self.size, self.steps * self.batch_size)

    def batch(self, order: Sequence[int], step: int) -> list[int]:
        """The image indices of one step, from the epoch's order."""
        return list(order[step * self.batch_size : (step + 1) * self.batch_size])

    def order(self, epoch: int) -> list[int]:
        """The image indices of an epoch, shuffled."""
        return list(_shuffled(self.size, self.seed, epoch))

    def keys(self, epoch: int, step: int) -> list[tuple[int, int]]:
        """What one step reads: (epoch, image index)."""
        return [(epoch, index) for index in self.batch(_shuffled(self.size, self.seed, epoch), step)]

    def smallest_part(self) -> int:
        """Images of the smallest micro-batch that holds any."""
        sizes = {min(self.batch_size, self.size)}
        if not self.drop_last and self.size % self.batch_size:
            sizes.add(self.size % self.batch_size)
        return min(size // self.parts or 1 for size in sizes)


@dataclass(frozen=True)
class Stream(Deal):
    """Samples dealt to a given number of steps, over as many passes as that takes; a batch may reach into the next one.

    What is an epoch elsewhere is here the part up to the next evaluation.

    Attributes:
        total: Steps in all.
        every: Steps of a part; the last may have fewer.
    """

    total: int
    every: int

    @property
    def epochs(self) -> int:
        """How many parts there are."""
        return math.ceil(self.total / self.every)

    def steps_of(self, epoch: int) -> int:
        """Steps of a part."""
        return min(self.every, self.total - epoch * self.every)

    def seen(self, epochs: int) -> int:
        """Samples of the first so many parts, repeated ones too."""
        return min(epochs * self.every, self.total) * self.batch_size

    def keys(self, epoch: int, step: int) -> list[tuple[int, int]]:
        """What one step reads: (pass over the samples, index)."""
        first = (epoch * self.every + step) * self.batch_size
        places = [divmod(place, self.size) for place in range(first, first + self.batch_size)]
        return [(at, _shuffled(self.size, self.seed, at)[place]) for at, place in places]


@lru_cache(maxsize=4)
def _shuffled(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    """All indices in the order of an epoch."""
    generator = torch.Generator().manual_seed(mix(seed, SHUFFLE, epoch))
    return tuple(torch.randperm(size, generator=generator).tolist())


@dataclass(frozen=True)
class Part:
    """One micro-batch: its images, and how many of them count.

    A rank that gets no image of a small last batch computes one anyway, with weight zero: gradients are reduced
    collectively, and every rank has to take part.
    """

    keys: list[tuple[int, int]]
    counted: int


def parts_of(deal: Deal, rank: int, world: int, epoch: int, first_step: int, epochs: int) -> Iterator[Part]:
    """The micro-batches of one rank from a position to the end of training, as (epoch, image) keys."""
    for at_epoch in range(epoch, epochs):
        for step in range(first_step if at_epoch == epoch else 0, deal.steps_of(at_epoch)):
            batch = deal.keys(at_epoch, step)
            for part in range(rank, deal.parts, world):
                keys = batch[part :: deal.parts]
                yield Part(keys or batch[:1], len(keys))


class Keyed(Dataset):
    """A dataset addressed by (epoch, image): its random transforms are a function of both, whichever process asks."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        try:
            return self.dataset[index]
        except FastPEFTError as error:
            # A loader process would wrap it in its traceback; as a sample it reaches the reader as it is.
            return error


def collate(samples: list) -> tuple[torch.Tensor, torch.Tensor] | FastPEFTError:
    """Stack (image, label) pairs; an error among them takes the batch's place."""
    for sample in samples:
        if isinstance(sample, FastPEFTError):
            return sample
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels, dtype=torch.long)


def training_batches(
    dataset: Dataset, parts: Iterator[Part], workers: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Load the micro-batches in order: images, labels, and how many of them count.

    A dataset with `rows` is in memory, and gives a batch in one go, without loader.
    """
    if hasattr(dataset, "rows"):
        for part in parts:
            yield *dataset.rows([index for _, index in part.keys]), part.counted
        return
    for batch, counted in dealt_batches(dataset, parts, workers, collate):
        yield *batch, counted


def dealt_batches(
    dataset: Dataset, parts: Iterator[Part], workers: int, collate: Callable[[list], Any]
) -> Iterator[tuple[Any, int]]:
    """Load the micro-batches in order: each as `collate` makes it, and how many of its samples count.

    Args:
        dataset: Of samples; one with `set_epoch` is told the epoch before it is asked.
        parts: This rank's micro-batches.
        workers: Processes that load.
        collate: From samples to a batch. Reading may leave an error in a sample's place, which it returns.
    """
    counts: list[int] = []

    def keys() -> Iterator[list[tuple[int, int]]]:
        for part in parts:
            counts.append(part.counted)
            yield part.keys

    loader = _loader(dataset, keys(), workers, collate)
    # The loader runs ahead of what it has yielded, so counts are taken from the front in the order of the keys.
    for batch in loader:
        yield _whole(batch), counts.pop(0)


def evaluation_batches(
    dataset: Dataset, batch_size: int, rank: int, world: int, workers: int, collate: Callable[[list], Any] = collate
) -> Iterator[Any]:
    """Every `world`-th image of a split, starting at `rank`: all ranks together see each image once.

    A dataset with `rows` is in memory, as for `training_batches`.
    """
    indices = range(rank, len(dataset), world)
    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    if hasattr(dataset, "rows"):
        yield from map(dataset.rows, batches)
        return
    for batch in _loader(dataset, [[(0, index) for index in batch] for batch in batches], workers, collate):
        yield _whole(batch)


def _loader(
    dataset: Dataset, batches: Iterable[list[tuple[int, int]]], workers: int, collate: Callable[[list], Any]
) -> DataLoader:
    # A loader draws a seed for its processes when it starts. From torch's own generator that would shift what the
    # steps draw, by where the run was resumed.
    return DataLoader(
        Keyed(dataset),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        generator=torch.Generator(),
    )


def _whole(batch):
    """The batch, unless reading it failed."""
    if isinstance(batch, FastPEFTError):
        raise batch
    return batch
