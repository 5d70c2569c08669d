"""Runs that differ only in rates, weight decay and seed, trained side by side on one set of features.

A step of all of them reads a batch once; of linear heads it has one loss and one backward pass. Products are taken run
by run, in the shapes and with the random numbers that the trainer has for that run alone: every run ends with the very
bits that it would have ended with by itself, whatever others there are. That is why products are not stacked: a library
rounds larger ones otherwise, and high learning rates make much of a rounding.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import fastpeft
from bench.tables.lockstep_run import Run, starting_tensors
from fastpeft.config import Config, parse_interval
from fastpeft.metrics import Top1
from fastpeft.state import clock_of
from fastpeft.trainer import checkpoint, feature_key, launch, memory, optim, precision, results
from fastpeft.trainer.feature_store import FeatureStore
from fastpeft.trainer.features import Features
from fastpeft.trainer.order import STEP, evaluation_batches, mix
from fastpeft.trainer.report import Reporter
from fastpeft.trainer.saved import SavedBytes
from fastpeft.trainer.task import prepare
from fastpeft.trainer.workload import Workload, deal_images

# Of the trained tensors, their gradients and the optimizer's state of all runs that go together.
LIMIT_BYTES = 2 * 2**30
# Seconds of training that a killed process may lose.
SAVE_AFTER = 60.0

# What the trainer's results hold, as far as a table needs it; None for a run that diverged.
Outcome = dict[str, Any] | None


def train(
    configs: Sequence[Config],
    source: str,
    ranks: launch.Ranks,
    store: FeatureStore | None,
    folder: Path,
    done: Callable[[int, Outcome], None],
) -> bool:
    """Train all, and evaluate each whenever the trainer would.

    Args:
        configs: of the runs; they differ in `train.base_lr`, `train.weight_decay`, `train.seed` and `out`.
        source: for messages.
        ranks: one.
        store: where features are kept.
        folder: of the checkpoints, from which the same runs go on if they were interrupted.
        done: called with the index and outcome of each. Seconds are those of all, divided by their number.

    Returns:
        False, with nothing done, if these runs cannot go together: their training features are too large to keep, or
        they draw masks.

    Raises:
        ConfigError: a run cannot begin.
        OSError: a checkpoint cannot be written.
    """
    launch.start(ranks)
    left = list(range(len(configs)))
    while left:
        started = time.monotonic()
        memory.forget_peak(ranks.device)
        task, model = prepare(configs[left[0]], source)
        if clock_of(model) is not None:
            return False
        work = Workload(task, model, deal_images(task, model, ranks), ranks, Reporter(False), store)
        if not isinstance(work.train_split, Features) or work.dtype == torch.float16:
            return False
        backbone = feature_key.prefix_digest(fastpeft.frozen_prefix(work.model))
        together = _same_backbone(work, backbone, configs, left, source)
        before = (time.monotonic() - started) / len(together)
        for part in _parts(work, together):
            started = time.monotonic()
            runs = [Run.begin(work, configs[index], index, start) for index, start in part]
            about = _train(work, runs, ranks, folder, backbone)
            about["seconds"] = {"total": before + (time.monotonic() - started) / len(runs)}
            for run in runs:
                done(run.index, None if run.lost else about | _history(run))
        found = {index for index, _ in together}
        left = [index for index in left if index not in found]
    return True


def _same_backbone(
    work: Workload, backbone: str, configs: Sequence[Config], left: list[int], source: str
) -> list[tuple[int, dict[str, torch.Tensor]]]:
    """The runs whose frozen prefix has the workload's weights, each with the tensors that its seed begins with.

    Without pretrained weights a seed draws the backbone too, and then runs with other seeds have to wait.
    """
    starts: dict[int, dict[str, torch.Tensor] | None] = {configs[left[0]].train.seed: starting_tensors(work.model)}
    found = []
    for index in left:
        seed = configs[index].train.seed
        if seed not in starts:
            _, model = prepare(configs[index], source)
            precision.cast_frozen(model, work.dtype)
            same = feature_key.prefix_digest(fastpeft.frozen_prefix(model)) == backbone
            starts[seed] = starting_tensors(model) if same else None
        if starts[seed] is not None:
            found.append((index, starts[seed]))
    return found


def _parts(work: Workload, together: list) -> list[list]:
    """As many at a time as fit into memory."""
    trained = sum(parameter.numel() * parameter.element_size() for parameter in work.named_trained().values())
    size = max(1, LIMIT_BYTES // (4 * trained))
    return [together[first : first + size] for first in range(0, len(together), size)]


def _train(work: Workload, runs: list[Run], ranks: launch.Ranks, folder: Path, backbone: str) -> dict[str, Any]:
    """From the first step, or the last checkpoint, to the evaluation; what all have in common of their outcomes."""
    train = work.task.config.train
    interval, unit = parse_interval(train.checkpoint_every)
    identity = [[run.config.identity() for run in runs], backbone]
    first, seconds = _resume(runs, folder, identity)
    saved = time.monotonic()
    work.train_mode()
    saved_mb = _saved_mb(work, runs[0], ranks)
    for epoch in range(first, train.epochs):
        started = time.perf_counter()
        orders = {run.config.train.seed: run.deal.order(epoch) for run in runs}
        for step in range(work.deal.steps):
            _step(work, [run for run in runs if not run.lost], orders, epoch, step, ranks)
        seconds += time.perf_counter() - started
        for run in runs:
            run.end_epoch()
        if epoch + 1 == train.epochs or (train.eval_every and (epoch + 1) % train.eval_every == 0):
            _evaluate(work, [run for run in runs if not run.lost], ranks)
        # It is when it writes a checkpoint that the trainer finds out what is no longer finite.
        if epoch + 1 == train.epochs or (unit == "epoch" and (epoch + 1) % interval == 0):
            for run in runs:
                run.lost = run.lost or not run.finite()
        if time.monotonic() - saved >= SAVE_AFTER and epoch + 1 < train.epochs:
            _save(runs, folder, identity, epoch + 1, seconds)
            saved = time.monotonic()
    summary = fastpeft.summary(work.model)
    return {
        "train_size": work.deal.size,
        "trained_parameters": summary.trainable,
        "backbone_parameters": summary.backbone,
        "ms_per_image": round(1000 * seconds / (len(runs) * train.epochs * work.deal.size), 4),
        "peak_memory_mb": results.peak_memory_mb(ranks.device),
        "saved_mb": saved_mb,
        "precision": work.precision,
        "device": str(ranks.device.type),
    }


def _history(run: Run) -> dict[str, Any]:
    """As the trainer's results have it; where there are validation images nobody reads the test images."""
    return {"history": run.history, "test_accuracy": {"last": run.history[-1].get("test_accuracy"), "best_val": None}}


def _save(runs: list[Run], folder: Path, identity: list, epoch: int, seconds: float) -> None:
    """Write a checkpoint after an epoch; runs that are lost have nothing to keep."""
    from safetensors import SafetensorError

    tensors = {}
    for place, run in enumerate(runs):
        tensors |= {} if run.lost else run.kept(place)
    told = [{"lost": run.lost, "history": run.history} for run in runs]
    state = {"epoch": epoch, "seconds": seconds, "runs": told, "identity": identity}
    try:
        checkpoint.save(folder, epoch, tensors, state)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _resume(runs: list[Run], folder: Path, identity: list) -> tuple[int, float]:
    """Go on from the last checkpoint of the very same runs: the epochs that are done, and their seconds."""
    found = checkpoint.load_latest(folder, Reporter(True).warn)
    if found is None or found[1]["identity"] != identity:
        # Of other runs: a later epoch of theirs would outlive an earlier one of these.
        shutil.rmtree(folder, ignore_errors=True)
        return 0, 0.0
    tensors, state = found
    for place, (run, told) in enumerate(zip(runs, state["runs"], strict=True)):
        run.lost, run.history = told["lost"], told["history"]
        if not run.lost:
            run.load(tensors, place)
    return state["epoch"], state["seconds"]


def _step(
    work: Workload, runs: list[Run], orders: dict[int, list[int]], epoch: int, step: int, ranks: launch.Ranks
) -> None:
    """One optimizer step of every run, as `fastpeft.trainer.loop` takes it on one rank."""
    batches, draws = {}, {}
    for seed in {run.config.train.seed for run in runs}:
        batches[seed] = _batch(work, work.deal.batch(orders[seed], step), ranks)
        draws[seed] = mix(seed, STEP, epoch * work.deal.steps + step, ranks.rank)
    size = _at_once(work)
    for first in range(0, len(runs), size):
        part = runs[first : first + size]
        logits, labels = [], []
        for run in part:
            optim.set_rates(run.optimizer, optim.rate_factor(run.config.train, epoch, step, work.deal.steps))
            _seed(draws[run.config.train.seed], ranks.device)
            logits.append(work.forward(batches[run.config.train.seed][0], run.tensors).float())
            labels.append(batches[run.config.train.seed][1])
        images = len(labels[0])
        chances = F.log_softmax(torch.cat(logits), dim=1).split(images)
        pairs = zip(chances, labels, strict=True)
        losses = torch.stack([F.nll_loss(*pair, reduction="sum") for pair in pairs])
        (losses * (1.0 / images)).sum().backward()
        for run, loss in zip(part, losses.tolist(), strict=True):
            run.note(loss, images)
            run.optimizer.step()
            run.optimizer.zero_grad()


def _saved_mb(work: Workload, run: Run, ranks: launch.Ranks) -> float:
    """What one run's first step keeps for its backward pass, as that of the trainer does for the run alone.

    Of all runs together it would be what they have at once, of which the batch is kept once for all. The pass is one
    more than the runs need, on copies of what it would change; the masks that a step draws have a seed of their own.
    """
    parameters = set(run.parameters.values())
    tensors = {name: one if one in parameters else one.clone() for name, one in run.tensors.items()}
    inputs, labels = _batch(work, work.deal.batch(run.deal.order(0), 0), ranks)
    with SavedBytes((*work.model.parameters(), *work.model.buffers(), *tensors.values())) as counted:
        loss = F.cross_entropy(work.forward(inputs, tensors).float(), labels, reduction="sum")
    del loss
    return counted.megabytes


def _at_once(work: Workload) -> int:
    """How many runs have one loss and one backward pass: several where only an output layer is trained.

    What a deeper head, or a block, keeps for its backward pass is too much to keep for many.
    """
    linear = work.train_split.features.ndim == 2 and sum(p.ndim == 2 for p in work.named_trained().values()) == 1
    logits = 4 * work.deal.batch_size * work.task.num_classes
    return max(1, LIMIT_BYTES // (8 * logits)) if linear else 1


def _seed(seed: int, device: torch.device) -> None:
    """Of what a head drops out. As `torch.manual_seed`, which on a machine without a GPU takes longer than a step."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _batch(work: Workload, indices: list[int], ranks: launch.Ranks) -> tuple[torch.Tensor, torch.Tensor]:
    split = work.train_split
    labels = torch.tensor([split.labels[index] for index in indices], dtype=torch.long)
    return work.converted(split.features[indices].to(ranks.device)), labels.to(ranks.device)


@torch.no_grad()
def _evaluate(work: Workload, runs: list[Run], ranks: launch.Ranks) -> None:
    """Note every run's accuracy and loss on the validation images, or without them on the test images.

    What is not encoded yet is encoded once for all.
    """
    name = "test" if work.val_split is None else "val"
    split = {"val": work.val_split, "test": work.test_split}[name]
    counts = [Top1(ranks.device) for _ in runs]
    work.eval_mode()
    workers = work.task.config.data.workers
    for images, labels in evaluation_batches(split, work.evaluation_batch, 0, 1, workers):
        inputs = work.converted(work.encoded(images.to(ranks.device), split))
        labels = labels.to(ranks.device)
        for run, count in zip(runs, counts, strict=True):
            count.update(work.forward(inputs, run.tensors), labels)
    for run, count in zip(runs, counts, strict=True):
        run.history[-1] |= {f"{name}_accuracy": count.accuracy, f"{name}_loss": count.loss}
    work.train_mode()
