"""t-SNE of read-out embeddings: which embedding, the same picture twice, and what is printed with it."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

import fastpeft
from bench.analyses.runs import Run, embeddings
from bench.analyses.tsne import figure, main, neighbours_agree, project
from fastpeft.trainer.report import Reporter
from tests import tiny


@pytest.mark.parametrize("name", ["linear", "vpt-deep", "mlp-3"])
@pytest.mark.parametrize("variant", ["class_token", "average_pool"])
def test_the_embedding_is_what_the_head_is_given(name, variant, vtab):
    from bench.analyses.images import open_set

    model = tiny.patched(tiny.METHODS[name], variant).eval()
    run = Run("x", model, ["a"] * 5, tiny.SIZE, (0.5,) * 3, (0.5,) * 3, "squash")
    images = open_set(str(vtab / "eurosat"), "test")
    found = embeddings(run, images, 3, Reporter(False))
    data = run.data(images)
    batch = torch.stack([data[i][0] for i in range(len(data))])
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(batch), pre_logits=True)
        torch.testing.assert_close(model.head(found), model(batch))
    torch.testing.assert_close(found, expected)
    assert found.shape == (8, tiny.DIM) and not model.head._forward_pre_hooks


def test_neighbours_by_hand():
    # Two classes far apart: each has its own around it. One of them mislabelled: only that one has not.
    points = np.concatenate((np.random.default_rng(0).normal(size=(20, 3)), np.full((20, 3), 50.0) + np.eye(20, 3)))
    labels = np.repeat([0, 1], 20)
    assert neighbours_agree(points, labels) == 1
    labels[3] = 1
    assert neighbours_agree(points, labels) == 39 / 40


def test_clusters_stay_apart_and_the_seed_decides():
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 20)
    points = random.normal(size=(60, 8)) + 20 * np.eye(3, 8)[labels]
    first = project(points, 10, seed=0)
    assert np.array_equal(first, project(points, 10, seed=0)) and first.shape == (60, 2)
    assert neighbours_agree(first, labels) == 1


@pytest.mark.parametrize("classes", [3, 15, 40])
def test_legends_name_what_they_can(classes):
    labels = np.arange(80) % classes
    plots = {name: (np.random.default_rng(0).normal(size=(80, 2)), 0.5) for name in "abcd"}
    drawn = figure(plots, labels, [f"class {i}" for i in range(classes)], "title")
    assert len(drawn.legends) == (classes <= 20)
    assert sum(axes.get_visible() for axes in drawn.axes) == 4
    colours = {tuple(points.get_facecolor()[0]) for points in drawn.axes[0].collections}
    assert len(colours) == classes


def test_the_command(vtab, tmp_path, capsys, monkeypatch):
    from tests.bench.test_analyses_attributions import save, shorten

    shorten(monkeypatch)
    folders = [
        str(save(tmp_path / name, method, 1)) for name, method in (("f", fastpeft.Full()), ("l", fastpeft.LoRA(2)))
    ]
    out = tmp_path / "tsne.png"
    command = ["--adapters", *folders, "--data", f"{vtab / 'eurosat'}:train", "--out", str(out)]
    assert main([*command, "--perplexity", "5"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "full: " in said and "lora: " in said and "of 16 images have their own class around them" in said
    with out.with_suffix(".csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2 * 16
    first = out.read_bytes(), out.with_suffix(".csv").read_bytes()
    assert main([*command, "--perplexity", "5"]) == 0
    assert (out.read_bytes(), out.with_suffix(".csv").read_bytes()) == first
    capsys.readouterr()
    for more, expected in (
        ([], "--perplexity 30: expected more than 0, less than 16 images"),
        (["--images", "5"], "--images must be at least 11, got 5"),
        (["--data", str(vtab / "eurosat" / "images"), "--perplexity", "5"], "these images have no labels"),
        (["--data", "digits", "--perplexity", "5"], "digits has 10 classes (0, 1, 2, ...), but full was trained on 4"),
    ):
        assert main([*command, *more]) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1, error
