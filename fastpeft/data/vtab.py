"""VTAB-1k folders: `<root>/<task>/` with image files and the lists train800, val200, train800val200 and test.

A list has one `relative/path label` a line. It may come from anywhere, so it cannot name a file outside its own task
folder: absolute paths, `..` and symbolic links that lead out are errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastpeft.data.draws import draw_train_and_val, some_of_each_class
from fastpeft.data.errors import DataError
from fastpeft.data.home import Home
from fastpeft.data.sources import FileSource

# Folder names that the usual converters and readers write for one task, and its number of classes.
_TASKS: tuple[tuple[tuple[str, ...], int], ...] = (
    (("cifar", "cifar100"), 100),
    (("caltech101",), 102),
    (("dtd",), 47),
    (("oxford_flowers102",), 102),
    (("oxford_iiit_pet", "oxford_pet"), 37),
    (("svhn",), 10),
    (("sun397",), 397),
    (("patch_camelyon",), 2),
    (("eurosat",), 10),
    (("resisc45",), 45),
    (("diabetic_retinopathy",), 5),
    (("clevr_count",), 8),
    (("clevr_dist", "clevr_distance"), 6),
    (("dmlab",), 6),
    (("kitti",), 4),
    (("dsprites_loc", "dsprites_location"), 16),
    (("dsprites_ori", "dsprites_orientation"), 16),
    (("smallnorb_azi", "smallnorb_azimuth"), 18),
    (("smallnorb_ele", "smallnorb_elevation"), 9),
)
# Protocol -> the lists of its training, validation and test images.
_LISTS: Mapping[str, Mapping[str, str]] = {
    "search": {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"},
    "final": {"train": "train800val200.txt", "test": "test.txt"},
}


@dataclass(frozen=True)
class Draw:
    """A training set of another size than VTAB-1k's.

    Attributes:
        train_size: Training images; None for all.
        val_size: Validation images.
        per_class: Training images of each class, and as many for validation; None for a draw by size.
        pool: List file with images beyond those of train800 and val200; None if there is none.
        how: One of `fastpeft.data.draws.DRAWS`.
        seed: Of the draw.
    """

    train_size: int | None
    val_size: int | None
    per_class: int | None
    pool: str | None
    how: str
    seed: int


def open_vtab(
    root: str | Path, task: str, protocol: str, draw: Draw | None = None
) -> tuple[dict[str, FileSource], list[str]]:
    """Read the lists of a task.

    Args:
        root: Folder that holds the task folders.
        task: A task's folder, or another of its usual names (`cifar100` finds `cifar`).
        protocol: `search` trains on train800 and validates on val200; `final` trains on train800val200.
        draw: Instead of these: training and validation images drawn from train800, val200 and a pool. `final` trains
            on both, so that it has seen what the search of the same draw has.

    Returns:
        The sources `train`, `val` (for `search`) and `test`, and the class names in label order: from `classes.txt`
        where the folder has one, else the numbers.
    """
    if protocol not in _LISTS:
        raise DataError(f"protocol: expected one of {', '.join(_LISTS)}, got '{protocol}'")
    folder, classes = _find_task(Path(root), task)
    names = _class_names(folder)
    if names is not None:
        classes = len(names)
    lists = dict(_LISTS["search" if draw else protocol])
    if draw and draw.pool is not None:
        lists["pool"] = draw.pool
    sources = {split: read_list(folder, file, classes) for split, file in lists.items()}
    if classes is None:
        classes = 1 + max(max(source.labels) for source in sources.values())
    if draw:
        sources = _drawn(sources, draw, protocol)
    return sources, names or [str(label) for label in range(classes)]


def _drawn(sources: dict[str, FileSource], draw: Draw, protocol: str) -> dict[str, FileSource]:
    lists, pool = [sources["train"], sources["val"]], sources.get("pool")
    if draw.per_class is not None:
        chosen = [some_of_each_class(each.labels, draw.seed + n, draw.per_class) for n, each in enumerate(lists)]
        parts = [[each.subset(indices)] for each, indices in zip(lists, chosen, strict=True)]
    else:
        sizes = [len(each.labels) if size is None else size
                 for size, each in zip((draw.train_size, draw.val_size), lists, strict=True)]  # fmt: skip
        parts = draw_train_and_val(lists, pool, tuple(sizes), draw.seed, draw.how)
    train, val = map(FileSource.joined, parts)
    if protocol == "final":
        return {"train": FileSource.joined([train, val]), "test": sources["test"]}
    return {"train": train, "val": val, "test": sources["test"]}


def read_list(folder: Path, file: str, classes: int | None = None) -> FileSource:
    """Read one list file.

    Args:
        folder: The task folder, to which the paths in the list are relative.
        file: Name of the list in it.
        classes: Number of classes, above which labels are errors; None if not known.
    """
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise DataError(f"{file}: a list file lies in the task's folder, {folder}; give its name there")
    path = folder / file
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(
            f"{path}: list file not found; a VTAB-1k task folder has one image path and label a line in it"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list file: {error}") from None
    home = Home(folder)
    paths, labels = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        fields = line.split()
        if len(fields) != 2:
            raise DataError(f"{where}: expected 'relative/path label', got '{line.strip()}'")
        paths.append(home.find(fields[0], where))
        labels.append(_label(fields[1], classes, where))
    if not paths:
        raise DataError(f"{path}: the list is empty")
    return FileSource(paths, labels)


def _label(text: str, classes: int | None, where: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise DataError(f"{where}: expected a label, a whole number from 0, got '{text}'")
    label = int(text)
    if classes is not None and label >= classes:
        raise DataError(f"{where}: label {label} is out of range: the task has {classes} classes, 0 to {classes - 1}")
    return label


def _find_task(root: Path, task: str) -> tuple[Path, int | None]:
    """The task's folder and its number of classes, None for a task that VTAB does not have."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; data.root is the folder that holds the VTAB-1k task folders")
    names, classes = next(((names, classes) for names, classes in _TASKS if task in names), ((task,), None))
    for name in (task, *names):
        if (root / name).is_dir():
            return root / name, classes
    there = sorted(path.name for path in root.iterdir() if path.is_dir())
    raise DataError(f"{root}: no folder for task '{task}'; it has: {', '.join(there) or 'no folders'}")


def _class_names(folder: Path) -> list[str] | None:
    path = folder / "classes.txt"
    if not path.is_file():
        return None
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list of class names: {error}") from None
    if not names:
        raise DataError(f"{path}: no class names in it; remove the file or name one class a line")
    return names
