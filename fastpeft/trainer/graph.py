"""A training step recorded once as a CUDA graph and replayed: one launch instead of some thousands.

What is recorded reads and writes fixed memory: inputs are copied into it, gradients and losses appear in it, and the
counter of the dropout masks goes on inside it. Steps of another shape (an epoch's last batch) run as usual in between.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastpeft.engine.clock import DropoutClock

# Runs a function once without effect and returns what runs it again and again, and its result's memory.
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


def capture_cuda(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record the work that a function gives to the GPU."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result


class StepGraph:
    """Whole training steps, forward to optimizer, of one batch shape.

    The first steps run as usual, which makes the optimizer's state, compiles kernels and lets libraries allocate what
    they keep; then one of the full size is recorded.
    """

    # Of two steps in a row one is of the full size, so the largest batch among these is.
    EAGER_STEPS = 3

    def __init__(
        self,
        compute: Callable[[Tensor, Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        clock: DropoutClock | None,
        capture: Capture = capture_cuda,
    ) -> None:
        """Prepare to record.

        Args:
            compute: Of inputs and labels: runs forward and backward, returns the sum of losses as a tensor.
            optimizer: Its rates must be tensors, and its state on the device, as `capturable` makes them.
            clock: Of the model's dropout masks, if it draws any.
            capture: What records; `capture_cuda`, unless a test stands in for the GPU.
        """
        self._compute, self._optimizer, self._clock, self._capture = compute, optimizer, clock, capture
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._eager = self._largest = 0
        self._replay: Callable[[], None] | None = None
        self._inputs: Tensor | None = None
        self._labels: Tensor | None = None
        self._loss: Tensor | None = None
        self._step: Tensor | None = None

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Take a step; returns the sum of the batch's losses, which the next step may overwrite."""
        if self._replay is None:
            self._largest = max(self._largest, len(inputs))
            if self._eager < self.EAGER_STEPS or len(inputs) < self._largest:
                self._eager += 1
                return self._run(inputs, labels)
            self._record(inputs, labels)
        elif inputs.shape != self._inputs.shape or inputs.dtype != self._inputs.dtype:
            return self._run(inputs, labels)
        if self._clock is not None and self._clock.step is not self._step:
            # Steps that were not replayed have counted on in a tensor of their own.
            self._step.copy_(self._clock.step)
            self._clock.step = self._step
        self._inputs.copy_(inputs)
        self._labels.copy_(labels)
        self._replay()
        return self._loss

    def _run(self, inputs: Tensor, labels: Tensor) -> Tensor:
        self._forget()
        loss = self._compute(inputs, labels)
        self._optimizer.step()
        self._forget()
        return loss

    def _record(self, inputs: Tensor, labels: Tensor) -> None:
        self._inputs, self._labels = inputs.clone(), labels.clone()
        if self._clock is not None:
            self._step = self._clock.step
        # With no gradient there, the recorded backward pass writes gradients instead of adding to them.
        self._forget()
        self._replay, self._loss = self._capture(self._recorded)
        if self._clock is not None:
            self._clock.step = self._step
        # Not to be reached from outside: they belong to the graph's memory and are overwritten by each replay.
        self._forget()

    def _recorded(self) -> Tensor:
        loss = self._compute(self._inputs, self._labels)
        self._optimizer.step()
        if self._clock is not None:
            self._step.copy_(self._clock.step)
        return loss

    def _forget(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
