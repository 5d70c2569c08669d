"""Batches of image and text, padded on the right to the longest text among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

from fastpeft.data.errors import DataError
from fastpeft.data.vl_datasets import CaptionSample, VqaSample
from fastpeft.errors import FastPEFTError

# From texts and the most tokens to keep (None: all) to ids (texts, tokens) and mask (texts, tokens), True where real.
Tokenizer = Callable[[list[str], int | None], tuple[torch.Tensor, torch.Tensor]]
Batch = TypeVar("Batch", bound=NamedTuple)


class CaptionBatch(NamedTuple):
    """Images with prompts, and in training a caption of each.

    Attributes:
        images: (B, ...) as the samples have them.
        prompt_ids: (B, L) of the text encoder; None if it is not used.
        prompt_mask: (B, L), True where real.
        ids: (B, M) of the captions; None in evaluation.
        mask: (B, M).
        indices: (B,), which pair each is in training, which image in evaluation.
    """

    images: torch.Tensor
    prompt_ids: torch.Tensor | None
    prompt_mask: torch.Tensor | None
    ids: torch.Tensor | None
    mask: torch.Tensor | None
    indices: torch.Tensor


class VqaBatch(NamedTuple):
    """Images with questions, and in training A distinct answers of all of them, those of one question in a row.

    Attributes:
        images: (B, ...) as the samples have them.
        question_ids: (B, L).
        question_mask: (B, L), True where real.
        answer_ids: (A, M); None in evaluation, as the following three.
        answer_mask: (A, M).
        weights: (A,), float32.
        counts: (B,), answers of each question; they sum to A.
        indices: (B,), which question each is.
    """

    images: torch.Tensor
    question_ids: torch.Tensor
    question_mask: torch.Tensor
    answer_ids: torch.Tensor | None
    answer_mask: torch.Tensor | None
    weights: torch.Tensor | None
    counts: torch.Tensor | None
    indices: torch.Tensor


class _Collate:
    """From samples to a batch. An error in a sample's place takes the batch's, as does one in making it."""

    def __call__(self, samples: Sequence) -> NamedTuple | FastPEFTError:
        try:
            for sample in samples:
                if isinstance(sample, FastPEFTError):
                    return sample
            return self.batch(samples)
        except FastPEFTError as error:
            return error


class CaptionCollate(_Collate):
    """Makes a `CaptionBatch` of samples."""

    def __init__(self, tokenizer: Tokenizer, max_length: int | None = None) -> None:
        """Prepare.

        Args:
            tokenizer: Of texts that have their end token.
            max_length: Tokens of a caption that are kept, the first one included. A longer one loses its end token.
        """
        self.tokenizer = tokenizer
        self.max_length = max_length

    def batch(self, samples: Sequence[CaptionSample]) -> CaptionBatch:
        """The batch of some samples."""
        prompts, captions = [sample.prompt for sample in samples], [sample.caption for sample in samples]
        prompt = (None, None) if None in prompts else tokenized(self.tokenizer, prompts, None)
        caption = (None, None) if None in captions else tokenized(self.tokenizer, captions, self.max_length)
        return CaptionBatch(_stacked(samples), *prompt, *caption, _indices(samples))


class VqaCollate(_Collate):
    """Makes a `VqaBatch` of samples."""

    def __init__(
        self, tokenizer: Tokenizer, *, training: bool, max_length: int | None = None, ending: str = ""
    ) -> None:
        """Prepare.

        Args:
            tokenizer: Of answers that have their end token, and of questions, which have none.
            training: Whether answers are in the batch, and `max_length` counts.
            max_length: Tokens of a question that are kept in training, the first one included.
            ending: What the template has behind the question, such as " Answer: ". It is kept: of a text that is too
                long, what follows the template is cut first, and then the end of the question.

        Raises:
            DataError: The ending leaves no room for a question.
        """
        self.tokenizer = tokenizer
        self.training = training
        self.max_length = max_length if training else None
        self.ending = tokenized(tokenizer, [ending], None)[0][0, 1:]
        if self.max_length is not None and len(self.ending) + 1 >= self.max_length:
            raise DataError(
                f"max_length: {self.max_length} tokens leave no room for a question before '{ending}', which has "
                f"{len(self.ending)}"
            )

    def batch(self, samples: Sequence[VqaSample]) -> VqaBatch:
        """The batch of some samples.

        Raises:
            DataError: One has no answer to train on.
        """
        question = self._questions(samples)
        answers: tuple[torch.Tensor | None, ...] = (None, None, None, None)
        if self.training:
            counts = [len(sample.answers) for sample in samples]
            if 0 in counts:
                raise DataError(f"question '{samples[counts.index(0)].question}' has no answer to train on")
            texts = [answer for sample in samples for answer in sample.answers]
            weights = torch.tensor([weight for sample in samples for weight in sample.weights], dtype=torch.float32)
            answers = (*tokenized(self.tokenizer, texts, None), weights, torch.tensor(counts))
        return VqaBatch(_stacked(samples), *question, *answers, _indices(samples))

    def _questions(self, samples: Sequence[VqaSample]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = tokenized(self.tokenizer, [sample.question for sample in samples], None)
        most = self.max_length
        if most is None or ids.shape[1] <= most:
            return ids, mask
        ids = ids[:, :most].clone()
        asked = [sample.question.removesuffix(sample.more) for sample in samples]
        cut = tokenized(self.tokenizer, asked, None)[1].sum(1) > most
        ids[cut, most - len(self.ending) :] = self.ending
        return ids, mask[:, :most]


def moved(batch: Batch, device: torch.device | str) -> Batch:
    """A batch with its tensors on another device."""
    return type(batch)(*(None if part is None else part.to(device, non_blocking=True) for part in batch))


def tokenized(tokenizer: Tokenizer, texts: list[str], max_length: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of some texts, no wider than the longest of them.

    Raises:
        DataError: What the tokenizer gives is not what it should.
    """
    ids, mask = tokenizer(texts, max_length)
    if ids.ndim != 2 or ids.shape != mask.shape or len(ids) != len(texts):
        raise DataError(
            f"tokenizer: expected ids and mask of one shape ({len(texts)}, tokens), got {tuple(ids.shape)} and "
            f"{tuple(mask.shape)}"
        )
    mask = mask.bool()
    lengths = mask.sum(1)
    width = int(lengths.max())
    if not torch.equal(mask, torch.arange(mask.shape[1]) < lengths[:, None]):
        raise DataError("tokenizer: expected padding on the right only")
    if max_length is not None and width > max_length:
        raise DataError(f"tokenizer: gave {width} tokens where {max_length} at most were asked for")
    return ids[:, :width], mask[:, :width]


def _stacked(samples: Sequence) -> torch.Tensor:
    return torch.stack([sample.image for sample in samples])


def _indices(samples: Sequence) -> torch.Tensor:
    return torch.tensor([sample.index for sample in samples])
