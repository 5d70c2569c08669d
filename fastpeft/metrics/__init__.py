"""The papers' metrics."""

from fastpeft.metrics.accuracy import Top1

__all__ = ["Top1"]
