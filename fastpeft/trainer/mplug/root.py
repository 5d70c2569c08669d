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


class Called(nn.Module):
    """A method as a module of its own, whose call can be seen from outside."""

    def __init__(self, method: Callable[..., Tensor]) -> None:
        super().__init__()
        # Not registered: the weights are those of the method's owner.
        self.__dict__["_method"] = method

    def forward(self, *arguments: Tensor) -> Tensor:
        """What the method gives."""
        return self._method(*arguments)


def readers_of(root: Root) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """Modules that read others' weights, and those weights.

    The output layer is a method of the decoder, with the embedding's matrix, and the losses are one of the model: both
    become such modules, in place.

    What stays for the whole of a forward pass is a tower's class token and positions, and the prompts before a stack:
    they are read by the model itself, between its layers.
    """
    model = root.model
    decoder = model.text_decoder
    root.logits, root.losses = Called(decoder.logits), Called(model._losses)
    decoder.__dict__["logits"], model.__dict__["_losses"] = root.logits, root.losses
    output = [*decoder.cls.parameters(), decoder.bert.embeddings.word_embeddings.weight]
    readers = [(root.logits, output), (root.losses, output)]
    readers.append((root.tower, list(root.tower.inner.parameters(recurse=False))))
    readers += [(module, list(module.parameters())) for module in model.modules() if isinstance(module, Embeddings)]
    prompts = [module for module in model.modules() if isinstance(module, InputPrompts)]
    return [*readers, (root, [parameter for module in prompts for parameter in module.parameters()])]
