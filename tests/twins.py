"""The patched model beside the literal one: the same weights, the same dropout masks, one step each."""

from __future__ import annotations

import copy
import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import literal, parity
from tests.tiny import images, labels, patched, vit


def literal_of(fused: nn.Module, base: nn.Module, method, dtype: torch.dtype) -> nn.Module:
    """The literal implementation with the patched model's weights; in training it takes that model's latest masks.

    Args:
        fused: the patched model.
        base: a plain model of the same architecture.
        method: what `fused` was patched with.
        dtype: type to compute in.
    """
    twin = literal.apply(copy.deepcopy(base).to(dtype), method, **_masks(fused))
    twin.load_state_dict(fused.state_dict())
    return twin


def _masks(fused: nn.Module) -> dict:
    """The engine's masks, in the order of the literal model's rows: prompts stand before the patches there."""
    masks = parity.engine_masks(fused)
    first = fused.num_prefix_tokens

    def lora_mask(index: int, role: str, x: Tensor) -> Tensor:
        block = fused.blocks[index]
        prompts = block.fastpeft_block.carry_in or getattr(getattr(block, "vpt", None), "length", 0)
        if not prompts:
            return masks["lora_mask"](index, role, x)
        own = masks["lora_mask"](index, role, x)  # tokens, then prompts
        tokens = x.shape[1] - prompts
        return torch.cat((own[:, :first], own[:, tokens:], own[:, first:tokens]), dim=1)

    return {**masks, "lora_mask": lora_mask}


def step(model: nn.Module, x: Tensor, *, autocast: bool = False) -> dict[str, Tensor]:
    """Logits and the gradient of every trainable parameter, in float64. The head's own dropout, torch's, is off."""
    for name, module in model.named_modules():
        if name.startswith(literal.HEADS) and isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(x)
    F.cross_entropy(logits.double(), labels(len(x))).backward()
    found = {"logits": logits.detach().double()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            found[name] = parameter.grad.double()
    return found


def assert_same_step(method, variant: str, training: bool, *, batch: int = 3, **options) -> None:
    """Patched and literal step in float64, where nothing but the order of additions may differ."""
    fused = patched(method, variant, dtype=torch.float64, **options).train(training)
    x = images(variant, batch, dtype=torch.float64)
    actual = step(fused, x)
    twin = literal_of(fused, vit(variant, **options), method, torch.float64).train(training)
    expected = step(twin, x)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def measure(
    method, variant: str, dtype: torch.dtype, training: bool, *, autocast: bool = False, draws: int = 4
) -> dict[str, tuple[float, float]]:
    """Relative errors against float64 of the patched and of the literal model, by tensor.

    The error of one small tensor is luck, and large where a ReLU's input changes its sign. So errors are geometric
    means over the blocks and over models drawn afresh, none counted below half a rounding. A gradient that is zero but
    for rounding is measured against the whole gradient's size.

    Returns:
        name without the block's number -> (patched, literal). "contribution" is what the method adds to the logits.
    """
    floor = torch.finfo(torch.bfloat16 if autocast else dtype).eps / 2
    logs: dict[str, list[tuple[float, float]]] = {}
    for seed in range(draws):
        base = vit(variant, seed=seed)
        fused = patched(method, variant, dtype=dtype, seed=seed, scale=0.1).train(training)
        x = images(variant, 8, seed=100 + seed, dtype=dtype)
        found = step(fused, x, autocast=autocast)
        baseline = step(literal_of(fused, base, method, dtype).train(training), x, autocast=autocast)
        truth = step(literal_of(fused, base, method, torch.float64).train(training), x.double())
        plain, exact = _plain_logits(base, fused, x, dtype, autocast), _plain_logits(base, fused, x, torch.float64)
        if any(name.startswith("blocks.") and any(new in name for new in literal.NEW_TENSORS) for name in truth):
            for results, base_logits in ((found, plain), (baseline, plain), (truth, exact)):
                results["contribution"] = results["logits"] - base_logits
        whole = max(float(t.norm()) for name, t in truth.items() if name not in ("logits", "contribution"))
        for name, expected in truth.items():
            size = max(float(expected.norm()), 1e-3 * whole)
            pair = (math.log(max(float((t[name] - expected).norm()) / size, floor)) for t in (found, baseline))
            logs.setdefault(re.sub(r"blocks\.\d+", "blocks.*", name), []).append(tuple(pair))
    return {name: tuple(math.exp(sum(e[i] for e in all_) / len(all_)) for i in (0, 1)) for name, all_ in logs.items()}


@torch.no_grad()
def _plain_logits(base, fused, x, dtype, autocast=False) -> Tensor:
    plain = copy.deepcopy(base).to(dtype)
    plain.load_state_dict(fused.state_dict(), strict=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return plain.eval()(x.to(dtype)).double()
