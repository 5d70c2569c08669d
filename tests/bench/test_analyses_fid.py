"""The command that measures distances between data sets: what it reads, what it says, what it refuses."""

from __future__ import annotations

import csv
import math
import os

import numpy as np
import pytest
import torch

from bench.analyses import gaps
from bench.analyses.accuracies import Accuracies
from bench.analyses.errors import AnalysisError
from bench.analyses.fid import main, read_statistics
from bench.analyses.images import open_set

BACKBONE = ["--backbone", "vit_tiny_patch16_224@random", "--image-size", "32"]


def table(path):
    with path.open() as file:
        return {(row["first"], row["second"]): float(row["distance"]) for row in csv.DictReader(file)}


@pytest.fixture
def photos(tmp_path):
    """A plain folder of images in two folders."""
    from PIL import Image

    random = np.random.default_rng(0)
    for i in range(6):
        path = tmp_path / "photos" / f"part{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def test_sets_by_name_and_split(vtab, photos):
    assert len(open_set(str(vtab / "eurosat"), "train")) == 16
    assert len(open_set(f"{vtab / 'eurosat'}:test", "train")) == 8
    found = open_set(f"x={vtab / 'eurosat'}:val", "train")
    assert (found.name, found.split, len(found), found.class_names) == ("x", "val", 4, ["a", "b", "c", "d"])
    plain = open_set(str(photos), "train")
    assert (plain.name, plain.split, len(plain), plain.class_names) == ("photos", "all", 6, None)
    assert plain.file(0).endswith("part0/0.png")
    digits = open_set("digits", "test")
    assert digits.name == "digits" and len(digits) == 797 and digits.file(3) == "digits 3"
    few = digits.thinned(10, seed=0)
    assert len(few) == 10 and few.source.labels == digits.thinned(10, seed=0).source.labels
    assert few.source.labels != digits.thinned(10, seed=1).source.labels and digits.thinned(None, 0) is digits


def test_class_folders(photos):
    photos.rename(photos.parent / "train")
    root = photos.parent
    (root / "test").mkdir()
    (root / "train" / "part0").rename(root / "test" / "part0")
    (root / "train" / "part0").mkdir()
    assert len(open_set(str(root), "train")) == 3 and len(open_set(f"{root}:test", "train")) == 3
    with pytest.raises(AnalysisError, match="there is no split 'val'"):
        open_set(f"{root}:val", "train")


def test_distances_of_sets_and_of_their_statistics(vtab, photos, tmp_path, capsys):
    out = tmp_path / "fid"
    data = [str(photos), str(vtab / "eurosat"), f"same={vtab / 'eurosat'}", f"rest={vtab / 'eurosat'}:test"]
    command = [*BACKBONE, *(word for one in data for word in ("--data", one)), "--out", str(out)]
    assert main([*command, "--keep-statistics", "--batch-size", "5"]) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    found = table(out / "fid.csv")
    assert len(found) == 6 and found["eurosat", "same"] < 1e-9 * found["photos", "eurosat"]
    assert found["eurosat", "rest"] < found["photos", "eurosat"]
    assert "vit_tiny_patch16_224@random at 32 px, squash" in said.out and "Reference: photos" in said.out
    assert "singular" in said.err and "differ in size" in said.err
    assert {path.name for path in out.glob("fid*")} == {"fid.csv", "fid.md", "fid.tex", "fid.png", "fid.svg"}
    # Features of all at once, by NumPy, give the same; and the kept statistics stand for the images.
    again = tmp_path / "again"
    kept = [*BACKBONE, "--data", str(out / "photos.npz"), "--data", f"e={out / 'eurosat.npz'}", "--out", str(again)]
    assert main(kept) == 0, capsys.readouterr().err
    assert table(again / "fid.csv")["photos", "e"] == pytest.approx(found["photos", "eurosat"], rel=1e-9)
    with np.load(out / "eurosat.npz") as file:
        assert int(file["count"]) == 16
        np.testing.assert_allclose(file["mu"], features(vtab / "eurosat").mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(file["sigma"], np.cov(features(vtab / "eurosat").T), atol=1e-6)
    # At another size the features are others.
    assert main([*kept[:2], "--image-size", "48", *kept[4:]]) == 2
    assert "statistics of vit_tiny_patch16_224@random at 32 px, squash, expected" in capsys.readouterr().err


def features(folder):
    from bench.analyses.extractors import open_extractor
    from fastpeft.data import ImageDataset

    extractor = open_extractor("vit_tiny_patch16_224@random", 32, torch.device("cpu"))
    data = ImageDataset(open_set(str(folder), "train").source, 32, extractor.mean, extractor.std)
    return extractor(torch.stack([data[i][0] for i in range(len(data))])).numpy()


def test_as_many_images_of_each(vtab, photos, tmp_path, capsys):
    command = [*BACKBONE, "--data", str(photos), "--data", str(vtab / "cifar"), "--out", str(tmp_path / "fid")]
    assert main([*command, "--images", "5"]) == 0
    said = capsys.readouterr()
    assert "cifar: 5 images" in said.out and "photos: 5 images" in said.out and "differ in size" not in said.err


def accuracies(**differences) -> Accuracies:
    full = {task: {0: 50.0, 1: 60.0} for task in differences}
    vpt = {task: {0: 50.0 + more, 1: 60.0 + more, 2: 99.0} for task, more in differences.items()}
    return Accuracies("results.csv", "a set-up", {"full": full, "vpt-deep": vpt})


def test_gaps_pair_seeds_and_tasks():
    known = accuracies(cifar100=3, dtd=-1, svhn=5, kitti=0)
    found = gaps.gaps({"cifar": 10.0, "dtd": 30.0, "svhn": 5.0, "photos": 1.0}, known, "full", "vpt-deep")
    assert [(gap.task, gap.distance, gap.difference) for gap in found] == [
        ("cifar100", 10, 3), ("dtd", 30, -1), ("svhn", 5, 5),
    ]  # fmt: skip
    with pytest.raises(AnalysisError, match=r"2 of the data sets .* tasks with both: cifar100, dtd, kitti, svhn"):
        gaps.gaps({"cifar": 10.0, "dtd": 30.0}, known, "full", "vpt-deep")


def test_correlations_are_scipys():
    from scipy import stats

    found = [gaps.Gap(str(i), x, y) for i, (x, y) in enumerate([(1, 9), (2, 7), (3, 8), (4, 2)])]
    x, y = [1, 2, 3, 4], [9, 7, 8, 2]
    rho = gaps.correlation(found)
    assert rho.spearman == pytest.approx(stats.spearmanr(x, y).statistic)
    assert rho.pearson == pytest.approx(stats.pearsonr(x, y).statistic) and rho.count == 4
    # Of 24 pairings, four are as far from zero on this side (rho <= -0.8); twice that.
    assert rho.p == pytest.approx(8 / 24)
    many = [gaps.Gap(str(i), i, (7 * i) % 19) for i in range(19)]
    x, y = [gap.distance for gap in many], [gap.difference for gap in many]
    assert gaps.correlation(many).p == pytest.approx(stats.spearmanr(x, y).pvalue, abs=0.02)
    flat = gaps.correlation([gaps.Gap("a", 1, 2), gaps.Gap("b", 2, 2), gaps.Gap("c", 3, 2)])
    assert math.isnan(flat.spearman) and str(flat) == "no correlation: all values are equal, 3 tasks"


def test_methods_against_distances(vtab, tmp_path, capsys):
    from tests.bench.test_analyses_significance import results

    rows = [(method, task, 0, value) for task in ("eurosat", "cifar100", "svhn") for method, value in
            (("full", 0.5), ("vpt-deep", 0.5 + len(task) / 100))]  # fmt: skip
    path = results(tmp_path / "results.csv", rows)
    data = ["--data", "ref=digits", "--images", "12", "--data", str(vtab / "eurosat"), "--data", str(vtab / "cifar")]
    command = [*BACKBONE, *data, "--results", str(path), "--out", str(tmp_path / "fid")]
    assert main(command) == 2
    assert "2 of the data sets are tasks" in capsys.readouterr().err and not (tmp_path / "fid").exists()
    assert main([*command, "--data", f"svhn={vtab / 'cifar'}:test"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "vpt-deep against full and the distance to ref" in said and "Spearman" in said and "+7.00" in said
    written = {path.name for path in (tmp_path / "fid").glob("fid-gaps*")}
    assert written == {"fid-gaps.md", "fid-gaps.tex", "fid-gaps.png", "fid-gaps.svg"}


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_statistics_that_are_none(tmp_path):
    def refuse(expected, **arrays):
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(AnalysisError, match=expected):
            read_statistics(tmp_path / "x.npz", "me")

    refuse("expected the arrays mu and sigma", mu=np.zeros(2))
    refuse("expected a mean", mu=np.zeros(2), sigma=np.zeros((3, 3)))
    refuse("not finite", mu=np.full(2, np.nan), sigma=np.eye(2))
    refuse("statistics of you, expected me", mu=np.zeros(2), sigma=np.eye(2), extractor="you")
    refuse("cannot be read", mu=np.array([Payload(str(tmp_path / "made"))], dtype=object), sigma=np.eye(2))
    assert not (tmp_path / "made").exists()
    with pytest.raises(AnalysisError, match="no such file"):
        read_statistics(tmp_path / "none.npz", "me")
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(AnalysisError, match="cannot be read"):
        read_statistics(tmp_path / "torn.npz", "me")
    # What pytorch-fid wrote says nothing of its extractor.
    np.savez(tmp_path / "plain.npz", mu=np.zeros(2), sigma=np.eye(2))
    assert read_statistics(tmp_path / "plain.npz", "me").count is None


def test_bad_requests_are_one_line(vtab, photos, tmp_path, capsys):
    eurosat, out = str(vtab / "eurosat"), ["--out", str(tmp_path / "fid")]
    (tmp_path / "empty").mkdir()
    broken = photos / "part0" / "0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    for arguments, expected in (
        ([*BACKBONE, "--data", eurosat, *out], "give --data at least twice"),
        ([*BACKBONE, "--data", eurosat, "--data", eurosat, *out], "two sets are called eurosat"),
        ([*BACKBONE, "--data", eurosat, "--data", "nowhere", *out], "nowhere: no such folder"),
        ([*BACKBONE, "--data", eurosat, "--data", str(tmp_path / "empty"), *out], "no image files in it"),
        ([*BACKBONE, "--data", eurosat, "--data", f"{photos}:test", *out], "which has no split 'test'"),
        ([*BACKBONE, "--data", eurosat, "--data", f"={photos}", *out], "the name is empty"),
        ([*BACKBONE, "--data", eurosat, "--data", str(photos), *out], "0.png: cannot be read as an image"),
        ([*BACKBONE, "--data", eurosat, "--data", str(vtab / "cifar"), "--images", "1", *out], "at least 2, got 1"),
        (["--backbone", "resnet18", "--data", eurosat, "--data", str(photos), *out], "give NAME@WEIGHTS"),
        ([*BACKBONE, "--data", eurosat, "--data", str(photos), "--results", "no.csv", *out], "no such result file"),
        (
            [*BACKBONE, "--data", eurosat, "--data", str(photos), "--out", str(vtab / "eurosat" / "test.txt")],
            "folder for",
        ),
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1, error
