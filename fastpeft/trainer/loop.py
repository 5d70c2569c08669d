"""The training loop: from a position to the end, with a checkpoint at every interval."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch.utils.data import Dataset

import fastpeft
from fastpeft.config import ConfigError, parse_interval
from fastpeft.errors import FastPEFTError
from fastpeft.state import clock_of
from fastpeft.trainer import checkpoint, optim, precision
from fastpeft.trainer.evaluate import Spare, evaluate
from fastpeft.trainer.folder import RunFolder
from fastpeft.trainer.graph import StepGraph
from fastpeft.trainer.launch import Ranks, barrier
from fastpeft.trainer.logs import Logs
from fastpeft.trainer.order import STEP, evaluation_batches, mix, parts_of, training_batches
from fastpeft.trainer.report import Reporter
from fastpeft.trainer.stepper import Stepper
from fastpeft.trainer.workload import Workload


class DivergedError(FastPEFTError):
    """The loss, or a trained parameter, is no longer a finite number."""


@dataclass
class Position:
    """Where a run stands: everything a checkpoint keeps beside tensors.

    Attributes:
        epoch: Epochs completed.
        step: Steps taken in the current epoch.
        global_step: Steps taken in all.
        loss_sum: Sum of the current epoch's per-image losses so far.
        images: Images of the current epoch so far.
        history: One entry a completed epoch.
        best: Validation accuracy of the best epoch and its number, or None.
        train_seconds: Time spent in training steps, over all sessions.
        other_seconds: Time spent otherwise up to the last checkpoint.
    """

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    loss_sum: float = 0.0
    images: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, float] | None = None
    train_seconds: float = 0.0
    other_seconds: float = 0.0


class Loop:
    """A run in progress.

    Attributes:
        position: Where it stands.
        best: The trained tensors of the best epoch on validation, if there is a validation split.
    """

    def __init__(
        self, work: Workload, stepper: Stepper, ranks: Ranks, folder: RunFolder, report: Reporter, started: float
    ) -> None:
        self.work, self.stepper, self.ranks, self.folder, self.report = work, stepper, ranks, folder, report
        self.train = work.task.config.train
        self.deal = work.deal
        self.position = Position()
        self.best: dict[str, torch.Tensor] = {}
        self.scale = precision.LossScale(list(stepper.named.values()), work.dtype == torch.float16)
        self.graph: StepGraph | None = None
        if self.train.cuda_graph:
            if ranks.device.type != "cuda" or ranks.world > 1:
                where = f"{ranks.world} ranks" if ranks.world > 1 else "the CPU"
                raise ConfigError(f"train.cuda_graph: records steps on one GPU, and this run is on {where}")
            self.graph = StepGraph(self._forward_and_backward, stepper.optimizer, clock_of(work.model))
        self._interval, self._unit = parse_interval(self.train.checkpoint_every)
        self._session_start = started
        self._train_seconds_before = 0.0
        self._other_seconds_before = 0.0

    def resume(self) -> bool:
        """Continue from the newest whole checkpoint; False if there is none. Collective."""
        found = checkpoint.load_latest(self.folder.checkpoints, self.report.warn) if self.ranks.first else None
        barrier(self.ranks)
        if not self.ranks.first:
            # The first rank has removed what was damaged.
            found = checkpoint.load_latest(self.folder.checkpoints, self.report.warn)
        if found is None:
            return False
        tensors, state = found
        fields = Position.__dataclass_fields__.keys()
        if state["position"].keys() != fields:
            raise FastPEFTError(
                f"{self.folder.checkpoints} was written by another version of fastpeft: its position has "
                f"{', '.join(sorted(state['position'].keys() ^ fields))} where this one differs; --fresh starts over"
            )
        self.position = Position(**state["position"])
        self._train_seconds_before = self.position.train_seconds
        self._other_seconds_before = self.position.other_seconds
        self.stepper.load(tensors, state["steps_taken"])
        self.work.load_buffers(_under("buffer", tensors))
        self.best = _under("best", tensors)
        self.scale.load(state["scale"])
        fastpeft.set_rng_state(self.work.model, rank=self.ranks.rank, **state["rng"])
        if state["world"] != self.ranks.world:
            self.report.warn(
                f"begun on {state['world']} ranks, continued on {self.ranks.world}: sums are rounded in another order"
            )
        return True

    def save(self) -> None:
        """Write a checkpoint of the current position; collective."""
        tensors = self.stepper.tensors()
        bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if bad:
            raise DivergedError(
                f"step {self.position.global_step}: {bad[0]} is no longer finite; {self._remedy('The update')}"
            )
        tensors |= {f"buffer/{name}": tensor for name, tensor in self.work.buffers().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        if self.ranks.first:
            position = self.position
            position.other_seconds = self.total_seconds() - position.train_seconds
            state = {
                "position": asdict(position),
                "steps_taken": self.stepper.steps_taken(),
                "scale": self.scale.state(),
                "rng": fastpeft.get_rng_state(self.work.model),
                "world": self.ranks.world,
            }
            checkpoint.save(self.folder.checkpoints, position.global_step, tensors, state)
        barrier(self.ranks)

    def total_seconds(self) -> float:
        """Time spent on the run, over all sessions; what was lost between a checkpoint and a kill is not in it."""
        trained = self.position.train_seconds - self._train_seconds_before
        elapsed = time.monotonic() - self._session_start
        return self.position.train_seconds + self._other_seconds_before + elapsed - trained

    def _remedy(self, what: str) -> str:
        kept = self.folder.checkpoints
        return f"{what} was not kept, the last good checkpoint is in {kept}; try a lower learning rate"

    def run(self, logs: Logs) -> None:
        """Train to the end; the last checkpoint is of the finished run."""
        position, deal, train = self.position, self.deal, self.train
        total = train.epochs * deal.steps
        if position.epoch == train.epochs:
            return
        parts = parts_of(deal, self.ranks.rank, self.ranks.world, position.epoch, position.step, train.epochs)
        batches = training_batches(self.work.train_split, parts, self.work.task.config.data.workers)
        self.work.train_mode()
        with self.report.bar("training", total, position.global_step) as advance:
            while position.epoch < train.epochs:
                while position.step < deal.steps:
                    self._step(batches, logs)
                    advance(1)
                    if self._unit == "step" and position.global_step % self._interval == 0:
                        self.save()
                self._end_epoch(logs)
                last = position.epoch == train.epochs
                if last or (self._unit == "epoch" and position.epoch % self._interval == 0):
                    self.save()

    def _step(self, batches, logs: Logs) -> None:
        """One optimizer step over all ranks and micro-batches."""
        started = time.perf_counter()
        position, train, deal, device = self.position, self.train, self.deal, self.ranks.device
        factor = optim.rate_factor(train, position.epoch, position.step, deal.steps)
        optim.set_rates(self.stepper.optimizer, factor)
        # Whatever draws from torch's generator (a head's dropout) draws the same whether or not the run was resumed.
        torch.manual_seed(mix(train.seed, STEP, position.global_step, self.ranks.rank))
        images = min(deal.batch_size, deal.size - position.step * deal.batch_size)
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for _ in range(train.grad_accumulation):
            inputs, labels, counted = next(batches)
            inputs, labels = inputs.to(device), labels.to(device)
            if self.graph is not None:
                loss_sum += self.graph(inputs, labels)
                continue
            loss = F.cross_entropy(self.work.forward(inputs).float(), labels, reduction="sum")
            if not counted:
                loss = loss * 0.0
            # The stepper averages over ranks; the step is on the mean over the whole batch.
            self.stepper.backward(loss * (self.scale.scale * self.ranks.world / images))
            loss_sum += loss.detach()
        if self.ranks.world > 1:
            torch.distributed.all_reduce(loss_sum)
        total = float(loss_sum)
        if not math.isfinite(total):
            raise DivergedError(
                f"step {position.global_step + 1} (epoch {position.epoch + 1}): the loss is {total}; "
                + self._remedy("The step")
            )
        stepped = self.scale.unscale()
        if not stepped and self.scale.exhausted:
            raise DivergedError(
                f"step {position.global_step + 1} (epoch {position.epoch + 1}): a gradient is not finite at the "
                f"smallest loss scale; {self._remedy('The step')}"
            )
        if self.graph is None:
            self.stepper.step() if stepped else self.stepper.skip()
        self.scale.update(stepped)
        position.step += 1
        position.global_step += 1
        position.loss_sum += total
        position.images += images
        position.train_seconds += time.perf_counter() - started
        rates = {group["name"]: group["base_lr"] * factor for group in self.stepper.optimizer.param_groups}
        logs.step(position.global_step, total / images, rates)

    def _forward_and_backward(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """A whole batch on one rank: gradients of its mean loss; returns the sum of its losses."""
        loss = F.cross_entropy(self.work.forward(inputs).float(), labels, reduction="sum")
        (loss / len(inputs)).backward()
        return loss.detach()

    def _end_epoch(self, logs: Logs) -> None:
        """Close the epoch: evaluate if it is due, remember the best, say one line."""
        position, train = self.position, self.train
        position.epoch += 1
        entry: dict[str, Any] = {"epoch": position.epoch, "train_loss": position.loss_sum / position.images}
        due = position.epoch == train.epochs or (train.eval_every and position.epoch % train.eval_every == 0)
        if due:
            # With a validation split the test images wait until everything has been chosen.
            split = "test" if self.work.val_split is None else "val"
            entry |= self.measure(split)
            accuracy = entry[f"{split}_accuracy"]
            if split == "val" and (self.position.best is None or accuracy > self.position.best["accuracy"]):
                self.position.best = {"accuracy": accuracy, "epoch": position.epoch}
                self.best = self.trained_tensors()
        position.history.append(entry)
        logs.epoch(position.global_step, entry)
        self.report.say(self._line(entry))
        position.step, position.loss_sum, position.images = 0, 0.0, 0

    def _line(self, entry: dict[str, Any]) -> str:
        width = len(str(self.train.epochs))
        seen = self.position.epoch * min(self.deal.size, self.deal.steps * self.deal.batch_size)
        line = f"epoch {entry['epoch']:>{width}}/{self.train.epochs}  loss {entry['train_loss']:.4f}"
        for split in ("val", "test"):
            if f"{split}_accuracy" in entry:
                line += f"  {split} {entry[f'{split}_accuracy']:.2%}"
        return f"{line}  {1000 * self.position.train_seconds / seen:.2f} ms/image"

    def measure(self, split: str) -> dict[str, float]:
        """Accuracy and loss of a split with the current weights; collective."""
        dataset = {"val": self.work.val_split, "test": self.work.test_split}[split]
        workers = self.work.task.config.data.workers
        batches = evaluation_batches(dataset, self.work.evaluation_batch, self.ranks.rank, self.ranks.world, workers)
        self.work.eval_mode()
        with self.report.bar(f"evaluating on {split}", len(dataset)) as advance:
            counts = evaluate(
                lambda inputs: self.work.forward(self.work.encoded(inputs, dataset)),
                batches,
                self.ranks.device,
                lambda images: advance(images * self.ranks.world),
                self._spare(dataset),
            )
        self.work.train_mode()
        return {f"{split}_accuracy": counts.accuracy, f"{split}_loss": counts.loss}

    def _spare(self, dataset: Dataset) -> Spare | None:
        """What a rank runs that has fewer batches of a split than another, where a forward pass is collective."""
        if self.train.zero < 3 or self.ranks.world == 1:
            return None
        rounds = math.ceil(len(dataset) / self.ranks.world / self.work.evaluation_batch)
        return Spare(dataset[0][0].unsqueeze(0), rounds)

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """Copies of all that training changes: parameters and the head's running statistics; collective."""
        return self.stepper.parameters() | self.work.buffers()


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names start with `<prefix>/`, without it."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}/")}
