"""mPLUG's decoder as its original generates: without caches, the whole text in every step, the memory once a beam."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.models.mplug import DecoderCache, MPlug, Stream
from fastpeft.models.mplug.stream import LayerCache


class WithoutCaches:
    """What `fastpeft.models.mplug.generate` asks of a model. Its cache holds the text and the memory themselves.

    Args:
        model: in evaluation mode.
    """

    training = False

    def __init__(self, model: MPlug) -> None:
        self.model, self.config = model, model.config

    def decode(self, ids: Tensor, mask: None, memory: Stream | None, cache: DecoderCache) -> Tensor:
        """Logits (B, 1, vocabulary) behind the text so far."""
        if not cache.layers:
            cache.layers = [LayerCache(memory_k=memory.states, memory_v=memory.states)]
            cache.memory_mask = memory.mask
        layer = cache.layers[0]
        ids = ids[:, None, :, None]
        text, _ = layer.extend(ids, ids)
        beams = torch.full((len(layer.memory_k),), len(text) // len(layer.memory_k), device=ids.device)
        repeated = Stream(layer.memory_k, cache.memory_mask).repeat(beams)
        return self.model.text_decoder.logits(self.model.hidden(text[:, 0, :, 0], mask, repeated)[:, -1:])
