"""Caption metrics of COCO's evaluation: BLEU-1 to 4, METEOR, ROUGE-L and CIDEr, computed by pycocoevalcap."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastpeft.data.captions import Captions
from fastpeft.data.errors import DataError
from fastpeft.metrics import ptb
from fastpeft.metrics.result_files import check_coverage, read_records

TOKENIZERS = ("java", "python")
_BLEU = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4")
METRICS = (*_BLEU, "METEOR", "ROUGE_L", "CIDEr")

# Tokenized captions by image, as pycocoevalcap takes them.
_Texts = dict[Hashable, list[str]]


@dataclass(frozen=True)
class CaptionScores:
    """Scores of a set of captions.

    Attributes:
        scores: By metric, as fractions; CIDEr, whose largest value is 10, is quoted times 100 in papers.
        by_image: The same for each image id.
        not_computed: Metrics that were asked for and are not in `scores`, with the reason.
        tokenizer: What made words of the captions.
    """

    scores: dict[str, float]
    by_image: dict[Hashable, dict[str, float]]
    not_computed: dict[str, str]
    tokenizer: str


def score_captions(
    predictions: Mapping[Hashable, str],
    references: Mapping[Hashable, Sequence[str]],
    *,
    tokenizer: str = "java",
    metrics: Sequence[str] = METRICS,
) -> CaptionScores:
    """Score one caption an image against those of people.

    CIDEr weighs words by how few of the scored images' references have them: it depends on the whole set, and is 0 for
    a single image.

    Args:
        predictions: A caption for each image id.
        references: At least one caption for each.
        tokenizer: `java`, COCO's own, or `python`, which needs no Java and makes the same words of ordinary captions.
        metrics: Some of `METRICS`. METEOR is a Java program; without Java it is in `not_computed`.

    Raises:
        DataError: The image ids are not the same, an image has no reference, none has a word, pycocoevalcap is not
            installed, or the tokenizer needs Java and there is none.
    """
    _check(predictions, references, tokenizer, metrics)
    ptb.package_folder()
    ids = list(references)
    texts = [predictions[image] for image in ids] + [text for image in ids for text in references[image]]
    tokens = ptb.java_tokens(texts) if tokenizer == "java" else [ptb.python_tokens(text) for text in texts]
    words = iter([" ".join(caption) for caption in tokens])
    predicted: _Texts = {image: [next(words)] for image in ids}
    wanted: _Texts = {image: [next(words) for _ in references[image]] for image in ids}
    if not any(map(any, wanted.values())):
        raise _wordless(references)
    scores: dict[str, float] = {}
    by_image: dict[Hashable, dict[str, float]] = {image: {} for image in ids}
    not_computed = {}
    for names in (_BLEU, ("METEOR",), ("ROUGE_L",), ("CIDEr",)):
        if not set(names) & set(metrics):
            continue
        if names == ("METEOR",) and ptb.java() is None:
            not_computed["METEOR"] = "needs Java, and no 'java' that runs was found"
            continue
        for name, whole, each in _computed(names, wanted, predicted):
            if name in metrics:
                scores[name] = whole
                for image, score in zip(ids, each, strict=True):
                    by_image[image][name] = score
    return CaptionScores(scores, by_image, not_computed, tokenizer)


def check_words(references: Mapping[Hashable, Sequence[str]], tokenizer: str) -> None:
    """Look whether there is a word among the references, before there are predictions.

    Args:
        references: At least one caption for each image id.
        tokenizer: As of `score_captions`.

    Raises:
        DataError: There is none: all of them are punctuation.
    """
    texts = [text for own in references.values() for text in own]
    # The first text settles it for all but odd files; Java's start is left for those.
    if any(ptb.python_tokens(text) for text in texts):
        return
    if tokenizer != "java" or not any(ptb.java_tokens(texts)):
        raise _wordless(references)


def _wordless(references: Mapping[Hashable, Sequence[str]]) -> DataError:
    image, texts = next(iter(references.items()))
    return DataError(
        f"captions: no reference has a word to score by; the first image is {image}, which has {texts[0]!r}"
    )


def _check(
    predictions: Mapping[Hashable, str],
    references: Mapping[Hashable, Sequence[str]],
    tokenizer: str,
    metrics: Sequence[str],
) -> None:
    if tokenizer not in TOKENIZERS:
        raise DataError(f"tokenizer: expected one of {', '.join(TOKENIZERS)}, got '{tokenizer}'")
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise DataError(f"metrics: expected some of {', '.join(METRICS)}, got '{unknown[0]}'")
    if not references:
        raise DataError("captions: no images to score")
    check_coverage(predictions, references, "captions", "image")
    for image, texts in references.items():
        # A text is a sequence of texts to Python.
        if isinstance(texts, str) or not texts:
            raise DataError(f"captions: image {image}: expected a list of at least one reference, got {texts!r}")


def _computed(names: tuple[str, ...], wanted: _Texts, predicted: _Texts) -> list[tuple[str, float, list[float]]]:
    """Name, score of the whole and score of each image, of the metrics that one scorer computes."""
    if names == _BLEU:
        from pycocoevalcap.bleu.bleu import Bleu

        whole, each = Bleu(4).compute_score(wanted, predicted, verbose=0)
        return [(name, float(score), list(scores)) for name, score, scores in zip(names, whole, each, strict=True)]
    if names == ("METEOR",):
        whole, each = _meteor(wanted, predicted)
    elif names == ("ROUGE_L",):
        from pycocoevalcap.rouge.rouge import Rouge

        whole, each = Rouge().compute_score(wanted, predicted)
    else:
        from pycocoevalcap.cider.cider import Cider

        whole, each = Cider().compute_score(wanted, predicted)
    return [(names[0], float(whole), [float(score) for score in each])]


def _meteor(wanted: _Texts, predicted: _Texts) -> tuple[float, list[float]]:
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    try:
        return scorer.compute_score(wanted, predicted)
    # Of a program that has ended, or says something else than a number, this is what is left.
    except (OSError, ValueError) as error:
        with suppress(OSError):
            scorer.meteor_p.stdin.close()
        raise DataError(f"METEOR failed under Java: {error}") from None
    finally:
        # It takes its lock again to stop the program, and a failure leaves it taken.
        if scorer.lock.locked():
            scorer.lock.release()


def caption_records(predictions: Mapping[str, str], captions: Captions) -> list[dict[str, Any]]:
    """Predictions by image name with the references beside them, one record an image."""
    references = captions.references()
    return [
        {"question_id": name, "pred_caption": caption, "gold_caption": list(references[name])}
        for name, caption in predictions.items()
    ]


def read_caption_results(path: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Predictions and references by image name, from a result file of `caption_records`.

    Raises:
        DataError: It is missing or malformed, or an image is in it twice.
    """
    predictions, references = {}, {}
    for record in read_records(path, "question_id", "pred_caption"):
        name, gold = record["question_id"], record.get("gold_caption")
        if name in predictions:
            raise DataError(f"{path}: image {name} is there more than once")
        if not isinstance(gold, list) or not gold or not all(isinstance(text, str) for text in gold):
            raise DataError(f"{path}: image {name}: gold_caption: expected a list of texts, got {gold!r}")
        predictions[name], references[name] = record["pred_caption"], gold
    return predictions, references


def numbered(captions: Captions) -> bool:
    """Whether every image has its number in COCO, which a submission needs.

    Raises:
        DataError: They have, and two have the same.
    """
    names: dict[int | str, str] = {}
    if not all(isinstance(image.image_id, int) for image in captions.images):
        return False
    for image in captions.images:
        first = names.setdefault(image.image_id, image.name)
        if first != image.name:
            raise DataError(f"captions: images '{first}' and '{image.name}' have the same COCO number {image.image_id}")
    return True


def coco_submission(predictions: Mapping[str, str], captions: Captions) -> list[dict[str, Any]]:
    """Predictions by image name as COCO's server takes them: `[{"image_id": number, "caption": text}]`.

    Raises:
        DataError: An image's number in COCO is not known.
    """
    ids = {image.name: image.image_id for image in captions.images}
    for name in predictions:
        if not isinstance(ids.get(name), int):
            raise DataError(f"captions: image '{name}' has no COCO number; its list has neither cocoid nor image_id")
    return [{"image_id": ids[name], "caption": caption} for name, caption in predictions.items()]
