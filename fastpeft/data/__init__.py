"""Images and labels in the formats people already have on disk: VTAB-1k folders, class folders, digits from wheels."""

from fastpeft.data.dataset import ImageDataset, load_image
from fastpeft.data.errors import DataError
from fastpeft.data.splits import Splits, open_splits

__all__ = ["DataError", "ImageDataset", "Splits", "load_image", "open_splits"]
