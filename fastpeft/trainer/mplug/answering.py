"""Visual question answering as training work: weighted answers, VQA's accuracy of generated ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastpeft.config_mplug import QuestionConfig
from fastpeft.data.draws import drawn_share
from fastpeft.data.errors import DataError
from fastpeft.data.vl_batches import VqaBatch, VqaCollate
from fastpeft.data.vl_datasets import VqaQuestions
from fastpeft.data.vqa import TEMPLATES, Questions, read_vqa
from fastpeft.metrics.result_files import write_records
from fastpeft.metrics.vqa import annotations_of, vqa_accuracy, vqa_records
from fastpeft.models.mplug import Stream
from fastpeft.trainer.mplug.build import open_tokenizer
from fastpeft.trainer.mplug.task import MPlugTask, Split, image_files, prepared
from fastpeft.trainer.mplug.work import MPlugWork
from fastpeft.trainer.task import blame


def prepare(config: QuestionConfig, source: str) -> tuple[MPlugTask, nn.Module]:
    """Open the questions, build the model, and check that they fit each other and the optimizer.

    Raises:
        ConfigError: Something does not; one line with the file and the section.
    """
    data = config.data
    with blame(source, "model"):
        tokenizer = open_tokenizer(config.model)
    with blame(source, "data"):
        more = {"ocr": data.ocr, "objects": data.objects}
        found = {"train": read_vqa(data.train, data.root, training=True, **more)}
        for name, files in (("val", data.val), ("test", data.test)):
            if files is not None:
                found[name] = read_vqa(files, data.root, training=False, **more)
        if "val" in found:
            annotations_of(found["val"])
        chosen = drawn_share(len(found["train"].questions), 100 * data.data_ratio, data.seed)
    sizes = [f"{len(chosen):,} of {len(found['train'].questions):,} questions"]
    sizes += [f"{len(split.questions):,} {name} questions" for name, split in found.items() if name != "train"]
    split = partial(_splits, config, found, [int(number) for number in chosen])
    files = data.train if isinstance(data.train, str) else data.train[0]
    return prepared(config, source, tokenizer, split, f"questions of {files}: {', '.join(sizes)}")


def _splits(config: QuestionConfig, found: dict[str, Questions], chosen: list[int], size: int) -> dict[str, Split]:
    data, splits = config.data, {}
    template = TEMPLATES.get(data.template, data.template)
    for name, questions in found.items():
        files = image_files(config, questions.images, size, training=name == "train")
        limit = {"train": None, "val": data.val_size, "test": data.test_size}[name]
        numbers = chosen if name == "train" else list(range(len(questions.questions)))[:limit]
        dataset = VqaQuestions(questions, files, template=template, chosen=numbers)
        used = sorted({questions.questions[number].image for number in numbers})
        splits[name] = Split(dataset, questions, used)
    return splits


class Answering(MPlugWork):
    """A run of question answering. The loss is the answers' weighted sum, by the question."""

    metric = "accuracy"

    def collate(self, *, training: bool) -> Callable[[list], Any]:
        """Images with questions, and answers in training."""
        return VqaCollate(self.task.tokenizer, training=training, max_length=self.task.config.data.max_length)

    def units(self, keys: list[tuple[int, int]]) -> float:
        """The questions."""
        return len(keys)

    def memory(self, image: Stream, batch: VqaBatch) -> Stream:
        """Image and question after the fusion."""
        return self.model.memory(image, batch.question_ids, batch.question_mask)

    def losses(self, memory: Stream, batch: VqaBatch) -> Tensor:
        """Each answer's negative log-likelihood, times its weight."""
        losses, _ = self.model.token_losses(batch.answer_ids, memory.repeat(batch.counts), batch.answer_mask)
        return (losses.sum(1) * batch.weights).sum()

    def score(self, split: str, texts: dict[int, str], folder: Path) -> dict[str, float]:
        """Accuracy by the official rule, as a share; nothing for questions whose answers are not known."""
        questions = self.task.splits[split].source.questions
        predictions = {questions[number].question_id: text for number, text in texts.items()}
        write_records(folder / f"{split}.json", vqa_records(predictions))
        asked = Questions([], [questions[number] for number in texts])
        try:
            annotations = annotations_of(asked)
        except DataError:
            if any(question.answers for question in asked.questions):
                raise
            return {}
        return {"accuracy": vqa_accuracy(predictions, annotations).overall / 100}
