"""ZeRO stage 3: frozen weights are divided among the ranks, and the run comes out as without."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastpeft
from fastpeft.config import ConfigError
from fastpeft.trainer import features, loop
from fastpeft.trainer.evaluate import Spare, evaluate
from tests.thinned import thinned
from tests.trainer.conftest import ROOT
from tests.trainer.test_ranks import LAUNCHER, torchrun

# Run as a rank: the training command, with a look at what the rank holds between two steps and while a block runs.
_LOOK = """
import json, os, sys
import torch
from fastpeft.engine import block
from fastpeft.trainer import loop, partitioned
seen = {"whole": 0, "ran": 0, "gathered": 0, "left": 0}
LAST = []
init = partitioned.PartitionedStepper.__init__
def look(self, model, *rest):
    seen["whole"] = sum(p.numel() for p in model.parameters())
    init(self, model, *rest)
    self.model = model
    LAST.append(model)
    seen["held"] = sum(p.ds_tensor.numel() for p in model.parameters())
partitioned.PartitionedStepper.__init__ = look
run = block.run_block
def run_block(module, *rest):
    seen["ran"] += 1
    seen["gathered"] += all(p.numel() > 0 for p in module.parameters())
    seen["hooked"] = block.any_hooks(module)
    return run(module, *rest)
import fastpeft.models.families.timm_vit as family
family.run_block = run_block
step = loop.Loop._step
def stepped(self, *rest):
    # 15 test images, eight and seven: a rank has nothing left while the other runs its last one.
    self.work.evaluation_batch = 7
    step(self, *rest)
    seen["left"] = max(seen["left"], sum(p.numel() for p in self.stepper.model.parameters()))
loop.Loop._step = stepped
from fastpeft.train import main
code = main(sys.argv[1:])
seen["outer"] = len(list(LAST[0].ds_external_parameters()))
# A file each: on the launcher's output, two ranks' lines may run into one.
with open(f"seen{os.environ['RANK']}.json", "w") as file:
    json.dump(seen, file)
sys.exit(code)
"""


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "method",
    thinned(
        [
            {"name": "full"},
            {"name": "linear"},
            [{"name": "vpt", "length": 2}, {"name": "bitfit"}],
            {"name": "bitfit"},
            {"name": "lora", "rank": 2},
            {"name": "adapter", "reduction": 8},
        ],
        2,
    ),
    ids=str,
)
def test_methods_give_the_same_adapter_as_without(train, write_config, tmp_path, method):
    for zero in (0, 3):
        rates = {"lr": {}, "base_lr": 0.03, "optimizer": "sgd", "epochs": 2, "zero": zero}
        code, _, err = train(write_config(method=method, train=rates, out=str(tmp_path / f"zero{zero}")))
        assert code == 0, err
    plain = adapter(tmp_path / "zero0")
    for name, tensor in adapter(tmp_path / "zero3").items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-3, atol=1e-5)


def test_half_precision_weights_are_divided_beside_fp32_masters(train, write_config, tmp_path, monkeypatch):
    # The same operators on both sides: weights that are divided are never packed for others.
    monkeypatch.setenv("FASTPEFT_BACKEND", "reference")
    for zero in (0, 3):
        options = {"precision": "bf16", "zero": zero}
        assert train(write_config(train=options, out=str(tmp_path / f"zero{zero}")))[0] == 0
    plain = adapter(tmp_path / "zero0")
    for name, tensor in adapter(tmp_path / "zero3").items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, plain[name], rtol=2e-2, atol=2e-3)


def test_accumulated_micro_batches_are_one_step(train, write_config, tmp_path):
    method = {"name": "vpt", "length": 3, "dropout": 0.0}
    for parts in (1, 4):
        options = {"grad_accumulation": parts, "zero": 3}
        assert train(write_config(method=method, train=options, out=str(tmp_path / f"parts{parts}")))[0] == 0
    whole = adapter(tmp_path / "parts1")
    for name, tensor in adapter(tmp_path / "parts4").items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-3, atol=1e-4)


def test_the_best_epoch_is_put_back_into_divided_weights(train, write_config, tmp_path, monkeypatch):
    taken = {}
    measure = loop.Loop.measure

    def worse_every_epoch(self, split):
        found = measure(self, split)
        if split == "val":
            found["val_accuracy"] = 1.0 / self.position.epoch
            taken.setdefault("best", found["val_loss"])
        else:
            taken["again"] = measure(self, "val")["val_loss"]
        return found

    monkeypatch.setattr(loop.Loop, "measure", worse_every_epoch)
    code, _, err = train(write_config(train={"zero": 3}))
    assert code == 0, err
    assert fastpeft.read_config(tmp_path / "out" / "adapter")["epoch"] == 1
    assert taken["again"] == pytest.approx(taken["best"], rel=1e-5)


@pytest.mark.parametrize(
    "method", [pytest.param({"name": "linear"}, marks=pytest.mark.slow), {"name": "partial", "k": 1}], ids=str
)
def test_a_split_without_room_for_its_features_is_encoded_with_divided_weights(
    train, write_config, tmp_path, monkeypatch, method
):
    per_image = {"linear": 64, "partial": 64 * 5}[method["name"]] * 4
    # 45 training images and 12 of validation; the class token and the positions are divided too.
    monkeypatch.setattr(features, "LIMIT_BYTES", per_image * (45 + 12))
    found = []
    for zero in (0, 3):
        rates = {"lr": {}, "base_lr": 0.03, "optimizer": "sgd", "zero": zero}
        code, _, err = train(write_config(method=method, train=rates, out=str(tmp_path / f"zero{zero}")))
        assert code == 0, err
        found.append(json.loads((tmp_path / f"zero{zero}" / "results.json").read_text()))
    assert found[0]["cached_features"] and found[1]["cached_features"] == found[0]["cached_features"]
    assert found[1]["test_accuracy"] == found[0]["test_accuracy"]
    plain = adapter(tmp_path / "zero0")
    for name, tensor in adapter(tmp_path / "zero3").items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(LAUNCHER is None, reason="DeepSpeed's launcher is not installed")
def test_each_of_two_ranks_holds_half_and_gathers_a_block_while_it_runs(write_config, environment, tmp_path):
    config = write_config(train={"zero": 3, "epochs": 2}, out=str(tmp_path / "two"))
    script = tmp_path / "look.py"
    script.write_text(_LOOK)
    done = subprocess.run(
        [*torchrun(2), str(script), "--config", str(config)],
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        seen = json.loads((tmp_path / f"seen{rank}.json").read_text())
        assert seen["whole"] / 2 <= seen["held"] < 0.51 * seen["whole"]
        assert seen["gathered"] == seen["ran"] > 0 and not seen["hooked"]
        # DeepSpeed gathers what it finds missing for the whole of a forward pass: nothing may be.
        assert seen["outer"] == 0
        assert seen["left"] < 0.25 * seen["whole"]


def test_a_rank_with_fewer_batches_runs_along():
    calls = []

    def forward(inputs):
        calls.append(len(inputs))
        return torch.zeros(len(inputs), 3)

    batches = [(torch.zeros(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64))]
    counts = evaluate(forward, batches, torch.device("cpu"), spare=Spare(torch.zeros(1, 3, 2, 2), 3))
    assert calls == [4, 1, 1]
    assert counts.accuracy == 1.0


def test_fp16_is_refused(write_config):
    from fastpeft.config import load_config

    with pytest.raises(ConfigError, match="stage 3 reduces gradients before they are unscaled"):
        load_config(str(write_config(train={"zero": 3, "precision": "fp16"})), [])


def test_a_run_leaves_torchs_functions_as_they_were(train, write_config, tmp_path):
    linear, used = torch.nn.functional.linear, []
    begin = loop.Loop.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "run", lambda self, logs: used.append(torch.nn.functional.linear) or begin(self, logs))
        assert train(write_config(train={"zero": 3, "epochs": 2}, out=str(tmp_path / "out")))[0] == 0
    assert used and used[0] is not linear and torch.nn.functional.linear is linear
