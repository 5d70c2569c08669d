"""The dataset: values, memory, augmentation and files that are no images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastpeft.data import DataError, ImageDataset, load_image
from fastpeft.data.sources import ArraySource, FileSource
from tests.data.files import MEAN, STD, write_image


class Counting(ArraySource):
    """Counts how often an image is read."""

    def __init__(self, images, labels):
        super().__init__(images, labels)
        self.reads = 0

    def read(self, index):
        self.reads += 1
        return super().read(index)


def source(count: int = 6, size: int = 8, kind=Counting):
    images = np.random.RandomState(0).randint(0, 256, (count, size, size, 3)).astype(np.uint8)
    return kind(images, np.arange(count) % 3)


def test_values_are_normalised():
    data = source()
    image, label = ImageDataset(data, 8, MEAN, STD)[4]
    expected = (data.images[4] / 255 - np.array(MEAN)) / np.array(STD)
    assert (image.dtype, image.shape, label, type(label)) == (torch.float32, (3, 8, 8), 1, int)
    np.testing.assert_allclose(image.numpy(), expected.transpose(2, 0, 1), atol=1e-6)


def test_grey_images_become_three_channels():
    data = ArraySource(np.random.RandomState(0).randint(0, 256, (2, 8, 8)).astype(np.uint8), [0, 1])
    image, _ = ImageDataset(data, 8, (0, 0, 0), (1, 1, 1))[0]
    for channel in image:
        np.testing.assert_allclose(channel.numpy(), data.images[0] / 255, atol=1e-6)


@pytest.mark.parametrize("room, reads", [(2**20, 6), (0, 18), (3 * 8 * 8 * 3, 3 + 3 * 3)])
def test_memory_is_bounded(room, reads):
    """What fits is read once, what does not is read every epoch, and both give the same."""
    data = source()
    dataset = ImageDataset(data, 8, MEAN, STD, cache_bytes=room)
    epochs = [torch.stack([dataset[i][0] for i in range(len(dataset))]) for _ in range(3)]
    assert data.reads == reads
    assert torch.equal(epochs[0], epochs[1]) and torch.equal(epochs[0], epochs[2])


def test_preload_reads_everything_once():
    data, seen = source(), []
    dataset = ImageDataset(data, 8, MEAN, STD)
    dataset.preload(lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]
    assert data.reads == 6
    dataset.preload()
    [dataset[i] for i in range(6)]
    assert data.reads == 6


def test_end_of_the_dataset():
    dataset = ImageDataset(source(), 8, MEAN, STD)
    assert len(dataset) == len(list(dataset)) == 6
    with pytest.raises(IndexError):
        dataset[6]


def test_loader_batches():
    dataset = ImageDataset(source(), 8, MEAN, STD)
    images, labels = next(iter(torch.utils.data.DataLoader(dataset, batch_size=4)))
    assert images.shape == (4, 3, 8, 8)
    assert labels.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("augment, resize", [("flip", "squash"), ("flip", "crop"), ("crop_flip", "crop")])
def test_augmentation_is_a_function_of_seed_epoch_and_image(augment, resize):
    def epoch(seed, number):
        dataset = ImageDataset(source(20, 16), 14, MEAN, STD, augment=augment, resize=resize, seed=seed)
        dataset.set_epoch(number)
        return torch.stack([image for image, _ in dataset])

    assert torch.equal(epoch(0, 3), epoch(0, 3))
    assert not torch.equal(epoch(0, 3), epoch(0, 4))
    assert not torch.equal(epoch(0, 3), epoch(1, 3))
    assert epoch(0, 3).shape == (20, 3, 14, 14)


def test_flip_mirrors_about_half():
    dataset = ImageDataset(source(200), 8, MEAN, STD, augment="flip")
    plain = ImageDataset(source(200), 8, MEAN, STD)
    flipped = 0
    for (image, _), (original, _) in zip(dataset, plain, strict=True):
        assert torch.equal(image, original) or torch.equal(image, original.flip(-1))
        flipped += not torch.equal(image, original)
    assert 70 < flipped < 130
    assert (dataset.deterministic, plain.deterministic) == (False, True)


def test_crops_are_parts_of_the_image():
    dataset = ImageDataset(source(30, 16), 14, MEAN, STD, augment="crop_flip", resize="crop")
    whole = ImageDataset(source(30, 16), 16, MEAN, STD)
    places = set()
    for (crop, _), (image, _) in zip(dataset, whole, strict=True):
        hits = [
            (y, x, flip)
            for y in range(3)
            for x in range(3)
            for flip in (False, True)
            if torch.equal(crop.flip(-1) if flip else crop, image[:, y : y + 14, x : x + 14])
        ]
        assert len(hits) == 1
        places.add(hits[0])
    assert len(places) > 10


def test_settings_are_checked():
    with pytest.raises(DataError, match=r"resize: expected one of squash, .* got 'stretch'"):
        ImageDataset(source(), 8, MEAN, STD, resize="stretch")
    with pytest.raises(DataError, match=r"augment: expected one of none, .* got 'rotate'"):
        ImageDataset(source(), 8, MEAN, STD, augment="rotate")
    with pytest.raises(DataError, match="needs resize 'crop'"):
        ImageDataset(source(), 8, MEAN, STD, augment="crop_flip")
    with pytest.raises(DataError, match="three means and three positive deviations"):
        ImageDataset(source(), 8, (0.5,), (0.5,))
    with pytest.raises(DataError, match="three means and three positive deviations"):
        ImageDataset(source(), 8, MEAN, (0.2, 0.0, 0.2))


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "missing"])
@pytest.mark.parametrize("name", ["x.jpg", "x.png"])
def test_broken_image_is_named(tmp_path, damage, name):
    path = tmp_path / name
    write_image(path, size=(64, 64))
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"text": b"hello", "empty": b"", "cut": content[: len(content) // 2]}[damage])
    dataset = ImageDataset(FileSource([path], [0]), 8, MEAN, STD)
    for read in (lambda: dataset[0], dataset.preload, lambda: load_image(path, 8, MEAN, STD)):
        with pytest.raises(DataError, match=f"{name}: cannot be read as an image"):
            read()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_every_colour_mode_becomes_rgb(tmp_path, mode):
    from PIL import Image

    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new("RGB", (5, 4), (10, 200, 30)).convert(mode).save(path)
    assert load_image(path, 8, MEAN, STD).shape == (3, 8, 8)


def test_load_image_is_what_the_dataset_gives(tmp_path):
    path = tmp_path / "x.png"
    write_image(path, size=(30, 20))
    for resize in ("squash", "crop"):
        dataset = ImageDataset(FileSource([path], [0]), 16, MEAN, STD, resize=resize)
        assert torch.equal(load_image(path, 16, MEAN, STD, resize=resize), dataset[0][0])
