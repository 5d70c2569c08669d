"""One call from configuration to results: what `fastpeft.train` runs on every rank."""

from __future__ import annotations

import json
import time
from typing import Any

import torch

import fastpeft
from fastpeft.config import Config
from fastpeft.data.dataset import ImageDataset
from fastpeft.trainer import checkpoint, features, launch, optim, results
from fastpeft.trainer.feature_store import FeatureStore
from fastpeft.trainer.folder import RunFolder
from fastpeft.trainer.logs import Logs
from fastpeft.trainer.loop import Loop
from fastpeft.trainer.partitioned import PartitionedStepper
from fastpeft.trainer.report import Reporter
from fastpeft.trainer.stepper import Stepper
from fastpeft.trainer.task import Task, blame, prepare
from fastpeft.trainer.workload import Workload, deal_images


def run(
    config: Config,
    source: str,
    fresh: bool,
    report: Reporter,
    ranks: launch.Ranks,
    store: FeatureStore | None = None,
) -> dict[str, Any]:
    """Train, or finish training, or find that everything is done.

    Args:
        config: The run.
        source: Its file, for messages.
        fresh: Discard what the output folder holds.
        report: What speaks to the user.
        ranks: Where this process stands.
        store: Where features are kept that other runs need too; None computes them for this run alone.

    Returns:
        What `results.json` holds.
    """
    started = time.monotonic()
    folder = RunFolder(config.out)
    try:
        with blame(source, None):
            if ranks.first:
                folder.take()
                if fresh:
                    folder.clear()
                folder.claim(config)
        finished = folder.finished() if not fresh else None
        if finished is not None:
            report.say(f"{folder.root} is finished; --fresh would train again")
            _close(finished, folder, report)
            return finished
        return _train(config, source, folder, report, ranks, started, store)
    finally:
        folder.release()


def _train(
    config: Config,
    source: str,
    folder: RunFolder,
    report: Reporter,
    ranks: launch.Ranks,
    started: float,
    store: FeatureStore | None,
) -> dict[str, Any]:
    """Train from the last checkpoint, or from the beginning, to the end."""
    task, model = prepare(config, source)
    deal = deal_images(task, model, ranks)
    launch.start(ranks)
    report.say(f"data      {task.splits.description}")
    work = Workload(task, model, deal, ranks, report, store)
    _decode(work, report)
    summary = fastpeft.summary(work.model)
    report.say(f"model     {config.model.name}, {_method_name(config)}: {summary.trainable:,} parameters trained")
    report.say(f"precision {work.precision}")
    if work.cached is not None:
        report.say(f"features  of {work.cached} computed once, as nothing before them is trained")
    groups = fastpeft.parameter_groups(work.model)
    optimizer = optim.build_optimizer(groups, task.num_classes, config.train)
    micro_batch = max(1, work.deal.batch_size // work.deal.parts)
    if config.train.zero == 3:
        stepper = PartitionedStepper(work.trained_module(), work.named_trained(), optimizer, micro_batch)
    else:
        stepper = Stepper(work.named_trained(), optimizer, micro_batch, config.train.zero)
    loop = Loop(work, stepper, ranks, folder, report, started)
    if loop.resume():
        report.say(f"resuming  after step {loop.position.global_step} (epoch {loop.position.epoch + 1})")
    logs = Logs(folder.logs, loop.position.global_step, ranks.first)
    try:
        loop.run(logs)
    finally:
        logs.close()
    outcome = _finish(loop, summary)
    if ranks.first:
        _close(outcome, folder, report)
    launch.barrier(ranks)
    return outcome


def _decode(work: Workload, report: Reporter) -> None:
    """Decode the splits that are not encoded, so that a broken image ends the run before it starts."""
    for name in ("train", "val", "test"):
        split = getattr(work, f"{name}_split")
        if isinstance(split, ImageDataset):
            features.preload(split, report, name)


def _finish(loop: Loop, summary: Any) -> dict[str, Any]:
    """Test, select and save the adapter, and write the results; collective."""
    work, folder, position, config = loop.work, loop.folder, loop.position, loop.work.task.config
    last = position.history[-1]
    test = {"last": last.get("test_accuracy"), "best_val": None}
    chosen = loop.trained_tensors()
    selected = position.epoch
    if work.val_split is not None:
        test["last"] = loop.measure("test")["test_accuracy"]
    if work.val_split is not None and config.train.select == "best":
        chosen, selected = loop.best, int(position.best["epoch"])
        if selected != position.epoch:
            loop.stepper.load_parameters(chosen)
            work.load_buffers({name: chosen[name] for name in work.buffers()})
            test["best_val"] = loop.measure("test")["test_accuracy"]
        else:
            test["best_val"] = test["last"]
    memory = results.peak_memory_mb(loop.ranks.device)
    seen = position.global_step * work.deal.batch_size if config.train.drop_last else position.epoch * work.deal.size
    outcome = {
        "model": config.model.name,
        "method": _method_name(config),
        "trained_parameters": summary.trainable,
        "backbone_parameters": summary.backbone,
        "trained_share": summary.share,
        "train_size": work.deal.size,
        "test_accuracy": test,
        "selected_epoch": selected,
        "history": position.history,
        "seconds": {
            "train": round(position.train_seconds, 3),
            "total": round(loop.total_seconds(), 3),
        },
        "ms_per_image": round(1000 * position.train_seconds / seen, 4),
        "peak_memory_mb": memory,
        "precision": work.precision,
        "cached_features": work.cached,
        "ranks": loop.ranks.world,
        "threads": torch.get_num_threads(),
        "device": str(loop.ranks.device.type),
        "versions": results.versions(),
        "config": config.model_dump(mode="json"),
    }
    if loop.ranks.first:
        _export(work.task, chosen, selected, folder)
        results.draw(position.history, folder.plot)
        # Last: a folder with results is a finished run.
        checkpoint.write_text(folder.results, json.dumps(outcome, indent=1))
    return outcome


def _export(task: Task, tensors: dict[str, torch.Tensor], epoch: int, folder: RunFolder) -> None:
    """Save the adapter from a newly built model, whose frozen weights were never rounded to the working format."""
    config = task.config
    model = task.build()
    with torch.no_grad():
        state = model.state_dict()
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
    fastpeft.save(
        model,
        folder.adapter,
        base_model=config.model.name,
        weights=config.model.weights,
        **({"model_options": config.model.options} if config.model.options else {}),
        start=config.model.start,
        init_seed=task.init_seed,
        image_size=config.model.image_size,
        num_classes=task.num_classes,
        mean=task.mean,
        std=task.std,
        resize=config.data.resize,
        class_names=task.splits.class_names,
        epoch=epoch,
    )


def _close(outcome: dict[str, Any], folder: RunFolder, report: Reporter) -> None:
    report.table(results.rows(outcome), title=f"{outcome['model']}, {outcome['method']}")
    report.say(f"adapter   {folder.adapter}")
    report.say(f"results   {folder.results}, {folder.plot}; tensorboard --logdir {folder.logs}")
    report.say(f"next      python -m fastpeft.predict {folder.adapter} IMAGE...")


def _method_name(config: Config) -> str:
    parts = config.method if isinstance(config.method, list) else [config.method]
    return " + ".join(str(part["name"]) for part in parts)
