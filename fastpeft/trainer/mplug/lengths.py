"""Are all texts short enough for the model's positions? Told before training, not by the first that is not."""

from __future__ import annotations

from fastpeft.data.errors import DataError
from fastpeft.data.vl_datasets import END
from fastpeft.trainer.mplug.task import MPlugTask
from fastpeft.trainer.task import blame


def check_captions(task: MPlugTask, positions: int) -> None:
    """Look at the prompt, at what is trained on and at what is generated.

    Raises:
        ConfigError: One has more tokens than the model has positions; with the file and the key.
    """
    data = task.config.data
    _check_generated(task, positions)
    with blame(task.source, "data"):
        # The last token of a caption is predicted, and never read.
        _check_key("max_length", data.max_length, positions + 1, positions)
        if data.route == "fused":
            _check(f"prompt '{data.prompt}'", task.tokenizer.lengths([data.prompt])[0], positions)


def check_questions(task: MPlugTask, positions: int) -> None:
    """Look at the answers, at the questions of evaluation, which nothing cuts, and at what is generated.

    Raises:
        ConfigError: One has more tokens than the model has positions; with the file, and the key or the entry.
    """
    if task.answers is None:
        _check_generated(task, positions)
    with blame(task.source, "data"):
        _check_key("max_length", task.config.data.max_length, positions, positions)
        _check_listed(task, positions)
        _check_trained(task, positions)
        for name in ("val", "test"):
            if name in task.splits:
                _check_asked(task, name, positions)


def _check_generated(task: MPlugTask, positions: int) -> None:
    with blame(task.source, "eval"):
        # The start token is read, and the last generated one is not.
        _check_key("max_length", task.config.eval.max_length, positions, positions)


def _check_listed(task: MPlugTask, positions: int) -> None:
    """The answers to choose from."""
    path = task.config.data.answer_list
    for number, answer in enumerate(task.answers or ()):
        _check(f"{path}: entry {number}", len(task.tokenizer.encode(answer + END)) - 1, positions)


def _check_trained(task: MPlugTask, positions: int) -> None:
    """The answers of training, each once."""
    dataset = task.splits["train"].dataset
    first: dict[str, int] = {}
    for number in dataset.chosen:
        for answer in dataset.questions.questions[number].answers:
            first.setdefault(answer, number)
    lengths = task.tokenizer.lengths([answer + END for answer in first])
    for (answer, number), length in zip(first.items(), lengths, strict=True):
        if length - 1 > positions:
            _check(f"{dataset.questions.where(number)}: answer '{answer}'", length - 1, positions)


def _check_asked(task: MPlugTask, name: str, positions: int) -> None:
    """The questions of `val` or `test`, with their template."""
    dataset = task.splits[name].dataset
    texts = [dataset.text(dataset.questions.questions[number]) for number in dataset.chosen]
    for number, length in zip(dataset.chosen, task.tokenizer.lengths(texts), strict=True):
        if length > positions:
            _check(f"{dataset.questions.where(number)}: question", length, positions)


def _check(what: str, tokens: int, positions: int) -> None:
    if tokens > positions:
        raise DataError(f"{what}: has {tokens} tokens, and the model {positions} positions")


def _check_key(key: str, tokens: int, most: int, positions: int) -> None:
    if tokens > most:
        raise DataError(f"{key}: {tokens} tokens do not fit the model's {positions} positions; give {most} at most")
