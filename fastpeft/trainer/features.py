"""Features computed once: what lies before the first trained parameter is a constant per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed
from torch.utils.data import Dataset

from fastpeft.config import Config
from fastpeft.trainer import feature_key, order, precision
from fastpeft.trainer.feature_store import FeatureStore
from fastpeft.trainer.launch import Ranks
from fastpeft.trainer.report import Reporter

# Token features of a whole split can be larger than its images; beyond this they are computed again instead.
LIMIT_BYTES = 2 * 2**30
# Images of a pass through the prefix. Evaluation's too: what is encoded as it is evaluated has the same bits.
BATCH = 64


class Features(Dataset):
    """A split after the frozen prefix: (feature, label) pairs."""

    def __init__(self, features: torch.Tensor, labels: list[int]) -> None:
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.features[index], self.labels[index]

    def rows(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and labels of a batch in one go."""
        return self.features[list(indices)], torch.tensor([self.labels[index] for index in indices], dtype=torch.long)


@torch.no_grad()
def choose(
    prefix, images: Mapping[str, Dataset], ranks: Ranks, dtype: torch.dtype, limit: int | None = None
) -> list[str]:
    """The splits, by name in the order given, whose features together stay within the limit, judged by one image."""
    image = next(iter(images.values()))[0][0].unsqueeze(0).to(ranks.device)
    with precision.autocast(ranks.device, dtype):
        feature = prefix.encode(image)
    left, chosen = LIMIT_BYTES if limit is None else limit, []
    for name, split in images.items():
        size = feature.numel() * feature.element_size() * len(split)
        if size <= left:
            chosen.append(name)
            left -= size
    return chosen


def encode(
    prefix,
    images: Dataset,
    ranks: Ranks,
    dtype: torch.dtype,
    workers: int,
    report: Reporter,
    name: str,
    config: Config | None = None,
    store: FeatureStore | None = None,
) -> Features:
    """A split after the prefix: from the store if another run has left it there, else computed.

    Args:
        prefix: From `fastpeft.frozen_prefix`.
        images: The split.
        ranks: Each computes a share and gets the whole; the store is used by runs on one rank.
        dtype: The working format.
        workers: Loader processes.
        report: What shows the progress.
        name: Of the split.
        config: The run's; for the store.
        store: Where features of splits that it calls shared are kept; None keeps nothing.
    """

    def compute() -> torch.Tensor:
        return _encode(prefix, images, ranks, dtype, workers, report, name)

    if store is None or name not in store.shared or not store.limit or ranks.world > 1:
        return Features(compute(), list(images.labels))
    if feature_key.images_digest(images) is None:
        store.warn(f"features not kept: {name} images come from a {type(images.source).__name__}")
        return Features(compute(), list(images.labels))
    features = store.fetch(lambda: feature_key.feature_key(prefix, config, images, ranks, dtype), compute)
    return Features(features, list(images.labels))


@torch.no_grad()
def _encode(prefix, images, ranks: Ranks, dtype: torch.dtype, workers: int, report: Reporter, name: str):
    """Run a split through the prefix: (images, ...) on the CPU."""
    preload(images, report, name)
    features = None
    done = ranks.rank
    with report.bar(f"encoding {name} images", len(images)) as advance:
        for batch, _ in order.evaluation_batches(images, BATCH, ranks.rank, ranks.world, workers):
            with precision.autocast(ranks.device, dtype):
                encoded = prefix.encode(batch.to(ranks.device)).cpu()
            if features is None:
                features = torch.zeros(len(images), *encoded.shape[1:], dtype=encoded.dtype)
            features[done : done + len(batch) * ranks.world : ranks.world] = encoded
            done += len(batch) * ranks.world
            advance(len(batch) * ranks.world)
    return combined(features, len(images), ranks) if ranks.world > 1 else features


def preload(images: Dataset, report: Reporter, name: str) -> None:
    """Decode what fits into memory, so that a broken image shows before it is needed."""
    with report.bar(f"reading {name} images", len(images)) as advance:
        images.preload(lambda done, total: advance(1))


def combined(share: torch.Tensor | None, count: int, ranks: Ranks) -> torch.Tensor:
    """Add up the ranks' shares, each zero where it has no image: exact as bytes, in any format.

    Args:
        share: (count, ...) on the CPU; None of a rank that had no image at all.
        count: Images of the split.
        ranks: Where this process stands.
    """
    shapes: list[tuple | None] = [None] * ranks.world
    torch.distributed.all_gather_object(shapes, None if share is None else (tuple(share.shape), share.dtype))
    shape, dtype = next(entry for entry in shapes if entry is not None)
    whole = torch.zeros(shape, dtype=dtype) if share is None else share
    # In parts: on a GPU the sum goes through its memory.
    for first in range(0, count, 1024):
        part = whole[first : first + 1024].contiguous().view(torch.uint8).to(ranks.device)
        torch.distributed.all_reduce(part)
        whole[first : first + 1024] = part.cpu().view(dtype).view(-1, *shape[1:])
    return whole
