"""Locks beside the folders of runs: a run is trained by one worker at a time, whichever studies it is in.

The lock of a worker that is killed is free at once.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bench.tables.errors import TableError


@contextlib.contextmanager
def held(*folders: Path) -> Iterator[None]:
    """Have the locks of these folders, as soon as whoever has them is done.

    Raises:
        TableError: there can be no file beside a folder.
    """
    with contextlib.ExitStack() as stack:
        # All workers take them in one order: two that want the same ones do not wait for each other.
        for folder in sorted(set(folders)):
            _take(stack, folder, wait=True)
        yield


@contextlib.contextmanager
def free(folders: Iterable[Path]) -> Iterator[set[Path]]:
    """Have the locks of those folders that nobody has, without waiting for the others.

    Raises:
        TableError: there can be no file beside a folder.
    """
    with contextlib.ExitStack() as stack:
        yield {folder for folder in folders if _take(stack, folder, wait=False)}


@contextlib.contextmanager
def needed(folder: Path, remove: Callable[[], None]) -> Iterator[None]:
    """Have a folder stay that several studies read; of those that need it at a time the last to end removes it.

    An error leaves it for whoever goes on; a worker that is killed needs nothing any more.

    Args:
        folder: it may not be there yet.
        remove: removes it.

    Raises:
        TableError: there can be no file beside the folder.
    """
    users = folder.with_name(f"{folder.name}-users")
    with contextlib.ExitStack() as own:
        with held(users):
            own.enter_context(held(users / uuid.uuid4().hex))
        yield
        with held(users):
            own.close()
            theirs = [path.with_name(path.name[1:].removesuffix(".lock")) for path in users.glob(".*.lock")]
            # Whoever makes the folder without having said so has its own lock.
            with free([*theirs, folder]) as unused:
                if len(unused) > len(theirs):
                    remove()
                    shutil.rmtree(users, ignore_errors=True)


def _take(stack: contextlib.ExitStack, folder: Path, wait: bool) -> bool:
    from filelock import FileLock, Timeout

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(FileLock(folder.with_name(f".{folder.name}.lock"), timeout=-1 if wait else 0))
    except Timeout:
        return False
    except OSError as error:
        raise TableError(f"{folder}: cannot be locked: {error.strerror or error}") from error
    return True
