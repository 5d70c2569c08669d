"""The vision transformer with every place a tuning method may enter written out.

    x_0 = [cls, E] + positions                                           (Dosovitskiy et al., eq. 1)
    x'  = x + ls1(Attention(LN1(x)))                                     (eq. 2)
    x   = x' + ls2(FFN(LN2(x')))                                         (eq. 3)

Everything before block 1 and after the last block stays the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from bench.literal.attention import attention
from bench.literal.lora import project


class LiteralBlock(nn.Module):
    """A timm `Block` with the places of the methods in it; its children keep their names.

    Attributes:
        vpt, prefix, lora, adapter, serial_adapter, parallel_adapter: The method's tensors in this block, or None.
    """

    def __init__(self, block: nn.Module, index: int) -> None:
        super().__init__()
        expected = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
        children = dict(block.named_children())
        if set(children) != expected or type(block).__name__ != "Block":
            raise TypeError(f"block {index} is a {type(block).__name__}; expected timm's pre-norm Block")
        for name, child in children.items():
            self.add_module(name, child)
        self.index = index
        for method in ("vpt", "prefix", "lora", "adapter", "serial_adapter", "parallel_adapter"):
            setattr(self, method, None)
        self.train(block.training)

    def forward(self, x: Tensor, lora_mask: Callable[[int, str, Tensor], Tensor] | None = None) -> Tensor:
        """Run the block over all rows of x, (batch, rows, width)."""
        block_mask = None if lora_mask is None else partial(lora_mask, self.index)
        h = self.norm1(x)
        f = self.ls1(attention(self.attn, h, lora=self.lora, prefix=self.prefix, mask=block_mask))
        x = x + self.drop_path1(self._adapt("attn", h, f))

        h = self.norm2(x)
        f = self.ls2(self._ffn(h, block_mask))
        return x + self.drop_path2(self._adapt("ffn", h, f))

    def _adapt(self, location: str, h: Tensor, f: Tensor) -> Tensor:
        """Run the adapters of a sub-layer with input h and output f, in the order in which they were added."""
        for name, module in self.named_children():
            if name == "adapter" and location == "ffn":
                f = f + module(f)
            elif name == "serial_adapter" and location in module:
                f = module[location](f)
            elif name == "parallel_adapter" and location in module:
                f = f + module[location](h)
        return f

    def _ffn(self, h: Tensor, mask: Callable[[str, Tensor], Tensor] | None) -> Tensor:
        """Run the feed-forward part: the model's own module, written out only where LoRA enters it."""
        if self.lora is None or not ("fc1" in self.lora or "fc2" in self.lora):
            return self.mlp(h)
        mlp = self.mlp
        u = project(mlp.fc1, h, "fc1", self.lora, mask)
        if hasattr(mlp, "gate_last"):  # timm's GluMlp: one half of the hidden columns gates the other
            first, second = u.chunk(2, dim=-1)
            u = first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second
        else:
            u = mlp.act(u)
        u = mlp.norm(mlp.drop1(u))
        return mlp.drop2(project(mlp.fc2, u, "fc2", self.lora, mask))


class LiteralBlocks(nn.Sequential):
    """The stack of blocks, with prompts put between the prefix tokens and the patches: [cls, P, E].

    Attributes:
        first_patch: Rows before the first patch: class, distillation and register tokens.
        prompt_mask, lora_mask: Replacements of the random dropout, or None; see `bench.literal.apply`.
    """

    def __init__(self, blocks: list[LiteralBlock], first_patch: int) -> None:
        super().__init__(*blocks)
        self.first_patch = first_patch
        self.prompt_mask: Callable[[int, int], Tensor] | None = None
        self.lora_mask: Callable[[int, str, Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Run all blocks over the tokens and return the tokens, without any prompt row."""
        return self.token_states(x)[-1]

    def token_states(self, x: Tensor) -> list[Tensor]:
        """Return the token rows after each block, each (batch, tokens, width)."""
        states = []
        carried = 0  # prompt rows now in x
        for index, block in enumerate(self):
            if block.vpt is not None:
                mask = None if self.prompt_mask is None else partial(self.prompt_mask, index)
                prompts = block.vpt(len(x), mask)
                x = self._insert(self._remove(x, carried), prompts)
                carried = prompts.shape[1]

            hidden = block.prefix.hidden_rows(len(x)) if block.prefix is not None else None
            if hidden is not None:
                x = self._insert(x, hidden)
            x = block(x, self.lora_mask)
            if hidden is not None:
                x = self._remove(x, hidden.shape[1])
            states.append(self._remove(x, carried))
        return states

    def _insert(self, x: Tensor, rows: Tensor) -> Tensor:
        return torch.cat([x[:, : self.first_patch], rows.to(x.dtype), x[:, self.first_patch :]], dim=1)

    def _remove(self, x: Tensor, count: int) -> Tensor:
        return torch.cat([x[:, : self.first_patch], x[:, self.first_patch + count :]], dim=1) if count else x


def token_states(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the token rows after each block of a literal model, as `forward_intermediates` gives them."""
    x = model.patch_embed(images)
    x = model._pos_embed(x)
    x = model.norm_pre(model.patch_drop(x))
    return model.blocks.token_states(x)
