"""The Fréchet distance between two sets of features, each taken for a normal distribution.

    d = |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)

Fewer images than features give a singular covariance, where the usual square root of the product C1 C2 fails or needs a
multiple of the identity added. With C = F F^T the last trace is the sum of the singular values of F1^T F2, which exists
for every pair and is accurate to the rounding of the factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bench.analyses.errors import AnalysisError

# An eigenvalue below zero by more than rounding, as a share of the largest.
_NEGATIVE = 1e-6


class Moments:
    """Mean and covariance of vectors that come in batches, in one pass and double precision.

    Attributes:
        count: vectors so far.
        mean: (d,).
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = np.zeros(width)
        self._scatter = np.zeros((width, width))

    def add(self, batch: np.ndarray) -> None:
        """Take in vectors (n, d).

        A batch's scatter about its own mean is joined to the whole's (Chan et al. 1983): sums of squares, of which a
        large mean would be subtracted, never arise.

        Raises:
            AnalysisError: a value is not finite.
        """
        batch = np.asarray(batch, dtype=np.float64)
        if not np.isfinite(batch).all():
            raise AnalysisError("the extractor gave features that are not finite")
        if len(batch) == 0:
            return
        own = batch.mean(axis=0)
        centred = batch - own
        total = self.count + len(batch)
        gap = own - self.mean
        self._scatter += centred.T @ centred + np.outer(gap, gap) * (self.count * len(batch) / total)
        self.mean += gap * (len(batch) / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """The normal distribution with these moments; the covariance is that of a sample, divided by n - 1.

        Raises:
            AnalysisError: fewer than two vectors.
        """
        if self.count < 2:
            raise AnalysisError(f"a covariance needs at least 2 images, got {self.count}")
        return Gaussian(self.mean.copy(), self._scatter / (self.count - 1), self.count)


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution.

    Attributes:
        mean: (d,).
        covariance: (d, d).
        count: vectors that it was estimated from, or None if not known.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None

    def __post_init__(self) -> None:
        width = self.mean.size
        if self.mean.shape != (width,) or self.covariance.shape != (width, width):
            raise AnalysisError(
                f"expected a mean (d,) and a covariance (d, d), got {self.mean.shape} and {self.covariance.shape}"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise AnalysisError("a mean or a covariance is not finite")

    @cached_property
    def factor(self) -> np.ndarray:
        """F of (d, rank), F F^T the covariance.

        Raises:
            AnalysisError: the matrix is no covariance.
        """
        values, vectors = np.linalg.eigh((self.covariance + self.covariance.T) / 2)
        largest = max(values[-1], 0.0)
        if values[0] < -_NEGATIVE * largest or (largest == 0 and self.covariance.any()):
            raise AnalysisError(
                f"not a covariance: it has the eigenvalue {values[0]:.3g} beside the largest of {values[-1]:.3g}"
            )
        # What lies below is the rounding of zeros, whose square roots would not be small.
        kept = values > largest * len(values) * np.finfo(np.float64).eps
        return vectors[:, kept] * np.sqrt(values[kept])


def distance(first: Gaussian, second: Gaussian) -> float:
    """The squared Fréchet (2-Wasserstein) distance, in squared units of the features.

    Raises:
        AnalysisError: they are of different extractors.
    """
    if first.mean.size != second.mean.size:
        raise AnalysisError(f"features of {first.mean.size} and of {second.mean.size} numbers cannot be compared")
    gap = first.mean - second.mean
    common = first.factor.T @ second.factor
    shared = np.linalg.svd(common, compute_uv=False).sum() if common.size else 0.0
    found = gap @ gap + np.trace(first.covariance) + np.trace(second.covariance) - 2 * shared
    return max(float(found), 0.0)
