"""COCO captions: one sample a sentence to train on, one an image to evaluate; what is wrong is named."""

from __future__ import annotations

import os

import pytest

from fastpeft.data import DataError
from fastpeft.data.captions import read_captions
from tests.data.vl_files import caption_entries, write_json


def test_list_of_images(tmp_path):
    captions = read_captions(write_json(tmp_path / "train.json", caption_entries(tmp_path)), tmp_path)
    assert [image.path.relative_to(tmp_path).parts[0] for image in captions.images] == [
        "train2014_img",
        "val2014_img",
        "extra",
    ]
    assert captions.pairs == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0)]
    assert captions.images[1].sentences[2] == "picture 1 sentence 2", "lower case, nothing else"
    assert [image.image_id for image in captions.images] == [1, 2, 3]
    name = captions.images[2].name
    assert captions.references()[name] == ("picture 2 sentence 0",)


def test_punctuation_stays(tmp_path):
    entries = caption_entries(tmp_path)
    entries[0]["sentences"][0]["raw"] = 'The "STOP" sign,  by a T-shirt.'
    captions = read_captions(write_json(tmp_path / "a.json", entries), tmp_path)
    assert captions.images[0].sentences[0] == 'the "stop" sign,  by a t-shirt.'


def test_original_file_with_all_splits(tmp_path):
    entries = caption_entries(tmp_path, (1, 1, 1, 1))
    for entry, split, number in zip(entries, ("train", "restval", "val", "test"), (40, 41, 42, 43), strict=True):
        entry |= {"split": split, "cocoid": number, "imgid": 0}
    path = write_json(tmp_path / "dataset_coco.json", {"images": entries, "dataset": "coco"})
    chosen = {
        split: [image.image_id for image in read_captions(path, tmp_path, split).images]
        for split in ("train", "val", "test")
    }
    assert chosen == {"train": [40, 41], "val": [42], "test": [43]}
    with pytest.raises(DataError, match=r"dataset_coco\.json: holds all splits; say which: train, val, test"):
        read_captions(path, tmp_path)
    with pytest.raises(DataError, match="split: expected one of train, val, test, got 'restval'"):
        read_captions(path, tmp_path, "restval")
    del entries[1]["split"]
    path = write_json(tmp_path / "dataset_coco.json", {"images": entries})
    with pytest.raises(DataError, match="entry 1: has no field 'split', which is one of train, restval, val, test"):
        read_captions(path, tmp_path, "val")


def test_a_split_of_a_list(tmp_path):
    path = write_json(tmp_path / "test.json", caption_entries(tmp_path, split="test"))
    assert len(read_captions(path, tmp_path, "test").images) == 3
    with pytest.raises(DataError, match=r"test\.json: no images of split 'val' in it"):
        read_captions(path, tmp_path, "val")
    plain = write_json(tmp_path / "plain.json", caption_entries(tmp_path))
    assert len(read_captions(plain, tmp_path, "val").images) == 3, "one file a split need not say so"


def test_ids(tmp_path):
    entries = caption_entries(tmp_path, (1, 1, 1))
    os.rename(tmp_path / "extra" / entries[2]["filename"], tmp_path / "extra" / "a.png")
    entries[2]["filename"] = "a.png"
    entries[0]["cocoid"] = 77
    images = read_captions(write_json(tmp_path / "a.json", entries), tmp_path).images
    assert [image.image_id for image in images] == [77, 2, "a.png"]
    # What a file calls imgid counts its images, and is no number of COCO's.
    for number, entry in enumerate(entries):
        entry["imgid"] = 500 + number
    images = read_captions(write_json(tmp_path / "a.json", entries), tmp_path).images
    assert [image.image_id for image in images] == [77, 2, "a.png"]
    captions = read_captions(write_json(tmp_path / "a.json", entries + entries[:1]), tmp_path)
    with pytest.raises(DataError, match="another image has the same name, which is its id"):
        captions.references()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda e: e[1].pop("filename"), r"entry 1: has no field 'filename', which is a text"),
        (lambda e: e[1].pop("filepath"), r"entry 1: has no field 'filepath'"),
        (lambda e: e[2].pop("sentences"), r"entry 2: has no field 'sentences', which is a list of objects"),
        (lambda e: e[0].update(filename=5), r"entry 0: filename: expected a text, got 5"),
        (lambda e: e[0].update(sentences=[]), r"entry 0: sentences: expected a list of objects, got an empty one"),
        (lambda e: e[0].update(sentences="a"), r"entry 0: sentences: expected a list of objects, got \"a\""),
        (lambda e: e[0].update(sentences=["a"]), r"entry 0: sentences\[0\]: expected an object, got \"a\""),
        (lambda e: e[1]["sentences"][2].pop("raw"), r"entry 1: sentences\[2\]: has no field 'raw'"),
        (lambda e: e[1]["sentences"][2].update(raw=" "), r"sentences\[2\]: raw: expected a text, got a blank one"),
        (lambda e: e[1]["sentences"][2].update(raw=None), r"sentences\[2\]: raw: expected a text, got null"),
        (lambda e: e[0].update(cocoid="7"), r"entry 0: cocoid: expected a whole number, got \"7\""),
        (lambda e: e[0].update(filepath="../x"), r"entry 0: filename: expected a path inside .* without '\.\.'"),
        (lambda e: e.insert(1, "text"), r"entry 1: expected an object, got \"text\""),
        (lambda e: e.clear(), r"a\.json: no images in it"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, change, message):
    entries = caption_entries(tmp_path)
    change(entries)
    with pytest.raises(DataError, match=message) as caught:
        read_captions(write_json(tmp_path / "a.json", entries), tmp_path)
    assert str(tmp_path / "a.json") in str(caught.value) and "\n" not in str(caught.value)


def test_images_may_lie_in_the_folders_of_cocos_archives(tmp_path):
    entries = caption_entries(tmp_path)
    path = write_json(tmp_path / "a.json", entries)
    (tmp_path / "train2014_img").rename(tmp_path / "train2014")
    found = [image.path for image in read_captions(path, tmp_path).images]
    assert [image.parent.name for image in found] == ["train2014", "val2014_img", "extra"]
    # Of both, mPLUG's.
    (tmp_path / "val2014").mkdir()
    assert read_captions(path, tmp_path).images[1].path == found[1]
    message = (
        r"a\.json: entry 0: filename, in neither train2014_img nor train2014: "
        rf"'train2014_img/{entries[0]['filename']}': no such file in .*1 of 3 images are missing"
    )
    (tmp_path / "train2014").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=message):
        read_captions(path, tmp_path)


def test_missing_images_are_counted_and_the_first_named(tmp_path):
    entries = caption_entries(tmp_path)
    (tmp_path / "val2014_img" / entries[1]["filename"]).unlink()
    (tmp_path / "extra" / entries[2]["filename"]).unlink()
    (tmp_path / "extra").rmdir()
    path = write_json(tmp_path / "a.json", entries)
    message = rf"a\.json: entry 1: filename: 'val2014_img/{entries[1]['filename']}': no such file in .*2 of 3 images"
    with pytest.raises(DataError, match=message):
        read_captions(path, tmp_path)


def test_unreadable_files(tmp_path):
    (tmp_path / "half.json").write_text('[{"filename": ')
    with pytest.raises(DataError, match=r"half\.json: cannot be read as JSON: Expecting value"):
        read_captions(tmp_path / "half.json", tmp_path)
    with pytest.raises(DataError, match=r"none\.json: no such file"):
        read_captions(tmp_path / "none.json", tmp_path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe[")
    with pytest.raises(DataError, match=r"bytes\.json: cannot be read as JSON"):
        read_captions(tmp_path / "bytes.json", tmp_path)
    with pytest.raises(DataError, match="expected a list of images, or an object with the field 'images'"):
        read_captions(write_json(tmp_path / "a.json", {"annotations": []}), tmp_path)
    with pytest.raises(DataError, match="expected a list of images, got 5"):
        read_captions(write_json(tmp_path / "a.json", 5), tmp_path)
