"""Things a caller may ask of a patched model besides its outputs: dropout counters and the frozen prefix."""

from __future__ import annotations

import torch
from torch import nn

from fastpeft.engine.clock import DropoutClock
from fastpeft.engine.stack import EngineHost, FrozenPrefix, frozen_depth
from fastpeft.parameters import hosts


def clock_of(model: nn.Module) -> DropoutClock | None:
    """The counter of a patched model's dropout masks, or None if no method of it draws."""
    clocks = (host.fastpeft_host.clock for _, host in hosts(model))
    return next((clock for clock in clocks if clock is not None), None)


def get_rng_state(model: nn.Module) -> dict[str, int]:
    """The dropout counter: {"seed", "step"}, or an empty dict if no method of the model draws."""
    clock = clock_of(model)
    return {} if clock is None else {"seed": int(clock.seed), "step": int(clock.step)}


def set_rng_state(model: nn.Module, seed: int | None = None, step: int | None = None, rank: int | None = None) -> None:
    """Set the dropout counter; what is None stays.

    Args:
        model: a patched model; one without dropout is left as it is.
        seed: of the masks, equal on all ranks.
        step: number of training forwards begun.
        rank: position in the data-parallel group, so that ranks draw different masks.
    """
    for _, host in hosts(model):
        clock = host.fastpeft_host.clock
        if clock is None:
            continue
        if seed is not None:
            clock.seed = torch.full_like(clock.seed, seed)
        if step is not None:
            clock.step = torch.full_like(clock.step, step)
        if rank is not None:
            clock.rank = rank


def frozen_prefix(model: nn.Module) -> FrozenPrefix | None:
    """The part of a model that comes before its first trainable parameter.

    Its output is a constant per image, so it can be computed once a dataset.

    Returns:
        None if there is no such part: the stem is trained or drops out, the model is not itself a patched transformer
        whose every block the engine runs, or its family does not say how to stop before a block (`fastpeft_encode`).
    """
    if not isinstance(model, EngineHost) or not hasattr(model, "fastpeft_encode"):
        return None
    if model.fastpeft_host.spec.left_alone:
        return None
    start = frozen_depth(model)
    return None if start is None else FrozenPrefix(model, start)
