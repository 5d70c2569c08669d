"""The tasks of FGVC and VTAB-1k, in the papers' order, which of them a folder has, and how each is read.

A folder of any other data set is a task too when it is asked for by name: lists as VTAB-1k's, or class folders.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.tables.errors import TableError, unknown
from fastpeft.data.fgvc import DATA_SETS, open_fgvc
from fastpeft.data.folder import open_folder
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
    *_tasks("fgvc", *(tuple(dict.fromkeys((kind.name, *kind.folders))) for kind in DATA_SETS)),
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
GROUPS = ("fgvc", "natural", "specialized", "structured")
_FGVC, _OTHER = "fgvc", "other"
# Training images held out of class folders that have no validation images, while settings are searched for.
_HELD_OUT = 0.1


def group_size(group: str) -> int:
    """Tasks that a group has in the papers."""
    return sum(task.group == group for task in TASKS)


def find(root: Path, wanted: list[str] | None = None) -> tuple[dict[Task, str], list[Task]]:
    """The tasks that a folder has, with their folders' names, and those that it lacks.

    Lists are read, so that a broken one ends everything before it starts.

    Args:
        root: a folder of VTAB-1k's task folders, FGVC's data sets, or others.
        wanted: names of tasks, in any of their usual forms, or of folders that are no task of the papers; all if None.

    Raises:
        TableError: no such folder, no task in it, a task that was asked for by name is not there.
        DataError: a list file or an image is missing, or a list is malformed.
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
        _check(root, folder)
        found[task] = folder
    if wanted and missing:
        raise TableError(f"{root}: no folder for {', '.join(task.name for task in missing)}; it has {', '.join(there)}")
    if not found:
        raise TableError(
            f"{root}: no folder of a task of VTAB-1k or FGVC; it has {', '.join(there) or 'no folders'}, which --tasks "
            "takes by name"
        )
    return found, missing


def data_fields(root: Path, folder: str, stage: str, resize: str = "squash") -> dict[str, Any]:
    """A task as the `data` section of a configuration.

    VTAB-1k's images are squashed and never changed. FGVC's, and those in class folders, are cropped at random and
    mirrored while training.

    Args:
        root: of the data.
        folder: of the task below it.
        stage: "search", or another, which trains without validation images.
        resize: of VTAB-1k's images.
    """
    kind, searching = _layout(root, folder), stage == "search"
    listed = {"name": kind, "root": str(root), "task": folder, "protocol": "search" if searching else "final"}
    if kind == "vtab":
        return {**listed, "resize": resize}
    crops = {"resize": "crop", "augment": "crop_flip"}
    if kind == "fgvc":
        return {**listed, **crops}
    held_out = searching and "val" not in open_folder(root / folder)[0]
    return {"name": kind, "root": str(root / folder), "val_fraction": _HELD_OUT if held_out else 0.0, **crops}


def _layout(root: Path, folder: str) -> str:
    """How a task's folder is read: "fgvc", "folder" or "vtab"."""
    if any(task.group == _FGVC and folder in task.folders for task in TASKS):
        return "fgvc"
    lists = any((root / folder / f"{name}.txt").is_file() for name in ("train800", "val200", "train800val200", "test"))
    known = any(folder in task.folders for task in TASKS)
    return "vtab" if lists or known else "folder"


def _check(root: Path, folder: str) -> None:
    """Read a task's lists."""
    kind = _layout(root, folder)
    if kind == "folder":
        open_folder(root / folder)
        return
    for protocol in ("search", "final"):
        (open_fgvc if kind == "fgvc" else open_vtab)(root, folder, protocol)


def _named(name: str, there: list[str]) -> Task:
    for task in TASKS:
        if name in (task.name, *task.folders):
            return task
    if name in there:
        return Task(name, _OTHER, (name,))
    raise unknown("task", name, list(dict.fromkeys([*(task.name for task in TASKS), *there])))
