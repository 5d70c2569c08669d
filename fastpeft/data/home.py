"""A folder that lists of image files name files in, and out of which they may not lead."""

from __future__ import annotations

from pathlib import Path

from fastpeft.data.errors import DataError


class Home:
    """A folder out of which no path of a list leads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._parents: dict[Path, Path] = {}

    def find(self, relative: str, where: str) -> Path:
        """The existing file that a list means, with symbolic links resolved.

        Args:
            relative: the path as the list has it.
            where: the list, for messages.

        Raises:
            DataError: no such file, or one outside.
        """
        given = Path(relative)
        if given.is_absolute() or ".." in given.parts:
            raise DataError(f"{where}: '{relative}': expected a path inside {self.folder}, relative and without '..'")
        # Lists name thousands of files in a few folders: a folder's links are followed once.
        if given.parent not in self._parents:
            self._parents[given.parent] = (self.folder / given.parent).resolve()
        path = self._parents[given.parent] / given.name
        if path.is_symlink():
            path = path.resolve()
        if not path.is_relative_to(self.folder):
            raise DataError(f"{where}: '{relative}' is a link to {path}, outside {self.folder}")
        if not path.is_file():
            raise DataError(f"{where}: '{relative}': no such file in {self.folder}")
        return path
