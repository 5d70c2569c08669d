"""The kinds of runs: what opens their data and model, and what their steps are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from fastpeft.config import RunConfig
from fastpeft.trainer.order import Deal
from fastpeft.trainer.work import Work


class Kind(NamedTuple):
    """One of them.

    Attributes:
        prepare: Of configuration and file: what is trained on what, and the patched model.
        deal: Of those and the ranks: how samples are dealt to steps.
        work: Of all that, what speaks to the user, and where features are kept: the run, ready to train.
    """

    prepare: Callable[[RunConfig, str], tuple[Any, nn.Module]]
    deal: Callable[..., Deal]
    work: Callable[..., Work]


def of(config: RunConfig) -> Kind:
    """The kind of a configuration."""
    from fastpeft.config_mplug import CaptionConfig, QuestionConfig

    if isinstance(config, CaptionConfig):
        from fastpeft.trainer.mplug import captioning, task

        return Kind(captioning.prepare, task.deal_samples, captioning.Captioning)
    if isinstance(config, QuestionConfig):
        from fastpeft.trainer.mplug import answering, task

        return Kind(answering.prepare, task.deal_samples, answering.Answering)
    from fastpeft.trainer import task, workload

    return Kind(task.prepare, workload.deal_images, workload.Workload)
