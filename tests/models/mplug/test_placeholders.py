"""Files whose pickles name classes: the tensors are read, and nothing of the file runs."""

from __future__ import annotations

import argparse
import enum
import pickle
import sys
import types
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

from fastpeft import FastPEFTError
from fastpeft.models.mplug.checkpoint import load_checkpoint
from fastpeft.models.mplug.files import read_state
from fastpeft.models.mplug.placeholders import Placeholder, read_archive
from tests.models.mplug.published import expected, tensors
from tests.models.mplug.tiny import TINY, make


class Runs:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def absent_classes(monkeypatch) -> types.ModuleType:
    """A module with classes of the kinds that configurations are of; gone again when the test ends."""
    module = types.ModuleType("absent_package")

    class Mapping(OrderedDict):
        pass

    class EasyDict(dict):
        pass

    class Sequence(list):
        pass

    class Names(set):
        pass

    class Slots:
        __slots__ = ("a",)

    class Plain:
        def __init__(self, value):
            self.value = value

        def __setstate__(self, state):
            raise AssertionError("code of a class was run")

    class Kind(enum.Enum):
        BASE = 1

    for kind in (Mapping, EasyDict, Sequence, Names, Slots, Plain, Kind):
        kind.__module__, kind.__qualname__ = module.__name__, kind.__name__
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def configuration(m: types.ModuleType):
    slots = m.Slots()
    slots.a = m.Sequence([1, m.Plain(torch.ones(2))])
    config = m.Mapping(image_res=256, inner=m.EasyDict(lr=1e-3, betas=m.Sequence([0.9])), names=m.Names({"a", "b"}))
    config.comment = m.Plain("x")
    return {"yaml": config, "slots": slots, "kind": m.Kind.BASE, "args": argparse.Namespace(lr=1, more=config)}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("where", ["beside", "around", "protocol 4"])
def test_unknown_classes(tmp_path, monkeypatch, where):
    state = tensors(TINY)
    module = absent_classes(monkeypatch)
    content = {"model": state, "config": configuration(module), "epoch": 3}
    if where == "around":
        content = module.EasyDict(module=module.Mapping(state), config=configuration(module))
    torch.save(content, tmp_path / "x.pth", pickle_protocol=4 if where == "protocol 4" else 2)
    monkeypatch.delitem(sys.modules, module.__name__)
    model = make()
    report = load_checkpoint(tmp_path / "x.pth", model)
    held = model.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in expected(state, TINY).items())
    assert {f"absent_package.{name}" for name in ("Mapping", "EasyDict", "Kind")} <= set(report.placeholders)
    assert "absent_package.EasyDict" in str(report)
    assert "absent_package" not in sys.modules


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["config", "model", "around"])
def test_nothing_runs(tmp_path, place, legacy):
    marker = tmp_path / "marker"
    code = f"open({str(marker)!r}, 'w').close()"
    state = tensors(TINY)
    bad = [Runs(eval, code), Runs(exec, code), Runs(open, str(marker), "w"), Runs(marker.touch), Runs(print, code)]
    bad.append(Runs(getattr, Runs(__import__, "os"), "system"))
    content = {"model": state, "config": bad}
    if place == "model":
        content = {"model": {**state, "x": bad[0], "y": bad[1]}}
    if place == "around":
        content = Runs(eval, code)
    path = tmp_path / "x.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    model = make()
    if legacy or place == "around":
        with pytest.raises(FastPEFTError, match=r"x\.pth: "):
            load_checkpoint(path, model)
    else:
        report = load_checkpoint(path, model)
        assert "builtins.eval" in report.placeholders or "__builtin__.eval" in report.placeholders
        assert torch.equal(model.text_decoder.cls.predictions.bias, state["text_decoder.cls.predictions.bias"])
    assert not marker.exists()
    if not legacy and place != "model":
        # The file is what it seems: a full unpickle would have run it.
        torch.load(path, weights_only=False)
        assert marker.exists()


def test_functions_that_make_tensors_cannot_be_changed(tmp_path):
    pickled = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__code__K\x01sb."
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", pickled)
    with pytest.raises(FastPEFTError, match="sets attributes of a function"):
        read_archive(tmp_path / "x.pth")


def tree(state: dict[str, torch.Tensor]) -> nn.Module:
    """Modules in modules, with these names."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        if tensor.is_floating_point():
            module.register_parameter(last, nn.Parameter(tensor))
        else:
            module.register_buffer(last, tensor)
    return root


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript(tmp_path):
    """CLIP's published files are such archives; half-precision, with constants of their own beside the tensors."""
    state = {
        "visual.conv1.weight": torch.randn(4, 3, 2, 2).half(),
        "visual.transformer.resblocks.0.ln_1.weight": torch.randn(4),
        "visual.transformer.resblocks.1.ln_1.weight": torch.randn(2, 4).t(),
        "logit_scale": torch.tensor(3.0),
        "input_resolution": torch.tensor(224),
    }
    torch.jit.save(torch.jit.script(tree(state)), tmp_path / "clip.pt")
    read = read_state(tmp_path / "clip.pt").state
    assert set(read) == set(state)
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in state.items())


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool]
)
def test_tensors_are_read_as_torch_reads_them(tmp_path, dtype):
    values = torch.arange(24).reshape(2, 3, 4).to(dtype)
    content = {
        "whole": values,
        "part": values[1, :, 1:3].t(),
        "shared": values.view(-1),
        "parameter": nn.Parameter(values.clone()) if dtype.is_floating_point else values,
        "empty": torch.empty(0, 3, dtype=dtype),
        "scalar": values[1, 1, 1],
    }
    torch.save({**content, "x": Runs(print)}, tmp_path / "x.pth")
    read, unknown = read_archive(tmp_path / "x.pth")
    assert isinstance(read.pop("x"), Placeholder)
    assert len(unknown) == 1
    for name, tensor in content.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], tensor)
    read["whole"].zero_()
    assert not read["shared"].any()
    assert torch.equal(torch.load(tmp_path / "x.pth", weights_only=False)["whole"], values), "the file is unchanged"


def repack(path, target, compression=zipfile.ZIP_STORED, **changed: bytes) -> None:
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w", compression) as out:
        for entry in source.infolist():
            name = entry.filename.split("/", 1)[1]
            out.writestr(entry.filename, changed.get(name.replace("/", "_").replace(".", "_"), source.read(entry)))


def test_compressed_and_unaligned_archives(tmp_path):
    torch.save({"a": torch.arange(9.0), "x": Runs(print)}, tmp_path / "x.pth")
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        repack(tmp_path / "x.pth", tmp_path / "y.pth", compression)
        assert torch.equal(read_state(tmp_path / "y.pth").state["a"], torch.arange(9.0))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
def test_damaged_files(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.arange(9.0), "x": Runs(print)}, path)
    whole = path.read_bytes()
    bad = tmp_path / "y.pth"
    for content in (whole[: len(whole) // 2], b"", b"text", pickle.dumps(Runs(print))):
        bad.write_bytes(content)
        with pytest.raises(FastPEFTError, match=r"y\.pth: "):
            read_state(bad)
    for changed in ({"data_0": b"12345678"}, {"data_pkl": b"\x80\x02}"}, {"byteorder": b"big"}, {"data_pkl": b""}):
        repack(path, bad, **changed)
        with pytest.raises(FastPEFTError, match=r"y\.pth: .*(cannot be read as a torch file|endian)"):
            read_state(bad)
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("a/readme", "x")
    with pytest.raises(FastPEFTError, match=r"y\.pth: expected a torch file with one data\.pkl in it, got 0"):
        read_state(bad)
