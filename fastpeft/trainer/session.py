"""One call from configuration to results: what `fastpeft.train` runs on every rank."""

from __future__ import annotations

import json
import time
from typing import Any

import torch

import fastpeft
from fastpeft.config import RunConfig
from fastpeft.trainer import checkpoint, kinds, launch, memory, optim, results
from fastpeft.trainer.feature_store import FeatureStore
from fastpeft.trainer.folder import RunFolder
from fastpeft.trainer.logs import Logs
from fastpeft.trainer.loop import Loop
from fastpeft.trainer.partitioned import PartitionedStepper, functions_put_back
from fastpeft.trainer.report import Reporter
from fastpeft.trainer.stepper import Stepper
from fastpeft.trainer.task import blame


def run(
    config: RunConfig,
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
                # Before the claim, which asks whether there is a checkpoint.
                checkpoint.recover(folder.checkpoints)
                folder.claim(config)
        finished = folder.finished() if not fresh else None
        if finished is not None:
            report.say(f"{folder.root} is finished; --fresh would train again")
            _close(finished, folder, report)
            return finished
        with functions_put_back():
            return _train(config, source, folder, report, ranks, started, store)
    finally:
        folder.release()


def _train(
    config: RunConfig,
    source: str,
    folder: RunFolder,
    report: Reporter,
    ranks: launch.Ranks,
    started: float,
    store: FeatureStore | None,
) -> dict[str, Any]:
    """Train from the last checkpoint, or from the beginning, to the end."""
    memory.forget_peak(ranks.device)
    kind = kinds.of(config)
    task, model = kind.prepare(config, source)
    deal = kind.deal(task, model, ranks)
    launch.start(ranks)
    report.say(f"data      {task.description}")
    work = kind.work(task, model, deal, ranks, report, store)
    work.preload(report)
    summary = fastpeft.summary(work.model)
    report.say(f"model     {config.model.name}, {_method_name(config)}: {summary.trainable:,} parameters trained")
    report.say(f"precision {work.precision}")
    if work.cached is not None:
        report.say(f"features  of {work.cached} computed once, as nothing before them is trained")
    groups = fastpeft.parameter_groups(work.model)
    optimizer = optim.build_optimizer(groups, task.num_classes, config.train)
    micro_batch = max(1, work.deal.batch_size // work.deal.parts)
    zero, offload = config.train.zero, config.train.offload
    if zero == 3:
        readers = work.whole_readers()
        stepper = PartitionedStepper(
            work.trained_module(), work.named_trained(), optimizer, micro_batch, offload, readers
        )
    else:
        stepper = Stepper(work.named_trained(), optimizer, micro_batch, zero, offload)
    loop = Loop(work, stepper, ranks, folder, report, started)
    if loop.resume():
        report.say(f"resuming  after step {loop.position.global_step} ({work.part} {loop.position.epoch + 1})")
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


def _finish(loop: Loop, summary: Any) -> dict[str, Any]:
    """Test, select and save the adapter, and write the results; collective."""
    work, folder, position, config = loop.work, loop.folder, loop.position, loop.work.task.config
    last = position.history[-1]
    score = f"test_{work.metric}"
    test = {"last": last.get(score), "best_val": None}
    chosen = loop.trained_tensors()
    selected = position.epoch
    more = {name: value for name, value in last.items() if name.startswith("test_")}
    if work.val_split is not None and work.test_split is not None:
        more = loop.measure("test")
        test["last"] = more.get(score)
    if work.val_split is not None and config.train.select == "best":
        chosen, selected = loop.best, int(position.best["epoch"])
        if selected != position.epoch:
            loop.stepper.load_parameters(chosen)
            work.load_buffers({name: chosen[name] for name in work.buffers()})
            if work.test_split is not None:
                more = loop.measure("test")
                test["best_val"] = more.get(score)
        else:
            test["best_val"] = test["last"]
    peak = results.peak_memory_mb(loop.ranks.device)
    outcome = {
        "model": config.model.name,
        "method": _method_name(config),
        "trained_parameters": summary.trainable,
        "backbone_parameters": summary.backbone,
        "trained_share": summary.share,
        "train_size": work.deal.size,
        "metric": work.metric,
        score: test,
        **work.scores(more),
        "selected_epoch": selected,
        "history": position.history,
        "seconds": {
            "train": round(position.train_seconds, 3),
            "total": round(loop.total_seconds(), 3),
        },
        "ms_per_image": round(1000 * position.train_seconds / work.deal.seen(position.epoch), 4),
        "peak_memory_mb": peak,
        "saved_mb": loop.saved_mb,
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
        outcome["next"] = work.task.use(folder.adapter)
        results.draw(position.history, folder.plot, work.metric)
        # Last: a folder with results is a finished run.
        checkpoint.write_text(folder.results, json.dumps(outcome, indent=1))
    return outcome


def _export(task: Any, tensors: dict[str, torch.Tensor], epoch: int, folder: RunFolder) -> None:
    """Save the adapter from a newly built model, whose frozen weights were never rounded to the working format."""
    model = task.build()
    with torch.no_grad():
        state = model.state_dict()
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
    fastpeft.save(model, folder.adapter, epoch=epoch, **task.metadata())


def _close(outcome: dict[str, Any], folder: RunFolder, report: Reporter) -> None:
    report.table(results.rows(outcome), title=f"{outcome['model']}, {outcome['method']}")
    report.say(f"adapter   {folder.adapter}")
    report.say(f"results   {folder.results}, {folder.plot}; tensorboard --logdir {folder.logs}")
    if "next" in outcome:
        report.say(f"next      {outcome['next']}")


def _method_name(config: RunConfig) -> str:
    parts = config.method if isinstance(config.method, list) else [config.method]
    return " + ".join(str(part["name"]) for part in parts)
