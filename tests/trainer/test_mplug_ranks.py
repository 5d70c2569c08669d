"""mPLUG on two ranks, on the CPU, against one process at the same global batch."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from fastpeft.models.mplug import MPlug, MPlugConfig
from tests.thinned import EXHAUSTIVE
from tests.trainer import vl
from tests.trainer.conftest import ROOT
from tests.trainer.test_mplug import adapter, close, results, squares, write  # noqa: F401
from tests.trainer.test_ranks import LAUNCHER, free_port, torchrun

pytestmark = pytest.mark.skipif(LAUNCHER is None, reason="DeepSpeed's launcher is not installed")

METHODS = {
    "lora": {"name": "lora", "rank": 4, "targets": ["q", "k"]},
    "prefix": [{"name": "prefix", "length": 3, "form": "hidden"}, {"name": "classifier", "part": "transform"}],
    "image": {"name": "lora", "rank": 4, "targets": ["q", "k"], "stacks": ["image", "text", "fusion", "decoder"]},
    "prompts": [{"name": "prompt_tuning", "length": 2}, {"name": "classifier"}],
}
# SGD: what AdamW makes of a gradient hides its size, and noise where a gradient is zero.
TRAIN = {"steps": 20, "eval_every": 10, "optimizer": "sgd", "base_lr": 0.3, "checkpoint_every": "10 steps"}

# Weights as a model usually begins with let nothing through to queries and keys at this width.
LIVELY = 0.15

# Run as a rank: the training command, with a look at what the rank holds between two steps.
_LOOK = """
import json, os, sys
from fastpeft.trainer import loop, partitioned
seen = {"whole": 0, "left": 0, "most": 0}
LAST = []
init = partitioned.PartitionedStepper.__init__
def look(self, model, *rest):
    seen["whole"] = sum(p.numel() for p in model.parameters())
    init(self, model, *rest)
    self.model = model
    LAST.append(model)
    seen["held"] = sum(p.ds_tensor.numel() for p in model.parameters())
partitioned.PartitionedStepper.__init__ = look
from fastpeft.engine.post_norm import PostNormRun
run = PostNormRun.run
def looked(self, *rest):
    seen["most"] = max(seen["most"], sum(p.numel() for p in LAST[0].parameters()))
    return run(self, *rest)
PostNormRun.run = looked
step = loop.Loop._step
def stepped(self, *rest):
    step(self, *rest)
    seen["left"] = max(seen["left"], sum(p.numel() for p in self.stepper.model.parameters()))
    seen["outer"] = sum(p.ds_numel for _, p in self.stepper.model.ds_external_parameters())
loop.Loop._step = stepped
from fastpeft.train import main
code = main(sys.argv[1:])
# A file each: on the launcher's output, two ranks' lines may run into one.
with open(f"seen{os.environ['RANK']}.json", "w") as file:
    json.dump(seen, file)
sys.exit(code)
"""

# Run as a rank: the training command, with a look at what DeepSpeed is asked for.
_OFFLOADED = """
import json, os, sys
import deepspeed
initialize = deepspeed.initialize
def look(**arguments):
    with open(f"kept{os.environ['RANK']}.json", "w") as file:
        json.dump(arguments["config"]["zero_optimization"], file)
    return initialize(**arguments)
deepspeed.initialize = look
from fastpeft.train import main
sys.exit(main(sys.argv[1:]))
"""


def lively(root) -> dict[str, str]:
    """A model to begin with whose weights are so large that LoRA has gradients."""
    path = root / "lively.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        sizes = vl.config(root)["model"]["sizes"]
        model = MPlug.from_config(MPlugConfig(image_size=32, vocab_size=len(vl.VOCAB), **sizes))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.startswith("visual_encoder"):
                    parameter.add_(LIVELY * torch.randn_like(parameter))
        model.save(path)
    return {"checkpoint": str(path)}


@pytest.mark.parametrize(
    "kind, method, zero, cache",
    [
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("captions", "lora", 3, "off"),
                ("captions", "prefix", 2, "auto"),
                ("captions", "image", 3, "auto"),
                ("vqa", "prompts", 1, "off"),
            )
        ),
        *(
            pytest.param(*case, marks=EXHAUSTIVE)
            for case in (
                ("captions", "lora", 1, "auto"),
                ("captions", "prompts", 3, "auto"),
                ("vqa", "lora", 2, "off"),
                ("vqa", "prefix", 3, "auto"),
            )
        ),
    ],
)
def test_two_ranks_train_what_one_does(command, train, write, tmp_path, kind, method, zero, cache):  # noqa: F811
    options = {"train": TRAIN | {"cache_images": cache}, "method": METHODS[method]}
    if kind == "vqa":
        # A question's loss is a sum over its answer's tokens.
        options["train"]["base_lr"] = 0.05
    # 5 validation samples in batches of 4: one rank has nothing left while the other searches.
    options["data"] = {"val_size": 5, "test_size": 5}
    options["eval"] = {"batch_size": 2}
    if method in ("lora", "image"):
        options["model"] = lively(tmp_path)
    code, _, err = train(write(kind, out="alone", **options))
    assert code == 0, err
    options["train"] = options["train"] | {"zero": zero}
    done = command(write(kind, out="two", **options), launcher=torchrun(2))
    assert done.returncode == 0, done.stderr
    one, two = results(tmp_path / "alone"), results(tmp_path / "two")
    assert two["ranks"] == 2
    for first, second in zip(one["history"], two["history"], strict=True):
        assert second["train_loss"] == pytest.approx(first["train_loss"], rel=1e-5)
    # Without that, wrong gradients would show in nothing.
    assert one["history"][-1]["train_loss"] < 0.99 * one["history"][0]["train_loss"]
    if method in ("lora", "image"):
        # Far above what is let pass below.
        assert all(
            tensor.abs().max() > 1e-4 for name, tensor in adapter(tmp_path / "two").items() if name.endswith("B")
        )
    close(tmp_path / "two", tmp_path / "alone", rtol=1e-3, atol=1e-5)
    # Every sample once, whoever generated its text.
    assert read(tmp_path / "two") == read(tmp_path / "alone")


def read(out) -> list:
    return json.loads((out / "predictions" / "test.json").read_text())


@pytest.mark.slow
def test_an_image_that_only_one_rank_reads_is_named(command, write, tmp_path, squares):  # noqa: F811
    tree = json.loads((squares / "captions.json").read_text())
    # Of the images of an evaluation the second rank reads the second, and so on.
    image = [image for image in tree["images"] if image["split"] == "val"][1]
    whole = squares / f"{image['filepath']}_img" / image["filename"]
    image["filename"] = "truncated.png"
    whole.with_name("truncated.png").write_bytes(whole.read_bytes()[:60])
    (tmp_path / "captions.json").write_text(json.dumps(tree))
    data = dict.fromkeys(("train", "val", "test"), str(tmp_path / "captions.json"))
    done = command(write(data=data, train={"steps": 1, "warmup_steps": 0, "cache_images": "off"}), launcher=torchrun(2))
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if "error: " in line and "another rank has ended" not in line]
    assert len(told) == 1 and told[0].startswith("error: rank 1: ") and "truncated.png" in told[0], done.stderr
    assert "[rank0]: Traceback" not in done.stderr


@pytest.mark.slow
def test_each_of_two_ranks_holds_half_and_nothing_outlives_the_gather(write, environment, tmp_path):  # noqa: F811
    # Layers enough for one to be a small part.
    sizes = vl.config(tmp_path)["model"]["sizes"] | {"decoder_layers": 6}
    options = {"zero": 3, "steps": 4, "cache_images": "off"}
    config = write(train=options, method=METHODS["prompts"], model={"sizes": sizes})
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
        assert seen["whole"] / 2 <= seen["held"] < 0.52 * seen["whole"]
        # Two rows before each of two stacks are all that stays for the whole of a forward pass.
        assert seen["outer"] == 2 * 2 * 32
        assert seen["left"] < 0.1 * seen["whole"]
        # The layer that runs, the one that is fetched ahead, the embeddings and the prompts.
        assert 0 < seen["most"] < 0.35 * seen["whole"]


@pytest.mark.slow
def test_what_two_ranks_keep_in_the_hosts_memory_changes_nothing(train, write, environment, tmp_path):  # noqa: F811
    assert train(write(train=TRAIN, method=METHODS["prefix"], out="alone"))[0] == 0
    config = write(train=TRAIN | {"zero": 3, "offload": "all"}, method=METHODS["prefix"], out="two")
    script = tmp_path / "offloaded.py"
    script.write_text(_OFFLOADED)
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
        kept = json.loads((tmp_path / f"kept{rank}.json").read_text())
        assert [kept[place]["device"] for place in ("offload_optimizer", "offload_param")] == ["cpu", "cpu"]
    close(tmp_path / "two", tmp_path / "alone", rtol=1e-3, atol=1e-5)
    assert read(tmp_path / "two") == read(tmp_path / "alone")


@pytest.mark.slow
def test_a_run_goes_on_at_another_world_size_and_stage(command, train, write, tmp_path, monkeypatch):  # noqa: F811
    from tests.trainer.test_resume import Killed, interrupt_after

    options = {"train": TRAIN | {"checkpoint_every": "1 step"}, "method": METHODS["lora"], "model": lively(tmp_path)}
    assert train(write(out="whole", **options))[0] == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        with pytest.raises(Killed):
            train(write(out="cut", **options))
    done = command(write(out="cut", **options), "train.zero=3", launcher=torchrun(2))
    assert done.returncode == 0, done.stderr
    assert "resuming  after step 7" in done.stdout and "begun on 1 ranks, continued on 2" in done.stderr
    close(tmp_path / "cut", tmp_path / "whole", rtol=1e-3, atol=1e-5)
    assert all(tensor.dtype == torch.float32 for tensor in adapter(tmp_path / "cut").values())


@pytest.mark.slow
def test_two_nodes_of_a_hostfile_train_what_one_process_does(train, write, environment, tmp_path):  # noqa: F811
    # As docs/scale.md has it, with both nodes on this machine.
    options = {"method": METHODS["lora"], "model": lively(tmp_path)}
    assert train(write(train=TRAIN, out="alone", **options))[0] == 0
    config = write(train=TRAIN | {"zero": 2}, out="nodes", **options)
    (tmp_path / "hostfile").write_text("node-a slots=1\nnode-b slots=1\n")
    port = free_port()
    options = [
        "--hostfile",
        str(tmp_path / "hostfile"),
        "--no_ssh",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        port,
    ]
    script = [str(ROOT / "fastpeft" / "train.py"), "--config", str(config)]
    nodes = [
        subprocess.Popen(
            [LAUNCHER, *options, "--node_rank", str(number), *script],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    said = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert results(tmp_path / "nodes")["ranks"] == 2
    close(tmp_path / "nodes", tmp_path / "alone", rtol=1e-3, atol=1e-5)
