"""Sentences to be continued: what mPLUG's prefix language modelling pre-trains on, from captions.

The text encoder reads the beginning of a sentence and the decoder writes the rest. A model that had only ever seen one
fixed prompt there would have learned to ignore what the text encoder says, and with it every question.
"""

from __future__ import annotations

import random
from typing import Any


def continued(captions: list[dict[str, Any]], prompt: str, seed: int) -> list[dict[str, Any]]:
    """Every sentence twice: whole, after the prompt, and cut after one of its words, drawn evenly.

    Args:
        captions: images of a captions file.
        prompt: what is read before a whole sentence.
        seed: of the cuts.

    Returns:
        Entries of a question file: the beginning is the question, the rest its only answer.
    """
    draw, entries = random.Random(seed), []
    for image in captions:
        for sentence in image["sentences"]:
            words = sentence["raw"].split()
            cut = draw.randrange(1, len(words)) if len(words) > 1 else 0
            for beginning, rest in ((prompt, words), (" ".join(words[:cut]) or prompt, words[cut:])):
                entries.append(_entry(image, len(entries), beginning, " ".join(rest)))
    return entries


def last_words(captions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first sentence of every image, but for its last word, which is the answer.

    Args:
        captions: images of a captions file.
    """
    entries = []
    for image in captions:
        words = image["sentences"][0]["raw"].rstrip(".").split()
        entries.append(_entry(image, len(entries), " ".join(words[:-1]), words[-1], people=10))
    return entries


def _entry(image: dict[str, Any], number: int, question: str, answer: str, people: int = 1) -> dict[str, Any]:
    where = f"{image['filepath']}/{image['filename']}"
    return {"dataset": "vqa", "image": where, "question": question, "question_id": number, "answer": [answer] * people}
