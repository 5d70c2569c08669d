"""How the study trains: Table II, and what it leaves open."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.mplug_study.methods import FULL, TUNINGS, Tuning

CAPTION, VQA = "caption", "vqa"


@dataclass(frozen=True)
class Schedule:
    """Captions or questions.

    Attributes:
        metric: of the trainer, by which the best state is chosen and a run is judged.
        title: of the metric, times a hundred.
        train: fields of a configuration's section `train`, but for rate and seed.
        evaluation: of its section `eval`.
        data: of its section `data`, besides where the data are.
        ratios: shares of the training samples.
        sizes: of each method's module.
        rates: peak learning rates by method; of several the best on validation is taken, with all of the data and the
            module's reference size.
        variant: what follows the protocol's name in results, where something here changes their meaning.
    """

    metric: str
    title: str
    train: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    data: Mapping[str, Any]
    ratios: tuple[float, ...]
    sizes: Mapping[str, tuple[int, ...]]
    rates: Mapping[str, tuple[float, ...]]
    variant: str = ""


@dataclass(frozen=True)
class Protocol:
    """How the runs of a study are trained.

    Attributes:
        name: in a word, for results: runs of different protocols are never taken for each other.
        schedules: of captions and of questions.
        seeds: of the runs.
        described: in a sentence.
        tunings: its methods.
    """

    name: str
    schedules: Mapping[str, Schedule]
    seeds: tuple[int, ...]
    described: str
    tunings: Mapping[str, Tuning] = dataclasses.field(default_factory=lambda: TUNINGS)

    def named(self, kind: str) -> str:
        """Its name in results of a kind."""
        return self.name + self.schedules[kind].variant


_LENGTHS, _RANKS = (2, 4, 8, 16, 32, 64, 128), (2, 4, 8, 16, 32)
_SIZES = {"prompt": _LENGTHS, "prefix": _LENGTHS, "lora": _RANKS, FULL: (0,)}
_FEW_HIDDEN, _HIDDEN = (16, 32, 64, 128), (16, 32, 64, 128, 256, 512)
# The study does not say what full fine-tuning was trained with: the model's own fine-tuning has this rate.
_FULL_RATE = {CAPTION: 1e-5, VQA: 3e-5}
# The study has a batch of 64 on each of four GPUs.
BATCH, PARTS = 256, 4
_COMMON = {"batch_size": BATCH, "optimizer": "adamw", "weight_decay": 0.05, "select": "best"}

CAPTIONS = Schedule(
    metric="cider",
    title="CIDEr",
    train={
        **_COMMON,
        "steps": 4000, "warmup_steps": 400, "warmup_lr": 0.0, "min_lr": 0.0, "eval_every": 400,
        "checkpoint_every": "200 steps",
    },
    evaluation={"beams": 5, "min_length": 8, "max_length": 25, "metric": "cider"},
    data={"route": "fused", "prompt": "a picture of", "augment": "rand_augment"},
    ratios=(0.01, 0.02, 0.04, 0.08, 0.1, 0.2, 0.4, 0.8, 1.0),
    sizes={**_SIZES, "serial": _FEW_HIDDEN, "parallel": _FEW_HIDDEN},
    rates={
        "prompt": (3e-4,), "prefix": (3e-4,), "lora": (5e-6,), "serial": (1e-6,), "parallel": (1e-6,),
        FULL: (_FULL_RATE[CAPTION],),
    },
)  # fmt: skip
QUESTIONS = Schedule(
    metric="accuracy",
    title="VQA accuracy",
    train={
        **_COMMON,
        "epochs": 10, "warmup_steps": 800, "warmup_by_ratio": True, "warmup_lr": 1e-6, "min_lr": 1e-6,
        "checkpoint_every": "200 steps",
    },
    evaluation={"beams": 5, "min_length": 1, "max_length": 10},
    # Mirrored images would make noise of questions about left and right.
    data={"template": "study", "augment": "crop"},
    ratios=(0.1, 0.2, 0.4, 0.8, 1.0),
    sizes={**_SIZES, "serial": _HIDDEN, "parallel": _HIDDEN},
    rates={
        "prompt": (3e-4,), "prefix": (3e-4,), "lora": (3e-4,), "serial": (3e-4,), "parallel": (3e-4,),
        FULL: (_FULL_RATE[VQA],),
    },
)  # fmt: skip

_FIRST_SEED = 42


def of_study(
    quick: bool, seeds: int, *, tokenizer: str = "java", grad_accumulation: int = 1, workers: int = 0
) -> Protocol:
    """The study's protocol.

    Args:
        quick: two shares, two sizes, a tenth of the steps, and greedy search for beams.
        seeds: runs of every setting; the study does not say how many it made.
        tokenizer: what makes words of captions, `java` or `python`. CIDEr differs a little between them, so that
            results of captions are kept apart.
        grad_accumulation: parts that a batch is computed in, which changes no result's meaning.
        workers: processes that read images; likewise.
    """
    chosen = tuple(range(_FIRST_SEED, _FIRST_SEED + seeds))
    runs = f"{len(chosen)} seed{'s' if len(chosen) > 1 else ''}"
    usual = {CAPTION: _worded(CAPTIONS, tokenizer), VQA: QUESTIONS}
    usual = {kind: _computed(schedule, grad_accumulation, workers) for kind, schedule in usual.items()}
    if tokenizer != "java":
        runs += f", captions' words by the {tokenizer} tokenizer"
    if not quick:
        return Protocol("study", usual, chosen, f"the study's Table II, {runs}")
    quick_captions = {"steps": 400, "warmup_steps": 40, "eval_every": 100, "checkpoint_every": "100 steps"}
    quick_questions = {"epochs": 1, "warmup_steps": 80}
    schedules = {
        CAPTION: _thinned(usual[CAPTION], quick_captions),
        VQA: _thinned(usual[VQA], quick_questions),
    }
    return Protocol(
        "quick", schedules, chosen, f"a tenth of the study's steps, two shares, two sizes, greedy search, {runs}"
    )


def _worded(schedule: Schedule, tokenizer: str) -> Schedule:
    if tokenizer == "java":
        return schedule
    evaluation = {**schedule.evaluation, "tokenizer": tokenizer}
    return dataclasses.replace(schedule, evaluation=evaluation, variant=f"-{tokenizer}")


def _computed(schedule: Schedule, grad_accumulation: int, workers: int) -> Schedule:
    train = {**schedule.train, "grad_accumulation": grad_accumulation}
    return dataclasses.replace(schedule, train=train, data={**schedule.data, "workers": workers})


def _thinned(schedule: Schedule, changed: Mapping[str, Any]) -> Schedule:
    return dataclasses.replace(
        schedule,
        train={**schedule.train, **changed},
        evaluation={**schedule.evaluation, "beams": 1},
        ratios=(0.1, 1.0),
        sizes={name: tuple(sorted({sizes[0], TUNINGS[name].reference})) for name, sizes in schedule.sizes.items()},
    )
