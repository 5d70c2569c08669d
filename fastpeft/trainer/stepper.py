"""DeepSpeed behind three calls, backward, step and state, for ZeRO stages 0 to 2; stage 3 is in `partitioned`.

DeepSpeed is given the trained parameters alone. They are fp32 masters and its engine runs in fp32, while the frozen
weights keep whatever format the forward pass wants: to the optimizer they are constants, with nothing to broadcast,
reduce or shard.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def state_keys(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """What an optimizer keeps beside each parameter, a step count aside."""
    if isinstance(optimizer, torch.optim.AdamW):
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if optimizer.defaults["momentum"] else ()


def offloading(offload: str) -> dict[str, dict[str, object]]:
    """DeepSpeed's options for `train.offload`."""
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    places = {"none": (), "optimizer": ("offload_optimizer",), "all": ("offload_optimizer", "offload_param")}
    return {place: dict(host) for place in places[offload]}


class _Trained(nn.Module):
    """The trained parameters as a module of their own; the forward pass is called on the model directly."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.parameters_ = nn.ParameterList(parameters)


class Stepper:
    """Accumulates gradients over micro-batches and ranks, and takes optimizer steps."""

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        micro_batch: int,
        zero: int,
        offload: str = "none",
    ) -> None:
        """Start DeepSpeed's engine.

        Args:
            named: The trained parameters, each once, by their names in the model.
            optimizer: Over the same parameters.
            micro_batch: Images of a micro-batch; DeepSpeed only reports it.
            zero: ZeRO stage, 0 to 2.
            offload: "optimizer" keeps masters and optimizer state in the host's memory, with stages 1 and 2.
        """
        self.named = dict(named)
        self.optimizer = optimizer
        self.zero = zero
        self._keys = state_keys(optimizer)
        self._start(_Trained(list(self.named.values())), micro_batch, {"stage": zero, **offloading(offload)})
        if zero:
            self._create_partitioned_state()

    def _start(self, module: nn.Module, micro_batch: int, zero_optimization: Mapping[str, object]) -> None:
        """Start DeepSpeed's engine over a module."""
        import deepspeed

        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=self.optimizer,
            config={
                "train_micro_batch_size_per_gpu": micro_batch,
                # step() is the boundary, so that an epoch's last batch may hold fewer micro-batches than the others.
                "managed_gradient_accumulation": False,
                "zero_optimization": dict(zero_optimization),
                # DeepSpeed clips to a norm of 1 unless told not to; the papers' protocols do not clip.
                "gradient_clipping": 0.0,
                "zero_allow_untested_optimizer": True,
                # Offloaded state is stepped by torch's optimizer too, which gives the same bits wherever it lies.
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": None,
            },
        )

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's gradients; `step` averages them over ranks."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> None:
        """Reduce the gradients, update the parameters, forget the gradients."""
        self._engine.step()

    def skip(self) -> None:
        """Forget the gradients without a step."""
        for parameter in self.named.values():
            parameter.grad = None

    def parameters(self) -> dict[str, torch.Tensor]:
        """The trained parameters as full CPU tensors, by name; collective."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.named.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and optimizer state as full CPU tensors: `param/<name>` and `<state key>/<name>`; collective."""
        tensors = {f"param/{name}": tensor for name, tensor in self.parameters().items()}
        for key in self._keys:
            for name, parameter in self.named.items():
                tensors[f"{key}/{name}"] = self._state_of(parameter, key).detach().cpu().clone()
        return tensors

    def steps_taken(self) -> int:
        """The optimizer's own step count, which AdamW's bias correction uses."""
        return next((int(state["step"]) for state in self.optimizer.state.values() if "step" in state), 0)

    def load(self, tensors: Mapping[str, torch.Tensor], steps_taken: int) -> None:
        """Continue from what `tensors` and `steps_taken` returned."""
        self.load_parameters({name: tensors[f"param/{name}"] for name in self.named})
        if self.zero:
            self._load_partitioned(tensors, steps_taken)
            return
        for name, parameter in self.named.items():
            values = {key: tensors[f"{key}/{name}"].to(parameter.device, copy=True) for key in self._keys}
            self.optimizer.state[parameter] = values | self._step_count(steps_taken, parameter)

    @torch.no_grad()
    def load_parameters(self, values: Mapping[str, torch.Tensor]) -> None:
        """Set the trained parameters; the optimizer's own copies under ZeRO are `load`'s business."""
        for name, parameter in self.named.items():
            parameter.copy_(values[name])

    def _step_count(self, steps_taken: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
        if not isinstance(self.optimizer, torch.optim.AdamW):
            return {}
        # A fused step counts on the device.
        device = like.device if self.optimizer.defaults["fused"] else torch.device("cpu")
        return {"step": torch.tensor(float(steps_taken), device=device)}

    def _create_partitioned_state(self) -> None:
        """Give every group's flat partition the state that its first step would start from.

        DeepSpeed maps optimizer state to parameters once, after the first group's first step, when the other groups
        have none yet; so the state of all groups is made and mapped here.
        """
        partitioned = self._engine.optimizer
        for flat in partitioned.single_partition_of_fp32_groups:
            state = {key: torch.zeros_like(flat, requires_grad=False) for key in self._keys}
            self.optimizer.state[flat] = state | self._step_count(0, flat)
        partitioned._lazy_init_hp_params_optimizer_state()

    def _load_partitioned(self, tensors: Mapping[str, torch.Tensor], steps_taken: int) -> None:
        """Fill this rank's flat partition of each group."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for flat, state in self.optimizer.state.items():
            state |= self._step_count(steps_taken, flat)
        for name, parameter in self.named.items():
            safe_set_full_fp32_param(parameter, tensors[f"param/{name}"].to(parameter.device))
            for key in self._keys:
                safe_set_full_optimizer_state(parameter, tensors[f"{key}/{name}"].to(parameter.device), key)

    def _state_of(self, parameter: nn.Parameter, key: str) -> torch.Tensor:
        if not self.zero:
            # A parameter that has never had a gradient has no state; zeros are what its first step would start from.
            return self.optimizer.state.get(parameter, {}).get(key, torch.zeros_like(parameter))
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, key)
