"""Products of bf16 tensors on a CPU that has no instructions for them.

torch's own loops take a hundred times as long there as a product in fp32. What these return is the same but for the
order of a sum: a product of two bf16 numbers is exact in fp32, where sums are taken in either case. Operands have an
fp32 copy while they are multiplied, in the patched form as in the plain one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastpeft import _native

_aten = torch.ops.aten
_PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.convolution.default,
    _aten.convolution_backward.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}


def native() -> bool:
    """Whether this CPU multiplies bf16 itself."""
    return not _native.cpu_features().isdisjoint({"amx_bf16", "avx512_bf16"})


def in_fp32() -> contextlib.AbstractContextManager:
    """While it is active, bf16 products are taken in fp32 and rounded once."""
    return _InFp32()


class _InFp32(TorchDispatchMode):
    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or not any(_is_bf16(argument) for argument in args):
            return func(*args, **kwargs)
        wide = tree_map_only(torch.Tensor, lambda t: t.float() if _is_bf16(t) else t, (args, kwargs))
        found = func(*wide[0], **wide[1])
        if func is _aten._scaled_dot_product_flash_attention_for_cpu.default:
            # The second is the logarithm of the sums, which backward takes in fp32 whatever the inputs are.
            return found[0].to(torch.bfloat16), *found[1:]
        return tree_map_only(torch.Tensor, lambda t: t.to(torch.bfloat16), found)


def _is_bf16(argument: object) -> bool:
    return isinstance(argument, torch.Tensor) and argument.dtype is torch.bfloat16
