"""A post-LayerNorm block's layers by a backend that has packed them: products with what stands around them.

    rows:          a W'^T + low-rank terms                    of several layers that read the same rows
    behind:        x + [A] (a W'^T + low-rank terms)          an output projection with its residual sum
    feed_forward:  x + [A] W_2 act(W_1 x)
    attend_to_memory:  attention whose keys and values are never there

Each gives None where the block has to compose it, and has computed nothing then.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastpeft.engine.branches import Inside, Layers, layers_of, packer
from fastpeft.engine.extensions import Bottleneck
from fastpeft.ops.autocast import suspended
from fastpeft.ops.choose import choose, is_reference
from fastpeft.ops.memory_attention import memory_attention, pays

if TYPE_CHECKING:
    from fastpeft.engine.block import BlockRun


def rows(run: BlockRun, roles: tuple[str, ...], x: Tensor) -> list[Tensor] | None:
    """What the layers of these roles give for x (B, N, in), one for each role: views of one tensor."""
    found = _serve(run, roles, x)
    if found is None:
        return None
    module, layers = found
    with suspended(x.device):
        plan = module.Linear(packer(run, module)("+".join(roles), layers, None), layers.places(module))
        y = module.linear(x, None, plan, layers.factors)
    return list(y.split([weight.shape[0] for weight in layers.weights], dim=-1))


def behind(run: BlockRun, role: str, location: str, a: Tensor, x: Tensor) -> Tensor | None:
    """x (B, N, d) and what the layer of a role gives for a (B, N, in), with the adapters of the location."""
    found = _serve(run, (role,), a)
    adapter = _adapter(run, location)
    if found is None or adapter is None:
        return None
    module, layers = found
    mode, inner = adapter
    # The sum may be in fp32, but an adapter beside the branch reads x as products do.
    if x.dtype != a.dtype and (x.dtype != torch.float32 or mode == "parallel"):
        return None
    serial = module.Adapter("serial", inner.act, inner.scale) if mode == "serial" else None
    with suspended(x.device):
        plan = module.Linear(packer(run, module)(role, layers, None), layers.places(module), serial)
        y = module.linear(a, x, plan, [*layers.factors, *(_factors(inner) if serial else ())])
        return _beside(module, inner, x, y) if mode == "parallel" else y


def feed_forward(run: BlockRun, x: Tensor) -> Tensor | None:
    """x (B, N, d) and what the feed-forward layers give for it, with their adapters."""
    spec, adapter = run.spec, _adapter(run, "ffn")
    first, last = _serve(run, ("fc1",), x), None
    if first is not None and adapter is not None and spec.activation is not None:
        last = _serve(run, ("fc2",), x)
    if last is None:
        return None
    module, fc1 = first
    fc2 = last[1]
    inside = Inside(run, "ffn", bool(fc1.terms or fc2.terms))
    with suspended(x.device):
        pack = packer(run, module)
        plan = module.Mlp(
            pack("fc1", fc1, None),
            pack("fc2", fc2, None),
            (fc1.places(module), fc2.places(module)),
            spec.activation,
            None,
            True,
            run.state.host.memory == "balanced",
            inside.adapter(module),
        )
        y = module.mlp_branch(x, plan, [*fc1.factors, *fc2.factors, *inside.factors])
        return y if inside.all else _beside(module, adapter[1], x, y)


def attend_to_memory(
    run: BlockRun, q: Tensor, memory: Tensor, attn_mask: Tensor | None, lengths: Tensor | None
) -> Tensor | None:
    """What cross-attention gives for queries (B, H, M, D) of a memory (B, N, d), (B, M, H D), if they are few.

    On a CPU alone, whatever its instruction set: nobody has measured it on a GPU.
    """
    spec, backend = run.spec, run.backends["prompt_attention"]
    if memory.device.type != "cpu" or backend not in ("auto", "cpu") or run.backends["block"] == "reference":
        return None
    if run.hooked or torch.compiler.is_compiling() or not memory.shape[:-1].numel() or not _as_they_are(memory):
        return None
    needs = [torch.is_grad_enabled() and t.requires_grad for t in (memory, q)]
    if not pays(q.shape[2], spec.num_heads, memory.shape[-1], *needs):
        return None
    keys, values = layers_of(run, ("cross_k",)), layers_of(run, ("cross_v",))
    if keys is None or values is None or keys.trained or values.trained:
        return None
    wk, wv, bv = keys.weights[0], values.weights[0], values.biases[0]
    with suspended(memory.device):
        return memory_attention(
            q, memory, wk, wv, bv, keys.terms, values.terms, spec.scale, attn_mask, lengths, backend
        )


def _serve(run: BlockRun, roles: tuple[str, ...], x: Tensor) -> tuple[ModuleType, Layers] | None:
    """The backend and the layers, if all of them are frozen and nobody looks."""
    if run.hooked or is_reference("block", run.backends["block"], x.device) or torch.compiler.is_compiling():
        return None
    if not x.shape[:-1].numel() or not _as_they_are(x):
        return None
    layers = layers_of(run, roles)
    if layers is None or layers.trained:
        return None
    widths = (*layers.weights[0].shape[1:], *(weight.shape[0] for weight in layers.weights))
    wish, weights = run.backends["block"], layers.weights
    module = choose("block", wish, x.device, lambda module: module.reasons(x, widths, None, weights))
    return None if module is None else (module, layers)


def _as_they_are(x: Tensor) -> bool:
    """Whether a product takes these rows without a cast, and gives rows of their format."""
    kind = x.device.type
    return not torch.is_autocast_enabled(kind) or x.dtype == torch.get_autocast_dtype(kind)


def _adapter(run: BlockRun, location: str) -> tuple[str, Bottleneck | None] | None:
    """What stands behind or beside a branch: its mode and itself, ("", None) for nothing; None if that is more."""
    here = [adapter for adapter in run.adapters if adapter.acts_on(location)]
    if not here:
        return "", None
    inner = here[0].bottleneck(location) if len(here) == 1 else None
    return None if inner is None else (here[0].mode, inner)


def _beside(module: ModuleType, inner: Bottleneck, x: Tensor, y: Tensor) -> Tensor:
    """y + A(x)."""
    return module.bottleneck(x, y, module.Adapter("parallel", inner.act, inner.scale), inner.skip, _factors(inner))


def _factors(inner: Bottleneck) -> list[Tensor | None]:
    return [inner.down.weight, inner.down.bias, inner.up.weight, inner.up.bias]
