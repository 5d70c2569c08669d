"""The model as a tuning method sees it: blocks with roles, a stem, a head; no library's classes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fastpeft.engine.adopt import adopt
from fastpeft.engine.block import BlockState
from fastpeft.engine.description import BlockSpec, HostSpec, child
from fastpeft.engine.extensions import Extension, Prompts
from fastpeft.engine.head import DeepHead
from fastpeft.errors import MethodError


@dataclass
class BlockView:
    """One block.

    Attributes:
        index: number in the outermost host, from 0; a tower's blocks are counted behind its own.
        path: module path in the outermost host.
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
        """Add a method's extension as the block's child `name`, on the block's device; in float64 if the block is.

        Raises:
            MethodError: the block has a child or attribute of that name.
        """
        state: BlockState = self.module.fastpeft_block
        if hasattr(self.module, name):
            raise MethodError(f"{self.path} already has {name!r}; a method can be attached once")
        extension.place(self.index, len(state.extensions))
        _like(extension, self.module)
        self.module.add_module(name, extension)
        state.extensions = (*state.extensions, name)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of what a method adds: float64 beside weights of float64, else float32, the masters of lower ones too."""
        return torch.float64 if _is_double(self.module) else torch.float32

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
        prefix: of paths in the outermost host: "" or, of a tower, its own path with a dot behind.
        blocks: its blocks, in order.
        carried: prompt rows that leave block i, for each block; a method that inserts prompts adds its own.
        towers: the transformers inside it that a method may name, as it would see them; those that the engine runs.
    """

    def __init__(self, host: nn.Module, spec: HostSpec, prefix: str = "", first: int = 0):
        self.host = host
        self.spec = spec
        self.prefix = prefix
        self.blocks = [
            BlockView(i, prefix + path, host.get_submodule(path), b) for i, (path, b) in enumerate(spec.blocks, first)
        ]
        self.carried = [0] * len(self.blocks)
        self.towers: dict[str, ModelView] = {}
        self._every_block = self.blocks
        for name, path in spec.towers.items():
            # What stands there may have been wrapped since.
            for inner, module in host.get_submodule(path).named_modules(prefix=path):
                if "fastpeft_host" in module.__dict__:
                    behind = first + len(self.every_block())
                    self.towers[name] = ModelView(module, module.fastpeft_host.spec, f"{prefix}{inner}.", behind)
                    break

    def of(self, stacks: tuple[str, ...] | None) -> ModelView:
        """The same model with the blocks of these stacks only; of all but the towers' for None.

        A tower alone is the view of that transformer. With other stacks its blocks stand before theirs.

        Raises:
            MethodError: a stack that the model does not have, or a tower that the engine does not run.
        """
        if stacks is None:
            return self
        known = [name for name in (*self.spec.towers, *self.spec.stacks) if name]
        for stack in stacks:
            if stack not in known:
                listed = f"it has: {', '.join(known)}" if known else "its blocks are one stack without a name"
                raise MethodError(f"{self.spec.family} has no stack {stack!r}; {listed}")
        towers = [self._running(name) for name in self.spec.towers if name in stacks]
        part = copy.copy(towers[0] if len(stacks) == len(towers) == 1 else self)
        own = [block for block in self.blocks if block.spec.stack in stacks]
        part.blocks = [*(block for tower in towers for block in tower.blocks), *own]
        return part

    def _running(self, name: str) -> ModelView:
        """A tower whose every block the engine runs."""
        tower = self.towers.get(name)
        if tower is None:
            raise MethodError(f"the engine does not run {self.spec.towers[name]}, which is the stack {name!r}")
        if tower.spec.left_alone:
            path, reason = tower.spec.left_alone[0]
            raise MethodError(f"the stack {name!r} needs every block, but {tower.prefix}{path} is left alone: {reason}")
        return tower

    def every_block(self) -> list[BlockView]:
        """The blocks of all stacks, those of the towers before the transformer's own."""
        return [*(block for tower in self.towers.values() for block in tower.every_block()), *self._every_block]

    def inputs(self) -> list[BlockView]:
        """The blocks that hold what stands before the input of their stack."""
        places = {self.prefix + path for path in self.spec.inputs.values()}
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

    def outputs(self) -> list[nn.Module]:
        """The output layers, whatever they are (two for distilled models, none if the model is a tower)."""
        return [] if self.prefix else [self.host.get_submodule(name) for name in self.spec.heads]

    def heads(self) -> list[nn.Linear]:
        """The output layers that are linear (none if the model has no classifier)."""
        return [head for head in self.outputs() if isinstance(head, nn.Linear)]

    def read_tokens(self) -> list[nn.Parameter]:
        """Embeddings of the tokens that the head reads; none if it reads others, or if the model is a tower."""
        return [] if self.prefix else [self.host.get_parameter(name) for name in self.spec.read_tokens]

    def deepen(self, head: nn.Linear, layers: nn.Module) -> None:
        """Put layers before a linear head, as its child `mlp`.

        Raises:
            MethodError: the head has hidden layers already.
        """
        if isinstance(head, DeepHead):
            raise MethodError("the head already has hidden layers")
        head.mlp = _like(layers, head)
        adopt(head, DeepHead)

    def final(self) -> list[nn.Module]:
        """Modules between the last block and the head."""
        return [self.host.get_submodule(name) for name in self.spec.final]

    def backbone(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter that is run and neither the head's nor a method's; of chosen stacks, those of their blocks.

        Without chosen stacks, those of the towers too.
        """
        added = method_tensors(self.host, self.every_block())
        unread = tuple(f"{path}." for path in self.spec.unread)
        chosen = "" if self.blocks is self._every_block else tuple(f"{block.path}." for block in self.blocks)
        for name, parameter in self.host.named_parameters():
            path = self.prefix + name
            ours = path not in added and name.split(".")[0] not in self.spec.heads
            if ours and path.startswith(chosen) and not name.startswith(unread):
                yield path, parameter

    def carry(self, first: int, last: int, length: int) -> None:
        """Declare that `length` prompt rows inserted in block `first` (from 0) are ordinary rows up to block `last`.

        They leave every block of the range but the last one, where nobody reads their output. They are those that were
        attached to block `first` last.

        Raises:
            MethodError: the model has several stacks of blocks, from one of which to the next no row is carried; or
                block `first` has no such rows.
        """
        if last > first and self.spec.inputs:
            raise MethodError(
                f"{self.spec.family} cannot carry prompts from block to block; fastpeft.PromptTuning puts them before "
                "the input of its stacks"
            )
        if last > first:
            self._rows_of(self.blocks[first], length).carried = True
        for index in range(first, last):
            self.carried[index] += length

    @staticmethod
    def _rows_of(block: BlockView, length: int) -> Prompts:
        """The latest `length` prompt rows that a method attached to a block."""
        attached = [block.module._modules[name] for name in block.module.fastpeft_block.extensions]
        for extension in reversed(attached):
            if isinstance(extension, Prompts) and extension.length == length:
                return extension
        raise MethodError(f"{block.path} inserts no {length} prompt rows to carry on; attach them before `carry`")

    def settle(self) -> None:
        """Tell the blocks what they carry."""
        for tower in self.towers.values():
            tower.settle()
        for index, block in enumerate(self.blocks):
            state: BlockState = block.module.fastpeft_block
            state.carry_in = self.carried[index - 1] if index else 0
            state.carry_out = self.carried[index]


def _like(added: nn.Module, module: nn.Module) -> nn.Module:
    """What a method adds to a module, on its device and no less exact than it; in place."""
    added.to(next(module.parameters()).device)
    return added.double() if _is_double(module) else added


def _is_double(module: nn.Module) -> bool:
    return any(parameter.dtype is torch.float64 for parameter in module.parameters())


def method_tensors(host: nn.Module, blocks: list[BlockView]) -> dict[str, str]:
    """Names of the tensors that methods added to these blocks, and to the host's head -> name of the method."""
    found = {}
    for block in blocks:
        for name in block.module.fastpeft_block.extensions:
            for tensor in block.module._modules[name].state_dict():
                found[f"{block.path}.{name}.{tensor}"] = name
    for name, module in host.named_children():
        if isinstance(module, DeepHead):
            found |= {f"{name}.mlp.{tensor}": "mlp_head" for tensor in module.mlp.state_dict()}
    return found
