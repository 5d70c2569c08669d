"""The model as a tuning method sees it: blocks with roles, a stem, a head; no library's classes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from fastpeft.engine.adopt import adopt
from fastpeft.engine.block import BlockState
from fastpeft.engine.description import BlockSpec, HostSpec, child
from fastpeft.engine.extensions import Extension
from fastpeft.engine.head import DeepHead
from fastpeft.errors import MethodError


@dataclass
class BlockView:
    """One block.

    Attributes:
        index: position, from 0.
        path: module path in the host.
        module: the block.
        spec: the block by roles.
    """

    index: int
    path: str
    module: nn.Module
    spec: BlockSpec

    @property
    def dim(self) -> int:
        return self.spec.dim

    def attach(self, name: str, extension: Extension) -> None:
        """Add a method's extension as the block's child `name`, on the block's device.

        Raises:
            MethodError: the block has a child or attribute of that name.
        """
        state: BlockState = self.module.fastpeft_block
        if hasattr(self.module, name):
            raise MethodError(f"{self.path} already has {name!r}; a method can be attached once")
        extension.place(self.index, len(state.extensions))
        extension.to(self.device)
        self.module.add_module(name, extension)
        state.extensions = (*state.extensions, name)

    @property
    def device(self):
        return next(iter(self.module.parameters())).device

    def norms(self) -> Iterator[nn.Module]:
        """The block's LayerNorms."""
        for role in ("norm1", "cross_norm", "norm2"):
            if role in self.spec.inner:
                yield child(self.module, self.spec.inner[role])


class ModelView:
    """A host (a transformer inside the user's model) for a method to act on.

    Attributes:
        host: the transformer.
        spec: its description.
        blocks: its blocks, in order.
        carried: prompt rows that leave block i, for each block; a method that inserts prompts adds its own.
    """

    def __init__(self, host: nn.Module, spec: HostSpec):
        self.host = host
        self.spec = spec
        self.blocks = [BlockView(i, path, host.get_submodule(path), b) for i, (path, b) in enumerate(spec.blocks)]
        self.carried = [0] * len(self.blocks)
        self._every_block = self.blocks

    def of(self, stacks: tuple[str, ...] | None) -> ModelView:
        """The same model with the blocks of these stacks only; of all for None.

        Raises:
            MethodError: a stack that the model does not have.
        """
        if stacks is None:
            return self
        known = self.spec.stacks
        for stack in stacks:
            if stack not in known or not stack:
                listed = f"it has: {', '.join(known)}" if any(known) else "its blocks are one stack without a name"
                raise MethodError(f"{self.spec.family} has no stack {stack!r}; {listed}")
        part = copy.copy(self)
        part.blocks = [block for block in self.blocks if block.spec.stack in stacks]
        return part

    def inputs(self) -> list[BlockView]:
        """The blocks that hold what stands before the input of their stack."""
        places = set(self.spec.inputs.values())
        return [block for block in self.blocks if block.path in places]

    def classifier(self, part: str) -> list[nn.Parameter]:
        """Parameters of the output layer, by what is to be trained of it; none if the model does not know that."""
        return [self.host.get_parameter(name) for name in self.spec.classifiers.get(part, ())]

    @property
    def dim(self) -> int:
        return self.spec.dim

    @property
    def patch_area(self) -> int:
        """Values in a flattened patch, 3 * height * width."""
        return self.spec.patch_area

    def heads(self) -> list[nn.Linear]:
        """The linear output layers (two for distilled models, none if the model has no classifier)."""
        found = [self.host.get_submodule(name) for name in self.spec.heads]
        return [head for head in found if isinstance(head, nn.Linear)]

    def read_tokens(self) -> list[nn.Parameter]:
        """Embeddings of the tokens that the head reads; none if it reads others."""
        return [self.host.get_parameter(name) for name in self.spec.read_tokens]

    def deepen(self, head: nn.Linear, layers: nn.Module) -> None:
        """Put layers before a linear head, as its child `mlp`.

        Raises:
            MethodError: the head has hidden layers already.
        """
        if isinstance(head, DeepHead):
            raise MethodError("the head already has hidden layers")
        head.mlp = layers.to(head.weight.device)
        adopt(head, DeepHead)

    def final(self) -> list[nn.Module]:
        """Modules between the last block and the head."""
        return [self.host.get_submodule(name) for name in self.spec.final]

    def backbone(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter that is neither the head's nor a method's; of chosen stacks, those of their blocks."""
        added = method_tensors(self.host, self._every_block)
        chosen = "" if self.blocks is self._every_block else tuple(f"{block.path}." for block in self.blocks)
        for name, parameter in self.host.named_parameters():
            if name not in added and name.split(".")[0] not in self.spec.heads and name.startswith(chosen):
                yield name, parameter

    def carry(self, first: int, last: int, length: int) -> None:
        """Declare that `length` prompt rows inserted in block `first` (from 0) are ordinary rows up to block `last`.

        They leave every block of the range but the last one, where nobody reads their output.

        Raises:
            MethodError: the model has several stacks of blocks, from one of which to the next no row is carried.
        """
        if last > first and self.spec.inputs:
            raise MethodError(
                f"{self.spec.family} cannot carry prompts from block to block; fastpeft.PromptTuning puts them before "
                "the input of its stacks"
            )
        for index in range(first, last):
            self.carried[index] += length

    def settle(self) -> None:
        """Tell the blocks what they carry."""
        for index, block in enumerate(self.blocks):
            state: BlockState = block.module.fastpeft_block
            state.carry_in = self.carried[index - 1] if index else 0
            state.carry_out = self.carried[index]


def method_tensors(host: nn.Module, blocks: list[BlockView]) -> dict[str, str]:
    """Names, in the host, of the tensors that methods added -> name of the method."""
    found = {}
    for block in blocks:
        for name in block.module.fastpeft_block.extensions:
            for tensor in block.module._modules[name].state_dict():
                found[f"{block.path}.{name}.{tensor}"] = name
    for name, module in host.named_children():
        if isinstance(module, DeepHead):
            found |= {f"{name}.mlp.{tensor}": "mlp_head" for tensor in module.mlp.state_dict()}
    return found
