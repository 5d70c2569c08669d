"""Small captioning and question sets on disk, and a tokenizer of words."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.data.files import write_image

CLS, SEP = 101, 102


def write_json(path: Path, values) -> Path:
    path.write_text(json.dumps(values))
    return path


def caption_entries(root: Path, sentences: tuple[int, ...] = (2, 3, 1), split: str | None = None) -> list[dict]:
    """Objects of images, with as many sentences each, and the images."""
    found = []
    for number, count in enumerate(sentences):
        folder = ("train2014", "val2014", "extra")[number % 3]
        stored = {"train2014": "train2014_img", "val2014": "val2014_img"}.get(folder, folder)
        name = f"COCO_{folder}_{number + 1:012d}.png"
        write_image(root / stored / name, seed=number)
        raw = [{"raw": f"Picture {number} Sentence {j}"} for j in range(count)]
        found.append({"filename": name, "filepath": folder, "sentences": raw} | ({"split": split} if split else {}))
    return found


def question_entries(root: Path) -> list[dict]:
    """Two questions about one image and one about another, and the images."""
    for number in range(2):
        write_image(root / f"val2014/{number}.png", seed=number)
    asked = (
        ("0.png", "Is it red?", 7, ["yes"] * 7 + ["no"] * 3),
        ("1.png", "How many?", 8, ["2"] * 10),
        ("0.png", "What {is} it?", 9, ["a", "b", "a", "c"] * 2),
    )
    return [
        {"dataset": "vqa", "image": f"val2014/{name}", "question": text, "question_id": number, "answer": answers}
        for name, text, number, answers in asked
    ]


class WordTokenizer:
    """[CLS] and a number for each word, the literal [SEP] as its own; padded on the right."""

    def __init__(self) -> None:
        self.words: dict[str, int] = {}

    def __call__(self, texts: list[str], max_length: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [
            [CLS, *(SEP if word == "[SEP]" else 1000 + self.words.setdefault(word, len(self.words)) for word in words)]
            for words in (text.lower().replace("[sep]", " [SEP] ").split() for text in texts)
        ]
        rows = [row[:max_length] for row in rows]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return ids, torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])

    def text(self, ids: torch.Tensor) -> str:
        """Words of a row, padding left out."""
        names = {number + 1000: word for word, number in self.words.items()} | {CLS: "[CLS]", SEP: "[SEP]"}
        return " ".join(names[number] for number in ids.tolist() if number)
