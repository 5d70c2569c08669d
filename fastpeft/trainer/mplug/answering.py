"""Visual question answering as training work: weighted answers, VQA's accuracy of generated ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastpeft.config_mplug import QuestionConfig
from fastpeft.data.answer_list import check_answers, read_answer_list
from fastpeft.data.draws import drawn_share
from fastpeft.data.vl_batches import VqaBatch, VqaCollate
from fastpeft.data.vl_datasets import END, VqaQuestions
from fastpeft.data.vqa import TEMPLATES, Questions, read_vqa
from fastpeft.metrics.result_files import write_json, write_records
from fastpeft.metrics.vqa import Annotation, annotations_from, annotations_of, vqa_accuracy, vqa_records
from fastpeft.models.mplug import Stream, rank_answers
from fastpeft.models.mplug.generation import ranking_calls
from fastpeft.trainer.mplug.build import open_tokenizer
from fastpeft.trainer.mplug.lengths import check_questions
from fastpeft.trainer.mplug.lockstep import Lockstep
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
        chosen = [int(n) for n in drawn_share(len(found["train"].questions), 100 * data.data_ratio, data.seed)]
        gold = {name: _gold(config, name, found[name]) for name in ("val", "test") if name in found}
        answers = _answers(config, found, chosen)
    sizes = [f"{len(chosen):,} of {len(found['train'].questions):,} questions"]
    sizes += [f"{len(split.questions):,} {name} questions" for name, split in found.items() if name != "train"]
    split = partial(_splits, config, found, chosen, gold)
    files = data.train if isinstance(data.train, str) else data.train[0]
    about = f"questions of {files}: {', '.join(sizes)}"
    if answers is not None:
        about += f"; {len(answers):,} answers to choose from"
    task, model = prepared(config, source, tokenizer, split, about)
    task.answers = answers
    check_questions(task, model.config.max_positions)
    return task, model


def _used(config: QuestionConfig, name: str, questions: Questions, chosen: list[int]) -> list[int]:
    """Numbers of the questions of a split that are asked."""
    if name == "train":
        return chosen
    return list(range(len(questions.questions)))[: {"val": config.data.val_size, "test": config.data.test_size}[name]]


def _answers(config: QuestionConfig, found: dict[str, Questions], chosen: list[int]) -> list[str] | None:
    """What evaluation chooses from, if that is given and has what is asked for."""
    path = config.data.answer_list
    if path is None:
        return None
    answers = read_answer_list(path)
    if config.data.answers_outside == "refuse":
        for name, questions in found.items():
            numbers = _used(config, name, questions, chosen)
            check_answers(path, answers, questions, numbers, training=name == "train")
    return answers


def _gold(config: QuestionConfig, name: str, questions: Questions) -> dict[int, Annotation] | None:
    """What the answers of a split are scored by; None if that is not known, which may be so of the test.

    Raises:
        DataError: It is known of some questions, and not of all, or is not where it should be.
    """
    numbers = _used(config, name, questions, [])
    path = (config.data.annotations or {}).get(name)
    if path is not None:
        return annotations_from(path, questions, numbers)
    if name == "test" and not any(questions.questions[number].answers for number in numbers):
        return None
    return annotations_of(questions, numbers)


def _splits(
    config: QuestionConfig,
    found: dict[str, Questions],
    chosen: list[int],
    gold: dict[str, dict[int, Annotation] | None],
    size: int,
) -> dict[str, Split]:
    data, splits = config.data, {}
    template = TEMPLATES.get(data.template, data.template)
    for name, questions in found.items():
        files = image_files(config, questions.images, size, training=name == "train")
        numbers = _used(config, name, questions, chosen)
        dataset = VqaQuestions(questions, files, template=template, chosen=numbers)
        used = sorted({questions.questions[number].image for number in numbers})
        splits[name] = Split(dataset, questions, used, gold.get(name))
    return splits


class Answering(MPlugWork):
    """A run of question answering. The loss is the answers' weighted sum, by the question."""

    metric = "accuracy"

    @cached_property
    def _choices(self) -> list[list[int]]:
        """Tokens of the answers to choose from."""
        return [self.task.tokenizer.encode(answer + END)[1:] for answer in self.task.answers]

    def written(self, model: nn.Module | Lockstep, memory: Stream) -> list[str]:
        """The likeliest of the answers to choose from, if there are any; else as generated."""
        if self.task.answers is None:
            return super().written(model, memory)
        return [self.task.answers[ranked[0][0]] for ranked in rank_answers(model, memory, self._choices)]

    @property
    def decoder_calls(self) -> int:
        """Of either way."""
        if self.task.answers is None:
            return super().decoder_calls
        return ranking_calls(self.task.config.eval.batch_size, self._choices)

    def collate(self, *, training: bool) -> Callable[[list], Any]:
        """Images with questions, and answers in training."""
        data = self.task.config.data
        ending = TEMPLATES.get(data.template, data.template).rpartition("{question}")[2]
        return VqaCollate(self.task.tokenizer, training=training, max_length=data.max_length, ending=ending)

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
        """Accuracy by the official rule, as a share; nothing for questions whose answers are not known.

        Where types are known, accuracies by the type of answer too, and a file with those by the type of question.
        """
        questions = self.task.splits[split].source.questions
        predictions = {questions[number].question_id: text for number, text in texts.items()}
        write_records(folder / f"{split}.json", vqa_records(predictions))
        gold = self.task.splits[split].gold
        if gold is None:
            return {}
        found = vqa_accuracy(predictions, gold)
        if not found.by_question_type and not found.by_answer_type:
            return {"accuracy": found.overall / 100}
        write_json(folder / f"{split}_accuracy.json", found.rounded())
        kinds = {f"accuracy_{kind}": value / 100 for kind, value in found.by_answer_type.items()}
        return {"accuracy": found.overall / 100, **kinds}
