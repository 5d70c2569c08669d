"""The image tower's tokens computed once: with a frozen tower and plain images they are constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastpeft.data.vl_transforms import ImageFiles
from fastpeft.errors import FastPEFTError
from fastpeft.trainer import feature_key, features, order
from fastpeft.trainer.feature_store import FeatureStore
from fastpeft.trainer.launch import Ranks
from fastpeft.trainer.report import Reporter

# Images of a pass through the tower.
BATCH = 64


class Tokens:
    """Takes the place of a split's images.

    Attributes:
        tokens: (images, Ni, image_width), on the CPU.
    """

    def __init__(self, numbers: Sequence[int], tokens: Tensor) -> None:
        self.tokens = tokens
        self._rows = {number: row for row, number in enumerate(numbers)}

    def read(self, image: int, sample: int, epoch: int) -> Tensor:
        """Tokens (Ni, image_width) of image number `image`; `sample` and `epoch` change nothing."""
        return self.tokens[self._rows[image]]


class _Pictures(torch.utils.data.Dataset):
    """Some of the images of files, with their rows."""

    def __init__(self, files: ImageFiles, numbers: Sequence[int]) -> None:
        self.files, self.numbers = files, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.files.read(self.numbers[row], 0, 0), row


def encode(
    files: ImageFiles,
    numbers: Sequence[int],
    tower: Callable[[Tensor], Tensor],
    ranks: Ranks,
    workers: int,
    report: Reporter,
    name: str,
) -> Tokens:
    """The tokens of some images; each rank computes a share and gets the whole.

    Args:
        files: The images.
        numbers: Which of them.
        tower: From images on the device to tokens, in the working format and in evaluation mode.
        ranks: Where this process stands.
        workers: Loader processes.
        report: What shows the progress.
        name: Of the split.
    """
    tokens = None
    with report.bar(f"encoding {name} images", len(numbers)) as advance:
        pictures = _Pictures(files, numbers)
        for images, rows in order.evaluation_batches(pictures, BATCH, ranks.rank, ranks.world, workers, _stacked):
            with torch.no_grad():
                encoded = tower(images.to(ranks.device)).cpu()
            if tokens is None:
                tokens = torch.zeros(len(numbers), *encoded.shape[1:], dtype=encoded.dtype)
            tokens[rows] = encoded
            advance(len(rows) * ranks.world)
    if ranks.world > 1:
        tokens = features.combined(tokens, len(numbers), ranks)
    return Tokens(numbers, tokens)


def kept(
    store: FeatureStore,
    files: ImageFiles,
    numbers: Sequence[int],
    tower: nn.Module,
    dtype: torch.dtype,
    ranks: Ranks,
    compute: Callable[[], Tokens],
) -> Tokens:
    """The same from a folder that other runs read too, or computed and left there."""

    def describe() -> dict[str, object]:
        named = [*tower.named_parameters(), *tower.named_buffers()]
        return {
            "tower": feature_key.tensors_digest(named),
            "architecture": str(tower),
            "images": len(numbers),
            "data": feature_key.files_digest(files.paths[number] for number in numbers),
            "preprocessing": repr(files.transform),
            **feature_key.circumstances(ranks, dtype),
        }

    return Tokens(numbers, store.fetch(describe, lambda: compute().tokens))


def _stacked(samples: list) -> tuple[Tensor, Tensor] | FastPEFTError:
    for sample in samples:
        if isinstance(sample, FastPEFTError):
            return sample
    images, rows = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(rows)
