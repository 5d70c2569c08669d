"""mPLUG's three stacks of layers, with the names of its state dicts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft.models.mplug.config import MPlugConfig
from fastpeft.models.mplug.layers import BertLayer, Embeddings


class Layers(nn.Module):
    """Layers by number; `layer` is a list, or a dict where the numbers do not begin at 0."""

    def __init__(self, layers: dict[int, BertLayer]):
        super().__init__()
        if list(layers) == list(range(len(layers))):
            self.layer = nn.ModuleList(layers.values())
        else:
            self.layer = nn.ModuleDict({str(number): layer for number, layer in layers.items()})

    def numbered(self) -> list[tuple[int, BertLayer]]:
        """(number, layer) in order."""
        return [(int(name), layer) for name, layer in self.layer.named_children()]


class TextEncoder(nn.Module):
    """Embeddings and the lower half of a BERT."""

    def __init__(self, config: MPlugConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Layers({number: BertLayer(config, cross=False) for number in range(config.text_layers)})


class FusionEncoder(nn.Module):
    """The upper half: layers that attend to the image, and connected ones that run over image and text together."""

    def __init__(self, config: MPlugConfig):
        super().__init__()
        self.encoder = Layers(
            {number: BertLayer(config, cross=not config.connected(number)) for number in config.fusion_numbers}
        )


class _Bert(nn.Module):
    def __init__(self, config: MPlugConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Layers({number: BertLayer(config, cross=True) for number in range(config.decoder_layers)})


class _Transform(nn.Module):
    def __init__(self, config: MPlugConfig):
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


class _Predictions(nn.Module):
    def __init__(self, config: MPlugConfig):
        super().__init__()
        self.transform = _Transform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))


class _Head(nn.Module):
    def __init__(self, config: MPlugConfig):
        super().__init__()
        self.predictions = _Predictions(config)


class TextDecoder(nn.Module):
    """A causal BERT that attends to a memory, and its vocabulary head, whose matrix is the word embedding."""

    def __init__(self, config: MPlugConfig):
        super().__init__()
        self.bert = _Bert(config)
        self.cls = _Head(config)

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """States (R, D) and the tokens (R,) that they are to predict -> -log p, (R,), at least fp32."""
        logits = self.logits(x)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, targets, reduction="none")

    def logits(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., vocabulary)."""
        predictions = self.cls.predictions
        return F.linear(predictions.transform(x), self.bert.embeddings.word_embeddings.weight, predictions.bias)
