"""Samples of image and text: what the loader's processes prepare, before the tokenizer makes a batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch.utils.data import Dataset

from fastpeft.data.captions import Captions
from fastpeft.data.errors import DataError
from fastpeft.data.vqa import TEMPLATES, Question, Questions

# mPLUG's tokenizer reads it as its end token.
END = "[SEP]"


class Images(Protocol):
    """Where image tensors come from: files, or what an image tower has made of them once."""

    def read(self, image: int, sample: int, epoch: int) -> torch.Tensor:
        """Image number `image` as `sample` sees it in `epoch`."""


class CaptionSample(NamedTuple):
    """An image, the prompt of the text encoder (None if it is not used), and a caption unless it is to be evaluated."""

    image: torch.Tensor
    prompt: str | None
    caption: str | None
    index: int


class VqaSample(NamedTuple):
    """An image, a question, and the answers with their weights; `more` of the question stands behind its template."""

    image: torch.Tensor
    question: str
    answers: tuple[str, ...]
    weights: tuple[float, ...]
    index: int
    more: str = ""


class _Samples(Dataset):
    """Samples at chosen numbers; a sample is the same image in a smaller choice as in a larger one."""

    def __init__(self, images: Images, total: int, chosen: Sequence[int] | None) -> None:
        self.images = images
        self.chosen = list(range(total)) if chosen is None else [int(number) for number in chosen]
        if not self.chosen or min(self.chosen) < 0 or max(self.chosen) >= total:
            raise DataError(f"chosen: expected some of {total} samples, 0 to {total - 1}")
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.chosen)

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation's draw."""
        self.epoch = epoch

    def _read(self, image: int, sample: int) -> torch.Tensor:
        return self.images.read(image, sample, self.epoch)


class CaptionPairs(_Samples):
    """For training: a sample from each sentence; `index` is its number in `Captions.pairs`."""

    def __init__(
        self,
        captions: Captions,
        images: Images,
        *,
        prompt: str | None = "a picture of",
        prefix: str = "",
        chosen: Sequence[int] | None = None,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            captions: The split.
            images: Its images, by their number in `captions.images`.
            prompt: What the text encoder reads; None if the decoder sees the image alone.
            prefix: What the decoder reads before each caption. No space is put between them.
            chosen: Numbers of the pairs to train on; None for all.
        """
        super().__init__(images, len(captions.pairs), chosen)
        self.captions = captions
        self.prompt = prompt
        self.prefix = prefix

    def __getitem__(self, index: int) -> CaptionSample:
        number = self.chosen[index]
        image, sentence = self.captions.pairs[number]
        text = self.captions.images[image].sentences[sentence]
        return CaptionSample(self._read(image, number), self.prompt, f"{self.prefix}{text}{END}", number)


class CaptionImages(_Samples):
    """For evaluation: a sample from each image, without a caption; `index` is its number in `Captions.images`."""

    def __init__(
        self,
        captions: Captions,
        images: Images,
        *,
        prompt: str | None = "a picture of",
        chosen: Sequence[int] | None = None,
    ) -> None:
        """Prepare; the arguments are those of `CaptionPairs`, `chosen` numbers of images."""
        super().__init__(images, len(captions.images), chosen)
        self.captions = captions
        self.prompt = prompt

    def __getitem__(self, index: int) -> CaptionSample:
        number = self.chosen[index]
        return CaptionSample(self._read(number, number), self.prompt, None, number)


class VqaQuestions(_Samples):
    """A sample from each question; `index` is its number in `Questions.questions`."""

    def __init__(
        self,
        questions: Questions,
        images: Images,
        *,
        template: str = TEMPLATES["study"],
        chosen: Sequence[int] | None = None,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            questions: The split.
            images: Its images, by their number in `questions.images`.
            template: What the text encoder reads, with `{question}` where the question is; one of `TEMPLATES`.
            chosen: Numbers of the questions; None for all.
        """
        super().__init__(images, len(questions.questions), chosen)
        if "{question}" not in template:
            raise DataError(f"template: expected a text with '{{question}}' in it, got '{template}'")
        self.questions = questions
        self.template = template

    def __getitem__(self, index: int) -> VqaSample:
        number = self.chosen[index]
        question = self.questions.questions[number]
        answers = tuple(answer + END for answer in question.answers)
        image = self._read(question.image, number)
        return VqaSample(image, self.text(question), answers, question.weights, number, question.more)

    def text(self, question: Question) -> str:
        """What the text encoder reads of a question."""
        # Not str.format: a question may have braces of its own.
        return self.template.replace("{question}", question.text) + question.more
