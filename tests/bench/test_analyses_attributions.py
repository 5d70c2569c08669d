"""Grad-CAM against the equation written out, Integrated Gradients against their axiom, and the grid of both."""

from __future__ import annotations

import csv

import pytest
import torch

pytest.importorskip("captum")

import fastpeft
from bench.analyses.attributions import figure, main
from bench.analyses.errors import AnalysisError
from bench.analyses.gradcam import default_layer, grad_cam
from bench.analyses.integrated import integrated_gradients
from fastpeft.models.build import build_model
from tests import tiny

SIDE = 32


def by_hand(model, images, targets, prompts=None):
    """Grad-CAM at the last block's first norm, of a plain timm model; prompts by block, behind the patches.

    One image, one class and one gradient at a time, and no hooks.
    """
    prefix, grid = model.num_prefix_tokens, model.patch_embed.grid_size
    count = grid[0] * grid[1]
    maps = []
    for image, target in zip(images, targets.tolist(), strict=True):
        x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))
        for index, block in enumerate(model.blocks):
            if prompts is not None:
                x = torch.cat((x[:, : prefix + count], prompts[index][None]), dim=1)
            if index == len(model.blocks) - 1:
                normed = block.norm1(x).detach().requires_grad_()
                x = x.detach() + block.attn(normed)
                x = x + block.mlp(block.norm2(x))
            else:
                x = block(x)
        logit = model.forward_head(model.norm(x[:, : prefix + count]))[0, target]
        (gradient,) = torch.autograd.grad(logit, normed)
        patches = slice(prefix, prefix + count)
        weights = gradient[0, patches].mean(dim=0)
        maps.append((normed[0, patches] @ weights).relu().view(1, 1, *grid).detach())
    return torch.nn.functional.interpolate(torch.cat(maps), images.shape[-2:], mode="bilinear")[:, 0]


@pytest.mark.parametrize("variant", ["class_token", "registers", "average_pool", "oblong"])
def test_grad_cam_is_the_equation(variant):
    model = tiny.vit(variant, dtype=torch.float64).eval()
    images, targets = tiny.images(variant, dtype=torch.float64), tiny.labels()
    expected = by_hand(model, images, targets)
    assert expected.amax() > 0 and (expected.flatten(1).amax(1) > 0).sum() >= 2
    torch.testing.assert_close(grad_cam(model, images, targets), expected)
    # The engine's blocks, of which a map's hook needs every row, and a model of which nothing but the head was trained.
    torch.testing.assert_close(grad_cam(fastpeft.patch(model, fastpeft.Linear()).eval(), images, targets), expected)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["vpt-deep", "vpt-shallow"])
def test_prompts_take_part_and_are_no_place(name):
    plain = tiny.vit(dtype=torch.float64).eval()
    model = tiny.patched(tiny.METHODS[name], dtype=torch.float64).eval()
    images, targets = tiny.images(dtype=torch.float64), tiny.labels()
    if name == "vpt-deep":
        prompts = [block.vpt.prompts for block in model.blocks]
        torch.testing.assert_close(grad_cam(model, images, targets), by_hand(plain, images, targets, prompts))
    found = grad_cam(model, images, targets)
    assert found.shape == (3, SIDE, SIDE) and not torch.allclose(found, by_hand(plain, images, targets))


def test_layers_that_cannot_be_looked_at():
    model, images, targets = tiny.vit().eval(), tiny.images(), tiny.labels()
    assert default_layer(model) == "blocks.2.norm1"
    assert default_layer(torch.nn.Sequential(torch.nn.Identity(), model)) == "1.blocks.2.norm1"
    with pytest.raises(AnalysisError, match=r"no layer 'blocks.9'; the default is blocks.2.norm1"):
        grad_cam(model, images, targets, "blocks.9")
    with pytest.raises(AnalysisError, match=r"the output of 'head' is \(3, 5\)"):
        grad_cam(model, images, targets, "head")
    with pytest.raises(AnalysisError, match="one transformer"):
        grad_cam(torch.nn.Linear(2, 2), images, targets)
    # A class token alone is read behind the last block.
    assert not grad_cam(model, images, targets, "norm").any()


# Random low-rank factors in every layer bend the path most.
@pytest.mark.parametrize(("name", "steps"), [("full", 128), ("vpt-deep", 128), ("lora-all", 1024)])
def test_integrated_gradients_are_complete(name, steps):
    model = tiny.patched(tiny.METHODS[name], dtype=torch.float64).eval()
    images, targets = tiny.images(dtype=torch.float64), tiny.labels()
    baseline = torch.full((1, 3, 1, 1), -0.5, dtype=torch.float64)
    found = integrated_gradients(model, images, targets, baseline, steps=steps, batch_size=300)
    rows = torch.arange(3)
    with torch.no_grad():
        difference = model(images)[rows, targets] - model(baseline.expand_as(images))[rows, targets]
    assert difference.abs().min() > 0.01
    torch.testing.assert_close(found.difference, difference)
    torch.testing.assert_close(found.values.sum((1, 2, 3)), difference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.missed, found.values.sum((1, 2, 3)) - difference)
    # Two points are too few, and that is said.
    assert integrated_gradients(model, images, targets, baseline, 2).share_missed.max() > 100 * found.share_missed.max()


def test_integrated_gradients_are_the_integral():
    model = tiny.patched(tiny.METHODS["vpt-deep"], dtype=torch.float64).eval()
    images, targets = tiny.images(batch=1, dtype=torch.float64), torch.tensor([3])
    found = integrated_gradients(model, images, targets, torch.zeros(1, 3, 1, 1), steps=64).values
    steps = 400
    shares = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    points = (shares.view(-1, 1, 1, 1) * images).requires_grad_()
    gradients = torch.autograd.grad(model(points)[:, 3].sum(), points)[0]
    torch.testing.assert_close(found, images * gradients.mean(0, keepdim=True), rtol=1e-3, atol=1e-5)


def save(folder, method, seed, classes=("a", "b", "c", "d")):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = build_model("vit_tiny_patch16_224", 4, SIDE, depth=2)
        fastpeft.patch(model, method)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.head.parameters():
                parameter.normal_()
    fastpeft.save(
        model, folder, base_model="vit_tiny_patch16_224", weights=None, init_seed=5, image_size=SIDE, num_classes=4,
        mean=[0.5] * 3, std=[0.5] * 3, resize="squash", class_names=list(classes),
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two run folders, of models whose heads differ; a tiny backbone with two blocks stands in for timm's."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        save(folder / "full" / "adapter", fastpeft.Full(), 1)
        save(folder / "vpt", fastpeft.VPT(3, dropout=0.0), 2)
    return folder


def shorten(patch):
    """Have timm build the tiny model with two blocks, also where an adapter is loaded."""
    import timm

    create = timm.create_model
    patch.setattr(timm, "create_model", lambda *args, **options: create(*args, **{"depth": 2, **options}))


@pytest.fixture
def short(monkeypatch):
    shorten(monkeypatch)


def test_a_grid_of_what_two_runs_see_differently(runs, vtab, tmp_path, capsys, short):
    out = tmp_path / "look" / "grid.png"
    command = ["--adapters", str(runs / "full"), f"VPT={runs / 'vpt'}", "--steps", "8", "--out", str(out)]
    assert main([*command, "--data", str(vtab / "eurosat"), "--count", "2"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "disagree: " in said and "images right" in said and "miss at most" in said
    with out.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 and {row["model"] for row in rows} == {"full", "VPT"}
    for image in {row["image"] for row in rows}:
        own = {row["model"]: row["predicted"] == row["label"] for row in rows if row["image"] == image}
        assert own["full"] != own["VPT"]
    assert all(row["explained"] == row["label"] for row in rows)
    assert [bool(row["missed"]) for row in rows[:4]] == [False, False, True, True]
    first = out.read_bytes()
    assert first.startswith(b"\x89PNG")
    assert main([*command, "--data", str(vtab / "eurosat"), "--count", "2"]) == 0
    assert out.read_bytes() == first


def test_steps_are_doubled_where_they_miss_much(monkeypatch):
    from types import SimpleNamespace

    from bench.analyses import attributions
    from bench.analyses.runs import Run

    taken = []
    real = attributions.integrated_gradients
    monkeypatch.setattr(attributions, "integrated_gradients", lambda *args: taken.append(args[4]) or real(*args))
    model = tiny.patched(tiny.METHODS["lora-all"]).eval()
    run = Run("x", model, ["a"] * 5, tiny.SIZE, (0.5,) * 3, (0.5,) * 3, "squash")
    options = SimpleNamespace(kinds=("integrated-gradients",), layer=None, baseline="mean", steps=2, batch_size=64)
    (panel,) = attributions.explain(run, tiny.images()[0], 1, options)
    assert taken in ([2, 4], [2, 4, 8], [2, 4, 8, 16]) and panel.target == 1
    assert panel.missed <= 0.05 or taken[-1] == 16
    taken.clear()
    options.steps = 256
    attributions.explain(run, tiny.images()[0], 1, options)
    assert taken == [256]


def test_files_without_labels(runs, vtab, tmp_path, capsys, short):
    out = tmp_path / "grid.svg"
    files = [str(vtab / "eurosat" / "images" / f"{i}.png") for i in range(2)]
    command = ["--adapters", str(runs / "vpt"), "--images", *files, "--kinds", "grad-cam", "--out", str(out)]
    assert main(command) == 0, capsys.readouterr().err
    assert b"<svg" in out.read_bytes() and "integrated" not in capsys.readouterr().out
    with out.with_suffix(".csv").open() as file:
        assert all(row["explained"] == row["predicted"] and not row["label"] for row in csv.DictReader(file))


def test_bad_requests_are_one_line(runs, vtab, tmp_path, capsys, short):
    full, vpt, data = str(runs / "full"), str(runs / "vpt"), str(vtab / "eurosat")
    other = str(save(tmp_path / "other", fastpeft.Linear(), 1, classes="wxyz"))
    out = ["--out", str(tmp_path / "grid.png")]
    for arguments, expected in (
        (["--adapters", full, "--data", data, "--out", "grid.bmp"], "expected a picture that ends in .png"),
        (["--adapters", full, full, "--data", data, *out], "two adapters are called full"),
        (["--adapters", full, other, "--data", data, *out], "trained on different classes"),
        (["--adapters", other, "--data", data, *out], "but linear was trained on 4 (w, x, y, ...)"),
        (["--adapters", str(vtab), "--data", data, *out], "adapter_config.json is not there"),
        (["--adapters", full, "--data", str(tmp_path / "none"), *out], "no such folder"),
        (["--adapters", full, "--data", data, "--show", "disagree", *out], "compares two models"),
        (["--adapters", full, "--images", "none.png", *out], "none.png: no such image file"),
        (["--adapters", full, "--images", data, "--show", "any", *out], "need --data"),
        (["--adapters", full, "--data", data, "--count", "0", *out], "--count must be at least 1, got 0"),
        (["--adapters", full, "--data", f"{data}:val", "--layer", "norm9", *out], "no layer 'norm9'"),
        (["--adapters", full, f"x={full}", "--data", data, *out], "--show disagree: none of the 8 images"),
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1, error
    assert not (tmp_path / "grid.png").exists()
    assert main(["--adapters", full, vpt, "--data", data, "--show", "any", "--device", "cuda:99", *out]) == 2
    assert "--device cuda:99" in capsys.readouterr().err


def test_the_figure_marks_right_and_wrong(runs, vtab, tmp_path, short):
    from bench.analyses.attributions import Panel, Row

    pixels = torch.rand(8, 8, 3).numpy()
    panels = [Panel("a", "grad-cam", torch.zeros(8, 8).numpy(), guess, 0.5, 1, None) for guess in (0, 1)]
    drawn = figure([Row("x.png", pixels, 1, panels)], ["no", "yes"], ("grad-cam",))
    labels = [axes.xaxis.label for axes in drawn.axes]
    assert [label.get_text() for label in labels] == ["yes", "no 50%", "yes 50%"]
    assert [label.get_color() for label in labels[1:]] == ["tab:red", "tab:green"]
