"""Pre-training of the small mPLUG on captions, from DINOv2 and MiniLM, with the image tower frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fastpeft
from bench.mplug_offline import plan
from bench.mplug_study.corpora import Corpus
from bench.mplug_study.job import Base
from bench.mplug_study.protocol import Protocol
from fastpeft.config_mplug import KINDS, QuestionConfig
from fastpeft.trainer import kinds, launch, session
from fastpeft.trainer.feature_store import FeatureStore
from fastpeft.trainer.report import Reporter


def config(corpus: Corpus, out: Path) -> QuestionConfig:
    """The run: blocks of all stacks that read text, and the output layer but for its tied matrix."""
    return QuestionConfig.model_validate(
        {
            "model": plan.START,
            # A beginning is read like a question, and the rest written like an answer.
            "data": {**corpus.fields, "template": "original", "augment": "none"},
            "method": [
                {"name": "full", "stacks": list(plan.STACKS)}, {"name": "classifier", "part": "transform"},
            ],
            "train": plan.PRETRAIN,
            "eval": plan.PRETRAIN_EVAL,
            "out": str(out),
        }
    )  # fmt: skip


def pretrained(corpus: Corpus, folder: Path, report: Reporter) -> tuple[Path, dict[str, Any]]:
    """The pretrained model's file, made if it is not there, and what its run measured.

    Args:
        corpus: beginnings of captions.
        folder: for the run and the file.
        report: what shows the progress.
    """
    run, path = config(corpus, folder / "pretrain"), folder / "pretrained.safetensors"
    source = "pre-training"
    # A finished run is read, not repeated.
    outcome = session.run(run, source, False, report, launch.find_ranks())
    if not path.is_file():
        task, model = kinds.of(run).prepare(run, source)
        # The adapter has no tensors of its own, only changed ones of the model's.
        model = fastpeft.load(fastpeft.unpatch(model), folder / "pretrain" / "adapter")
        fastpeft.unpatch(model).save(path)
        report.say(f"model     {path}, trained on {len(task.splits['train']):,} beginnings of captions")
    return path, outcome


def untuned(
    base: Base, corpus: Corpus, protocol: Protocol, folder: Path, store: FeatureStore, report: Reporter
) -> dict[str, float]:
    """What the pretrained model scores on a corpus's test before it is tuned.

    Args:
        base: the pretrained model.
        corpus: captions or questions.
        protocol: how they are written and scored.
        folder: for the run and what it writes.
        store: of the image tower's tokens.
        report: what shows the progress.
    """
    schedule = protocol.schedules[corpus.kind]
    data = {**schedule.data, **corpus.fields}
    run = KINDS[data["name"]].model_validate(
        {
            "model": dict(base.fields), "data": data, "eval": dict(schedule.evaluation), "out": str(folder),
            # Its modules add nothing before their first step.
            "method": {"name": "lora", "rank": 1}, "train": {**schedule.train, "base_lr": 1e-9},
        }
    )  # fmt: skip
    kind, ranks = kinds.of(run), launch.find_ranks()
    task, model = kind.prepare(run, corpus.name)
    work = kind.work(task, model, kind.deal(task, model, ranks), ranks, report, store)
    work.model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    return {name.removeprefix("test_"): score for name, score in work.measure("test", report, folder).items()}
