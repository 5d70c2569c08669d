"""Runs that begin with what another run trained."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import fastpeft
from fastpeft import predict
from fastpeft.models.build import build_model, start_from


@pytest.fixture
def tuned(train, write_config, tmp_path):
    """The adapter folder of a full fine-tuning run."""
    out = tmp_path / "tuned"
    rates = {"epochs": 2, "lr": {"backbone": 1e-2, "head": 1e-2}}
    code, _, err = train(write_config(method={"name": "full"}, train=rates, out=str(out)))
    assert code == 0, err
    return out / "adapter"


def backbone(model) -> dict[str, torch.Tensor]:
    return {
        name: tensor.clone() for name, tensor in model.state_dict().items() if "vpt" not in name and "clock" not in name
    }


def test_prompts_on_a_backbone_that_was_tuned(tuned, train, write_config, tmp_path, images):
    config = write_config(model={"start": str(tuned)}, train={"epochs": 2, "head_init": "keep"})
    code, _, err = train(config)
    assert code == 0, err
    own = build_model("test_vit", 3, 32, weights="random")
    start_from(own, tuned)
    assert not hasattr(own, "fastpeft_record"), "a plain model"
    before = backbone(own)
    plain = backbone(build_model("test_vit", 3, 32, weights="random"))
    assert not torch.equal(before["blocks.0.attn.qkv.weight"], plain["blocks.0.attn.qkv.weight"])
    # The saved prompts fit the tuned backbone and no other.
    after = backbone(fastpeft.load(own, tmp_path / "out" / "adapter"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}
    with pytest.raises(fastpeft.FastPEFTError, match="another base"):
        fastpeft.load(build_model("test_vit", 3, 32, weights="random"), tmp_path / "out" / "adapter")
    path = images / "test" / "red" / "000.png"
    probabilities = predict.Predictor(tmp_path / "out" / "adapter")(path)
    assert float(probabilities.sum()) == pytest.approx(1)


@pytest.mark.parametrize("head", ["keep", "vpt"])
def test_the_head_is_kept_or_new(head, tuned, train, write_config, tmp_path):
    rates = {"epochs": 1, "warmup_epochs": 0, "lr": {"vpt": 1e-9, "head": 1e-9}, "head_init": head}
    code, _, err = train(write_config(model={"start": str(tuned)}, train=rates))
    assert code == 0, err
    heads = [
        load_file(folder / "adapter_model.safetensors")["head.weight"] for folder in (tuned, tmp_path / "out/adapter")
    ]
    assert torch.allclose(*heads, atol=1e-6) == (head == "keep")


@pytest.mark.parametrize("what, message", [("prompts", "adds tensors of its own"), ("nothing", "adapter_config.json")])
def test_what_is_no_start_is_one_line(what, message, train, write_config, tmp_path):
    folder = tmp_path / what
    if what == "prompts":
        assert train(write_config(train={"epochs": 1, "warmup_epochs": 0}, out=str(folder)))[0] == 0
        folder = folder / "adapter"
    code, _, err = train(write_config(model={"start": str(folder)}))
    assert code == 2 and message in err and "model.start" in err and len(err.strip().splitlines()) == 1
