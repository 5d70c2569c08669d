"""ZeRO stage 3: every weight, frozen ones too, is divided among the ranks and gathered while it is in use.

DeepSpeed is given the model that runs, and gathers weights by hooks on the modules that own them. A block that the
engine runs reads the weights of its layers itself, without calling them, and takes a hook below it for somebody who
wants to see every row. So all weights of a block are declared its own, gathered together before it runs, forward and
backward, and released behind it, and what lies below it keeps no hook. (DeepSpeed's leaf modules would do the former,
but reduce gradients of a block whose input needs none before they are there.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed
from torch import nn

from fastpeft.engine.block import BlockState
from fastpeft.trainer.stepper import Stepper, offloading, state_keys


@contextlib.contextmanager
def functions_put_back() -> Iterator[None]:
    """Give `torch.nn.functional.linear` back to the process, which DeepSpeed replaces for good.

    Its own keeps input and weight for the backward pass whether or not the weight is trained, and so would every model
    that is run after a run at stage 3 in the same process.
    """
    linear = nn.functional.linear
    try:
        yield
    finally:
        nn.functional.linear = linear


class PartitionedStepper(Stepper):
    """A `Stepper` for stage 3.

    A forward pass is collective from here on: every rank has to call the model equally often.
    """

    def __init__(
        self,
        model: nn.Module,
        named: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        micro_batch: int,
        offload: str = "none",
        readers: Sequence[tuple[nn.Module, Sequence[nn.Parameter]]] = (),
    ) -> None:
        """Divide the model's weights, in place, and start DeepSpeed's engine.

        Args:
            model: What a step calls. Its parameters are empty outside of its modules' forward and backward passes.
            named: The trained parameters, each once, by their names in a checkpoint.
            optimizer: Over the same parameters.
            micro_batch: Images of a micro-batch; DeepSpeed only reports it.
            offload: "optimizer" keeps masters and optimizer state in the host's memory, "all" the shares of all
                weights too.
            readers: Modules, besides the engine's blocks, that read weights which are not their own, and those weights.
        """
        self.named = dict(named)
        self.optimizer = optimizer
        self.zero = 3
        self._keys = state_keys(optimizer)
        blocks = [m for m in model.modules() if isinstance(m.__dict__.get("fastpeft_block"), BlockState)]
        trained = sum(parameter.numel() for parameter in self.named.values())
        readers = [*((block, list(block.parameters())) for block in blocks), *readers]
        largest = max((sum(weight.numel() for weight in weights) for _, weights in readers), default=0)
        options = {
            "stage": 3,
            # Small weights are many in a transformer, and are gathered with a block's large ones in one go.
            "stage3_param_persistence_threshold": 0,
            # Left to itself DeepSpeed keeps what it will use again within the next thousand million weights, which is
            # the whole of most models, from the forward pass to the backward pass, and fetches as much ahead. Here it
            # fetches what runs next, and keeps nothing.
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 2 * largest,
            "stage3_prefetch_bucket_size": largest,
            # The bucket is allocated, two gigabytes of it by default; few parameters have gradients here.
            "reduce_bucket_size": min(trained, 500_000_000),
            **offloading(offload),
        }
        with _without_new_hooks(_gathering_nothing(model, readers)):
            self._start(model, micro_batch, options)
        for reader, weights in readers:
            _own(reader, weights)
        self._fill_state(0)

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's gradients, reduced over ranks."""
        # What the engine's own forward does first: the next gradients are added to those that are there.
        self._engine.optimizer.clear_backward_seen_flag()
        super().backward(loss)

    def skip(self) -> None:
        """Not called: stage 3 does not run in fp16, where steps are left out."""
        raise AssertionError("a step at ZeRO stage 3 cannot be left out")

    def parameters(self) -> dict[str, torch.Tensor]:
        """The trained parameters as full CPU tensors, by name; collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p).detach().cpu().clone() for name, p in self.named.items()}

    def load(self, tensors: Mapping[str, torch.Tensor], steps_taken: int) -> None:
        """Continue from what `tensors` and `steps_taken` returned."""
        from deepspeed.utils import safe_set_local_optimizer_state

        self.load_parameters({name: tensors[f"param/{name}"] for name in self.named})
        self._fill_state(steps_taken)
        for key in self._keys:
            for name, parameter in self.named.items():
                safe_set_local_optimizer_state(parameter, _share(tensors[f"{key}/{name}"], parameter), key)

    @torch.no_grad()
    def load_parameters(self, values: Mapping[str, torch.Tensor]) -> None:
        """Set the trained parameters, each rank its share."""
        from deepspeed.utils import safe_set_local_fp32_param

        # What an evaluation fetched ahead and did not use is still there whole, and would be used as it was.
        self._engine.empty_partition_cache()
        for name, parameter in self.named.items():
            share = _share(values[name], parameter)
            # What the forward pass gathers may be the optimizer's own or a copy of it.
            parameter.ds_tensor.copy_(share)
            safe_set_local_fp32_param(parameter, share)

    def _fill_state(self, steps_taken: int) -> None:
        """Give every share the state that its first step would start from."""
        for flat in self._engine.optimizer.fp32_partitioned_groups_flat:
            state = {key: torch.zeros_like(flat, requires_grad=False) for key in self._keys}
            self.optimizer.state[flat] = state | self._step_count(steps_taken, flat)


def _gathering_nothing(
    model: nn.Module, readers: Sequence[tuple[nn.Module, Sequence[nn.Parameter]]]
) -> list[nn.Module]:
    """The modules for whose own sake no weight has to be there: others see to all that they have, if any."""
    kept = {model, *(module for module, _ in readers)}
    seen_to = {id(parameter) for _, weights in readers for parameter in weights}
    return [
        module
        for module in model.modules()
        if module not in kept and all(id(parameter) in seen_to for parameter in module.parameters(recurse=False))
    ]


@contextlib.contextmanager
def _without_new_hooks(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Remove the hooks that modules are given meanwhile."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    before = [(hooks, set(hooks)) for module in modules for hooks in (getattr(module, kind) for kind in kinds)]
    yield
    for hooks, kept in before:
        for key in set(hooks) - kept:
            del hooks[key]


def _own(reader: nn.Module, weights: Sequence[nn.Parameter]) -> None:
    """Let DeepSpeed gather weights for a module that reads them, though they are registered elsewhere."""
    import deepspeed

    own = {id(parameter) for parameter in reader.parameters(recurse=False)}
    for parameter in weights:
        if id(parameter) not in own:
            deepspeed.zero.register_external_parameter(reader, parameter)


def _share(value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """This rank's share of a full tensor; the last one is filled up with zeros."""
    size = parameter.ds_tensor.numel()
    rank = torch.distributed.get_rank()
    share = value.flatten()[rank * size : (rank + 1) * size]
    return nn.functional.pad(share, (0, size - share.numel())).to(parameter.ds_tensor)
