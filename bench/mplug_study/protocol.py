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
    """

    metric: str
    title: str
    train: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    data: Mapping[str, Any]
    ratios: tuple[float, ...]
    sizes: Mapping[str, tuple[int, ...]]
    rates: Mapping[str, tuple[float, ...]]


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


_LENGTHS, _RANKS = (2, 4, 8, 16, 32, 64, 128), (2, 4, 8, 16, 32)
_SIZES = {"prompt": _LENGTHS, "prefix": _LENGTHS, "lora": _RANKS, FULL: (0,)}
_FEW_HIDDEN, _HIDDEN = (16, 32, 64, 128), (16, 32, 64, 128, 256, 512)
# The study does not say what full fine-tuning was trained with: the model's own fine-tuning has this rate.
_FULL_RATE = {CAPTION: 1e-5, VQA: 3e-5}
_COMMON = {"batch_size": 256, "optimizer": "adamw", "weight_decay": 0.05, "select": "best"}

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


def of_study(quick: bool, seeds: int) -> Protocol:
    """The study's protocol.

    Args:
        quick: two shares, two sizes and a tenth of the steps.
        seeds: runs of every setting; the study does not say how many it made.
    """
    chosen = tuple(range(_FIRST_SEED, _FIRST_SEED + seeds))
    runs = f"{len(chosen)} seed{'s' if len(chosen) > 1 else ''}"
    if not quick:
        return Protocol("study", {CAPTION: CAPTIONS, VQA: QUESTIONS}, chosen, f"the study's Table II, {runs}")
    quick_captions = {"steps": 400, "warmup_steps": 40, "eval_every": 100, "checkpoint_every": "100 steps"}
    quick_questions = {"epochs": 1, "warmup_steps": 80}
    schedules = {
        CAPTION: _thinned(CAPTIONS, quick_captions),
        VQA: _thinned(QUESTIONS, quick_questions),
    }
    return Protocol("quick", schedules, chosen, f"a tenth of the study's steps, two shares, two sizes, {runs}")


def _thinned(schedule: Schedule, changed: Mapping[str, Any]) -> Schedule:
    return dataclasses.replace(
        schedule,
        train={**schedule.train, **changed},
        evaluation={**schedule.evaluation, "beams": 1},
        ratios=(0.1, 1.0),
        sizes={name: tuple(sorted({sizes[0], TUNINGS[name].reference})) for name, sizes in schedule.sizes.items()},
    )
