"""Are the images there that a list names? Folders are listed once; no image is opened."""

from __future__ import annotations

import os
from pathlib import Path

from fastpeft.data.errors import DataError


class Presence:
    """Collects the images that lists name, and says at the end which are missing.

    A hundred thousand images lie in a few folders, so that listing each folder once is much cheaper than a look at
    each file, above all on a network's file system.
    """

    def __init__(self) -> None:
        self._listed: dict[Path, frozenset[str]] = {}
        self._there: dict[Path, bool] = {}
        # Lists name an image as often as they have something to say about it.
        self._paths: dict[tuple[Path, str], Path] = {}
        self._missing = 0
        self._first = ""

    def ask(self, root: Path, relative: str, where: str) -> Path:
        """The path of an image, noted as missing if its folder does not list it.

        Args:
            root: Folder that relative paths start from.
            relative: The path in it.
            where: File, entry and field that name it, for messages.

        Raises:
            DataError: The path is absolute or leads out of the folder.
        """
        if (root, relative) in self._paths:
            return self._paths[root, relative]
        given = Path(relative)
        if given.is_absolute() or ".." in given.parts:
            raise DataError(f"{where}: expected a path inside {root}, relative and without '..', got '{relative}'")
        path = self._paths[root, relative] = root / given
        if path.name not in self._names(path.parent):
            self._missing += 1
            self._first = self._first or f"{where}: '{relative}': no such file in {root}"
        return path

    def has(self, folder: Path) -> bool:
        """Whether there is such a folder; looked for once."""
        if folder not in self._there:
            self._there[folder] = folder.is_dir()
        return self._there[folder]

    def check(self) -> None:
        """Raise an error about the first image that is missing, with the number of all that are.

        Raises:
            DataError: One or more are missing.
        """
        if self._missing:
            raise DataError(f"{self._first} ({self._missing:,} of {len(self._paths):,} images are missing)")

    def _names(self, folder: Path) -> frozenset[str]:
        if folder not in self._listed:
            try:
                self._listed[folder] = frozenset(os.listdir(folder))
            except OSError:
                self._listed[folder] = frozenset()
        return self._listed[folder]
