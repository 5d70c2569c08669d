"""Training steps and inference of one method by every implementation of it, as things to time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastpeft
from bench.cases import METHODS, TrainingStep, build, has_peft
from bench.device_parts.rows import Unavailable
from bench.device_parts.settings import DTYPES, Settings, Shape
from fastpeft.state import clock_of
from fastpeft.trainer.graph import Capture, StepGraph, capture_cuda

Prepared = Iterator[tuple[str, Callable[[], "TrainingStep | Inference"]]]


class GraphedStep(TrainingStep):
    """A training step that is recorded once and replayed."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, capture: Capture = capture_cuda) -> None:
        super().__init__(model, images, labels)
        if images.is_cuda:
            rate = torch.tensor(1e-4, device=images.device)
            trained = [p for p in model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(trained, lr=rate, fused=True, capturable=True)
        self._graph = StepGraph(self._compute, self.optimizer, clock_of(model), capture)

    def _compute(self, images: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(self.model(images).float(), labels)
        loss.backward()
        return loss.detach()

    def __call__(self) -> Tensor:
        """Take a step; returns the loss before it."""
        return self._graph(self.images, self.labels)


def ours(settings: Settings, shape: Shape, method: str, backend: str) -> nn.Module:
    """The library's model of a method, by name, on a backend."""
    model = settings.plain(shape, DTYPES[settings.dtype])
    return fastpeft.patch(model, METHODS[method](), backend=backend)


def other(settings: Settings, shape: Shape, method: str, variant: str) -> nn.Module:
    """The literal or peft's model of a method, by name.

    Raises:
        Unavailable: peft has no such method, or is not there.
    """
    made = METHODS[method]()
    if variant == "peft" and not has_peft(made):
        raise Unavailable(f"peft has no {method}")
    return build(variant, made, settings.plain(shape, DTYPES[settings.dtype]))


def steps(settings: Settings, shape: Shape, method: str) -> Iterator[tuple[str, Callable[[], TrainingStep]]]:
    """The eager training steps of a method: name, and what prepares one."""
    images, labels = settings.batch_of(shape, DTYPES[settings.dtype])
    for backend in settings.backends:
        yield backend, lambda b=backend: TrainingStep(ours(settings, shape, method, b), images, labels)
        if settings.cuda:
            yield (
                f"{backend}-graph",
                lambda b=backend: GraphedStep(ours(settings, shape, method, b), images, labels),
            )
    yield "literal", lambda: TrainingStep(other(settings, shape, method, "literal"), images, labels)
    if has_peft(METHODS[method]()):
        yield "peft", lambda: TrainingStep(other(settings, shape, method, "peft"), images, labels)


def compiled_steps(settings: Settings, shape: Shape, method: str) -> Iterator[tuple[str, Callable[[], TrainingStep]]]:
    """The training steps of what the library is compared with, under torch.compile."""
    images, labels = settings.batch_of(shape, DTYPES[settings.dtype])
    names = ["literal", *(["peft"] if has_peft(METHODS[method]()) else [])]
    for name in names:
        yield (
            f"{name}-compiled",
            lambda n=name: TrainingStep(
                other(settings, shape, method, n), images, labels, compile_options=compile_options(settings)
            ),
        )


def compile_options(settings: Settings) -> Mapping[str, Any]:
    """What torch.compile is given; in little it only traces, since generating code takes longer than all else."""
    return {"backend": "aot_eager"} if settings.tiny else {"mode": "max-autotune"}


class Inference:
    """Logits of a batch, without gradients.

    Attributes:
        model: in evaluation mode.
        images: the batch.
        compiled: whether torch.compile runs the model.
    """

    def __init__(self, model: nn.Module, images: Tensor, compiled: Mapping[str, Any] | None = None) -> None:
        self.model = model.eval()
        self.images, self.compiled = images, compiled is not None
        self._forward = model if compiled is None else torch.compile(model, **compiled)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Run the batch."""
        return self._forward(self.images)


def inference(settings: Settings, shape: Shape, method: str) -> Iterator[tuple[str, Callable[[], Inference]]]:
    """A method's model merged for deployment, where it can be, its literal form, and the plain model."""
    images, _ = settings.batch_of(shape, DTYPES[settings.dtype])
    for backend in settings.backends:
        yield f"{backend}-merged", lambda b=backend: Inference(merged(settings, shape, method, b), images)
    yield "literal", lambda: Inference(other(settings, shape, method, "literal"), images)
    yield "plain", lambda: Inference(settings.plain(shape, DTYPES[settings.dtype]), images)


def merged(settings: Settings, shape: Shape, method: str, backend: str) -> nn.Module:
    """The library's model as it is deployed: what can be folded is."""
    model = ours(settings, shape, method, backend)
    try:
        return fastpeft.merge(model)
    except fastpeft.MethodError:
        # A method that only chooses what is trained, or adapters: there is nothing to fold.
        return model


def resident_bytes(step: TrainingStep | Inference) -> int:
    """Bytes of weights, buffers and optimizer state."""
    tensors = [*step.model.parameters(), *step.model.buffers()]
    optimizer = getattr(step, "optimizer", None)
    if optimizer is not None:
        tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
