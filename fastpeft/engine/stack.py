"""Running a host's blocks one after another, and what can be computed once because nothing before it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastpeft.engine.adopt import Adopted
from fastpeft.engine.clock import DropoutClock
from fastpeft.engine.description import HostSpec, child
from fastpeft.engine.extensions import Extension, Noise
from fastpeft.engine.hooks import replaced
from fastpeft.ops.choose import CHOICES

# What a training step keeps for its backward pass: all it needs; the activation's derivative in eight bits where
# activations are in half precision; each block's input alone.
MEMORIES = ("fast", "balanced", "small")


@dataclass
class HostState:
    """What the engine keeps on a host.

    Attributes:
        spec: the host's description.
        clock: counter of the dropout masks, one for a transformer and its towers; None if no method draws.
        backbone_eval: keep everything but the method and the head in evaluation mode while training.
        memory: one of `MEMORIES`.
        backends: operator -> what is asked for, as `fastpeft.ops.choose.asked` gives it.
    """

    spec: HostSpec
    clock: DropoutClock | None = None
    backbone_eval: bool = False
    memory: str = "fast"
    backends: Mapping[str, str] = field(default_factory=lambda: dict.fromkeys(CHOICES, "auto"))

    def noise(self) -> Noise | None:
        """The masks of the forward that the clock stands at."""
        return None if self.clock is None else Noise(self.clock, self.clock.step)


class EngineHost(Adopted):
    """Mixin of an adopted transformer. A family adds the forward, written with `run_blocks`."""

    def train(self, mode: bool = True):
        """As usual, except that a frozen backbone stays in evaluation mode (dropout and stochastic depth off)."""
        super().train(mode)
        state: HostState = self.fastpeft_host
        for packs in packs_of(self):
            packs.verify()
        if mode and state.backbone_eval:
            for name, inner in self._modules.items():
                if inner is not None and name not in state.spec.heads:
                    _rest(inner)
        return self


def packs_of(host: nn.Module) -> list:
    """What backends have packed of the frozen weights of the host's own blocks, block by block."""
    own: HostState = host.fastpeft_host
    states = [_state_at(host, path) for path, _ in own.spec.blocks]
    if None in states:
        # Blocks were wrapped or cut off since: by the modules that there are.
        found = (module.__dict__.get("fastpeft_block") for module in host.modules())
        states = [state for state in found if state is not None and state.host is own]
    return [state.packs for state in states if state.packs is not None]


def _state_at(host: nn.Module, path: str):
    """The state of the block of this path, or None if it stands there no longer."""
    module = host
    for name in path.split("."):
        module = module._modules.get(name)
        if module is None:
            return None
    return module.__dict__.get("fastpeft_block")


def _rest(module: nn.Module) -> None:
    """Evaluation mode for a backbone module; the methods' extensions in it go on training."""
    if isinstance(module, Extension):
        return
    if isinstance(module, EngineHost) and module.fastpeft_host.backbone_eval:
        # A tower with a method in it rests by itself, and is in training: it draws masks.
        return
    module.training = False
    for inner in module._modules.values():
        if inner is not None:
            _rest(inner)


def begin(host: nn.Module) -> Noise | None:
    """Begin a forward of the host: in training, the next masks."""
    clock = host.fastpeft_host.clock
    if clock is None:
        return None
    return Noise(clock, clock.tick() if host.training else clock.step)


def run_blocks(
    host: nn.Module,
    x: Tensor,
    noise: Noise | None,
    rows: int | None = None,
    start: int = 0,
    stop: int | None = None,
    checkpointing: bool = False,
) -> Tensor:
    """Run the blocks start..stop of an adopted host.

    Args:
        host: the transformer.
        x: (B, N + carried, d).
        noise: what `begin` gave.
        rows: how many rows of the last block's output anybody reads; None for all.
        start: first block.
        stop: one behind the last block; None for all.
        checkpointing: keep only the blocks' inputs and run them again in the backward pass.

    Returns:
        (B, rows or N + carried, d).
    """
    paths = [path for path, _ in host.fastpeft_host.spec.blocks]
    for index, path in enumerate(paths[start:stop], start):
        block = child(host, path)
        keep = rows if index == len(paths) - 1 else None
        x = call_block(block, x, {"rows": keep, "noise": noise}, checkpointing)
    return x


def call_block(
    block: nn.Module, x: Tensor, options: dict, checkpointing: bool | None, inputs: dict | None = None
) -> Tensor:
    """Call a block.

    Args:
        block: adopted or not.
        x: (B, N, d).
        options: what the engine tells it besides; stays away from hooks and replaced forwards, which expect x.
        checkpointing: run the block again in the backward pass; False leaves that to what the host's `memory` says,
            and None forbids it.
        inputs: what the model's own code gives to the block besides x.
    """
    if replaced(block) or not isinstance(block, Adopted):
        options = {}
    if isinstance(block, Adopted) and checkpointing is not None:
        checkpointing = checkpointing or block.fastpeft_block.host.memory == "small"
    options = {**(inputs or {}), **options}
    options = {name: value for name, value in options.items() if value is not None}
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, x, **options, use_reentrant=False)
    return block(x, **options)


class FrozenPrefix(nn.Module):
    """The part of a model that comes before its first trainable parameter: a constant per image.

    Attributes:
        decoder: module of features -> logits; its parameters are the model's own objects.
        description: what the prefix covers, in words.
    """

    def __init__(self, host: nn.Module, start: int):
        super().__init__()
        self.decoder = _Decoder(host, start)
        self.start = start
        count = len(host.fastpeft_host.spec.blocks)
        self.description = (
            "the whole backbone" if start > count else "all blocks" if start == count else f"blocks 0..{start - 1}"
        )
        if start == 0:
            self.description = "the embedding of the patches"

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Features of a batch: (B, ...) -> (B, N + carried, d), or the head's input if all of it is frozen."""
        host = self.decoder.model
        training = host.training
        host.eval()
        try:
            return host.fastpeft_encode(images, self.start)
        finally:
            host.train(training)


class _Decoder(nn.Module):
    def __init__(self, host: nn.Module, start: int):
        super().__init__()
        self.model = host
        self.start = start

    def forward(self, features: Tensor) -> Tensor:
        return self.model.fastpeft_decode(features, self.start)


def frozen_depth(host: nn.Module) -> int | None:
    """How many blocks lie before the first trainable parameter.

    Returns:
        None if the stem is trained or has active dropout; the number of blocks plus one if everything up to the head's
        input is frozen.
    """
    spec: HostSpec = host.fastpeft_host.spec
    named = dict(host.named_parameters())
    if any(p.requires_grad for name, p in named.items() if name.split(".")[0] in spec.stem):
        return None
    state = host.fastpeft_host
    if not state.backbone_eval and _random(host):
        return None
    for index, (path, _) in enumerate(spec.blocks):
        if any(p.requires_grad for p in host.get_submodule(path).parameters()):
            return index
    final = any(p.requires_grad for name, p in named.items() if name.split(".")[0] in spec.final)
    return len(spec.blocks) + (0 if final else 1)


def _random(host: nn.Module) -> bool:
    """Whether any module of the host drops something out: nn.Dropout, stochastic depth, patch dropout."""
    return any(getattr(m, rate, 0) for m in host.modules() for rate in ("p", "drop_prob", "prob"))
