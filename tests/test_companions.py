"""A patched model under the tools that people train with: DDP, FSDP, DeepSpeed, the Hugging Face Trainer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft.trainer import launch
from tests.tiny import images, labels, vit

METHODS = {
    "vpt": fastpeft.VPT(4),
    "vpt-shallow": fastpeft.VPT(4, deep=False),
    "lora": fastpeft.LoRA(2, targets=("q", "v", "fc1")),
    "bitfit": fastpeft.BitFit(),
}


@pytest.fixture
def one_rank():
    """A process group of this process alone: the trainer's, since DeepSpeed remembers the first one for good."""
    launch.start(launch.find_ranks())


def _patched(name: str) -> nn.Module:
    model = fastpeft.patch(vit(), METHODS[name]).train()
    fastpeft.set_rng_state(model, seed=7, step=0)
    return model


def _gradients(model: nn.Module, named: nn.Module) -> dict[str, torch.Tensor]:
    nn.functional.cross_entropy(model(images()), labels()).backward()
    return {name: p.grad for name, p in named.named_parameters() if p.requires_grad}


def _assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", METHODS)
def test_ddp(one_rank, name):
    model = _patched(name)
    expected = _gradients(alone := copy.deepcopy(model), alone)
    parallel = nn.parallel.DistributedDataParallel(model)
    _assert_same(_gradients(parallel, model), expected)


@pytest.mark.parametrize("name", METHODS)
def test_fsdp2_shards_the_blocks(one_rank, name):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = _patched(name)
    expected = _gradients(alone := copy.deepcopy(model), alone)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = {key: value.full_tensor() for key, value in _gradients(model, model).items()}
    _assert_same(found, expected)


@pytest.mark.parametrize("stage", [0, 1])
def test_deepspeed_step_is_seen_by_the_next_forward(one_rank, stage):
    import deepspeed

    model = _patched("vpt")
    plain = copy.deepcopy(model)
    config = {"train_micro_batch_size_per_gpu": 3, "zero_optimization": {"stage": stage}, "steps_per_print": None}
    config |= {"zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}
    optimizer = torch.optim.SGD(fastpeft.trainable_parameters(model), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.backward(nn.functional.cross_entropy(engine(images()), labels()))
    engine.step()
    _gradients(plain, plain)
    torch.optim.SGD(fastpeft.trainable_parameters(plain), lr=0.1).step()
    torch.testing.assert_close(model.eval()(images()), plain.eval()(images()), rtol=1e-5, atol=1e-5)


def test_hugging_face_trainer(tmp_path):
    import transformers

    class WithLoss(nn.Module):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.model = model

        def forward(self, pixel_values, labels):
            logits = self.model(pixel_values)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    model = _patched("vpt")
    before = copy.deepcopy(model.state_dict())
    data = [{"pixel_values": image, "labels": label} for image, label in zip(images(batch=8), labels(8), strict=True)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no"
    )
    transformers.Trainer(WithLoss(model), arguments, train_dataset=data).train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
