"""The study's task folders: what is given, what is made on the spot, and smaller and larger draws of CIFAR-100."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from filelock import FileLock

from bench.made import dsprites, mnist
from bench.made.lists import write_lists
from bench.offline.plan import ONE_SHOT_TASK, SCALES
from bench.tables.errors import TableError
from fastpeft.data.vtab import open_vtab

GIVEN = ("cifar", "dtd10")
POOL = "train_pool10k.tar"
_POOL_LIST = "pool10k.txt"
Sample = tuple[Path, int]


def prepare(data: Path, work: Path) -> tuple[dict[str, Path], list[str]]:
    """Make what can be made, and find what is there.

    Args:
        data: folder with the task folders `cifar` and `dtd10`, or one of them.
        work: folder for what is made.

    Returns:
        The root of each task folder that is there, and a sentence for each that is not.

    Raises:
        TableError: `data` is no folder.
        DataError: a list file is missing or malformed.
    """
    if not data.is_dir():
        raise TableError(f"{data}: no such folder; --data is the folder that holds the task folders cifar and dtd10")
    roots, missing = {}, []
    for folder in GIVEN:
        if (data / folder).is_dir():
            open_vtab(data, folder, "search")
            open_vtab(data, folder, "final")
            roots[folder] = data
        else:
            missing.append(f"{folder}: not in {data}")
    made = work / "made"
    made.mkdir(parents=True, exist_ok=True)
    # Of two commands that begin at once the second finds what the first has made.
    with FileLock(made / ".lock"):
        roots |= _make(made, missing, data / "cifar" if "cifar" in roots else None)
    return roots, missing


def _make(made: Path, missing: list[str], cifar: Path | None) -> dict[str, Path]:
    roots = {}
    for folder, make in (("mnist", mnist.make), ("dsprites_ori", dsprites.make)):
        # The lists are written last: a folder that has one is whole.
        if not (made / folder / "test.txt").is_file():
            make(made)
        roots[folder] = made
    if cifar is not None:
        roots |= _draws(cifar, made / f"of-{_digest(cifar)}", missing)
    return roots


def _digest(cifar: Path) -> str:
    """Of what draws are made from: those of another folder, or of other lists, are others."""
    parts = [str(cifar.resolve()).encode()]
    parts += [path.read_bytes() for path in sorted(cifar.glob("*.txt"))]
    if (cifar / POOL).is_file():
        parts.append(str((cifar / POOL).stat().st_size).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def _draws(cifar: Path, made: Path, missing: list[str]) -> dict[str, Path]:
    """CIFAR-100 with fewer or more training images, tested on the same images."""
    names = {size: name for size, name in SCALES.items() if name != "cifar100"}
    if not (cifar / POOL).is_file():
        missing += [f"{name}: needs {cifar / POOL}" for name in (*names.values(), ONE_SHOT_TASK)]
        return {}
    roots = {}
    for size, name in names.items():
        if not (made / name).is_dir():
            # Both are in random order.
            images = [*_own(cifar), *_pool(cifar, made)][:size]
            if len(images) < size:
                raise TableError(f"{cifar}: {size} training images are needed, it has {len(images)}")
            _write(cifar, made / name, images[: size * 4 // 5], images[size * 4 // 5 :])
        roots[name] = made
    if not (made / ONE_SHOT_TASK).is_dir():
        _write(cifar, made / ONE_SHOT_TASK, *_one_a_class(_pool(cifar, made)), final="train800")
    return roots | {ONE_SHOT_TASK: made}


def _own(cifar: Path) -> list[Sample]:
    source = open_vtab(cifar.parent, cifar.name, "final")[0]["train"]
    return list(zip(source.paths, source.labels, strict=True))


def _pool(cifar: Path, made: Path) -> list[Sample]:
    """The pool's images, unpacked once."""
    folder = made / "pool"
    if not (folder / _POOL_LIST).is_file():
        made.mkdir(parents=True, exist_ok=True)
        part = made / f".{os.getpid()}.pool"
        with tarfile.open(cifar / POOL) as archive:
            _unpack(archive, part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    lines = (folder / _POOL_LIST).read_text(encoding="utf-8").splitlines()
    return [(folder / path, int(label)) for path, label in map(str.split, lines)]


def _unpack(archive: tarfile.TarFile, folder: Path) -> None:
    """The archive's files and nothing else; Python before 3.11.4 has no filter for that."""
    for member in archive:
        path = folder / member.name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise TableError(f"{archive.name}: '{member.name}' leads out of the folder that it is unpacked to")
        if member.isfile():
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                shutil.copyfileobj(archive.extractfile(member), file)


def _one_a_class(pool: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """One image a class to train on and another to choose by."""
    of_class = defaultdict(list)
    for number in np.random.default_rng(0).permutation(len(pool)):
        of_class[pool[number][1]].append(pool[number])
    return [of_class[label][0] for label in sorted(of_class)], [of_class[label][1] for label in sorted(of_class)]


def _write(cifar: Path, folder: Path, train: list[Sample], val: list[Sample], final: str = "train800val200") -> None:
    """A task folder with its own images, as lists cannot lead out of their folder; whole or not at all.

    Args:
        cifar: folder whose test images are those of the new one.
        folder: the new one.
        train, val: images of the search.
        final: the list whose images the final runs train on.
    """
    test = open_vtab(cifar.parent, cifar.name, "final")[0]["test"]
    samples = {"train800": train, "val200": val, "test": list(zip(test.paths, test.labels, strict=True))}
    part = folder.with_name(f".{os.getpid()}.{folder.name}")
    lists = {}
    for split, images in samples.items():
        (part / "images" / split).mkdir(parents=True)
        lists[split] = []
        for number, (path, label) in enumerate(images):
            name = f"images/{split}/{number:06d}{path.suffix}"
            _copy(path, part / name)
            lists[split].append((name, label))
    if (cifar / "classes.txt").is_file():
        shutil.copyfile(cifar / "classes.txt", part / "classes.txt")
    write_lists(part, lists)
    if final != "train800val200":
        shutil.copyfile(part / f"{final}.txt", part / "train800val200.txt")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def _copy(image: Path, place: Path) -> None:
    """A second name for the image where the file system has that, else a copy."""
    try:
        os.link(image, place)
    except OSError:
        shutil.copyfile(image, place)
