"""The examples of docs/extending.md, run as they stand; and what they add is as right as what is built in."""

from __future__ import annotations

import copy
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

import fastpeft
from fastpeft.methods import REGISTRY, from_dict
from fastpeft.models import families
from tests.tiny import images, vit

TEXT = (Path(__file__).parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
FILES = {m[1]: code for code in BLOCKS if (m := re.match(r"# file: (\S+)\n", code))}
SNIPPETS = [code for code in BLOCKS if not code.startswith("# file: ")]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The page's files where it says they go, in a folder that stands beside the library's own."""
    for name, code in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code, encoding="utf-8")
    loaded, known = set(sys.modules), dict(REGISTRY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "fastpeft/models/families")])
    monkeypatch.setattr(fastpeft.methods, "__path__", [*fastpeft.methods.__path__, str(tmp_path / "fastpeft/methods")])
    importlib.invalidate_caches()
    importlib.import_module("fastpeft.methods.adaptformer")
    yield tmp_path
    for name in set(sys.modules) - loaded:
        if "sketch" in name or "adaptformer" in name:
            del sys.modules[name]
    REGISTRY.clear()
    REGISTRY.update(known)


def run(snippet, **names):
    exec(compile(snippet, "docs/extending.md", "exec"), {"__name__": __name__, **names})


def test_the_page_has_the_examples_that_are_run_here():
    assert list(FILES) == [
        "fastpeft/methods/adaptformer.py",
        "sketch_net.py",
        "fastpeft/models/families/sketch.py",
    ]
    assert len(SNIPPETS) == 3


def test_the_method_in_ten_lines(installed):
    code = FILES["fastpeft/methods/adaptformer.py"]
    body = code[code.index("@dataclass") :].splitlines()
    assert len([line for line in body if line.strip() and '"""' not in line]) <= 10
    model, fresh = vit(), vit()
    run(SNIPPETS[0], model=model, fresh_model=fresh, folder=installed / "out")
    assert torch.equal(fresh.eval()(images()), model.eval()(images()))
    fastpeft.unpatch(model, discard=True)
    assert model.state_dict().keys() == vit().state_dict().keys()


def test_the_method_is_the_equation(installed):
    method = from_dict({"name": "adaptformer", "hidden": 8, "scale": 0.1})
    built_in = fastpeft.ParallelAdapter(8, bias=True, scale=0.1, locations=("ffn",))
    x = images(dtype=torch.float64)
    models = [fastpeft.patch(vit(dtype=torch.float64), m).double() for m in (method, built_in)]
    torch.testing.assert_close(models[0].eval()(x), vit(dtype=torch.float64).eval()(x))  # the identity at the start
    with torch.no_grad():
        for one, other in zip(*(fastpeft.trainable_parameters(m) for m in models), strict=True):
            one.copy_(other.normal_(std=0.3))
    torch.testing.assert_close(models[0](x), models[1](x))


def test_a_method_that_only_chooses(installed):
    model = vit()
    run(SNIPPETS[1], model=model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("head")}
    assert trained == {f"blocks.{i}.norm{j}.{kind}" for i in range(3) for j in (1, 2) for kind in ("weight", "bias")}


def test_the_family(installed):
    run(SNIPPETS[2], drawings=torch.randn(3, 12, 8))


METHODS = {
    "none": None,
    "full": fastpeft.Full(),
    "bitfit": fastpeft.BitFit(),
    "lora": fastpeft.LoRA(2, alpha=3, targets=("q", "k", "v", "o", "fc1", "fc2")),
    "vpt": fastpeft.VPT(4, dropout=0.0),
    "vpt-shallow": fastpeft.VPT(4, deep=False),
    "prefix": fastpeft.PrefixTuning(4),
    "adapter": fastpeft.Adapter(8),
}


def literal_forward(net, x, extra):
    """SketchNet's own forward with W + B A in place of W and prompts in front of the strokes."""
    net = copy.deepcopy(net)
    paths = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "attention.out"}
    paths |= {"fc1": "ffn.0", "fc2": "ffn.2"}
    x = net.embed(x) + net.positions
    carried = 0
    for index, layer in enumerate(net.layers):
        for role, path in paths.items():
            a = extra.get(f"layers.{index}.lora.{role}.A")
            if a is not None:
                layer.get_submodule(path).weight.data += 1.5 * extra[f"layers.{index}.lora.{role}.B"] @ a
        prompts = extra.get(f"layers.{index}.vpt.prompts")
        if prompts is not None:
            x = torch.cat((prompts.expand(len(x), -1, -1), x[:, carried:]), dim=1)
            carried = len(prompts)
        x = layer(x)
    return net.classify(net.norm(x[:, carried:]).mean(dim=1))


@pytest.mark.parametrize("method", METHODS)
def test_the_family_is_exact(method, installed):
    from sketch_net import SketchNet

    plain = SketchNet().double()
    net = fastpeft.patch(copy.deepcopy(plain), METHODS[method]).double()
    x = torch.randn(3, 12, 8, dtype=torch.float64)
    new = {name: t for name, t in net.state_dict().items() if name not in plain.state_dict()}
    if method in ("lora", "vpt", "vpt-shallow"):
        for tensor in new.values():
            tensor.normal_(std=0.2)
    if method != "prefix":
        torch.testing.assert_close(net.eval()(x), literal_forward(plain, x, new))
    net.train()(x).sum().backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    prefix = fastpeft.frozen_prefix(net)
    if prefix is not None:
        torch.testing.assert_close(prefix.decoder(prefix.encode(x)), net(x))
    assert [path for path, _ in fastpeft.summary(net).fused] == [f"layers.{i}" for i in range(3)]
    fastpeft.unpatch(net, discard=True)
    assert type(net) is SketchNet and net.state_dict().keys() == plain.state_dict().keys()


def test_layers_that_the_family_does_not_know(installed):
    from sketch_net import SketchLayer, SketchNet

    class Gated(SketchLayer):
        pass

    net = SketchNet()
    net.layers[1] = Gated(32, 2)
    with pytest.raises(fastpeft.UnsupportedModelError, match=r"layers\.1: a Gated is not a SketchLayer"):
        fastpeft.patch(net)


def test_a_family_sleeps_until_its_library_is_loaded(installed):
    assert "sketch_net" not in sys.modules
    fastpeft.patch(vit())
    assert "sketch_net" not in sys.modules
    assert not [family for family in families.families() if family.requires == "sketch_net"]
