"""What a vision-language model sees of an image: the same whichever process asks, and what each operation does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fastpeft.data import DataError
from fastpeft.data.rand_augment import OPERATIONS, rand_augment
from fastpeft.data.vl_transforms import (
    CLIP_MEAN,
    CLIP_STD,
    EvalTransform,
    ImageFiles,
    TrainTransform,
    draws_of,
    random_crop,
)
from tests.data.files import write_image

MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))


def gradient(width=40, height=30) -> np.ndarray:
    """An image in which every pixel tells where it was: columns in red, rows in green."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(width) * 3
    pixels[..., 1] = np.arange(height)[:, None] * 5
    pixels[..., 2] = 90
    return pixels


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    return ((tensor * STD + MEAN) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def test_evaluation_squashes_with_a_bicubic_filter():
    pixels = gradient()
    found = EvalTransform(16)(pixels)
    wanted = np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC))
    assert found.dtype == torch.float32 and found.shape == (3, 16, 16) and found.is_contiguous()
    assert (bytes_of(found) == wanted).all()
    by_hand = (wanted[3, 5].astype(np.float64) / 255 - CLIP_MEAN) / CLIP_STD
    torch.testing.assert_close(found[:, 3, 5].double(), torch.tensor(by_hand), rtol=0, atol=1e-6)


def test_an_image_depends_on_seed_epoch_and_sample_alone(tmp_path):
    write_image(tmp_path / "a.png", size=(60, 50))
    files = ImageFiles([tmp_path / "a.png"], TrainTransform(24), seed=3)
    first = files.read(0, 5, 2)
    files.read(0, 6, 2)
    torch.rand(3), np.random.rand(3)
    again = ImageFiles([tmp_path / "a.png"], TrainTransform(24), seed=3).read(0, 5, 2)
    assert torch.equal(first, again)
    others = [
        files.read(0, 5, 3),
        files.read(0, 6, 2),
        ImageFiles(files.paths, files.transform, seed=4).read(0, 5, 2),
    ]
    assert not any(torch.equal(first, other) for other in others)
    plain = ImageFiles(files.paths, EvalTransform(24))
    assert torch.equal(plain.read(0, 5, 2), plain.read(0, 0, 0))


def test_broken_image_is_named(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"a\.jpg: cannot be read as an image"):
        ImageFiles([tmp_path / "a.jpg"], EvalTransform(8)).read(0, 0, 0)


def test_crops_have_the_area_and_sides_asked_for():
    shares, ratios, lefts = [], [], []
    for sample in range(400):
        left, top, right, bottom = random_crop((640, 480), (0.5, 1.0), draws_of(0, 0, sample))
        assert 0 <= left < right <= 640 and 0 <= top < bottom <= 480
        shares.append((right - left) * (bottom - top) / (640 * 480))
        ratios.append((right - left) / (bottom - top))
        lefts.append(left)
    assert 0.49 < min(shares) < 0.55 and 0.9 < max(shares) <= 1
    assert 0.74 < min(ratios) < 0.85 and 1.25 < max(ratios) < 1.35
    assert len(set(lefts)) > 100


def test_crop_of_a_strip_falls_back_to_its_middle():
    assert random_crop((1000, 30), (0.5, 1.0), draws_of(0, 0, 0)) == (480, 0, 520, 30)
    assert random_crop((30, 1000), (0.5, 1.0), draws_of(0, 0, 0)) == (0, 480, 30, 520)


def test_flip_is_half_of_the_images_and_can_be_left_out():
    pixels = gradient()
    mirrored = sum(
        bool(image[0, 12, 4] > image[0, 12, 20])
        for image in (TrainTransform(24, operations=0)(pixels, draws_of(0, 0, sample)) for sample in range(200))
    )
    assert 75 < mirrored < 125
    kept = TrainTransform(24, flip=False, operations=0)
    assert all((image := kept(pixels, draws_of(0, 0, s)))[0, 12, 4] < image[0, 12, 20] for s in range(50))


def test_whole_area_and_nothing_else_is_a_resize_of_some_box():
    pixels = gradient(32, 32)
    draw = draws_of(1, 0, 0)
    box = random_crop((32, 32), (0.5, 1.0), draws_of(1, 0, 0))
    found = TrainTransform(16, flip=False, operations=0)(pixels, draw)
    wanted = Image.fromarray(pixels).crop(box).resize((16, 16), Image.Resampling.BICUBIC)
    assert (bytes_of(found) == np.asarray(wanted)).all()
    with pytest.raises(DataError, match=r"scale: expected two shares of the area"):
        TrainTransform(16, scale=(0.5, 1.2))


@pytest.mark.parametrize("sign", [1, -1])
def test_translations_are_seven_pixels_with_grey_behind_them(sign):
    pixels = gradient()
    across = np.asarray(OPERATIONS["translate_x"](Image.fromarray(pixels), sign))
    down = np.asarray(OPERATIONS["translate_y"](Image.fromarray(pixels), sign))
    if sign > 0:
        assert (across[:, :33] == pixels[:, 7:]).all() and (across[:, 33:] == 128).all()
        assert (down[:23] == pixels[7:]).all() and (down[23:] == 128).all()
    else:
        assert (across[:, 7:] == pixels[:, :33]).all() and (across[:, :7] == 128).all()
        assert (down[7:] == pixels[:23]).all() and (down[:7] == 128).all()


def test_shears_move_by_a_fifth_of_the_distance():
    pixels = gradient()
    across = np.asarray(OPERATIONS["shear_x"](Image.fromarray(pixels), 1)).astype(float)
    # Red is three times the column: row r shows what was 0.21 r further right.
    for row in (0, 10, 20):
        assert across[row, 10, 0] == pytest.approx(3 * (10 + 0.21 * (row + 0.5)), abs=1.1)
    down = np.asarray(OPERATIONS["shear_y"](Image.fromarray(pixels), -1)).astype(float)
    for column in (0, 15, 30):
        assert down[20, column, 1] == pytest.approx(5 * (20 - 0.21 * (column + 0.5)), abs=1.6)


def test_rotation_is_by_21_degrees():
    pixels = np.zeros((101, 101, 3), np.uint8)
    pixels[50, 50:] = 255
    turned = np.asarray(OPERATIONS["rotate"](Image.fromarray(pixels), 1))[..., 0].astype(float)
    turned[turned == 128] = 0
    rows, columns = np.nonzero(turned > 100)
    far = columns > 75
    angles = np.degrees(np.arctan2(50 - rows[far], columns[far] - 50))
    assert angles.mean() == pytest.approx(21, abs=1)


def test_enhancements_have_factor_1_36():
    pixels = np.full((6, 6, 3), 100, np.uint8)
    assert (np.asarray(OPERATIONS["brightness"](Image.fromarray(pixels), 1)) == 136).all()
    pixels[3, 3] = 160
    sharper = np.asarray(OPERATIONS["sharpness"](Image.fromarray(pixels), 1))[3, 3, 0]
    smooth = (8 * 100 + 5 * 160) / 13
    assert sharper == pytest.approx(smooth + 1.36 * (160 - smooth), abs=1)
    stretched = np.asarray(OPERATIONS["auto_contrast"](Image.fromarray(pixels), 1))
    assert stretched.min() == 0 and stretched.max() == 255
    assert len(OPERATIONS) == 10 and OPERATIONS["identity"](pixels, 1) is pixels


def test_each_of_two_operations_is_applied_half_of_the_time():
    seen = []
    counted = {name: lambda image, sign, name=name: seen.append((name, sign)) or image for name in OPERATIONS}
    real = dict(OPERATIONS)
    OPERATIONS.update(counted)
    try:
        for sample in range(500):
            rand_augment(None, 2, draws_of(0, 0, sample))
    finally:
        OPERATIONS.update(real)
    assert 430 < len(seen) < 570
    counts = {name: sum(other == name for other, _ in seen) for name in OPERATIONS}
    assert min(counts.values()) > 25
    assert 0.4 < sum(sign == 1 for _, sign in seen) / len(seen) < 0.6
