"""The module that a step of mPLUG calls, and what under ZeRO stage 3 reads weights that are not its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from fastpeft.engine.extensions import InputPrompts
from fastpeft.models.mplug.layers import Embeddings

T = TypeVar("T")


class Root(nn.Module):
    """A model around which everything that it does in one go is one call.

    At ZeRO stage 3 a forward pass begins and ends with the module that DeepSpeed was given; a step calls several
    methods of the model, and a search calls one of them many times.

    Attributes:
        model: The mPLUG.
        tower: Its image tower, as a module whose call gives all tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.tower = Tower(model.visual_encoder)
        self._todo: Callable[[], Any] | None = None

    def run(self, todo: Callable[[], T]) -> T:
        """Call a function of the model in a forward pass."""
        self._todo = todo
        try:
            return self()
        finally:
            self._todo = None

    def forward(self) -> Any:
        """Use `run`."""
        return self._todo()


class Tower(nn.Module):
    """The image tower's tokens."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.inner = tower

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, Ni, image_width)."""
        return self.inner.forward_features(images)


class Vocabulary(nn.Module):
    """The decoder's output layer as a module of its own: it is a method of the decoder, with the embedding's matrix."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        # Not registered: its weights are the decoder's.
        self.__dict__["_logits"] = decoder.logits

    def forward(self, states: Tensor) -> Tensor:
        """(..., D) -> (..., vocabulary)."""
        return self._logits(states)


def readers_of(root: Root) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """Modules that read others' weights, and those weights; the decoder's output layer becomes such a module, in place.

    What stays for the whole of a forward pass is a tower's class token and positions, and the prompts before a stack:
    they are read by the model itself, between its layers.
    """
    model = root.model
    decoder = model.text_decoder
    root.vocabulary = Vocabulary(decoder)
    decoder.__dict__["logits"] = root.vocabulary
    output = [*decoder.cls.parameters(), decoder.bert.embeddings.word_embeddings.weight]
    readers = [(root.vocabulary, output), (root.tower, list(root.tower.inner.parameters(recurse=False)))]
    readers += [(module, list(module.parameters())) for module in model.modules() if isinstance(module, Embeddings)]
    prompts = [module for module in model.modules() if isinstance(module, InputPrompts)]
    return [*readers, (root, [parameter for module in prompts for parameter in module.parameters()])]
