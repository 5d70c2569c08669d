"""Scenes made to CLEVR's rules: camera, placing, what rays meet, labels, and the folders that come out."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image

from bench.made import clevr
from bench.made.__main__ import main
from bench.made.clevr import picture, shapes
from bench.made.clevr.scene import CAMERA, COLORS, LAMPS, SHAPES, SIZES, Camera, Scene, Thing, draw
from fastpeft.data import open_splits
from fastpeft.data.vtab import open_vtab

LAMPS_AT = {name: np.array(at) for name, at in LAMPS.items()}


def scene_of(*things: Thing) -> Scene:
    return Scene(Camera(np.array(CAMERA)), LAMPS_AT, things)


def thing(shape="sphere", x=0.0, y=0.0, size="large", material="rubber", color="red", turn=0.4) -> Thing:
    radius = SIZES[size] / (math.sqrt(2) if shape == "cube" else 1)
    return Thing(shape, size, material, color, x, y, radius, turn)


def scenes(count: int) -> list[Scene]:
    return [draw(rng, picture.visible_pixels) for rng in (np.random.default_rng([7, i]) for i in range(count))]


def test_the_camera_sees_what_a_published_scene_says():
    """Coordinates of one scene of the published generator, whose camera had been moved by this much."""
    camera = Camera(np.array([7.52853, -6.46085, 5.39217]))
    points = [
        (-1.4927696, -2.0407913, 0.7), (1.5566601, -2.1519246, 0.7), (-2.341233, -0.5676895, 0.35),
        (-0.8063592, 1.8669357, 0.7), (2.6773329, -0.0126493, 0.35),
    ]  # fmt: skip
    published = np.array([
        (117, 135, 10.7852), (203, 197, 8.6881), (157, 118, 12.3608), (277, 98, 12.5627), (338, 198, 9.3315),
    ])  # fmt: skip
    seen = camera.view(np.array(points))
    assert np.abs(seen[:, :2] - published[:, :2]).max() <= 0.51, "published pixels are rounded"
    assert np.abs(seen[:, 2] - published[:, 2]).max() < 1e-3


def test_scenes_keep_the_rules():
    behind = np.array([-0.754490315914154, 0.6563112735748291])
    beside = np.array([0.6563112735748291, 0.7544902563095093])
    for scene in scenes(12):
        assert 3 <= len(scene.things) <= 10 and picture.visible_pixels(scene).min() >= 200
        assert np.abs(scene.camera.position - CAMERA).max() <= 0.5
        for i, one in enumerate(scene.things):
            assert abs(one.x) <= 3 and abs(one.y) <= 3
            assert one.radius == pytest.approx(SIZES[one.size] / (math.sqrt(2) if one.shape == "cube" else 1))
            for other in scene.things[:i]:
                offset = np.array([one.x - other.x, one.y - other.y])
                assert np.linalg.norm(offset) - one.radius - other.radius >= 0.25
                assert min(abs(offset @ behind), abs(offset @ beside)) >= 0.4 - 1e-5


def test_everything_occurs():
    found = scenes(40)
    counts = np.bincount([len(scene.things) for scene in found], minlength=11)[3:]
    assert counts.min() > 0, counts
    things = [thing for scene in found for thing in scene.things]
    assert {thing.color for thing in things} == set(COLORS) and {thing.shape for thing in things} == set(SHAPES)
    assert {(thing.size, thing.material) for thing in things} == {(s, m) for s in SIZES for m in ("rubber", "metal")}


@pytest.mark.parametrize("shape", SHAPES)
def test_rays_meet_surfaces(shape):
    body = thing(shape, 0.3, -0.2)
    rng = np.random.default_rng(0)
    origins = (rng.normal(size=(4000, 3)) * 0.1 + np.array([4.0, -3.0, 3.0])).astype(np.float32)
    targets = body.center + rng.uniform(-1, 1, (4000, 3)) * 2 * body.radius
    rays = (targets - origins).astype(np.float32)
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    distance = shapes.meet(body, origins, rays)
    hit = np.isfinite(distance)
    assert 0.1 < hit.mean() < 0.9 and not (hit & ~shapes.near(body, origins, rays)).any()
    steps = np.linspace(0, 9, 2000)[:, None]
    for i in range(0, 4000, 100):
        local = origins[i] + rays[i] * steps - body.center
        cosine, sine = np.cos(body.turn), np.sin(body.turn)
        back = np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]])
        unit = np.abs(local @ back.T) / body.radius
        within = {
            "sphere": (unit**2).sum(1) < 1,
            "cube": unit.max(1) < 1,
            "cylinder": (np.hypot(unit[:, 0], unit[:, 1]) < 1) & (unit[:, 2] < 1),
        }[shape]
        if within.sum() > 2:
            assert distance[i] == pytest.approx(steps[within.argmax(), 0], abs=0.006)
    upright = shapes.normals(body, origins[hit] + rays[hit] * distance[hit][:, None])
    assert np.abs(np.linalg.norm(upright, axis=1) - 1).max() < 1e-5
    assert ((upright * rays[hit]).sum(1) < 0).mean() > 0.98, "normals look back along the ray"


def test_nearer_things_hide_farther_ones():
    ahead = np.array(CAMERA[:2]) / np.linalg.norm(CAMERA[:2])
    near, far = thing("sphere", *(1.5 * ahead)), thing("sphere", *(-1.5 * ahead), size="small")
    alone = picture.visible_pixels(scene_of(far, thing(x=0, y=3)))[0]
    hidden = picture.visible_pixels(scene_of(far, near))
    assert hidden[0] < alone and hidden[1] > alone
    # Of a sphere at depth z a share of (focal * radius / z)^2 pi is seen, stretched a little off the middle.
    center = Camera(np.array(CAMERA)).view(near.center[None])[0]
    assert hidden[1] == pytest.approx(math.pi * (525 * 0.7 / center[2]) ** 2, rel=0.05)


@pytest.mark.parametrize("color", ["red", "blue", "yellow"])
@pytest.mark.parametrize("material", ["rubber", "metal"])
def test_pictures_show_colors_and_shadows(color, material):
    body = thing("sphere", color=color, material=material)
    shown = picture.render(scene_of(body), np.random.default_rng(0)).astype(int)
    assert shown.shape == (320, 480, 3)
    column, row, _ = Camera(np.array(CAMERA)).view(body.center[None])[0].round().astype(int)
    patch = shown[row - 12 : row + 12, column - 12 : column + 12].mean((0, 1))
    assert patch.argmax() == np.argmax(COLORS[color]) and np.ptp(patch) > 40, patch
    # Grey is the ground alone: where it is darker than without the sphere, there is its shadow.
    empty = picture.render(scene_of(thing(x=-3, y=3, size="small")), np.random.default_rng(0)).astype(int)
    grey = np.ptp(shown, axis=2) < 12
    assert 300 < (grey & (shown.mean(2) < empty.mean(2) - 15)).sum() < 0.1 * grey.sum()
    assert np.abs(shown - empty).mean(2)[:60].max() < 4, "far away nothing changes"


def test_a_picture_is_a_function_of_its_seed():
    scene = scene_of(thing(material="metal"), thing("cube", -1.5, 1.5))
    pictures = [picture.render(scene, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert (pictures[0] == pictures[1]).all() and (pictures[0] != pictures[2]).any()


@pytest.mark.parametrize("nearest, label", [(7.0, 0), (8.0, 0), (8.01, 1), (8.5, 1), (9.2, 3), (10.0, 4), (10.01, 5)])
def test_labels_are_vtabs(nearest, label):
    found = clevr.labels(np.array([11.0, nearest, 12.0, 11.5]))
    assert found == {"clevr_count": 1, "clevr_dist": label}


def test_folders_are_made_and_taken_up_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clevr, "TRAINING", {"train800": 3, "val200": 2})
    command = ["clevr", "--out", str(tmp_path), "--test", "2"]
    drawn = []

    def interrupted(scene, rng):
        drawn.append(scene)
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return np.full((320, 480, 3), len(drawn), np.uint8)

    monkeypatch.setattr(clevr, "render", interrupted)
    assert main(command) == 130 and "goes on from here" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/*.txt")), "an unfinished task has no lists"
    first = (tmp_path / "clevr_count/images/train800/000000.jpg").read_bytes()
    assert main(command) == 0 and len(drawn) == 8
    assert (tmp_path / "clevr_count/images/train800/000000.jpg").read_bytes() == first
    for task, classes in (("clevr_count", 8), ("clevr_distance", 6)):
        sources, names = open_vtab(tmp_path, task, "search")
        assert {name: len(source.labels) for name, source in sources.items()} == {"train": 3, "val": 2, "test": 2}
        assert len(names) == classes
    described = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("clevr_count/scenes/train800/*"))]
    counts = open_vtab(tmp_path, "clevr_count", "final")[0]["train"].labels
    assert counts[:3] == [len(scene["objects"]) - 3 for scene in described]
    splits = open_splits({"name": "vtab", "root": tmp_path, "task": "clevr_dist"}, 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert splits.train[4][0].shape == (3, 32, 32)
    assert Image.open(tmp_path / "clevr_dist/images/test/000001.jpg").size == (480, 320)


def test_what_another_command_made_is_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clevr, "TRAINING", {"train800": 1, "val200": 1})
    monkeypatch.setattr(clevr, "render", lambda scene, rng: np.zeros((320, 480, 3), np.uint8))
    (tmp_path / "clevr_dist").mkdir()
    (tmp_path / "clevr_dist" / "train800.txt").write_text("images/0.png 1\n")
    assert main(["clevr", "--out", str(tmp_path)]) == 2
    assert "clevr_dist: not empty, and not made by this command" in capsys.readouterr().err
    out = ["clevr", "--out", str(tmp_path / "own"), "--test", "1"]
    assert main(out) == 0
    assert main([*out, "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert "choose another --out" in error and error.count("\n") == 1


def test_the_entry_names_its_makers(capsys):
    assert main([]) == 2 and main(["--help"]) == 0
    assert "clevr      Scenes drawn and rendered" in capsys.readouterr().out
    assert main(["clever"]) == 2
    assert "unknown data set 'clever'; did you mean 'clevr'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["clevr", "--help"])
    assert "test images; VTAB-1k has 15,000 [2000]" in " ".join(capsys.readouterr().out.split())
    assert main(["clevr", "--out", "x", "--test", "0"]) == 2
    assert "--test and --workers must be at least 1" in capsys.readouterr().err
