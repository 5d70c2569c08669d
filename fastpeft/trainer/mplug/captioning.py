"""Captioning as training work: COCO's captions, the loss by the token, scores of generated captions."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastpeft.config_mplug import CaptionConfig
from fastpeft.data.captions import Captions, read_captions
from fastpeft.data.draws import drawn_share
from fastpeft.data.errors import DataError
from fastpeft.data.vl_batches import CaptionBatch, CaptionCollate
from fastpeft.data.vl_datasets import END, CaptionImages, CaptionPairs
from fastpeft.metrics import ptb
from fastpeft.metrics.captions import METRICS, caption_records, check_words, coco_submission, numbered, score_captions
from fastpeft.metrics.result_files import write_records
from fastpeft.models.mplug import Stream
from fastpeft.trainer.mplug.build import open_tokenizer
from fastpeft.trainer.mplug.lengths import check_captions
from fastpeft.trainer.mplug.task import MPlugTask, Split, image_files, prepared
from fastpeft.trainer.mplug.work import MPlugWork
from fastpeft.trainer.task import blame


def prepare(config: CaptionConfig, source: str) -> tuple[MPlugTask, nn.Module]:
    """Open the captions, build the model, and check that they fit each other and the optimizer.

    Raises:
        ConfigError: Something does not; one line with the file and the section.
    """
    data = config.data
    with blame(source, "model"):
        tokenizer = open_tokenizer(config.model)
    with blame(source, "eval"):
        _check_scorers(config)
    with blame(source, "data"):
        found = {"train": read_captions(data.train, data.root, "train")}
        for name, path in (("val", data.val), ("test", data.test)):
            if path is not None:
                found[name] = read_captions(path, data.root, name)
                _check_references(config, name, found[name])
        chosen = drawn_share(len(found["train"].pairs), 100 * data.data_ratio, data.seed)
    sizes = [f"{len(chosen):,} of {len(found['train'].pairs):,} captions"]
    sizes += [f"{len(split.images):,} {name} images" for name, split in found.items() if name != "train"]
    split = partial(_splits, config, found, [int(number) for number in chosen])
    task, model = prepared(config, source, tokenizer, split, f"captions of {data.train}: {', '.join(sizes)}")
    check_captions(task, model.config.max_positions)
    return task, model


def _check_scorers(config: CaptionConfig) -> None:
    """Look for what the first evaluation would miss after an hour of training.

    Raises:
        DataError: It is not there.
    """
    ptb.package_folder()
    if ptb.java() is not None:
        return
    if config.eval.tokenizer == "java":
        raise DataError("tokenizer: 'java' needs Java, and no 'java' that runs was found; give eval.tokenizer=python")
    if config.eval.metric == "meteor":
        raise DataError("metric: METEOR needs Java, and no 'java' that runs was found; give another, such as cider")


def _check_references(config: CaptionConfig, name: str, captions: Captions) -> None:
    """Look whether the captions that are generated for a split can be scored.

    Raises:
        DataError: They cannot; with the file.
    """
    captions.references()
    numbered(captions)
    asked = Captions([captions.images[number] for number in _used(config, name, captions)])
    try:
        check_words(asked.references(), config.eval.tokenizer)
    except DataError as error:
        raise DataError(f"{getattr(config.data, name)}: {name}: {error}") from None


def _used(config: CaptionConfig, name: str, captions: Captions) -> list[int]:
    """Numbers of the images of `val` or `test` that captions are generated for."""
    return list(range(len(captions.images)))[: {"val": config.data.val_size, "test": config.data.test_size}[name]]


def _splits(config: CaptionConfig, found: dict[str, Captions], chosen: list[int], size: int) -> dict[str, Split]:
    data, splits = config.data, {}
    prompt = data.prompt if data.route == "fused" else None
    for name, captions in found.items():
        paths = [image.path for image in captions.images]
        files = image_files(config, paths, size, training=name == "train")
        if name == "train":
            dataset = CaptionPairs(captions, files, prompt=prompt, chosen=chosen)
            used = sorted({captions.pairs[number][0] for number in chosen})
        else:
            used = _used(config, name, captions)
            dataset = CaptionImages(captions, files, prompt=prompt, chosen=used)
        splits[name] = Split(dataset, captions, used)
    return splits


class Captioning(MPlugWork):
    """A run of captioning. The loss is the mean over all tokens of a step, whichever ranks they are on."""

    @property
    def metric(self) -> str:
        """As configured."""
        return self.task.config.eval.metric

    def collate(self, *, training: bool) -> Callable[[list], Any]:
        """Images with the prompt, and captions in training."""
        return CaptionCollate(self.task.tokenizer, self.task.config.data.max_length)

    def units(self, keys: list[tuple[int, int]]) -> float:
        """Tokens that are predicted: all but each caption's first."""
        indices = [index for _, index in keys]
        self._count([index for index in set(indices) if index not in self._predicted])
        return sum(self._predicted[index] for index in indices)

    @cached_property
    def _predicted(self) -> dict[int, int]:
        """Tokens that are predicted of each training sample seen so far: all ranks' are counted in every step."""
        return {}

    def _count(self, indices: list[int]) -> None:
        """Add samples to `_predicted`."""
        split, most = self.task.splits["train"], self.task.config.data.max_length
        captions, chosen = split.source, split.dataset.chosen
        pairs = [captions.pairs[chosen[index]] for index in indices]
        texts = [captions.images[image].sentences[sentence] + END for image, sentence in pairs]
        for index, length in zip(indices, self.task.tokenizer.lengths(texts), strict=True):
            self._predicted[index] = min(length, most) - 1

    def memory(self, image: Stream, batch: CaptionBatch) -> Stream:
        """By the route of the configuration."""
        return self.model.memory(image, batch.prompt_ids, batch.prompt_mask, self.task.config.data.route)

    def losses(self, memory: Stream, batch: CaptionBatch) -> Tensor:
        """Cross-entropy of every token but the first."""
        return self.model.token_losses(batch.ids, memory, batch.mask)[0].sum()

    def score(self, split: str, texts: dict[int, str], folder: Path) -> dict[str, float]:
        """COCO's scores, by name. Where COCO's numbers of all images are known, its server's file is written too."""
        captions: Captions = self.task.splits[split].source
        asked = Captions([captions.images[number] for number in texts])
        predictions = {image.name: text for image, text in zip(asked.images, texts.values(), strict=True)}
        write_records(folder / f"{split}.json", caption_records(predictions, asked))
        if numbered(asked):
            write_records(folder / f"{split}_coco.json", coco_submission(predictions, asked))
        settings = self.task.config.eval
        metrics = [name for name in METRICS if name.lower() in settings.metrics]
        found = score_captions(predictions, asked.references(), tokenizer=settings.tokenizer, metrics=metrics)
        return {name.lower(): value for name, value in found.scores.items()}
