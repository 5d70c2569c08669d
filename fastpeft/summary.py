"""`summary`: what is fused, what is not and why, what is trained."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from fastpeft.engine.block import lost_layer
from fastpeft.engine.description import child
from fastpeft.engine.hooks import any_hooks
from fastpeft.engine.linear import why_opaque
from fastpeft.engine.stack import packs_of
from fastpeft.engine.view import BlockView
from fastpeft.models.wrappers import wrapped
from fastpeft.ops.choose import is_reference
from fastpeft.parameters import hosts, owners, view_of
from fastpeft.patch import record_of


@dataclass(frozen=True)
class Summary:
    """What fastpeft does with a model.

    Attributes:
        method: the method as it is written in code, or "none".
        fused: (path, what) of the blocks that the engine runs.
        left_alone: (path, reason) of what it does not run, or runs by the reference path only.
        backends: operator -> what is asked for; "auto" without anything measured on this chip is the reference.
        trainable: number of trained parameters.
        head: how many of them are the head's.
        backbone: number of parameters of the backbone.
        total: number of all parameters: the backbone's, the head's and the method's.
        share: trainable / total, as the VPT paper's cost table counts.
        bytes: of all parameters and buffers, and of frozen weights that a backend has
            packed besides ("packed").
        merged: relative error of each folded projection, None before `merge`.
    """

    method: str
    fused: list[tuple[str, str]]
    left_alone: list[tuple[str, str]]
    backends: dict[str, str]
    trainable: int
    head: int
    backbone: int
    total: int
    share: float
    bytes: dict[str, int]
    merged: dict[str, float] | None = field(default=None)

    def __str__(self) -> str:
        lines = [
            f"method      {self.method}",
            f"trained     {self.trainable:,} parameters ({self.share:.3%} of {self.total:,}), "
            f"{self.head:,} of them in the head",
            f"fused       {len(self.fused)} blocks" + (f": {self.fused[0][1]}" if self.fused else ""),
            "backends    " + ", ".join(f"{name}: {backend}" for name, backend in self.backends.items()),
            f"bytes       {self.bytes['model']:,} in the model, {self.bytes['packed']:,} packed beside it",
        ]
        if self.merged:
            lines.append(f"merged      {len(self.merged)} projections, error up to {max(self.merged.values()):.2g}")
        lines += [f"left alone  {path or 'the model'}: {reason}" for path, reason in self.left_alone]
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Describe a model as it is now.

    Args:
        model: patched or not; one that is not has everything left alone.
    """
    record = record_of(model)
    # Paths in a record begin at the module that keeps it, which may have been wrapped since.
    kept = ((path, module.__dict__.get("fastpeft_record")) for path, module in model.named_modules())
    left = [(f"{path}.{inner}".strip("."), why) for path, own in kept if own for inner, why in own.left_alone]
    fused = []
    backends: dict[str, str] = {}
    packed = 0
    looked_into: set[str] = set()
    for prefix, host in hosts(model):
        device = next((parameter.device for parameter in host.parameters()), None)
        for operator, wish in host.fastpeft_host.backends.items():
            backends[operator] = "reference" if is_reference(operator, wish, device) else wish
        packed += sum(packs.bytes for packs in packs_of(host))
        for block in view_of(host).blocks:
            path = prefix + block.path
            what = ["attention"] + ["cross-attention"] * bool(block.spec.cross)
            what += [] if block.spec.opaque_mlp else ["mlp"]
            fused.append((path, " + ".join(what + list(block.module.fastpeft_block.extensions))))
            looked_into |= {f"{path}.{place.path}" for place in block.spec.roles.values()}
            left += _left_alone(path, block)
    if fused:
        listed = tuple(f"{path}." for path, _ in left)
        left += [
            (path, f"{what}, outside of the layers that the engine runs; called as a module")
            for path, what in wrapped(model)
            if path not in looked_into and not f"{path}.".startswith(listed)
        ]
    if not fused and not left:
        left.append(("", "not patched"))
    owner = owners(model)
    sizes = dict(model.named_parameters())
    trained = {name: p.numel() for name, p in sizes.items() if p.requires_grad}
    backbone = sum(p.numel() for name, p in sizes.items() if owner.get(name, "backbone") == "backbone")
    trainable, total = sum(trained.values()), sum(p.numel() for p in sizes.values())
    stored = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]
    }
    method = record.method if record else None
    return Summary(
        method="none" if method is None else " + ".join(map(repr, method.parts())),
        fused=fused,
        left_alone=left,
        backends=backends,
        trainable=trainable,
        head=sum(count for name, count in trained.items() if owner.get(name) == "head"),
        backbone=backbone,
        total=total,
        share=trainable / total if total else 0.0,
        bytes={"model": sum(stored.values()), "packed": packed},
        merged=record.merged if record else None,
    )


def _left_alone(path: str, block: BlockView) -> list[tuple[str, str]]:
    """What of a block the engine runs by the reference path only, or calls as a module."""
    lost = lost_layer(block.module, block.spec)
    if lost:
        return [(path, f"{lost} is gone, its container was wrapped since; the model's own block runs")]
    found = []
    if any_hooks(block.module):
        found.append((path, "an inner module carries hooks, so every row runs through every module"))
    layers = sorted({place.path for place in block.spec.roles.values()})
    found += [(f"{path}.{layer}", why) for layer in layers if (why := why_opaque(child(block.module, layer)))]
    if block.spec.opaque_mlp:
        found.append((f"{path}.{block.spec.mlp}", "not a two-layer MLP; called as a module"))
    return found
