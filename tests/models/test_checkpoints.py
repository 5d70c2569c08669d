"""Published checkpoint layouts, made small: everything arrives in its place, and what does not fit is an error."""

from __future__ import annotations

import argparse
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import ndimage

from fastpeft import FastPEFTError
from fastpeft.models.checkpoints import load_weights
from tests.models.published import assert_same, backbone, vit, write_npz


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_npz(tmp_path, prefix):
    published, model = vit(), vit()
    write_npz(tmp_path / "ViT.npz", published, prefix)
    head = model.head.weight.clone()
    report = load_weights(model, tmp_path / "ViT.npz")
    assert_same(model, backbone(published))
    assert torch.equal(model.head.weight, head)
    assert set(report.loaded) == set(backbone(published))
    assert [name for name, _ in report.dropped] == ["head/bias", "head/kernel"]
    assert report.missing == ("head.weight", "head.bias")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.forward_features(images), published.forward_features(images))


def test_npz_with_a_pickle_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", **{"embedding/kernel": np.array([print], dtype=object)})
    with pytest.raises(FastPEFTError, match=r"x\.npz: cannot be read as a NumPy archive"):
        load_weights(vit(), tmp_path / "x.npz")


def test_npz_without_a_part_names_it(tmp_path):
    write_npz(tmp_path / "x.npz", vit())
    with np.load(tmp_path / "x.npz") as archive:
        entries = dict(archive)
    del entries["Transformer/encoderblock_1/MlpBlock_3/Dense_0/bias"]
    np.savez(tmp_path / "x.npz", **entries)
    with pytest.raises(FastPEFTError, match="it has no Transformer/encoderblock_1/MlpBlock_3/Dense_0/bias"):
        load_weights(vit(), tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", a=np.zeros(1))
    with pytest.raises(FastPEFTError, match="it has no embedding/kernel"):
        load_weights(vit(), tmp_path / "x.npz")


def test_mae(tmp_path):
    """Under `model`, with the training script's arguments, the decoder and the mask token beside it."""
    published = vit(num_classes=0)
    state = {**published.state_dict(), "mask_token": torch.zeros(1, 1, 12), "decoder_pred.bias": torch.zeros(4)}
    torch.save({"model": state, "epoch": 1, "args": argparse.Namespace(lr=0.1)}, tmp_path / "mae.pth")
    model = vit()
    report = load_weights(model, tmp_path / "mae.pth")
    assert_same(model, backbone(published))
    assert [name for name, _ in report.dropped] == ["mask_token", "decoder_pred.bias"]


def test_mae_into_average_pooling(tmp_path):
    """The norm after pooling keeps its initial values, as the papers' code has it."""
    published = vit(num_classes=0)
    torch.save({"model": published.state_dict()}, tmp_path / "mae.pth")
    model = vit(global_pool="avg")
    report = load_weights(model, tmp_path / "mae.pth")
    assert report.missing == ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")
    assert [name for name, _ in report.dropped] == ["norm.weight", "norm.bias"]


def test_moco_v3(tmp_path):
    """Under `state_dict`, where only names with the prefix `module.` count; the head is never loaded."""
    published = vit()
    state = {f"module.{name}": tensor for name, tensor in published.state_dict().items()}
    torch.save({"state_dict": {**state, "queue": torch.zeros(2)}, "arch": "vit", "epoch": 9}, tmp_path / "m.pth.tar")
    model = vit()
    head = model.head.weight.clone()
    report = load_weights(model, tmp_path / "m.pth.tar")
    assert_same(model, backbone(published))
    assert torch.equal(model.head.weight, head), "of the same shape, and yet of another task"
    assert sorted(name for name, _ in report.dropped) == ["head.bias", "head.weight", "queue"]


@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_timm_state_dict(tmp_path, form):
    published, model = vit(), vit()
    if form == "torch":
        path = tmp_path / "model.bin"
        torch.save(published.state_dict(), path)
    else:
        path = tmp_path / "model.safetensors"
        save_file(published.state_dict(), path)
    report = load_weights(model, path)
    assert_same(model, published.state_dict())
    assert not report.missing and not report.dropped
    assert str(report) == f"{path}: {len(published.state_dict())} tensors loaded"


def test_head_of_another_task_is_dropped(tmp_path):
    torch.save(vit(num_classes=7).state_dict(), tmp_path / "x.pth")
    report = load_weights(vit(), tmp_path / "x.pth")
    assert report.dropped == (
        ("head.weight", "shape (7, 12), the model's has (3, 12)"),
        ("head.bias", "shape (7,), the model's has (3,)"),
    )
    assert "left at their initial values: head.weight, head.bias" in str(report)


@pytest.mark.parametrize("options", [{"embed_dim": 24}, {"patch_size": 16}])
def test_other_sizes_are_named(tmp_path, options):
    torch.save(vit(**options).state_dict(), tmp_path / "x.pth")
    with pytest.raises(FastPEFTError, match=r"has shape \(.*\), the model's has"):
        load_weights(vit(), tmp_path / "x.pth")


def test_a_part_of_a_backbone_is_not_loaded(tmp_path):
    torch.save(vit(depth=1).state_dict(), tmp_path / "shallow.pth")
    with pytest.raises(FastPEFTError, match=r"12 of the model's tensors are not in it: blocks\.1\.norm1\.weight"):
        load_weights(vit(), tmp_path / "shallow.pth")
    torch.save(vit(depth=3).state_dict(), tmp_path / "deep.pth")
    with pytest.raises(FastPEFTError, match=r"it has blocks\.2\.norm1\.weight, for which the model has no place"):
        load_weights(vit(), tmp_path / "deep.pth")


def test_failed_load_leaves_the_model_alone(tmp_path):
    model = vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(vit(depth=1).state_dict(), tmp_path / "x.pth")
    with pytest.raises(FastPEFTError):
        load_weights(model, tmp_path / "x.pth")
    assert_same(model, before)


def test_other_models_and_other_content(tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(FastPEFTError, match="nothing in it matches the model; it has weight, bias"):
        load_weights(vit(), tmp_path / "linear.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(FastPEFTError, match="expected a dict of tensors, got list"):
        load_weights(vit(), tmp_path / "list.pth")
    with pytest.raises(FastPEFTError, match=r"absent\.pth: no such file"):
        load_weights(vit(), tmp_path / "absent.pth")


class Malicious:
    """Would make a folder when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"model": vit().state_dict(), "x": Malicious(tmp_path / "made")}, tmp_path / "x.pth")
    with pytest.raises(FastPEFTError, match="it is not loaded, because that could run code"):
        load_weights(vit(), tmp_path / "x.pth")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["x.npz", "x.safetensors", "x.pth"])
@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_truncated_files_are_named(tmp_path, name, share):
    path = tmp_path / name
    if name == "x.npz":
        write_npz(path, vit())
    elif name == "x.safetensors":
        save_file(vit().state_dict(), path)
    else:
        torch.save(vit().state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(FastPEFTError, match=f"{name}: "):
        load_weights(vit(), path)


@pytest.mark.parametrize("side", [4, 6, 3, (3, 5)])
@pytest.mark.parametrize("mode", ["bicubic", "vpt"])
def test_position_tables_are_resampled(tmp_path, side, mode):
    """`vpt` against scipy's zoom, which the papers' code calls; `bicubic` against timm's own resampling."""
    from timm.layers import resample_abs_pos_embed

    published = vit()
    torch.save(published.state_dict(), tmp_path / "x.pth")
    sides = side if isinstance(side, tuple) else (side, side)
    model = vit(img_size=tuple(8 * s for s in sides))
    load_weights(model, tmp_path / "x.pth", pos_resize=mode)
    table = published.pos_embed.detach()
    if mode == "vpt":
        grid = table[0, 1:].reshape(4, 4, 12).numpy()
        zoomed = ndimage.zoom(grid, (sides[0] / 4, sides[1] / 4, 1), order=1).reshape(1, -1, 12)
        expected = torch.cat([table[:, :1], torch.from_numpy(zoomed)], dim=1)
    else:
        expected = resample_abs_pos_embed(table, list(sides), num_prefix_tokens=1)
    torch.testing.assert_close(model.pos_embed.detach(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"reg_tokens": 2},
        {"reg_tokens": 2, "no_embed_class": True},
        {"class_token": False, "global_pool": "avg"},
    ],
)
def test_prefix_rows_are_kept(tmp_path, options):
    published = vit(**options)
    torch.save(published.state_dict(), tmp_path / "x.pth")
    model = vit(img_size=48, **options)
    load_weights(model, tmp_path / "x.pth")
    prefix = published.pos_embed.shape[1] - 16
    assert torch.equal(model.pos_embed[:, :prefix], published.pos_embed[:, :prefix])
    assert model.pos_embed.shape[1] == prefix + 36


def test_position_tables_that_do_not_fit(tmp_path):
    state = vit().state_dict()
    torch.save({**state, "pos_embed": torch.zeros(1, 15, 12)}, tmp_path / "x.pth")
    with pytest.raises(FastPEFTError, match=r"pos_embed has shape \(1, 15, 12\); expected \(1, 1 \+ a square number"):
        load_weights(vit(), tmp_path / "x.pth")
    with pytest.raises(FastPEFTError, match="pos_resize: expected one of bicubic, vpt, got 'linear'"):
        load_weights(vit(), tmp_path / "x.pth", pos_resize="linear")
