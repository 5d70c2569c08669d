"""Runs that differ only in rates, weight decay and seed, trained side by side on one set of features.

A step of all of them reads a batch once and takes each run's forward, backward and optimizer step in turn, with the
operations, shapes and random numbers that the trainer has for that run alone: every run ends with the very bits that
it would have ended with by itself, whatever others there are. That is why their products are not stacked into larger
ones: a library rounds those by their size, and high learning rates make much of a rounding.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fastpeft
from fastpeft.config import Config, parse_interval
from fastpeft.metrics import Top1
from fastpeft.state import clock_of
from fastpeft.trainer import feature_key, launch, optim, precision, results
from fastpeft.trainer.feature_store import FeatureStore
from fastpeft.trainer.features import Features
from fastpeft.trainer.order import STEP, Deal, evaluation_batches, mix
from fastpeft.trainer.report import Reporter
from fastpeft.trainer.task import prepare
from fastpeft.trainer.workload import Workload, deal_images

# Of the trained tensors, their gradients and the optimizer's state of all runs that go together.
LIMIT_BYTES = 2 * 2**30


@dataclass
class _Run:
    """One of the runs.

    Attributes:
        index: of its configuration.
        tensors: its parameters and buffers, by their names in the trained module.
        lost: its loss or a tensor is no longer finite.
    """

    index: int
    config: Config
    deal: Deal
    parameters: dict[str, nn.Parameter]
    tensors: dict[str, torch.Tensor]
    optimizer: torch.optim.Optimizer
    lost: bool = False
    correct: dict[str, float] = field(default_factory=dict)

    def finite(self) -> bool:
        """Whether parameters and the optimizer's state are."""
        states = [value for state in self.optimizer.state.values() for value in state.values() if value is not None]
        return all(tensor.isfinite().all() for tensor in [*self.parameters.values(), *states])


def train(
    configs: Sequence[Config], source: str, ranks: launch.Ranks, store: FeatureStore | None
) -> list[dict[str, Any] | None] | None:
    """Train all, and evaluate each as the trainer does after its last epoch.

    Args:
        configs: of the runs; they differ in `train.base_lr`, `train.weight_decay`, `train.seed` and `out`.
        source: for messages.
        ranks: one.
        store: where features are kept.

    Returns:
        For each what the trainer's results hold as far as a table needs it, None for a run that diverged. Seconds and
        memory are those of all, seconds divided by their number. None in place of the list if these runs cannot go
        together: their training features are too large to keep, or they draw masks.

    Raises:
        ConfigError: a run cannot begin.
    """
    started = time.monotonic()
    launch.start(ranks)
    outcomes: dict[int, dict[str, Any] | None] = {}
    left = list(range(len(configs)))
    while left:
        task, model = prepare(configs[left[0]], source)
        if clock_of(model) is not None:
            return None
        work = Workload(task, model, deal_images(task, model, ranks), ranks, Reporter(False), store)
        if not isinstance(work.train_split, Features) or work.dtype == torch.float16:
            return None
        together = _same_backbone(work, configs, left, source)
        for part in _parts(work, together):
            runs = [_begin(work, configs[index], index, start) for index, start in part]
            found = _train(work, runs, ranks)
            outcomes |= {run.index: outcome for run, outcome in zip(runs, found, strict=True)}
        left = [index for index in left if index not in outcomes]
    seconds = round((time.monotonic() - started) / len(configs), 3)
    for outcome in outcomes.values():
        if outcome is not None:
            outcome["seconds"] = {"total": seconds}
    return [outcomes[index] for index in range(len(configs))]


def _same_backbone(
    work: Workload, configs: Sequence[Config], left: list[int], source: str
) -> list[tuple[int, dict[str, torch.Tensor]]]:
    """The runs whose frozen prefix has the workload's weights, each with the tensors that its seed begins with.

    Without pretrained weights a seed draws the backbone too, and then runs with other seeds have to wait.
    """
    own = feature_key.prefix_digest(fastpeft.frozen_prefix(work.model))
    starts: dict[int, dict[str, torch.Tensor] | None] = {configs[left[0]].train.seed: _tensors(work.model)}
    found = []
    for index in left:
        seed = configs[index].train.seed
        if seed not in starts:
            _, model = prepare(configs[index], source)
            precision.cast_frozen(model, work.dtype)
            same = feature_key.prefix_digest(fastpeft.frozen_prefix(model)) == own
            starts[seed] = _tensors(model) if same else None
        if starts[seed] is not None:
            found.append((index, starts[seed]))
    return found


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what training changes: trained parameters, and all buffers of a state dict."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}
    return {name: tensor.detach().cpu().clone() for name, tensor in (trained | buffers).items()}


def _parts(work: Workload, together: list) -> list[list]:
    """As many at a time as fit into memory."""
    trained = sum(parameter.numel() * parameter.element_size() for parameter in work.named_trained().values())
    size = max(1, LIMIT_BYTES // (4 * trained))
    return [together[first : first + size] for first in range(0, len(together), size)]


def _begin(work: Workload, config: Config, index: int, start: dict[str, torch.Tensor]) -> _Run:
    """A run before its first step."""
    device = next(iter(work.named_trained().values())).device
    trained = work.named_trained()
    copies = {name: tensor.to(device, copy=True) for name, tensor in start.items()}
    parameters = {name: nn.Parameter(copies[name]) for name in trained}
    groups = {
        group: [(name, parameters[name]) for name, _ in members]
        for group, members in fastpeft.parameter_groups(work.model).items()
    }
    optimizer = optim.build_optimizer(groups, work.task.num_classes, config.train)
    deal = Deal(work.deal.size, work.deal.batch_size, config.train.seed, work.deal.drop_last, 1)
    # Features are decoded by a module that holds the model under this name.
    tensors = {f"model.{name}": tensor for name, tensor in (copies | parameters).items()}
    return _Run(index, config, deal, parameters, tensors, optimizer)


def _train(work: Workload, runs: list[_Run], ranks: launch.Ranks) -> list[dict[str, Any] | None]:
    """From the first step to the evaluation."""
    train = work.task.config.train
    steps = work.deal.steps
    interval, unit = parse_interval(train.checkpoint_every)
    seconds = 0.0
    work.train_mode()
    for epoch in range(train.epochs):
        started = time.perf_counter()
        orders = {run.config.train.seed: run.deal.order(epoch) for run in runs}
        for step in range(steps):
            _step(work, [run for run in runs if not run.lost], orders, epoch, step, ranks)
        seconds += time.perf_counter() - started
        # When the trainer writes a checkpoint it finds out what is no longer finite.
        if epoch + 1 == train.epochs or (unit == "epoch" and (epoch + 1) % interval == 0):
            for run in runs:
                run.lost = run.lost or not run.finite()
    _evaluate(work, [run for run in runs if not run.lost], "test" if work.val_split is None else "val", ranks)
    summary = fastpeft.summary(work.model)
    seen = len(runs) * train.epochs * work.deal.size
    about = {
        "trained_parameters": summary.trainable,
        "backbone_parameters": summary.backbone,
        "ms_per_image": round(1000 * seconds / seen, 4),
        "peak_memory_mb": results.peak_memory_mb(ranks.device),
        "precision": work.precision,
        "device": str(ranks.device.type),
    }
    return [None if run.lost else about | _accuracies(run, train.epochs) for run in runs]


def _accuracies(run: _Run, epochs: int) -> dict[str, Any]:
    last = {"epoch": epochs} | {f"{split}_accuracy": share for split, share in run.correct.items()}
    return {"history": [last], "test_accuracy": {"last": run.correct.get("test"), "best_val": None}}


def _step(
    work: Workload, runs: list[_Run], orders: dict[int, list[int]], epoch: int, step: int, ranks: launch.Ranks
) -> None:
    """One optimizer step of every run, as `fastpeft.trainer.loop` takes it on one rank."""
    batches = {}
    losses = []
    for run in runs:
        seed = run.config.train.seed
        if seed not in batches:
            batches[seed] = _batch(work, work.deal.batch(orders[seed], step), ranks)
        inputs, labels = batches[seed]
        optim.set_rates(run.optimizer, optim.rate_factor(run.config.train, epoch, step, work.deal.steps))
        torch.manual_seed(mix(seed, STEP, epoch * work.deal.steps + step, ranks.rank))
        loss = F.cross_entropy(work.forward(inputs, run.tensors).float(), labels, reduction="sum")
        (loss * (1.0 / len(labels))).backward()
        losses.append(loss.detach())
        run.optimizer.step()
        run.optimizer.zero_grad()
    if runs:
        for run, finite in zip(runs, torch.stack(losses).isfinite().tolist(), strict=True):
            run.lost = not finite


def _batch(work: Workload, indices: list[int], ranks: launch.Ranks) -> tuple[torch.Tensor, torch.Tensor]:
    split = work.train_split
    labels = torch.tensor([split.labels[index] for index in indices], dtype=torch.long)
    return split.features[indices].to(ranks.device), labels.to(ranks.device)


@torch.no_grad()
def _evaluate(work: Workload, runs: list[_Run], name: str, ranks: launch.Ranks) -> None:
    """Note the accuracy of every run; images that are not encoded are encoded once for all."""
    split = {"val": work.val_split, "test": work.test_split}[name]
    counts = [Top1(ranks.device) for _ in runs]
    work.eval_mode()
    workers = work.task.config.data.workers
    for images, labels in evaluation_batches(split, work.evaluation_batch, 0, 1, workers):
        inputs, labels = work.encoded(images.to(ranks.device), split), labels.to(ranks.device)
        for run, count in zip(runs, counts, strict=True):
            count.update(work.forward(inputs, run.tensors), labels)
    for run, count in zip(runs, counts, strict=True):
        run.correct[name] = count.accuracy
    work.train_mode()
