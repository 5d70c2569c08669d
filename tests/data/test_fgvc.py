"""FGVC's data sets: JSON splits, the lists they come with, and what may be wrong with them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.io import savemat

from fastpeft.config import ConfigError, load_config
from fastpeft.data import DataError, open_splits
from fastpeft.data.fgvc import DATA_SETS, open_fgvc
from tests.data.files import MEAN, STD, write_image

# Class ids as they are in the wild: not from zero, not without gaps.
TRAIN = {"a/0.png": 3, "b/0.png": 17, "a/1.png": 3, "c/0.png": 400}
VAL, TEST = {"b/1.png": 17}, {"c/1.png": 400, "a/2.png": 3}


def write_json(root, folder="CUB_200_2011", images="images", **changed):
    home = root / folder
    lists = {"train": TRAIN, "val": VAL, "test": TEST} | changed
    for split, samples in lists.items():
        for seed, name in enumerate(samples):
            write_image(home / images / name, seed)
        (home / f"{split}.json").write_text(json.dumps(samples))
    return home


def labels(sources):
    return {split: source.labels for split, source in sources.items()}


@pytest.mark.parametrize("protocol", ["search", "final"])
def test_json_splits(tmp_path, protocol):
    write_json(tmp_path)
    sources, names = open_fgvc(tmp_path, "cub200", protocol)
    val = {"val": [1]} if protocol == "search" else {}
    assert labels(sources) == {"train": [0, 1, 0, 2], **val, "test": [2, 0]}
    assert names == ["3", "17", "400"]
    assert sources["test"].paths[0] == tmp_path / "CUB_200_2011/images/c/1.png"


@pytest.mark.parametrize("kind", DATA_SETS, ids=lambda kind: kind.name)
def test_every_folder_name_is_found(tmp_path, kind):
    for number, folder in enumerate(kind.folders):
        write_json(tmp_path / str(number), folder, kind.images)
        for name in (kind.name, folder):
            assert labels(open_fgvc(tmp_path / str(number), name, "final")[0])["test"] == [2, 0]


def test_a_smaller_list_does_not_shift_labels(tmp_path):
    write_json(tmp_path, **{"train_0.5": {"c/0.png": 400, "b/0.png": 17}})
    sources, names = open_fgvc(tmp_path, "cub200", "final", "train_0.5.json")
    assert sources["train"].labels == [2, 1] and len(names) == 3
    with pytest.raises(DataError, match=r"train_0\.1\.json: list file not found"):
        open_fgvc(tmp_path, "cub200", "final", "train_0.1.json")
    with pytest.raises(DataError, match="expected the name of a file in"):
        open_fgvc(tmp_path, "cub200", "final", "../train.json")


def test_papers_preprocessing(tmp_path):
    """Shorter side to 8/7 of the input, random crop and mirror in training, the middle in testing."""
    write_json(tmp_path)
    data = {"name": "fgvc", "root": tmp_path, "task": "cub200", "protocol": "search"}
    splits = open_splits(data | {"resize": "crop", "augment": "crop_flip"}, 224, MEAN, STD)
    assert splits.train._resized(0).shape[0] == 256 and splits.train[0][0].shape == (3, 224, 224)
    assert not splits.train.deterministic and splits.test.deterministic and splits.val.deterministic
    first = splits.train[0][0]
    splits.train.set_epoch(1)
    assert not (first == splits.train[0][0]).all()
    assert "fgvc cub200 (search): 4 train, 1 val, 2 test images, 3 classes, crop to 224 px" in splits.description
    larger = [open_splits(data | {"resize": "crop"}, size, MEAN, STD).test._resized(0).shape[0] for size in (384, 448)]
    assert larger == [438, 512]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"test": {"a/0.png": 5}}, r"test\.json: 'a/0\.png': class 5 is not one of the 3 classes of the training"),
        ({"train": {f"{n}.png": n for n in range(201)}}, r"train\.json: 201 classes; cub200 has 200"),
        ({"val": {}}, r"val\.json: expected an object"),
        ({"val": ["a/0.png"]}, r"val\.json: expected an object"),
        ({"val": {"a/0.png": 1.5}}, r"val\.json: 'a/0\.png': expected a class id"),
        ({"val": {"a/0.png": True}}, r"val\.json: 'a/0\.png': expected a class id"),
        ({"train": {"a/0.png": 3, "b/0.png": "ape"}}, r"train\.json: class ids are numbers in part"),
    ],
)
def test_wrong_lists_are_named(tmp_path, changed, message):
    write_json(tmp_path, **changed)
    with pytest.raises(DataError, match=message):
        open_fgvc(tmp_path, "cub200", "search")


def test_missing_files_are_named(tmp_path):
    home = write_json(tmp_path)
    (home / "images/c/1.png").unlink()
    with pytest.raises(DataError, match=r"test\.json: 'c/1\.png': no such file in .*CUB_200_2011/images"):
        open_fgvc(tmp_path, "cub200", "final")
    (home / "test.json").write_text('{"a/0.png": 3, "../../x.png": 3}')
    with pytest.raises(DataError, match="expected a path inside"):
        open_fgvc(tmp_path, "cub200", "final")
    (home / "test.json").write_text('{"a/0.png": 3, "a/0.png": 17}')
    with pytest.raises(DataError, match=r"test\.json: 'a/0\.png' is listed twice"):
        open_fgvc(tmp_path, "cub200", "final")
    (home / "test.json").write_text("{")
    with pytest.raises(DataError, match=r"test\.json: cannot be read as JSON"):
        open_fgvc(tmp_path, "cub200", "final")
    (home / "test.json").unlink()
    with pytest.raises(DataError, match=r"test\.json: list file not found"):
        open_fgvc(tmp_path, "cub200", "final")
    (home / "train.json").unlink()
    with pytest.raises(DataError, match=r"images\.txt: not found; expected the JSON splits .* or the lists"):
        open_fgvc(tmp_path, "cub200", "final")
    with pytest.raises(DataError, match="no folder for 'nabirds', which may be called nabirds, NABirds; it has: CUB"):
        open_fgvc(tmp_path, "nabirds", "final")
    with pytest.raises(DataError, match=r"expected one of cub200, nabirds, .*, got 'cub'"):
        open_fgvc(tmp_path, "cub", "final")
    with pytest.raises(DataError, match="no such folder"):
        open_fgvc(tmp_path / "absent", "cub200", "final")


def write_birds(home, count=40):
    tables = {"images": [], "image_class_labels": [], "train_test_split": []}
    for number in range(count):
        write_image(home / "images" / f"{number % 4}" / f"{number}.png", number)
        for table, value in zip(
            tables, (f"{number % 4}/{number}.png", 10 * (number % 4), int(number < 30)), strict=True
        ):
            tables[table].append(f"id-{number} {value}\n")
    for name, lines in tables.items():
        (home / f"{name}.txt").write_text("".join(lines))
    (home / "classes.txt").write_text("0 An ape\n10 Bee\n20 Cat\n30 Dog\n5 None of these\n")


def test_lists_of_birds_with_a_tenth_held_out(tmp_path):
    write_birds(tmp_path / "nabirds")
    sources, names = open_fgvc(tmp_path, "nabirds", "search")
    assert {split: len(source.labels) for split, source in sources.items()} == {"train": 27, "val": 3, "test": 10}
    assert names == ["An ape", "Bee", "Cat", "Dog"]
    for source in sources.values():
        assert source.labels == [int(path.parent.name) for path in source.paths]
    assert not set(sources["val"].paths) & set(sources["train"].paths)
    again = open_fgvc(tmp_path, "nabirds", "final")[0]
    assert again["train"].paths == sources["train"].paths and "val" not in again
    (tmp_path / "nabirds/train_test_split.txt").write_text("id-0 1\n")
    with pytest.raises(DataError, match=r"train_test_split\.txt: image id-1 of images\.txt is not in it"):
        open_fgvc(tmp_path, "nabirds", "final")


@pytest.mark.parametrize("train, val", [(5994, 600), (23929, 2393), (12000, 1200), (8144, 815)])
def test_held_out_images_are_as_many_as_the_papers(train, val):
    """CUB-200-2011, NABirds, Stanford Dogs and Cars."""
    import math

    from fastpeft.data import fgvc

    assert math.ceil(fgvc._HELD_OUT * train) == val


def test_lists_of_flowers(tmp_path):
    home = tmp_path / "flowers-102"
    for number in range(1, 9):
        write_image(home / "jpg" / f"image_{number:05d}.jpg", number)
    savemat(home / "imagelabels.mat", {"labels": np.array([[1, 1, 2, 2, 1, 2, 2, 1]], np.uint8)})
    savemat(home / "setid.mat", {"trnid": [[1, 4]], "valid": [[3]], "tstid": [[2, 5, 8]]})
    sources, _ = open_fgvc(tmp_path, "oxford_flowers", "search")
    assert labels(sources) == {"train": [0, 1], "val": [1], "test": [0, 0, 0]}
    assert sources["test"].paths[2].name == "image_00008.jpg"
    savemat(home / "setid.mat", {"trnid": [[1, 9]], "valid": [[3]], "tstid": [[2]]})
    with pytest.raises(DataError, match=r"setid\.mat: trnid: expected numbers from 1 to 8"):
        open_fgvc(tmp_path, "oxford_flowers", "search")
    savemat(home / "setid.mat", {"trnid": [[1]]})
    with pytest.raises(DataError, match=r"setid\.mat: no variable 'valid'"):
        open_fgvc(tmp_path, "oxford_flowers", "search")
    (home / "setid.mat").write_bytes(b"nothing that MATLAB wrote")
    with pytest.raises(DataError, match=r"setid\.mat: cannot be read as a MATLAB file"):
        open_fgvc(tmp_path, "oxford_flowers", "search")


def test_lists_of_dogs(tmp_path):
    home = tmp_path / "StanfordDogs"
    for split, count in (("train", 20), ("test", 4)):
        names = [f"n0{n % 2}-Dog_{n % 2}/{split}{n}.jpg" for n in range(count)]
        for number, name in enumerate(names):
            write_image(home / "Images" / name, number)
        file_list = np.array(names, dtype=object)[:, None]
        (home / "lists").mkdir(exist_ok=True)
        savemat(
            home / "lists" / f"{split}_list.mat",
            {"file_list": file_list, "labels": [[n % 2 + 1] for n in range(count)]},
        )
    sources, names = open_fgvc(tmp_path, "stanford_dogs", "search")
    assert labels(sources)["test"] == [0, 1, 0, 1]
    assert (len(sources["train"].labels), len(sources["val"].labels)) == (18, 2)
    assert names == ["Dog_0", "Dog_1"]


def annotations(rows):
    kinds = [(key, object) for key in rows[0]]
    return np.array([tuple(row.values()) for row in rows], dtype=kinds)[None]


def test_lists_of_cars(tmp_path):
    home = tmp_path / "stanford_cars"
    (home / "devkit").mkdir(parents=True)
    for split, file in (("train", "devkit/cars_train_annos"), ("test", "cars_test_annos_withlabels")):
        rows = [{"bbox_x1": 1, "class": n % 3 + 1, "fname": f"{n:05d}.jpg"} for n in range(10)]
        for number, row in enumerate(rows):
            write_image(home / f"cars_{split}" / row["fname"], number)
        savemat(home / f"{file}.mat", {"annotations": annotations(rows)})
    savemat(home / "devkit/cars_meta.mat", {"class_names": np.array(["A 1", "B 2", "C 3"], dtype=object)[None]})
    sources, names = open_fgvc(tmp_path, "stanford_cars", "search")
    assert labels(sources)["test"] == [0, 1, 2] * 3 + [0] and len(sources["val"].labels) == 1
    assert names == ["A 1", "B 2", "C 3"] and sources["test"].paths[0] == home / "cars_test/00000.jpg"
    (home / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(DataError, match="the development kit itself has no labels of the test images"):
        open_fgvc(tmp_path, "stanford_cars", "search")
    rows = [{"relative_im_path": f"cars_train/{n:05d}.jpg", "class": n % 3 + 1, "test": int(n > 6)} for n in range(10)]
    savemat(
        home / "cars_annos.mat",
        {"annotations": annotations(rows), "class_names": np.array(["A", "B", "C"], dtype=object)},
    )
    sources, names = open_fgvc(tmp_path, "stanford_cars", "final")
    assert (len(sources["train"].labels), sources["test"].labels, names) == (6, [1, 2, 0], ["A", "B", "C"])


def test_configuration(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {name: vit_tiny_patch16_224}\ndata: {name: fgvc, root: data, task: cub200}\n"
        "method: {name: linear}\ntrain: {base_lr: 1}\nout: out\n"
    )
    assert load_config(path, ["data.train_list=train_0.1.json"]).data.train_list == "train_0.1.json"
    with pytest.raises(ConfigError, match=r"data: data.train_list names a list of FGVC data, and data.name is 'mnist'"):
        load_config(path, ["data={name: mnist, train_list: x.json}"])
    with pytest.raises(ConfigError, match=r"data 'fgvc' needs data\.task"):
        load_config(path, ["data={name: fgvc, root: data}"])
    with pytest.raises(DataError, match="validation images of its own"):
        open_splits({"name": "fgvc", "root": "x", "task": "cub200", "val_fraction": 0.1}, 32, MEAN, STD)
    with pytest.raises(DataError, match="needs root"):
        open_splits({"name": "fgvc"}, 32, MEAN, STD)
