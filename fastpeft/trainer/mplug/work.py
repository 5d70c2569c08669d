"""What captioning and question answering have in common as training work."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from fastpeft.errors import FastPEFTError
from fastpeft.models.mplug import Stream
from fastpeft.models.mplug.beams import Generation
from fastpeft.models.mplug.generation import generate
from fastpeft.trainer import optim, precision
from fastpeft.trainer.feature_store import FeatureStore
from fastpeft.trainer.launch import Ranks
from fastpeft.trainer.mplug import tokens
from fastpeft.trainer.mplug.lockstep import Lockstep
from fastpeft.trainer.mplug.root import Root, readers_of
from fastpeft.trainer.mplug.task import MPlugTask, warmup_of
from fastpeft.trainer.order import Deal, dealt_batches, evaluation_batches, parts_of
from fastpeft.trainer.order import Stream as Steps
from fastpeft.trainer.report import Reporter
from fastpeft.trainer.work import Rate, Work


class MPlugWork(Work):
    """A run of mPLUG. A kind of task adds its batches, its loss and its scores.

    Attributes:
        root: What a step calls.
        settings: Of the search for text.
    """

    def __init__(
        self,
        task: MPlugTask,
        model: nn.Module,
        deal: Deal,
        ranks: Ranks,
        report: Reporter,
        store: FeatureStore | None = None,
    ) -> None:
        super().__init__(task, model, deal, ranks)
        self.root = self._trained = Root(self.model)
        self.part = "part" if isinstance(deal, Steps) else "epoch"
        self.train_split, self.val_split, self.test_split = (
            None if task.splits.get(name) is None else task.splits[name].dataset for name in ("train", "val", "test")
        )
        given, model_config = task.config.eval, self.model.config
        self.settings = Generation(
            given.beams,
            given.min_length,
            given.max_length,
            given.alpha,
            given.frozen_beams,
            given.early_stop,
            start_id=model_config.cls_id,
            end_id=model_config.sep_id,
        )
        tower = self.model.visual_encoder
        self._tower_frozen = not any(parameter.requires_grad for parameter in tower.parameters())
        if task.config.train.cache_images == "auto" and self._tower_frozen and self._still():
            self._cache(ranks, report, store)

    # What a kind of task adds.

    @abstractmethod
    def collate(self, *, training: bool) -> Callable[[list], Any]:
        """What makes batches, with `images`, `indices` and texts."""

    @abstractmethod
    def memory(self, image: Stream, batch: Any) -> Stream:
        """What the decoder attends to."""

    @abstractmethod
    def losses(self, memory: Stream, batch: Any) -> Tensor:
        """The sum of a batch's losses."""

    @abstractmethod
    def score(self, split: str, texts: dict[int, str], folder: Path) -> dict[str, float]:
        """Scores of the texts by the number of their samples; writes the result file. On the first rank only."""

    # What a kind of task may have otherwise.

    def written(self, model: nn.Module | Lockstep, memory: Stream) -> list[str]:
        """The text of every sample, from a model in evaluation mode, or what takes its place."""
        found = generate(model, memory, self.settings)
        return [self.task.tokenizer.decode(hypotheses[0].ids) for hypotheses in found]

    @property
    def decoder_calls(self) -> int:
        """How often `written` calls the decoder for a batch of evaluation at most."""
        return self.settings.max_length

    # What they have in common.

    @property
    def epochs(self) -> int:
        """Passes over the samples, or parts of the steps."""
        return self.deal.epochs if isinstance(self.deal, Steps) else self.task.config.train.epochs

    def place(self, epoch: int) -> str:
        """By the step, if the run's length is in steps."""
        if not isinstance(self.deal, Steps):
            return super().place(epoch)
        total = self.deal.total
        return f"step {min(epoch * self.deal.every, total):>{len(str(total))}}/{total}"

    def batches(self, epoch: int, step: int) -> Iterator[tuple[Any, int]]:
        """As the kind's collation makes them."""
        parts = parts_of(self.deal, self.ranks.rank, self.ranks.world, epoch, step, self.epochs)
        return dealt_batches(self.train_split, parts, self.task.config.data.workers, self.collate(training=True))

    def loss(self, batch: Any) -> Tensor:
        """Summed over the batch."""
        with precision.autocast(self.ranks.device, self.dtype):
            return self.root.run(lambda: self.losses(self.memory(self._image(batch.images), batch), batch))

    def rate(self, epoch: int, step: int) -> Rate:
        """Warm-up and cosine, by the step."""
        train, deal = self.task.config.train, self.deal
        stepwise = isinstance(deal, Steps)
        now = epoch * (deal.every if stepwise else deal.steps) + step
        total = deal.total if stepwise else train.epochs * deal.steps
        warmup = warmup_of(self.task.config)
        return lambda base: optim.stepwise_rate(base, now, total, warmup, train.min_lr, train.schedule, train.warmup_lr)

    def due(self, epoch: int) -> bool:
        """At the end of every part, or of every so many epochs."""
        if isinstance(self.deal, Steps) or epoch == self.epochs:
            return True
        every = self.task.config.train.eval_every
        return epoch % (1 if every is None else every) == 0 if every != 0 else False

    def measure(self, split: str, report: Reporter, folder: Path) -> dict[str, float]:
        """Generate the text of every sample, each on one rank, and score all of them."""
        dataset, ranks = {"val": self.val_split, "test": self.test_split}[split], self.ranks
        size, workers = self.task.config.eval.batch_size, self.task.config.data.workers
        collate = self.collate(training=False)
        texts: dict[int, str] = {}
        calls = 0
        with report.bar(f"evaluating on {split}", len(dataset)) as advance:
            for batch in evaluation_batches(dataset, size, ranks.rank, ranks.world, workers, collate):
                indices = batch.indices.tolist()
                texts |= zip(indices, self.generated(batch), strict=True)
                advance(len(indices) * ranks.world)
                calls += 1
            if self._together:
                spare = collate([dataset[0]])
                for _ in range(calls, math.ceil(math.ceil(len(dataset) / ranks.world) / size)):
                    self.generated(spare)
        return self._agreed(split, texts, folder)

    @torch.no_grad()
    def generated(self, batch: Any) -> list[str]:
        """The best text for every sample of a batch."""
        device = self.ranks.device
        batch = type(batch)(*(None if part is None else part.to(device) for part in batch))
        with precision.autocast(device, self.dtype):
            return self.root.run(lambda: self._written(self.memory(self._image(batch.images), batch)))

    def _written(self, memory: Stream) -> list[str]:
        if not self._together:
            return self.written(self.model, memory)
        model = Lockstep(self.model)
        texts = self.written(model, memory)
        model.fill_up(self.decoder_calls)
        return texts

    @property
    def _together(self) -> bool:
        """Whether all ranks have to call the model equally often."""
        return self.task.config.train.zero == 3 and self.ranks.world > 1

    def _agreed(self, split: str, texts: dict[int, str], folder: Path) -> dict[str, float]:
        """The scores of all ranks' texts, on all ranks; an error of the scoring too."""
        shares: list[dict[int, str]] = [texts]
        if self.ranks.world > 1:
            shares = [{} for _ in range(self.ranks.world)]
            torch.distributed.all_gather_object(shares, texts)
        found: list[Any] = [None]
        if self.ranks.first:
            every = {number: text for share in shares for number, text in share.items()}
            try:
                found = [self.score(split, dict(sorted(every.items())), folder)]
            except FastPEFTError as error:
                found = [error]
        if self.ranks.world > 1:
            torch.distributed.broadcast_object_list(found)
        if isinstance(found[0], FastPEFTError):
            raise found[0]
        return {f"{split}_{name}": value for name, value in found[0].items()}

    def scores(self, test: dict[str, float]) -> dict[str, Any]:
        """All scores of the test."""
        return {"test_scores": {name.removeprefix("test_"): value for name, value in test.items()}}

    def preload(self, report: Reporter) -> None:
        """Images are read as they are needed: a hundred thousand of them do not fit into memory."""

    def whole_readers(self) -> list[tuple[nn.Module, list[nn.Parameter]]]:
        """Embeddings, output layer and image tower."""
        return readers_of(self.root)

    def _image(self, images: Tensor) -> Stream:
        """The image's rows, of images (B, 3, H, W) or of the tower's tokens (B, Ni, image_width)."""
        if images.ndim == 4:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self._tower_frozen):
                images = self.root.tower(images)
        return self.model.project_image(images.to(self.dtype))

    def _still(self) -> bool:
        """Whether the image tower computes the same in training as in evaluation."""
        rates = [getattr(module, "p", 0.0) for module in self.model.visual_encoder.modules()]
        attention = [getattr(module, "attn_drop", 0.0) for module in self.model.visual_encoder.modules()]
        drops = any(rate for rate in [*rates, *attention] if isinstance(rate, float))
        return self.model.fastpeft_host.backbone_eval or not drops

    def _cache(self, ranks: Ranks, report: Reporter, store: FeatureStore | None) -> None:
        """Encode the images of the splits that there is room for, training images first, if they do not change."""
        task, config = self.task, self.task.config
        if task.splits["train"].dataset.images.transform.random:
            return
        size = self.model.config.image_tokens * self.model.config.image_width * self.dtype.itemsize
        left = config.train.cache_gib * 2**30
        self.model.eval()
        encoded = []
        for name in ("train", "val", "test"):
            split = task.splits.get(name)
            if split is None or len(split.used) * size > left:
                if name == "train":
                    return
                continue
            left -= len(split.used) * size
            split.dataset.images = self._encoded(name, split.dataset.images, split.used, report, store)
            encoded.append(name)
        self.cached = f"the image tower ({', '.join(encoded)})"

    def _encoded(self, name, files, used, report: Reporter, store: FeatureStore | None) -> tokens.Tokens:
        def tower(images: Tensor) -> Tensor:
            with precision.autocast(self.ranks.device, self.dtype):
                return self.root.tower(images).to(self.dtype)

        def compute() -> tokens.Tokens:
            return tokens.encode(files, used, tower, self.ranks, self.task.config.data.workers, report, name)

        if store is None or name not in store.shared or not store.limit or self.ranks.world > 1:
            return compute()
        return tokens.kept(store, files, used, self.model.visual_encoder, self.dtype, self.ranks, compute)
