"""The training loop: from a position to the end, with a checkpoint at every interval."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed

import fastpeft
from fastpeft.config import ConfigError, parse_interval
from fastpeft.errors import FastPEFTError
from fastpeft.state import clock_of
from fastpeft.trainer import checkpoint, optim, precision, results
from fastpeft.trainer.folder import RunFolder
from fastpeft.trainer.graph import StepGraph
from fastpeft.trainer.launch import Ranks, barrier
from fastpeft.trainer.logs import Logs
from fastpeft.trainer.order import STEP, mix
from fastpeft.trainer.report import Reporter
from fastpeft.trainer.saved import SavedBytes
from fastpeft.trainer.stepper import Stepper
from fastpeft.trainer.work import Work


class DivergedError(FastPEFTError):
    """The loss, or a trained parameter, is no longer a finite number."""


@dataclass
class Position:
    """Where a run stands: everything a checkpoint keeps beside tensors.

    Attributes:
        epoch: Epochs completed.
        step: Steps taken in the current epoch.
        global_step: Steps taken in all.
        loss_sum: Sum of the current epoch's losses so far.
        images: What that is a sum over: images of the current epoch, or whatever the work counts.
        history: One entry a completed epoch.
        best: Validation score of the best epoch, by the metric's name, and its number; or None.
        train_seconds: Time spent in training steps, over all sessions.
        other_seconds: Time spent otherwise up to the last checkpoint.
    """

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    loss_sum: float = 0.0
    images: float = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, float] | None = None
    train_seconds: float = 0.0
    other_seconds: float = 0.0


class Loop:
    """A run in progress.

    Attributes:
        position: Where it stands.
        best: The trained tensors of the best epoch on validation, if there is a validation split.
        saved_mb: What the run's first forward pass kept for its backward pass, on this rank; None where that cannot be
            counted.
    """

    def __init__(
        self, work: Work, stepper: Stepper, ranks: Ranks, folder: RunFolder, report: Reporter, started: float
    ) -> None:
        self.work, self.stepper, self.ranks, self.folder, self.report = work, stepper, ranks, folder, report
        self.train = work.task.config.train
        self.deal = work.deal
        self.position = Position()
        self.best: dict[str, torch.Tensor] = {}
        self.saved_mb: float | None = None
        self.scale = precision.LossScale(list(stepper.named.values()), work.dtype == torch.float16)
        self.graph: StepGraph | None = None
        if self.train.cuda_graph:
            if ranks.device.type != "cuda" or ranks.world > 1:
                where = f"{ranks.world} ranks" if ranks.world > 1 else "the CPU"
                raise ConfigError(f"train.cuda_graph: records steps on one GPU, and this run is on {where}")
            self.graph = StepGraph(self._forward_and_backward, stepper.optimizer, clock_of(work.model))
        self._interval, self._unit = parse_interval(self.train.checkpoint_every)
        # Steps between two checkpoints, or None. A run by steps is one long part where only its end is evaluated.
        self._every = self._interval if self._unit == "step" else None
        if self._every is None and work.part == "part":
            self._every = max(1, sum(work.deal.steps_of(part) for part in range(work.epochs)) // 10)
        # The step of the newest checkpoint, if nothing has changed since.
        self._kept: int | None = None
        self._session_start = started
        self._train_seconds_before = 0.0
        self._other_seconds_before = 0.0

    def resume(self) -> bool:
        """Continue from the newest whole checkpoint; False if there is none. Collective."""
        # The first rank alone chooses, and removes what is damaged: ranks that went on from different steps would not
        # notice.
        found = checkpoint.load_latest(self.folder.checkpoints, self.report.warn) if self.ranks.first else None
        state = None if found is None else found[1]
        if self.ranks.world > 1:
            chosen = [state]
            torch.distributed.broadcast_object_list(chosen)
            state = chosen[0]
        if state is None:
            return False
        fields = Position.__dataclass_fields__.keys()
        if state["position"].keys() != fields:
            raise FastPEFTError(
                f"{self.folder.checkpoints} was written by another version of fastpeft: its position has "
                f"{', '.join(sorted(state['position'].keys() ^ fields))} where this one differs; --fresh starts over"
            )
        tensors = self._tensors_of(state) if found is None else found[0]
        self.position = Position(**state["position"])
        self._kept = self.position.global_step
        self._train_seconds_before = self.position.train_seconds
        self._other_seconds_before = self.position.other_seconds
        self.stepper.load(tensors, state["steps_taken"])
        self.work.load_buffers(_under("buffer", tensors))
        self.best = _under("best", tensors)
        self.scale.load(state["scale"])
        self.saved_mb = state.get("saved_mb")
        fastpeft.set_rng_state(self.work.model, rank=self.ranks.rank, **state["rng"])
        if state["world"] != self.ranks.world:
            self.report.warn(
                f"begun on {state['world']} ranks, continued on {self.ranks.world}: sums are rounded in another order"
            )
        elif state.get("zero", self.train.zero) != self.train.zero:
            self.report.warn(
                f"begun at ZeRO stage {state['zero']}, continued at {self.train.zero}: "
                "sums are rounded in another order"
            )
        if state.get("precision", self._precision) != self._precision:
            self.report.warn(
                f"begun in {state['precision']}, continued in {self._precision}, which this machine is better at: "
                "products are rounded differently"
            )
        return True

    def _tensors_of(self, state: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors of the checkpoint that the first rank goes on from, as another rank reads them."""
        path = checkpoint.path_of(self.folder.checkpoints, state["position"]["global_step"])
        why = f"the first rank goes on from {path}, and all ranks have to see that"
        try:
            tensors, own = checkpoint.load(path)
        except checkpoint.CheckpointError as error:
            raise checkpoint.CheckpointError(f"{why}: {error}") from None
        # As text: a score that is not a number does not equal itself.
        if json.dumps(own, sort_keys=True) != json.dumps(state, sort_keys=True):
            raise checkpoint.CheckpointError(f"{why}: here it is one of another run")
        return tensors

    @property
    def _precision(self) -> str:
        """The working format's name."""
        return next(name for name, dtype in precision.DTYPES.items() if dtype == self.work.dtype)

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
                "zero": self.train.zero,
                "precision": self._precision,
                "saved_mb": self.saved_mb,
            }
            checkpoint.save(self.folder.checkpoints, position.global_step, tensors, state)
        self._kept = self.position.global_step
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
        position, deal, work = self.position, self.deal, self.work
        if position.epoch == work.epochs:
            return
        total = sum(deal.steps_of(epoch) for epoch in range(work.epochs))
        batches = work.batches(position.epoch, position.step)
        work.train_mode()
        with self.report.bar("training", total, position.global_step) as advance:
            while position.epoch < work.epochs:
                while position.step < deal.steps_of(position.epoch):
                    self._step(batches, logs)
                    advance(1)
                    if self._every is not None and position.global_step % self._every == 0:
                        self.save()
                ended = position.epoch + 1
                saved = ended == work.epochs or (self._unit == "epoch" and ended % self._interval == 0)
                if saved and work.due(ended) and self._kept != position.global_step:
                    # An evaluation may take longer than what it is of. A run that goes on from here begins with it.
                    self.save()
                self._end_epoch(logs)
                if saved:
                    self.save()

    def _step(self, batches, logs: Logs) -> None:
        """One optimizer step over all ranks and micro-batches."""
        started = time.perf_counter()
        position, train, deal, device = self.position, self.train, self.deal, self.ranks.device
        rate = self.work.rate(position.epoch, position.step)
        optim.apply_rates(self.stepper.optimizer, rate)
        # Whatever draws from torch's generator (a head's dropout) draws the same whether or not the run was resumed.
        torch.manual_seed(mix(train.seed, STEP, position.global_step, self.ranks.rank))
        units = self.work.units(deal.keys(position.epoch, position.step))
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for _ in range(train.grad_accumulation):
            batch, counted = next(batches)
            batch = moved(batch, device)
            if self.graph is not None:
                loss_sum += self.graph(*batch)
                continue
            loss = self._loss(batch)
            if not counted:
                loss = loss * 0.0
            # The stepper averages over ranks; the step is on the mean over the whole batch.
            self.stepper.backward(loss * (self.scale.scale * self.ranks.world / units))
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
        position.images += units
        position.train_seconds += time.perf_counter() - started
        rates = {group["name"]: rate(group["base_lr"]) for group in self.stepper.optimizer.param_groups}
        logs.step(position.global_step, total / units, rates)

    def _loss(self, batch: Any) -> torch.Tensor:
        """The sum of a micro-batch's losses; of the run's first one, what its graph keeps is counted."""
        # At stage 3 a tensor has to be found by its parameter again, as others hold its values meanwhile.
        if self.saved_mb is not None or self.train.zero == 3:
            return self.work.loss(batch)
        model = self.work.model
        with SavedBytes((*model.parameters(), *model.buffers())) as saved:
            loss = self.work.loss(batch)
        self.saved_mb = saved.megabytes
        return loss

    def _forward_and_backward(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """A whole batch on one rank: gradients of its mean loss; returns the sum of its losses."""
        loss = self.work.loss((inputs, labels))
        (loss / len(inputs)).backward()
        return loss.detach()

    def _end_epoch(self, logs: Logs) -> None:
        """Close the epoch: evaluate if it is due, remember the best, say one line."""
        position, work = self.position, self.work
        position.epoch += 1
        entry: dict[str, Any] = {"epoch": position.epoch, "train_loss": position.loss_sum / position.images}
        if work.part == "part":
            entry["step"] = position.global_step
        if work.due(position.epoch):
            # With a validation split the test images wait until everything has been chosen.
            split = "test" if work.val_split is None else "val"
            entry |= self.measure(split)
            score = entry.get(f"{split}_{work.metric}")
            if split == "val" and (position.best is None or score > position.best[work.metric]):
                position.best = {work.metric: score, "epoch": position.epoch}
                self.best = self.trained_tensors()
        position.history.append(entry)
        logs.epoch(position.global_step, entry)
        self.report.say(self._line(entry))
        position.step, position.loss_sum, position.images = 0, 0.0, 0

    def _line(self, entry: dict[str, Any]) -> str:
        line = f"{self.work.place(entry['epoch'])}  loss {entry['train_loss']:.4f}"
        for split in ("val", "test"):
            score = entry.get(f"{split}_{self.work.metric}")
            if score is not None:
                line += f"  {split} {results.shown(self.work.metric, score)}"
        return f"{line}  {1000 * self.position.train_seconds / self.deal.seen(self.position.epoch):.2f} ms/image"

    def measure(self, split: str) -> dict[str, float]:
        """Scores of a split with the current weights; collective."""
        self.work.eval_mode()
        found = self.work.measure(split, self.report, self.folder.predictions)
        self.work.train_mode()
        return found

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """Copies of all that training changes: parameters and the head's running statistics; collective."""
        return self.stepper.parameters() | self.work.buffers()


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names start with `<prefix>/`, without it."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}/")}


def moved(batch: Any, device: torch.device) -> Any:
    """A tuple of tensors, or of None, on another device."""
    parts = [part if part is None else part.to(device, non_blocking=True) for part in batch]
    return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
