"""Every stage of the model against the equations written out, in float64, padding included."""

from __future__ import annotations

import pytest
import torch

from fastpeft.models.mplug import DecoderCache, MPlug, MPlugConfig, Stream
from tests.models.mplug import written
from tests.models.mplug.tiny import TINY, batch, make


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def double(**changes) -> MPlug:
    return make(**changes).double()


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# A text stream of five rows, of which the later samples have fewer; a real row sees real rows only, so that rows of
# padding agree with the equations as well.
TEXT_MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
IDS = torch.tensor([[1, 7, 9, 33, 60], [1, 5, 7, 0, 0], [1, 0, 0, 0, 0]])


@torch.no_grad()
def test_image_tower():
    model = double(image_size=48)
    images = states(2, 3, 48, 48)
    found = model.encode_image(images)
    tokens = written.image_tower(model.state_dict(), images, patch=16, depth=2, heads=3)
    assert tokens.shape == (2, 10, 48) and found.mask is None
    close(model.visual_encoder.forward_features(images), tokens)
    close(found.states, written.projected(model.state_dict(), tokens))


@torch.no_grad()
def test_image_tower_of_the_same_width_has_no_projection():
    model = double(image_width=32, image_heads=2)
    assert not any(name.startswith("visn") for name in model.state_dict())
    images = states(2, 3, 32, 32)
    close(model.encode_image(images).states, written.image_tower(model.state_dict(), images, 16, 2, 2))


@torch.no_grad()
def test_text_encoder():
    model = double(text_layers=3)
    found = model.encode_text(IDS, TEXT_MASK)
    close(found.states, written.text_encoder(model.state_dict(), IDS, TEXT_MASK, layers=3, heads=4))
    assert found.mask is TEXT_MASK
    whole = model.encode_text(IDS)
    close(whole.states, written.text_encoder(model.state_dict(), IDS, torch.ones(3, 5), layers=3, heads=4))
    assert whole.mask is None


@torch.no_grad()
def test_positions_begin_at_zero_and_end_at_the_table():
    model = double()
    ids = torch.arange(1, 25)[None]
    expected = written.text_encoder(model.state_dict(), ids, torch.ones(1, 24), layers=2, heads=4)
    close(model.encode_text(ids).states, expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "layers, stride, connected", [(6, 3, [3]), (4, 2, [2]), (3, 1, [1, 2]), (6, 6, []), (5, 2, [2, 4])]
)
def test_fusion(layers, stride, connected):
    model = double(fusion_layers=layers, stride=stride, text_layers=3)
    state = model.state_dict()
    numbers = [int(name) for name in model.fusion_encoder.encoder.layer]
    assert numbers == list(range(3, 3 + layers))
    without = {n for n in numbers if f"fusion_encoder.encoder.layer.{n}.crossattention.self.query.weight" not in state}
    assert without == {3 + relative for relative in connected}
    t, v = states(3, 5, 32), states(3, 7, 32, seed=1)
    image, text = model.fuse(Stream(t, TEXT_MASK), Stream(v))
    expected_v, expected_t = written.fusion(state, t, TEXT_MASK, v, 3, layers, stride, heads=4)
    close(image.states, expected_v)
    close(text.states, expected_t)
    assert image.mask is None and text.mask is TEXT_MASK
    if not connected:
        assert image.states is v
    image, text = model.fuse(Stream(t), Stream(v))
    expected_v, expected_t = written.fusion(state, t, torch.ones(3, 5), v, 3, layers, stride, heads=4)
    close(image.states, expected_v)
    close(text.states, expected_t)


@torch.no_grad()
def test_masked_image_rows_are_seen_by_nobody():
    model = double()
    t, v = states(3, 5, 32), states(3, 7, 32, seed=1)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[:, 5:] = False
    image, text = model.fuse(Stream(t, TEXT_MASK), Stream(v, mask))
    shorter, expected = model.fuse(Stream(t, TEXT_MASK), Stream(v[:, :5]))
    close(text.states[TEXT_MASK], expected.states[TEXT_MASK])
    close(image.states[:, :5], shorter.states)


@torch.no_grad()
def test_memory():
    model = double()
    image = Stream(states(3, 5, 32))
    memory = model.memory(image, IDS, TEXT_MASK)
    state = model.state_dict()
    t = written.text_encoder(state, IDS, TEXT_MASK, 2, 4)
    close(memory.states, torch.cat(written.fusion(state, t, TEXT_MASK, image.states, 2, 4, 2, 4), 1))
    assert torch.equal(memory.mask, torch.cat((torch.ones(3, 5, dtype=torch.bool), TEXT_MASK), 1))
    assert model.memory(image, IDS).mask is None
    raw = model.memory(image, None, route="image")
    assert raw.states is image.states and raw.mask is None


@torch.no_grad()
def test_decoder():
    model = double(decoder_layers=3)
    memory = states(3, 8, 32)
    memory_mask = torch.ones(3, 8, dtype=torch.bool)
    memory_mask[0, 6:] = memory_mask[2, 7:] = False
    expected = written.decoder(model.state_dict(), IDS, TEXT_MASK, memory, memory_mask, layers=3, heads=4)
    close(model.decode(IDS, TEXT_MASK, Stream(memory, memory_mask)), expected)
    everything = torch.ones(3, 8)
    expected = written.decoder(model.state_dict(), IDS, torch.ones(3, 5), memory, everything, layers=3, heads=4)
    close(model.decode(IDS, None, Stream(memory)), expected)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[5], [1, 1, 1, 1, 1], [2, 3], [1, 4]])
@pytest.mark.parametrize("masked", [False, True])
def test_decoder_with_a_cache(cuts, masked):
    model = double()
    memory, memory_mask = states(3, 8, 32), torch.ones(3, 8, dtype=torch.bool)
    memory_mask[1, 3:] = False
    mask = TEXT_MASK if masked else torch.ones(3, 5, dtype=torch.bool)
    expected = written.decoder(model.state_dict(), IDS, mask, memory, memory_mask, layers=2, heads=4)
    cache, parts, first = DecoderCache(), [], 0
    for cut in cuts:
        part = slice(first, first + cut)
        given = Stream(memory, memory_mask) if first == 0 else None
        parts.append(model.decode(IDS[:, part], mask[:, part] if masked else None, given, cache))
        first += cut
    assert cache.length == 5
    close(torch.cat(parts, 1), expected)


@torch.no_grad()
def test_rows_of_a_cache_are_picked():
    model = double()
    memory, memory_mask = states(3, 8, 32), torch.ones(3, 8, dtype=torch.bool)
    memory_mask[1, 3:] = False
    index = torch.tensor([1, 1, 0, 2])
    expected = written.decoder(
        model.state_dict(), IDS[index], TEXT_MASK[index], memory[index], memory_mask[index], 2, 4
    )
    cache = DecoderCache()
    model.decode(IDS[:, :3], TEXT_MASK[:, :3], Stream(memory, memory_mask), cache)
    cache.reorder(index)
    close(model.decode(IDS[index, 3:], TEXT_MASK[index, 3:], None, cache), expected[:, 3:])


@torch.no_grad()
def test_the_whole_forward():
    model, given = double(), batch(dtype=torch.float64)
    state = model.state_dict()
    v = written.projected(state, written.image_tower(state, given.images, 16, 2, 3))
    t = written.text_encoder(state, given.ids, given.mask, 2, 4)
    memory = torch.cat(written.fusion(state, t, given.mask, v, 2, 4, 2, 4), 1)
    memory_mask = torch.cat((torch.ones(3, v.shape[1]), given.mask), 1)
    real = given.text != 0
    expected = written.decoder(state, given.text, real, memory, memory_mask, 2, 4)
    close(model(given.images, given.ids, given.mask, given.text, real), expected)
    expected = written.decoder(state, given.text, real, v, torch.ones(3, v.shape[1]), 2, 4)
    close(model(given.images, given.ids, given.mask, given.text, real, route="image"), expected)


def test_dropout_stands_where_bert_has_it(monkeypatch):
    model = make(dropout=0.2, attention_dropout=0.3, image_depth=1).train()
    assert [m.p for n, m in model.visual_encoder.named_modules() if isinstance(m, torch.nn.Dropout) and m.p] == [0.3]
    assert model.visual_encoder.blocks[0].attn.attn_drop.p == 0.3
    called, rates = [], []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and not name.startswith("visual_encoder"):
            module.register_forward_hook(lambda m, *_, name=name: called.append((name, m.p)))
    inner = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *a, dropout_p=0.0, **k: rates.append(dropout_p) or inner(*a, dropout_p=dropout_p, **k),
    )
    image = Stream(torch.randn(3, 5, 32))
    assert model.project_image(torch.randn(3, 5, 48)).states.requires_grad
    model.decode(IDS, TEXT_MASK, model.memory(image, IDS, TEXT_MASK))
    layer = ("attention.output.dropout", "output.dropout")
    crossing = ("attention.output.dropout", "crossattention.output.dropout", "output.dropout")
    expected = ["visn_dropout", "text_encoder.embeddings.dropout"]
    expected += [f"text_encoder.encoder.layer.{n}.{d}" for n in (0, 1) for d in layer]
    expected += [f"fusion_encoder.encoder.layer.{n}.{d}" for n in (2, 3, 4, 5) for d in (layer if n == 4 else crossing)]
    expected += ["text_decoder.bert.embeddings.dropout"]
    expected += [f"text_decoder.bert.encoder.layer.{n}.{d}" for n in (0, 1) for d in crossing]
    assert called == [(name, 0.2) for name in expected]
    assert rates == [0.3] * (2 + 4 + 3 + 2 * 2)
    rates.clear()
    model.eval().encode_text(IDS, TEXT_MASK)
    assert rates == [0.0] * 2


def test_start_of_the_weights():
    model = MPlug.from_config(MPlugConfig(**{**TINY.to_dict(), "width": 64, "vocab_size": 200}))
    for name, p in model.named_parameters():
        if name.startswith("visual_encoder") or p.numel() < 128:
            continue
        if name.endswith("LayerNorm.weight"):
            assert (p == 1).all()
        elif name.endswith("bias"):
            assert not p.any(), name
        else:
            assert p.mean().abs() < 0.01 and 0.015 < p.std() < 0.025, name
