"""Numbers of parameters as the shapes of the published models give them, without any memory; sizes that are refused."""

from __future__ import annotations

import pytest
import torch

from fastpeft import FastPEFTError
from fastpeft.models.mplug import DecoderCache, MPlug, MPlugConfig, Stream
from fastpeft.models.mplug.stream import join
from tests.models.mplug.tiny import TINY, batch, make


def meta(config: MPlugConfig) -> MPlug:
    with torch.device("meta"):
        return MPlug(config)


@pytest.fixture(scope="module")
def base():
    return meta(MPlugConfig.base())


@pytest.fixture(scope="module")
def large():
    return meta(MPlugConfig.large())


def count(model, path: str = "", without: str = "(none)") -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(path) and without not in name)


PARTS = {
    "visual_encoder": 85_845_504,
    "visual_encoder.cls_token": 768,
    "visual_encoder.pos_embed": 197_376,
    "visual_encoder.patch_embed": 589_824,
    "visual_encoder.norm_pre": 1_536,
    "visual_encoder.norm.": 1_536,
    "visual_encoder.blocks": 85_054_464,
    "visual_encoder.blocks.0.": 7_087_872,
    "visual_encoder.blocks.0.attn.qkv": 1_771_776,
    "visual_encoder.blocks.0.attn.proj": 590_592,
    "visual_encoder.blocks.0.mlp.fc1": 2_362_368,
    "visual_encoder.blocks.0.mlp.fc2": 2_360_064,
    "visual_encoder.blocks.0.norm": 3_072,
    "text_encoder": 66_364_416,
    "text_encoder.embeddings": 23_837_184,
    "text_encoder.embeddings.word": 23_440_896,
    "text_encoder.embeddings.position": 393_216,
    "text_encoder.embeddings.token_type": 1_536,
    "text_encoder.embeddings.LayerNorm": 1_536,
    "text_encoder.encoder.layer.0.": 7_087_872,
    "text_encoder.encoder.layer.0.attention": 2_363_904,
    "text_encoder.encoder.layer.0.intermediate": 2_362_368,
    "text_encoder.encoder.layer.0.output": 2_361_600,
    "fusion_encoder": 54_346_752,
    "fusion_encoder.encoder.layer.6.": 9_451_776,
    "fusion_encoder.encoder.layer.9.": 7_087_872,
    "text_decoder": 137_881_146,
    "text_decoder.bert.embeddings": 23_837_184,
    "text_decoder.bert.encoder.layer.11.": 9_451_776,
    "text_decoder.cls": 622_650,
    "text_decoder.cls.predictions.transform.dense": 590_592,
    "text_decoder.cls.predictions.transform.LayerNorm": 1_536,
    "text_decoder.cls.predictions.bias": 30_522,
}


@pytest.mark.parametrize("path", PARTS)
def test_base_by_part(base, path):
    assert count(base, path) == PARTS[path]


def test_base_as_a_whole(base):
    assert count(base) == 344_437_818
    assert count(base, "visual_encoder") + count(base, "text_decoder") == 223_726_650
    assert len({name.split(".")[0] for name, _ in base.named_parameters()}) == 4


def test_base_at_another_image_size():
    model = meta(MPlugConfig.base(384))
    assert count(model) == 344_683_578
    assert count(model, "visual_encoder.pos_embed") == 443_136
    assert model.config.image_tokens == model.visual_encoder.pos_embed.shape[1] == 577


def test_large(large):
    assert count(large) == 565_252_410
    assert count(large, "visual_encoder") == 304_293_888 - 786_432
    assert count(large, "visual_encoder.blocks.23.") == 12_596_224
    assert count(large, "visual_encoder.pos_embed") == 590_848
    assert count(large, "visual_encoder.patch_embed") == 602_112
    assert count(large, "visn_fc") == 787_200 and count(large, "visn_layer_norm") == 1_536
    assert count(large, "text_encoder") == 66_364_416 and count(large, "text_decoder") == 137_881_146
    assert count(large, "fusion_encoder") == 6 * 9_451_776


def test_which_fusion_layers_run(base, large):
    assert list(base.config.fusion_numbers) == list(large.config.fusion_numbers) == [6, 7, 8, 9, 10, 11]
    for model, connected in ((base, [9]), (large, [])):
        layers = model.fusion_encoder.encoder.numbered()
        assert [number for number, _ in layers] == [6, 7, 8, 9, 10, 11]
        assert [number for number, layer in layers if layer.crossattention is None] == connected
        assert [n for n in model.config.fusion_numbers if model.config.connected(n)] == connected


@torch.no_grad()
def test_shapes_from_stage_to_stage(base):
    base.eval()
    image = base.encode_image(torch.empty(2, 3, 256, 256, device="meta"))
    text = base.encode_text(torch.empty(2, 9, dtype=torch.int64, device="meta"))
    v, t = base.fuse(text, image)
    memory = join(v, t)
    logits = base.decode(torch.empty(2, 4, dtype=torch.int64, device="meta"), None, memory)
    assert image.states.shape == v.states.shape == (2, 257, 768)
    assert text.states.shape == t.states.shape == (2, 9, 768)
    assert memory.states.shape == (2, 266, 768) and logits.shape == (2, 4, 30522)


def test_norms_and_activations(base):
    assert {m.eps for m in base.visual_encoder.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}
    others = (base.text_encoder, base.fusion_encoder, base.text_decoder)
    assert {m.eps for part in others for m in part.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-12}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_heads": 5}, "width must be a positive multiple of its 5 heads, got 32"),
        ({"width": 0}, "width must be a positive"),
        ({"image_heads": 0}, "image_width must be a positive"),
        ({"image_size": 40}, "image_size must be a multiple of the patch size 16, got 40"),
        ({"image_size": 0}, "image_size must be a"),
        ({"text_layers": 0}, "text_layers must be at least 1, got 0"),
        ({"fusion_layers": 0}, "fusion_layers must be at least 1"),
        ({"decoder_layers": -1}, "decoder_layers must be at least 1, got -1"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"image_depth": 0}, "image_depth must be at least 1"),
        ({"max_positions": 0}, "max_positions must be at least 1"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"intermediate": 0}, "intermediate must be at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"attention_dropout": -0.1}, r"attention_dropout must be in \[0, 1\), got -0.1"),
        ({"image_size": "32"}, "image_size must be an integer, got '32'"),
        ({"width": 32.0}, "width must be an integer, got 32.0"),
        ({"stride": None}, "stride must be an integer, got None"),
        ({"dropout": "0.1"}, r"dropout must be in \[0, 1\), got '0.1'"),
        ({"sizes": 3}, "has no size 'sizes'; it has: attention_dropout, cls_id,"),
    ],
    ids=str,
)
def test_sizes_that_are_refused(changes, message):
    with pytest.raises(FastPEFTError, match=message) as caught:
        MPlugConfig.from_dict({**TINY.to_dict(), **changes})
    assert "\n" not in str(caught.value)


def test_sizes_as_a_dict():
    for config in (TINY, MPlugConfig.base(384), MPlugConfig.large(text_layers=3)):
        assert MPlugConfig.from_dict(config.to_dict()) == config
    assert MPlugConfig.large(stride=2).stride == 2
    assert MPlugConfig.large().image_tokens == 577


def test_an_image_tower_of_another_width():
    with pytest.raises(FastPEFTError, match="the image tower is 48 wide, the configuration says image_width 64"):
        MPlug(MPlugConfig(**{**TINY.to_dict(), "image_width": 64, "image_heads": 4}), make().visual_encoder)


def test_texts_that_are_too_long():
    model, given = make(), batch()
    message = "a text of 25 tokens is longer than the model's 24"
    long = torch.ones(3, 25, dtype=torch.int64)
    with pytest.raises(FastPEFTError, match=message):
        model.encode_text(long)
    memory = Stream(torch.zeros(3, 4, 32))
    with pytest.raises(FastPEFTError, match=message):
        model.decode(long, None, memory)
    cache = DecoderCache()
    model.decode(long[:, :24], None, memory, cache)
    with pytest.raises(FastPEFTError, match=message):
        model.decode(long[:, :1], None, None, cache)
    # The last token of a text is predicted and never read.
    model.token_losses(long, memory)
    assert given.ids.shape[1] < 24


def test_inputs_that_do_not_fit():
    model, given = make(), batch()
    image = Stream(torch.zeros(3, 4, 32))
    with pytest.raises(FastPEFTError, match="images of 32 x 32 pixels are expected, got 40 x 32"):
        model.encode_image(torch.zeros(3, 3, 40, 32))
    with pytest.raises(FastPEFTError, match="route must be one of fused, image, got 'raw'"):
        model.memory(image, given.ids, given.mask, route="raw")
    with pytest.raises(FastPEFTError, match=r'the route "fused" reads a text beside the image: give ids \(B, L\)'):
        model.memory(image, None)
    assert model.memory(image, None, route="image") is image
    with pytest.raises(FastPEFTError, match="each image needs one text, got 3 images and 2 texts"):
        model.memory(image, given.ids[:2], given.mask[:2])
    for token in (-1, TINY.vocab_size):
        message = f"the text has token {token}, but the model's vocabulary has {TINY.vocab_size}"
        with pytest.raises(FastPEFTError, match=message):
            model.encode_text(torch.full((3, 2), token))
        with pytest.raises(FastPEFTError, match=message):
            model.decode(torch.full((3, 1), token), None, image)
        # The last token is only a target.
        text = given.text.clone()
        text[0, -1] = token
        with pytest.raises(FastPEFTError, match=message):
            model.caption_loss(text, image)
    with pytest.raises(FastPEFTError, match="the decoder needs a memory, or a cache that has seen one"):
        model.decode(given.text, None, None)
    with pytest.raises(FastPEFTError, match="the decoder needs a memory, or a cache that has seen one"):
        model.decode(given.text, None, None, DecoderCache())
    with pytest.raises(FastPEFTError, match=r"a mask must be boolean and \(3, 5\), got torch.int64 \(3, 5\)"):
        model.encode_text(given.ids, given.mask.long())
    with pytest.raises(FastPEFTError, match=r"a mask must be boolean and \(3, 6\), got torch.bool \(3, 5\)"):
        model.decode(given.text, given.mask, image)
