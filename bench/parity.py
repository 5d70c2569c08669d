"""Is a fused training step the literal one? Logits and every trainable gradient against a float64 reference.

A tensor passes as in `bench.tolerance`, whose plain PyTorch is here the literal implementation.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import literal
from bench.cases import build
from bench.tolerance import Deviation, bound, relative_error, worst_place

# Of a whole step: relative error that no baseline can excuse.
_CAP = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Stir every tensor that a method added, and the head: what starts at zero would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(literal.HEADS) or any(part in name for part in literal.NEW_TENSORS):
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((0.5 * values / max(parameter.shape[-1], 8) ** 0.5).to(parameter))


def compare(
    model: nn.Module,
    method: Any,
    images: Tensor,
    labels: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    training: bool = True,
    patched: nn.Module | None = None,
    seed: int = 0,
) -> list[Deviation]:
    """Compare one fused forward and backward pass with the literal one.

    Random dropout in training mode is that of the engine, in all three models; the head's own (MLPHead), which torch
    draws, is off.

    Args:
        model: A plain timm model in float32; not changed.
        method: The method to put on it.
        images, labels: A batch on the model's device.
        dtype: Type in which the fused and the literal step run; the reference runs in float64.
        training: Training or evaluation mode.
        patched: The fused model, if it was made otherwise than by `fastpeft.patch(model, method)`.
        seed: Of what the method's tensors and the head are stirred with.
    """
    fused = patched if patched is not None else build("fused", method, copy.deepcopy(model).to(dtype))
    if dtype == torch.float64:
        fused.double()  # a method's tensors start in float32
    randomise(fused, seed)
    state = fused.state_dict()
    masks = engine_masks(fused)
    results = {"fused": _pass(fused.train(training), images.to(dtype), labels)}
    for name, kind in (("literal", dtype), ("reference", torch.float64)):
        twin = literal.apply(copy.deepcopy(model).to(kind), method, **masks)
        twin.load_state_dict(state)
        results[name] = _pass(twin.train(training), images.to(dtype).to(kind), labels)
    errors = {
        name: [_error(results[path][name], reference) for path in ("fused", "literal")]
        for name, reference in results["reference"].items()
    }
    # A tensor of a few elements may come out exact by luck, so no baseline counts as less than the step's usual error.
    usual = statistics.median(literal_error for _, literal_error in errors.values())
    return [
        Deviation(
            name,
            fused_error,
            literal_error,
            allowed_error(max(literal_error, usual), dtype),
            worst_place(results["fused"][name], results["reference"][name]),
        )
        for name, (fused_error, literal_error) in errors.items()
    ]


def _pass(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return logits and the gradient of every trainable parameter, in float64."""
    for name, module in model.named_modules():
        if name.startswith(literal.HEADS) and isinstance(module, nn.Dropout):
            module.p = 0.0
    logits = model(images)
    F.cross_entropy(logits.double(), labels).backward()
    found = {"logits": logits.detach().double()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[name] = parameter.grad.double()
    return found


def _error(x: Tensor, reference: Tensor) -> float:
    # Absolute where the gradient is identically zero.
    return relative_error(x, reference, size=float(reference.norm()) or 1.0)


def allowed_error(baseline: float, dtype: torch.dtype) -> float:
    """How far a tensor of a step may be from float64's, given how far the literal step's is."""
    # In float64 the literal step is the reference itself.
    return _CAP[dtype] if dtype == torch.float64 else bound(baseline, dtype, _CAP[dtype])


def engine_masks(patched: nn.Module) -> dict[str, Callable]:
    """Return the dropout multipliers of a patched model's latest forward pass, as arguments of `literal.apply`."""

    def prompt_mask(index: int, batch: int) -> Tensor:
        prompts = patched.blocks[index].vpt
        width = prompts.prompts.shape[-1]
        count = batch if prompts.per_sample else None
        noise = patched.fastpeft_host.noise()
        mask = noise.mask(prompts.site, count, prompts.length * width, prompts.dropout, torch.float64)
        return mask.view(-1, prompts.length, width)

    def lora_mask(index: int, role: str, x: Tensor) -> Tensor:
        term = patched.blocks[index].lora.term(role, 0, x.shape[-1], patched.fastpeft_host.noise())
        return term.dropout(torch.ones_like(x))

    return {"prompt_mask": prompt_mask, "lora_mask": lora_mask}
