"""Features computed once: what lies before the first trained parameter is a constant per image."""

from __future__ import annotations

import torch
import torch.distributed
from torch.utils.data import Dataset

from fastpeft.trainer import order, precision
from fastpeft.trainer.launch import Ranks
from fastpeft.trainer.report import Reporter

# Token features of a whole split can be larger than its images; beyond this they are computed again instead.
LIMIT_BYTES = 2 * 2**30


class Features(Dataset):
    """A split after the frozen prefix: (feature, label) pairs."""

    def __init__(self, features: torch.Tensor, labels: list[int]) -> None:
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.features[index], self.labels[index]


@torch.no_grad()
def fits(prefix, images: list[Dataset], ranks: Ranks, dtype: torch.dtype) -> bool:
    """Whether the features of all splits stay within the limit, judged by one image."""
    image = images[0][0][0].unsqueeze(0).to(ranks.device)
    with precision.autocast(ranks.device, dtype):
        feature = prefix.encode(image)
    return feature.numel() * feature.element_size() * sum(len(split) for split in images) <= LIMIT_BYTES


@torch.no_grad()
def encode(prefix, images: Dataset, ranks: Ranks, dtype: torch.dtype, workers: int, report: Reporter, name: str):
    """Run a split through the prefix; each rank computes a share and gets the whole."""
    features, labels = None, [0] * len(images)
    done = ranks.rank
    with report.bar(f"encoding {name} images", len(images)) as advance:
        for batch, batch_labels in order.evaluation_batches(images, 64, ranks.rank, ranks.world, workers):
            with precision.autocast(ranks.device, dtype):
                encoded = prefix.encode(batch.to(ranks.device)).cpu()
            if features is None:
                features = torch.zeros(len(images), *encoded.shape[1:], dtype=encoded.dtype)
            rows = torch.arange(done, done + len(batch) * ranks.world, ranks.world)
            features[rows] = encoded
            for row, label in zip(rows.tolist(), batch_labels.tolist(), strict=True):
                labels[row] = label
            done += len(batch) * ranks.world
            advance(len(batch) * ranks.world)
    if ranks.world > 1:
        features, labels = _combine(features, labels, ranks)
    return Features(features, labels)


def _combine(features: torch.Tensor, labels: list[int], ranks: Ranks) -> tuple[torch.Tensor, list[int]]:
    """Add up the ranks' shares, each zero where it has no image: exact as bytes, in any format."""
    whole = features.contiguous().view(torch.uint8).to(ranks.device)
    torch.distributed.all_reduce(whole)
    counted = torch.tensor(labels, device=ranks.device)
    torch.distributed.all_reduce(counted)
    return whole.cpu().view(features.dtype).view(features.shape), counted.tolist()
