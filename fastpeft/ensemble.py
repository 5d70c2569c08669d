"""Several sets of prompts on one backbone, run in one pass: an image is there once for each set.

    logits[t] = head_t(backbone(image, prompts_t)),    t = 1..T

What comes before the first prompt is computed once an image. The sets lie in a bank, whose keys and values are
projected once a batch, and each copy of an image takes its own by number.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastpeft.engine.extensions import PromptBank, Prompts
from fastpeft.errors import MethodError
from fastpeft.methods.base import Method
from fastpeft.methods.vpt import VPT
from fastpeft.parameters import hosts, view_of
from fastpeft.patch import patch, record_of, unpatch
from fastpeft.saving import load
from fastpeft.state import frozen_prefix


class PromptEnsemble(nn.Module):
    """Adapters of VPT that were trained on one backbone, with the same method fields and other seeds.

    Attributes:
        size: number of members T.
    """

    def __init__(self, model: nn.Module, folders: Sequence[str | os.PathLike], backend: str = "auto") -> None:
        """Load the members into a model, which is the ensemble's from then on.

        Args:
            model: the plain base model, with a head of as many classes as the adapters'.
            folders: written by `fastpeft.save`.
            backend: as `fastpeft.patch` takes it.

        Raises:
            MethodError: an adapter is not of VPT alone, its method differs from the first's, or its head is not linear;
                the model is no image transformer itself, or holds others.
            FastPEFTError: a folder is not an adapter, or is of another base.
        """
        super().__init__()
        if not folders:
            raise MethodError("an ensemble needs at least one adapter")
        self.size = len(folders)
        members = [_member(model, folder) for folder in folders]
        method, train_head, *_ = members[0]
        for folder, (other, *_) in zip(folders, members, strict=True):
            if other.to_dict() != method.to_dict():
                raise MethodError(
                    f"{folder} was trained with {other}, {folders[0]} with {method}; they make no ensemble"
                )
        patch(model, method, train_head=train_head, backend=backend).requires_grad_(False).eval()
        # An image's way up to the first prompt is the same for all members.
        host = _host(model)
        self._banks = []
        for block, *sets in zip(view_of(host).blocks, *(prompts for _, _, prompts, _ in members), strict=True):
            if sets[0] is not None:
                bank = PromptBank(nn.Parameter(torch.stack(sets)), method.length)
                block.module._modules[VPT.name] = bank.to(block.device).eval()
                self._banks.append(bank)
        prefix = frozen_prefix(host)
        if prefix is None:
            raise MethodError("an ensemble's model must be a transformer that fastpeft.frozen_prefix can take apart")
        for name in members[0][3]:
            setattr(host, name, _Heads([heads[name] for *_, heads in members]).to(next(host.parameters()).device))
        self.model, self._prefix = model, prefix

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits of every member.

        Args:
            images: (B, 3, height, width).

        Returns:
            (T, B, classes).
        """
        features = self._prefix.encode(images)
        index = torch.arange(self.size, device=images.device).repeat_interleave(len(images))
        for bank in self._banks:
            bank.index = index
        logits = self._prefix.decoder(features.repeat(self.size, *(1,) * (features.dim() - 1)))
        return logits.unflatten(0, (self.size, len(images)))

    def train(self, mode: bool = True) -> PromptEnsemble:
        """An ensemble is there to be asked: its members are trained one by one.

        Raises:
            MethodError: for `mode=True`.
        """
        if mode:
            raise MethodError("an ensemble of prompts cannot be trained; train its members")
        return super().train(False)


def _member(model: nn.Module, folder: str | os.PathLike) -> tuple[Method, bool, list[Tensor | None], dict]:
    """Copies of what an adapter holds: its method, whether its head was trained, prompts by block, heads by name."""
    load(model, folder)
    try:
        record = record_of(model)
        if not isinstance(record.method, VPT):
            raise MethodError(f"{folder} was trained with {record.method}; an ensemble is made of VPT alone")
        host = _host(model)
        view = view_of(host)
        if len(view.heads()) < sum(any(True for _ in head.parameters()) for head in view.outputs()):
            kinds = ", ".join(type(head).__name__ for head in view.outputs())
            raise MethodError(f"an ensemble's members have linear heads, {folder} is of {kinds}; run them one by one")
        prompts = [_prompts(block.module) for block in view.blocks]
        heads = {name: getattr(host, name) for name in view.spec.heads if isinstance(getattr(host, name), nn.Linear)}
        copies = {
            name: (head.weight.detach().clone(), None if head.bias is None else head.bias.detach().clone())
            for name, head in heads.items()
        }
        return record.method, record.train_head, prompts, copies
    finally:
        unpatch(model, discard=True)


def _host(model: nn.Module) -> nn.Module:
    """The model, if it is one transformer that reads images and holds no other.

    Raises:
        MethodError: it is not.
    """
    found = [path.rstrip(".") for path, _ in hosts(model)]
    if found != [""]:
        places = ", ".join(path or "the model itself" for path in found)
        raise MethodError(
            f"an ensemble's model must be one transformer that takes images, such as a timm VisionTransformer, got "
            f"{type(model).__name__} with {len(found)} ({places}); run its adapters one by one"
        )
    return model


def _prompts(block: nn.Module) -> Tensor | None:
    found = block._modules.get(VPT.name)
    return found.prompts.detach().clone() if isinstance(found, Prompts) else None


class _Heads(nn.Module):
    """One linear head a member, for rows that are in the members' order."""

    def __init__(self, heads: list[tuple[Tensor, Tensor | None]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([weight for weight, _ in heads]), requires_grad=False)
        biases = [bias for _, bias in heads if bias is not None]
        self.bias = nn.Parameter(torch.stack(biases)[:, None], requires_grad=False) if biases else None

    def forward(self, x: Tensor) -> Tensor:
        """(T * B, d) -> (T * B, classes)."""
        y = x.unflatten(0, (len(self.weight), -1)) @ self.weight.transpose(1, 2)
        return (y if self.bias is None else y + self.bias.to(y.dtype)).flatten(0, 1)
