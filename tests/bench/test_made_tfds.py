"""Task folders from TensorFlow Datasets' files: files it wrote itself, slices and labels of all tasks, mistakes."""

from __future__ import annotations

import io
import json
import runpy
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from bench.made.__main__ import main
from bench.made.tfds_files import Prepared, Split, _crc32c, _masked, example_type, find
from bench.made.tfds_tasks import SOURCES
from bench.tables.cells import cell
from bench.tables.tasks import TASKS
from bench.tables.tasks import find as find_tasks
from fastpeft.data import DataError
from fastpeft.data.sources import read_image
from fastpeft.data.vtab import _TASKS, open_vtab
from tests.bench import tfds_written

# Examples of the splits of the versions that the papers' code used.
PUBLISHED = {
    "cifar100": {"train": 50000, "test": 10000},
    "caltech101": {"train": 3057, "test": 6084},
    "dtd": {"train": 1880, "validation": 1880, "test": 1880},
    "oxford_flowers102": {"train": 1020, "validation": 1020, "test": 6149},
    "oxford_iiit_pet": {"train": 3680, "test": 3669},
    "svhn_cropped": {"train": 73257, "test": 26032},
    "sun397/tfds": {"train": 76128, "validation": 10875, "test": 21750},
    "patch_camelyon": {"train": 262144, "validation": 32768, "test": 32768},
    "eurosat/rgb": {"train": 27000},
    "resisc45": {"train": 31500},
    "diabetic_retinopathy_detection/btgraham-300": {"train": 35126, "validation": 10906, "test": 42670},
    "clevr": {"train": 70000, "validation": 15000, "test": 15000},
    "dmlab": {"train": 65550, "validation": 22628, "test": 22735},
    "kitti": {"train": 6347, "validation": 423, "test": 711},
    "dsprites": {"train": 737280},
    "smallnorb": {"train": 24300, "test": 24300},
}
SOURCE = {source.task: source for source in SOURCES}


def serialised(features: dict[str, list]) -> bytes:
    example = example_type()()
    for name, values in features.items():
        feature = example.features.feature[name]
        kind = {bytes: feature.bytes_list, float: feature.float_list, int: feature.int64_list}[type(values[0])]
        kind.value.extend(values)
    return example.SerializeToString()


def png(number: int, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    shape = (4, 5, 3) if mode == "RGB" else (4, 5)
    Image.fromarray(np.random.RandomState(number).randint(0, 256 if mode == "RGB" else 2, shape).astype(np.uint8)).save(
        buffer, format="PNG"
    )
    return buffer.getvalue()


def write(root, name, version, splits, info=None):
    """A data set as it is prepared: splits of lists of features, in shards of at most 700."""
    folder = root / name / version
    folder.mkdir(parents=True)
    described = []
    for split, examples in splits.items():
        shards = [examples[i : i + 700] for i in range(0, len(examples), 700)]
        for number, shard in enumerate(shards):
            file = folder / f"{name.split('/')[0]}-{split}.tfrecord-{number:05d}-of-{len(shards):05d}"
            with file.open("wb") as out:
                for features in shard:
                    record = serialised(features)
                    size = struct.pack("<Q", len(record))
                    out.write(size + struct.pack("<I", _masked(_crc32c(size))) + record)
                    out.write(struct.pack("<I", _masked(_crc32c(record))))
        described.append({"name": split, "shardLengths": [str(len(shard)) for shard in shards]})
    info = info or {"name": name.split("/")[0], "version": version, "splits": described}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def images(count, **of):
    return [{"image": [png(n)], **{key: value(n) for key, value in of.items()}} for n in range(count)]


@pytest.mark.parametrize("form", ["tfrecord", "array_record"])
def test_files_that_it_wrote_itself(tmp_path, form):
    if form == "array_record":
        pytest.importorskip("array_record")
    tfds_written.write(tmp_path, form)
    prepared = find(tmp_path, "clevr", "3.1.0")
    split = prepared.split("train")
    assert (prepared.version, len(split), prepared.label_names("label")) == ("3.1.0", 4, ["ape", "bee"])
    for number, example in zip(tfds_written.ORDER, split.read(0, 4), strict=True):
        assert example["label"] == [number % 2] and example["file_name"] == [f"{number}.png".encode()]
        assert example["objects/size"] == [j % 2 for j in range(3 * number)]
        assert example["objects/pixel_coords"][2::3] == [8.25 + number + j for j in range(3 * number)]
        assert (np.asarray(Image.open(io.BytesIO(example["image"][0]))) == 40 * number).all()
        if number:
            assert SOURCE["clevr_count"].label(example) == 3 * number - 3
            assert SOURCE["clevr_distance"].label(example) == {1: 3, 2: 5, 3: 5}[number]
    assert [example["label"] for example in split.read(1, 3)] == [[1], [1]]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.task)
def test_slices_are_the_protocols(source, tmp_path):
    splits = {name: Split(name, (), (count,), "tfrecord") for name, count in PUBLISHED[source.data_set].items()}
    slices = source.slices(Prepared(tmp_path, source.version, splits))
    sizes = {split: stop - start for split, (_, start, stop) in slices.items()}
    paper = {key: cell("vpt_table08", task=source.task, metric=f"n_{key}").value for key in ("val", "test", "classes")}
    assert sizes == {"train800": 800, "val200": paper["val"], "test": paper["test"]}
    assert source.classes == paper["classes"]
    for name, _, stop in slices.values():
        assert stop <= len(splits[name])
    ranges = [(name, set(range(start, stop))) for name, start, stop in slices.values()]
    assert not any(a[0] == b[0] and a[1] & b[1] for i, a in enumerate(ranges) for b in ranges[:i])


def test_validation_begins_where_the_protocol_says():
    def start(task):
        source = SOURCE[task]
        splits = {name: Split(name, (), (count,), "tfrecord") for name, count in PUBLISHED[source.data_set].items()}
        return source.slices(Prepared(None, source.version, splits))["val200"][:2]

    assert start("cifar100") == ("train", 45000) and start("caltech101") == ("train", 2751)
    assert start("oxford_iiit_pet") == ("train", 2944) and start("clevr_count") == ("train", 63000)
    assert start("eurosat") == ("train", 16200) and start("dsprites_location") == ("train", 589824)
    assert start("smallnorb_azimuth") == ("test", 0) and start("kitti") == ("validation", 0)


def test_every_task_has_a_folder_that_is_read():
    assert [source.task for source in SOURCES] == [task.name for task in TASKS if task.group != "fgvc"]
    classes = {name: count for names, count in _TASKS for name in names}
    assert {source.folder: source.classes for source in SOURCES} == {
        source.folder: classes[source.folder] for source in SOURCES
    }


@pytest.mark.parametrize(
    "task, example, label",
    [
        ("clevr_distance", {"objects/pixel_coords": [0.0, 0.0, 9.0, 0.0, 0.0, 8.0]}, 0),
        ("clevr_distance", {"objects/pixel_coords": [0.0, 0.0, 8.1]}, 1),
        ("clevr_distance", {"objects/pixel_coords": [9.0, 9.0, 10.5]}, 5),
        ("clevr_count", {"objects/size": [0] * 10}, 7),
        ("kitti", {"objects/type": [], "objects/location": []}, 3),
        ("kitti", {"objects/type": [3, 7], "objects/location": [0.0, 0.0, 5.0] * 2}, 3),
        ("kitti", {"objects/type": [3, 0], "objects/location": [0.0, 0.0, 5.0, 0.0, 0.0, 8.5]}, 1),
        ("kitti", {"objects/type": [2], "objects/location": [0.0, 0.0, 7.0]}, 0),
        ("kitti", {"objects/type": [1], "objects/location": [0.0, 0.0, 20.5]}, 2),
        ("dsprites_location", {"label_x_position": [31]}, 15),
        ("dsprites_location", {"label_x_position": [3]}, 1),
        ("dsprites_orientation", {"label_orientation": [4]}, 1),
        ("dsprites_orientation", {"label_orientation": [5]}, 2),
        ("dsprites_orientation", {"label_orientation": [39]}, 15),
        ("smallnorb_elevation", {"label_elevation": [8], "label_azimuth": [1]}, 8),
        ("smallnorb_azimuth", {"label_elevation": [8], "label_azimuth": [17]}, 17),
        ("svhn", {"label": [9]}, 9),
    ],
)
def test_labels_are_the_protocols(task, example, label):
    assert SOURCE[task].label(example) == label


def test_a_task_is_converted(tmp_path, capsys):
    """EuroSAT: everything out of one split, in several shards."""
    folder = write(tmp_path / "tfds", "eurosat/rgb", "2.0.0", {"train": images(1700, label=lambda n: [n % 10])})
    (folder / "label.labels.txt").write_text("".join(f"land {n}\n" for n in range(10)))
    out = tmp_path / "vtab"
    command = ["tfds", "--tfds-dir", str(tmp_path / "tfds"), "--task", "eurosat", "--out", str(out)]
    assert main(command) == 0
    assert "800 train800, 200 val200, 340 test, 10 classes" in " ".join(capsys.readouterr().out.split())
    sources, names = open_vtab(out, "eurosat", "search")
    assert names[3] == "land 3"
    assert [len(sources[split].labels) for split in ("train", "val", "test")] == [800, 200, 340]
    for split, first in (("train", 0), ("val", 1020), ("test", 1360)):
        assert sources[split].labels[:12] == [(first + n) % 10 for n in range(12)]
        for n in (0, 7):
            assert sources[split].paths[n].read_bytes() == png(first + n), "images are as they were"
    final = open_vtab(out, "eurosat", "final")[0]["train"]
    assert final.labels == sources["train"].labels + sources["val"].labels
    assert [task.name for task in find_tasks(out)[0]] == ["eurosat"]
    kept = sources["train"].paths[5].stat().st_mtime_ns
    assert main(command) == 0 and sources["train"].paths[5].stat().st_mtime_ns == kept


def test_all_that_is_prepared_is_converted(tmp_path, capsys):
    """dSprites' zeros and ones become black and white; of another version's images there is a warning."""
    sprites = [
        {"image": [png(n, "L")], "label_x_position": [n % 32], "label_orientation": [n % 40]} for n in range(1400)
    ]
    write(tmp_path / "tfds", "dsprites", "2.1.0", {"train": sprites})
    (tmp_path / "tfds" / "downloads").mkdir()
    assert main(["tfds", "--tfds-dir", str(tmp_path / "tfds"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "not prepared: cifar100" in said.out and "kitti" in said.out
    assert "version 2.1.0 of dsprites; the papers' is 2.0.0" in " ".join(said.err.split())
    for task, values in (("dsprites_location", 32), ("dsprites_orientation", 40)):
        sources, _ = open_vtab(tmp_path / "out", task, "search")
        assert sources["train"].labels[:80] == [int(n % values // (values / 16)) for n in range(80)]
        stored = np.asarray(Image.open(io.BytesIO(png(3, "L"))))
        assert (read_image(sources["train"].paths[3]) == 255 * stored[..., None]).all()


def broken(tmp_path, change):
    folder = write(tmp_path, "dtd", "3.0.1", {"train": images(3, label=lambda n: [n])})
    change(folder)
    return find(tmp_path, "dtd", "3.0.1").split("train")


def test_damaged_files_are_named(tmp_path):
    shard = "dtd-train.tfrecord-00000-of-00001"

    def cut(folder):
        (folder / shard).write_bytes((folder / shard).read_bytes()[:-30])

    def flip(folder):
        data = bytearray((folder / shard).read_bytes())
        data[0] ^= 1
        (folder / shard).write_bytes(data)

    def garble(folder):
        data = bytearray((folder / shard).read_bytes())
        data[12:20] = b"\xff" * 8
        (folder / shard).write_bytes(data)

    for number, (change, message) in enumerate((
        (cut, "ends in the middle of record 2"),
        (flip, "record 0 is damaged"),
        (garble, r"a record is no tf\.train\.Example"),
        (lambda folder: (folder / shard).write_bytes(b""), "0 records; expected 3"),
        (lambda folder: (folder / shard).unlink(), "shard not found"),
    )):  # fmt: skip
        split = broken(tmp_path / str(number), change)
        with pytest.raises(DataError, match=message) as caught:
            list(split.read(0, 3))
        assert shard in str(caught.value)


def test_what_is_not_there_is_named(tmp_path, capsys, monkeypatch):
    def complaint(*more):
        assert main(["tfds", "--tfds-dir", str(tmp_path / "tfds"), "--out", str(tmp_path / "out"), *more]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "no such folder" in complaint()
    write(tmp_path / "tfds", "dtd", "2.0.0", {"train": images(2, label=lambda n: [n])})
    assert "svhn_cropped: not prepared" in complaint("--task", "svhn")
    assert "no version 3.*.* in it, it has 2.0.0" in complaint("--task", "dtd")
    assert "unknown task 'kiti'; did you mean 'kitti'" in complaint("--task", "kiti")
    write(tmp_path / "tfds", "dtd", "3.0.1", {"train": images(2, label=lambda n: [n])})
    assert "no split 'test'; it has train" in complaint("--task", "dtd")
    few = {split: images(2, label=lambda n: [n]) for split in ("train", "validation", "test")}
    write(tmp_path / "tfds", "dmlab", "2.0.1", few)
    assert "split 'train' has 2 examples; dmlab needs those from 0 to 800" in complaint("--task", "dmlab")
    bad = {
        "train": images(800, label=lambda n: [n]),
        "validation": images(200, label=lambda n: [0]),
        "test": few["test"],
    }
    write(tmp_path / "tfds", "sun397/tfds", "4.0.0", bad)
    assert "train 397: label 397 is out of range: sun397 has 397 classes" in complaint("--task", "sun397")
    assert not list((tmp_path / "out").glob("*/*.txt")), "an unfinished task has no lists"
    without = {"train": [{"image": [png(0)]}] * 800, "validation": [{"image": [png(0)]}] * 200, "test": few["test"]}
    write(tmp_path / "tfds", "patch_camelyon", "2.0.0", without)
    assert "train 0: no image or label of patch_camelyon in it" in complaint("--task", "patch_camelyon")
    for name, info, message in (
        ("caltech101", {"name": "svhn_cropped"}, "cannot be read as the description of a prepared data set"),
        (
            "resisc45",
            {"name": "r", "version": "3.0.0", "splits": [], "fileFormat": "riegeli"},
            "files of format 'riegeli'",
        ),
    ):
        write(tmp_path / "tfds", name, "3.0.0", {}, info)
        assert message in complaint("--task", name)
    tfds_written.write(tmp_path / "tfds", "array_record")
    monkeypatch.setitem(sys.modules, "array_record.python.array_record_module", None)
    with pytest.raises(DataError, match="needs the package array-record: pip install array-record"):
        list(find(tmp_path / "tfds", "clevr", "3.1.0").split("train").read(0, 1))


def test_the_module_runs_by_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tfds", "--help"])
    monkeypatch.delitem(sys.modules, "bench.made.tfds", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("bench.made.tfds", run_name="__main__")
    assert ended.value.code == 0 and "--tfds-dir DIR" in capsys.readouterr().out
