"""What is measured: a task, a method, and whether the image tower runs in the step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastpeft
from bench.tables.errors import unknown
from fastpeft.models.mplug import MPlug, MPlugConfig

# The study's five; sizes near the middle of its sweeps.
METHODS: dict[str, Callable[[], Any]] = {
    "prompt": lambda: fastpeft.PromptTuning(8),
    "prefix": lambda: fastpeft.PrefixTuning(8, form="hidden"),
    "lora": lambda: fastpeft.LoRA(8, targets=("q", "k")),
    "serial": lambda: fastpeft.SerialAdapter(64),
    "parallel": lambda: fastpeft.ParallelAdapter(64),
}
TASKS = ("caption", "vqa")
# The image tower's tokens are at hand, or images are, and the frozen tower runs in every step.
IMAGES = ("cached", "given")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LITERAL, OURS = "literal", "ours"
WHO = (LITERAL, OURS)

_NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0}
_TINY = {
    "image_size": 32,
    "image_width": 64,
    "image_depth": 1,
    "image_heads": 1,
    "vocab_size": 211,
    "width": 64,
    "num_heads": 1,
    "intermediate": 128,
    "max_positions": 40,
    "text_layers": 1,
    "fusion_layers": 2,
    "stride": 1,
    "decoder_layers": 1,
}
# Tokens, both ends included: "a picture of" behind the first token; words with that token before them and the last
# behind; of an answer what the decoder has to say, which the first token is not.
_PROMPT, _CAPTION, _QUESTION, _ANSWER, _ANSWERS = 4, (12, 16), (8, 14), (2, 4), (1, 4)


@dataclass(frozen=True)
class Case:
    """A training step.

    Attributes:
        task: one of `TASKS`.
        images: one of `IMAGES`.
        method: key of `METHODS`.
        batch: images, each with a caption or a question.
        dtype: key of `DTYPES`.
        threads: of torch and of the native library.
        tiny: a few narrow layers instead of mPLUG-base, to try the program out.
        device: "cpu" or "cuda".
    """

    task: str
    images: str
    method: str
    batch: int = 8
    dtype: str = "bf16"
    threads: int = 2
    tiny: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        for kind, given, known in (
            ("task", self.task, TASKS),
            ("kind of images", self.images, IMAGES),
            ("method", self.method, METHODS),
            ("number format", self.dtype, DTYPES),
        ):
            if given not in known:
                raise unknown(kind, given, known)

    def __str__(self) -> str:
        return f"{self.group}/{self.method}"

    @property
    def group(self) -> str:
        """The case without its method."""
        return f"mplug-base/{self.task}/{self.images}/b{self.batch}/{self.dtype}/{self.threads}t"

    @property
    def config(self) -> MPlugConfig:
        """Sizes; nothing is dropped, the image tower's attention weights neither."""
        return MPlugConfig.base(**_NO_DROPOUT, **(_TINY if self.tiny else {}))

    def plain(self) -> MPlug:
        """The model that both implementations copy: random weights from a fixed seed."""
        return _plain(self.config, self.dtype, self.device)

    def described(self) -> dict[str, object]:
        """What a row is about."""
        words = {"model": "mplug-base", "task": self.task, "images": self.images}
        words |= {
            "method": repr(METHODS[self.method]()),
            "image_size": self.config.image_size,
            "batch": self.batch,
            "dtype": self.dtype,
        }
        return {**words, "threads": self.threads, **({"tiny": True} if self.tiny else {})}


def cases(
    methods: Iterable[str] | None = None,
    tasks: Iterable[str] | None = None,
    images: Iterable[str] | None = None,
    **others: Any,
) -> Iterator[Case]:
    """All cases, or those of the methods, tasks and images that are named, in their own order.

    Args:
        methods, tasks, images: names; None for all.
        others: further attributes of `Case`.

    Raises:
        TableError: a name that nobody knows.
    """
    chosen = []
    named = ("task", tasks, TASKS), ("kind of images", images, IMAGES), ("method", methods, METHODS)
    for kind, given, known in named:
        given = list(known) if given is None else list(given)
        for name in given:
            if name not in known:
                raise unknown(kind, name, known)
        chosen.append([name for name in known if name in given])
    return (Case(task, image, method, **others) for task in chosen[0] for image in chosen[1] for method in chosen[2])


@functools.lru_cache(maxsize=1)
def _plain(config: MPlugConfig, dtype: str, device: str) -> MPlug:
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        return MPlug.from_config(config).to(DTYPES[dtype])


class Batch(NamedTuple):
    """What a step is given.

    Attributes:
        images: (B, 3, H, W), or the image tower's tokens (B, Ni, D).
        ids: prompt or question (B, L).
        mask: bool (B, L), which of it is real; None for all.
        text: captions (B, M), or answers (A, M), one question's after another's.
        weights: fp32 (A,), those of a question sum to 1; None for captions.
        counts: int64 (B,), answers of each question; None for captions.
    """

    images: Tensor
    ids: Tensor
    mask: Tensor | None
    text: Tensor
    weights: Tensor | None
    counts: Tensor | None


def batch_of(case: Case, seed: int = 1) -> Batch:
    """A batch with lengths as the task has them, padded to the longest, drawn from a seed."""
    draw = torch.Generator().manual_seed(seed)
    config, size = case.config, case.batch
    if case.images == "cached":
        images = torch.randn(size, config.image_tokens, config.image_width, generator=draw)
    else:
        images = torch.randn(size, 3, config.image_size, config.image_size, generator=draw)
    mask = weights = counts = None
    if case.task == "caption":
        ids = _texts([_PROMPT], config, draw).expand(size, -1)
        text = _texts(_lengths(size, _CAPTION, draw), config, draw)
    else:
        ids = _texts(_lengths(size, _QUESTION, draw), config, draw)
        mask = ids != config.pad_id
        counts = torch.tensor(_lengths(size, _ANSWERS, draw))
        text = _texts([1 + said for said in _lengths(int(counts.sum()), _ANSWER, draw)], config, draw)
        votes = torch.randint(1, 8, (len(text),), generator=draw).float()
        weights = torch.cat([part / part.sum() for part in votes.split(counts.tolist())])
    found = Batch(images.to(DTYPES[case.dtype]), ids, mask, text, weights, counts)
    return Batch(*(None if t is None else t.to(case.device) for t in found))


def _lengths(count: int, between: tuple[int, int], draw: torch.Generator) -> list[int]:
    """So many lengths, the longest and the shortest among them where there are two at least."""
    low, high = between
    drawn = torch.randint(low, high + 1, (count,), generator=draw).tolist()
    if count > 1:
        drawn[:2] = high, low
    return drawn


def _texts(lengths: list[int], config: MPlugConfig, draw: torch.Generator) -> Tensor:
    """Texts (count, longest) of random words, with the first token before them and padding behind them."""
    words = (config.pad_id, config.cls_id, config.sep_id)
    ids = torch.randint(max(words) + 1, config.vocab_size, (len(lengths), max(lengths)), generator=draw)
    ids[:, 0] = config.cls_id
    for row, length in enumerate(lengths):
        ids[row, length:] = config.pad_id
    return ids
