"""Published mPLUG files: every tensor arrives in its place or is named, and what does not fit is one clear line."""

from __future__ import annotations

import math
import re

import pytest
import torch
from safetensors.torch import save_file

import fastpeft
from fastpeft import FastPEFTError
from fastpeft._compat import import_timm
from fastpeft.models.mplug import MPlug, MPlugConfig
from fastpeft.models.mplug.checkpoint import infer_config, load_checkpoint, save_checkpoint
from fastpeft.models.mplug.files import Checkpoint, read_state
from fastpeft.models.mplug.keys import TIED, Layout, model_name
from tests.models.mplug.published import expected, layout, pretrained, tensors, tie
from tests.models.mplug.tiny import TINY, make


def assert_holds(model: MPlug, wanted: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert set(state) == set(wanted)
    different = [name for name, tensor in wanted.items() if not torch.equal(state[name], tensor)]
    assert not different


def copies(model: MPlug) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def load(state: dict[str, torch.Tensor], model: MPlug | None = None):
    return load_checkpoint(Checkpoint("file", state), model or make())


# The layout.


@pytest.mark.parametrize(
    ("config", "entries", "with_copies", "used"),
    [
        (MPlugConfig.base(256), 1047, 2094, 344_437_818),
        (MPlugConfig.base(384), 1047, 2094, 344_683_578),
        (MPlugConfig.large(336), None, 2390, 565_252_410),
    ],
)
def test_every_key_of_the_published_layout_is_used_or_named(config, entries, with_copies, used):
    with torch.device("meta"):
        model = MPlug(config)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == used
    shapes = layout(config)
    if entries is not None:
        assert len(shapes) == entries
    assert len(layout(config, momentum=True)) == with_copies
    kinds = Layout(model.state_dict())
    taken = {model_name(name) for name in shapes} & kinds.names
    assert taken == kinds.names
    rest = {name for name in layout(config, momentum=True) if model_name(name) not in kinds.names} - set(TIED)
    assert [name for name in rest if kinds.group(model_name(name)) is None] == []
    cross = {name for name in rest if kinds.group(name) == "cross-attention of connected layers"}
    assert len(cross) == (10 if config.stride == 3 else 0)
    assert all(name.startswith("fusion_encoder.encoder.layer.9.crossattention.") for name in cross)


@pytest.mark.parametrize("config", [MPlugConfig.base(), MPlugConfig.base(384), MPlugConfig.large()])
def test_sizes_are_inferred(config):
    state = {name: torch.empty(shape, device="meta") for name, shape in layout(config).items()}
    assert infer_config(state) == config
    assert infer_config(state, image_size=config.patch_size * 2).image_size == config.patch_size * 2
    own = {name: state[name] for name in state if not re.match(r"fusion_encoder.*layer\.[0-5]\.", name)}
    assert infer_config(own) == config


def test_sizes_that_do_not_show_are_asked_for():
    state = tensors(TINY)
    with pytest.raises(FastPEFTError, match="width is 32, which heads of 64 do not divide; give num_heads"):
        infer_config(state)
    config = infer_config(state, num_heads=4, image_heads=3, stride=2)
    assert config == MPlugConfig(**{**TINY.to_dict(), "cls_id": 101, "sep_id": 102})
    del state["text_encoder.embeddings.word_embeddings.weight"]
    with pytest.raises(FastPEFTError, match=r"file: text_encoder\.embeddings\.word_embeddings\.weight.* is not in it"):
        infer_config(Checkpoint("file", state), num_heads=4, image_heads=3)
    with pytest.raises(FastPEFTError, match=r"it has no text_encoder\.encoder\.layer\.\*"):
        kept = {name: tensor for name, tensor in tensors(TINY).items() if "text_encoder.encoder" not in name}
        infer_config(kept, num_heads=4, image_heads=3)


# Loading.


@pytest.mark.parametrize(
    "form", ["model", "module", "state_dict", "bare", "module.", "fusion", "bert", "safetensors", "half", "legacy"]
)
def test_forms(tmp_path, form):
    state = tensors(TINY, momentum=form == "bare")
    wanted = expected(state, TINY)
    path = tmp_path / ("x.safetensors" if form == "safetensors" else "x.pth")
    if form == "safetensors":
        save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    elif form in ("fusion", "bert"):
        torch.save({"model": pretrained(state, form), "epoch": 3}, path)
    elif form == "module.":
        torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    elif form == "half":
        wanted = {name: tensor.half().float() for name, tensor in wanted.items()}
        torch.save({"model": tie({name: tensor.half() for name, tensor in state.items()})}, path)
    else:
        content = state if form == "bare" else {form if form != "legacy" else "model": state, "optimizer": {"x": 1}}
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    model = make()
    report = load_checkpoint(path, model)
    assert_holds(model, wanted)
    assert set(report.used) == set(wanted)
    assert report.unexpected == report.initial == ()
    assert ("momentum copies" in report.dropped) == (form in ("bare", "fusion", "bert"))


def test_report_counts_every_tensor_once():
    state = {**pretrained(tensors(TINY)), "something.else": torch.zeros(3)}
    report = load(state)
    dropped = [name for names in report.dropped.values() for name in names]
    given = [old for old, _ in report.renamed] + [name for name in report.used if name in state]
    assert sorted([*given, *dropped, *report.unexpected]) == sorted(state)
    assert report.unexpected == ("something.else",)
    counts = {group: len(names) for group, names in report.dropped.items()}
    assert counts == {
        "momentum copies": len(tensors(TINY)) + 1,
        "CLIP's text tower": 6 + 12,
        "CLIP's image projection": 1,
        "position ids": 3,
        "fusion embeddings": 5,
        "fusion layers that do not run": 2 * 26,
        "cross-attention of connected layers": 10,
        "heads and queues of pre-training": 10,
        "second names of tied tensors": 2,
    }
    text = str(report)
    assert text.startswith(f"file: {len(report.used)} tensors loaded, {len(report.renamed)} of them renamed\n")
    assert "cross-attention of connected layers (10)" in text
    assert "unexpected, not used (1): something.else" in text


def test_a_file_that_lacks_any_used_tensor_is_refused():
    state, model = tensors(TINY), make()
    before = copies(model)
    used = {old for old, _ in load(state).renamed} | (set(state) & set(before))
    assert len(used) == len(before)
    for name in sorted(used - set(TIED.values())):
        with pytest.raises(FastPEFTError, match=f"^file: 1 of the model's tensors are not in it: {re.escape(name)}$"):
            load({key: tensor for key, tensor in state.items() if key != name}, model)
    assert_holds(model, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_used_weight_that_is_no_number_is_refused(value):
    state, model = copies(make()), make()
    before = copies(model)
    name = "text_encoder.encoder.layer.0.intermediate.dense.bias"
    state[name][3] = value
    with pytest.raises(FastPEFTError, match=rf"file: {re.escape(name)} has values that are not finite numbers"):
        load(state, model)
    assert_holds(model, before)


def test_what_is_not_used_may_be_absent():
    state = tensors(TINY)
    wanted = expected(state, TINY)
    model = make()
    report = load({name: tensor for name, tensor in state.items() if model_name(name) in wanted}, model)
    assert_holds(model, wanted)
    assert report.dropped == {}


def test_a_fine_tuned_file_keeps_its_clean_names(tmp_path):
    """A name without a prefix to remove is not lost."""
    state = tensors(TINY)
    model = make()
    load(state, model)
    model.save(tmp_path / "x.pth")
    again = make(seed=1)
    load_checkpoint(tmp_path / "x.pth", again)
    assert_holds(again, expected(state, TINY))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("text_decoder.cls.predictions.transform.dense.bias", (31,), r"has shape \(31,\), expected \(32,\)$"),
        ("visual_encoder.visual.class_embedding", (47,), r"has shape \(47,\), expected \(48,\)$"),
        ("visual_encoder.visual.positional_embedding", (5, 47), r"has shape \(5, 47\), expected \(5, 48\)$"),
        ("visual_encoder.visual.positional_embedding", (17, 47), r"has shape \(17, 47\), expected \(5, 48\)$"),
        ("visual_encoder.visual.positional_embedding", (48,), r"has shape \(48,\), expected \(5, 48\)$"),
        ("visual_encoder.visual.positional_embedding", (7, 48), r"has shape \(1, 7, 48\), expected 1 \+ a square"),
        (
            "text_encoder.embeddings.position_embeddings.weight",
            (512, 32),
            r"has shape \(512, 32\), expected \(24, 32\)$",
        ),
    ],
)
def test_a_wrong_shape_is_one_clear_line(name, shape, message):
    model = make()
    before = copies(model)
    with pytest.raises(FastPEFTError, match=f"^file: {re.escape(name)} {message}"):
        load({**tensors(TINY), name: torch.zeros(shape)}, model)
    assert_holds(model, before)


def test_numbers_that_are_not_floating_point_are_refused():
    name = "text_encoder.embeddings.LayerNorm.bias"
    with pytest.raises(FastPEFTError, match=r"LayerNorm\.bias holds torch\.int8, expected the floating-point"):
        load({**tensors(TINY), name: torch.zeros(32, dtype=torch.int8)})


def test_more_layers_than_the_model_has_are_of_another_model():
    with pytest.raises(FastPEFTError, match=r"it has text_decoder\.bert\.encoder\.layer\.1\..*the model has no place"):
        load(tensors(TINY), make(decoder_layers=1))
    with pytest.raises(FastPEFTError, match=r"it has fusion_encoder\.encoder\.layer\.5\..*the model has no place"):
        load(tensors(TINY), make(fusion_layers=3))
    narrow = {"image_width": 32, "image_heads": 2}
    state = tensors(MPlugConfig(**{**TINY.to_dict(), **narrow}))
    with pytest.raises(FastPEFTError, match=r"it has visn_fc\.weight \(32, 48\), for which"):
        load({**state, "visn_fc.weight": torch.zeros(32, 48)}, make(**narrow))


def test_tied_tensors():
    state = tensors(TINY)
    matrix, words = next(iter(TIED.items()))
    wanted = expected(state, TINY)
    for absent in (*TIED, *TIED.values()):
        model = make()
        load({name: tensor for name, tensor in state.items() if name != absent}, model)
        assert_holds(model, wanted)
    state[matrix] = state[words].clone()
    load(state)
    state[matrix][3, 4] += 1e-3
    with pytest.raises(FastPEFTError, match=f"{re.escape(matrix)}.*and {re.escape(words)}.* are one tensor .* differ"):
        load(state)


def test_two_names_of_one_tensor():
    state, name = tensors(TINY), "text_encoder.embeddings.LayerNorm.bias"
    longer = name.replace("encoder.", "encoder.bert.")
    load({**state, longer: state[name].clone()})
    with pytest.raises(FastPEFTError, match=f"{re.escape(name)} and {re.escape(longer)} are two names of one tensor"):
        load({**state, longer: state[name] + 1})


def test_a_file_of_something_else_says_what_it_has(tmp_path):
    with pytest.raises(FastPEFTError, match=r"not in it: visual_encoder.*; it has conv\.weight"):
        load({"conv.weight": torch.zeros(2)})
    torch.save({"model": 3, "epoch": 1}, tmp_path / "x.pth")
    with pytest.raises(FastPEFTError, match=r"x\.pth: expected a dict of tensors, alone or under model"):
        read_state(tmp_path / "x.pth")
    with pytest.raises(FastPEFTError, match=r"y\.pth: no such file of weights"):
        read_state(tmp_path / "y.pth")
    (tmp_path / "y.safetensors").write_bytes(b"nothing")
    with pytest.raises(FastPEFTError, match=r"y\.safetensors: cannot be read as a safetensors file"):
        read_state(tmp_path / "y.safetensors")


# Position tables.


def bilinear(grid: torch.Tensor, side: int) -> torch.Tensor:
    """(n, n, D) -> (side, side, D): the weighted mean of the four cells whose centres are nearest."""
    n = grid.shape[0]
    result = torch.zeros(side, side, grid.shape[2])
    for i in range(side):
        for j in range(side):
            y, x = (max((at + 0.5) * n / side - 0.5, 0.0) for at in (i, j))
            top, left = math.floor(y), math.floor(x)
            for row, part in ((top, 1 - (y - top)), (top + 1, y - top)):
                for column, share in ((left, 1 - (x - left)), (left + 1, x - left)):
                    result[i, j] += part * share * grid[min(row, n - 1), min(column, n - 1)]
    return result


@pytest.mark.parametrize("size", [16, 48, 80])
def test_position_table_at_another_image_size(size):
    state = tensors(TINY)
    table = state["visual_encoder.visual.positional_embedding"]
    model = make(image_size=size)
    report = load(state, model)
    side = size // 16
    loaded = model.visual_encoder.pos_embed[0]
    assert torch.equal(loaded[0], table[0])
    torch.testing.assert_close(loaded[1:].view(side, side, -1), bilinear(table[1:].view(2, 2, -1), side))
    assert report.resized == f"position table of the image tower brought from 5 rows to {side**2 + 1}"
    assert report.resized in str(report)


# Writing.


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("changes", [{}, {"image_width": 32, "image_heads": 2, "stride": 4}])
def test_save_and_load(tmp_path, suffix, changes):
    model = make(**changes)
    path = tmp_path / "folder" / f"x.{suffix}"
    model.save(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    written = read_state(path).state
    assert set(written) <= set(layout(model.config))
    assert {model_name(name) for name in written} - set(TIED) == set(model.state_dict())
    shapes = layout(model.config)
    assert all(tuple(tensor.shape) == shapes[name] for name, tensor in written.items())
    again = MPlug.from_checkpoint(path)
    assert again.config == model.config
    assert_holds(again, model.state_dict())
    assert all(parameter.requires_grad for parameter in again.parameters())
    larger = MPlug.from_checkpoint(path, image_size=64)
    assert larger.visual_encoder.pos_embed.shape[1] == 17


def test_from_checkpoint_of_a_published_file(tmp_path):
    state = tensors(TINY)
    torch.save({"model": pretrained(state)}, tmp_path / "x.pth")
    model = MPlug.from_checkpoint(tmp_path / "x.pth", num_heads=4, image_heads=3, stride=2)
    assert_holds(model, expected(state, TINY))
    model = MPlug.from_checkpoint(tmp_path / "x.pth", config=TINY, image_size=48)
    assert model.config.cls_id == TINY.cls_id
    assert model.visual_encoder.pos_embed.shape[1] == 10
    with torch.no_grad():
        logits = model.eval()(torch.randn(1, 3, 48, 48), torch.tensor([[1, 5]]), None, torch.tensor([[1, 7, 9]]))
    assert logits.shape == (1, 3, 61)
    assert logits.isfinite().all()


def test_an_image_tower_of_another_form_keeps_its_names(tmp_path):
    def tower():
        vit = import_timm().models.vision_transformer.VisionTransformer
        return vit(img_size=32, patch_size=16, embed_dim=48, depth=2, num_heads=3, num_classes=0, init_values=1e-5)

    model = MPlug(TINY, tower())
    model.save(tmp_path / "x.safetensors")
    assert "visual_encoder.blocks.0.ls1.gamma" in read_state(tmp_path / "x.safetensors").state
    again = MPlug.from_checkpoint(tmp_path / "x.safetensors", visual_encoder=tower())
    assert_holds(again, model.state_dict())
    with pytest.raises(FastPEFTError, match=r"it has visual_encoder\.blocks\.0\.ls1\.gamma \(48,\), for which"):
        MPlug.from_checkpoint(tmp_path / "x.safetensors")


def test_what_cannot_be_written_says_why(tmp_path):
    model = make()
    with pytest.raises(FastPEFTError, match=r"x\.npz: a checkpoint's suffix must be one of \.safetensors, \.pth"):
        save_checkpoint(model, tmp_path / "x.npz")
    fastpeft.patch(model, fastpeft.LoRA(rank=2))
    with pytest.raises(FastPEFTError, match=r"tensors that are not its own: .*; unpatch it first"):
        model.save(tmp_path / "x.pth")
    assert list(tmp_path.iterdir()) == []
    fastpeft.unpatch(model, discard=True)
    model.save(tmp_path / "x.pth")


# At full size: 1.4 GB in memory; in the file each tensor is one number.


@pytest.mark.slow
def test_base(tmp_path):
    shapes = layout(MPlugConfig.base())
    state = {name: torch.tensor(i / 1024).expand(shape) for i, (name, shape) in enumerate(shapes.items())}
    tie(state)
    torch.save({"model": pretrained(state)}, tmp_path / "mplug_base.pth")
    model = MPlug.from_checkpoint(tmp_path / "mplug_base.pth", image_size=384)
    assert model.config == MPlugConfig.base(384)
    for name, tensor in expected(state, MPlugConfig.base()).items():
        value = model.state_dict()[name]
        assert value.min() == value.max() == tensor.flatten()[0], name
    model.save(tmp_path / "x.safetensors")
    assert MPlug.from_checkpoint(tmp_path / "x.safetensors").config == model.config
