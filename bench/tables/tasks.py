"""The tasks of VTAB-1k and FGVC, in the papers' order, and which of them a folder has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.tables.errors import TableError, unknown
from fastpeft.data.vtab import open_vtab


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: as in the papers' cells.
        group: "natural", "specialized", "structured" or "fgvc".
        folders: names that its folder may have.
    """

    name: str
    group: str
    folders: tuple[str, ...]


def _tasks(group: str, *names: tuple[str, ...]) -> tuple[Task, ...]:
    return tuple(Task(folders[0], group, folders) for folders in names)


TASKS: tuple[Task, ...] = (
    *_tasks(
        "natural", ("cifar100", "cifar"), ("caltech101",), ("dtd",), ("oxford_flowers102",),
        ("oxford_iiit_pet", "oxford_pet"), ("svhn", "svhn_cropped"), ("sun397",),
    ),
    *_tasks("specialized", ("patch_camelyon",), ("eurosat",), ("resisc45",), ("diabetic_retinopathy",)),
    *_tasks(
        "structured", ("clevr_count",), ("clevr_distance", "clevr_dist"), ("dmlab",), ("kitti",),
        ("dsprites_location", "dsprites_loc"), ("dsprites_orientation", "dsprites_ori"),
        ("smallnorb_azimuth", "smallnorb_azi"), ("smallnorb_elevation", "smallnorb_ele"),
    ),
)  # fmt: skip
GROUPS = ("natural", "specialized", "structured")
_OTHER = "other"


def group_size(group: str) -> int:
    """Tasks that a group has in the papers."""
    return sum(task.group == group for task in TASKS)


def find(root: Path, wanted: list[str] | None = None) -> tuple[dict[Task, str], list[Task]]:
    """The tasks that a VTAB-1k folder has, with their folders' names, and those that it lacks.

    Lists are read, so that a broken one ends everything before it starts.

    Args:
        root: a folder of task folders with list files.
        wanted: names of tasks, in any of their usual forms, or of folders that are no task of VTAB; all if None.

    Raises:
        TableError: no such folder, no task in it, a task that was asked for by name is not there.
        DataError: a list file is missing or malformed.
    """
    if not root.is_dir():
        raise TableError(f"{root}: no such folder; --data is the folder that holds the VTAB-1k task folders")
    there = sorted(path.name for path in root.iterdir() if path.is_dir())
    chosen = [_named(name, there) for name in wanted] if wanted else list(TASKS)
    found, missing = {}, []
    for task in chosen:
        folder = next((name for name in task.folders if name in there), None)
        if folder is None:
            missing.append(task)
            continue
        for protocol in ("search", "final"):
            open_vtab(root, folder, protocol)
        found[task] = folder
    if wanted and missing:
        raise TableError(f"{root}: no folder for {', '.join(task.name for task in missing)}; it has {', '.join(there)}")
    if not found:
        raise TableError(f"{root}: no folder of a VTAB-1k task; it has {', '.join(there) or 'no folders'}")
    return found, missing


def _named(name: str, there: list[str]) -> Task:
    for task in TASKS:
        if name in (task.name, *task.folders):
            return task
    if name in there:
        return Task(name, _OTHER, (name,))
    raise unknown("task", name, [*(task.name for task in TASKS), *there])
