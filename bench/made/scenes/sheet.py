"""A sheet of pictures of a made data set, each with its captions and its questions, to be looked at.

python -m bench.made.scenes.sheet data/scenes sheet.png --split test
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections import Counter
from pathlib import Path

from fastpeft._serve import serve
from fastpeft.data import DataError

_WIDTH, _LINE, _LETTERS = 330, 14, 54


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 2 for a folder that has no such split."""
    parser = argparse.ArgumentParser(prog="python -m bench.made.scenes.sheet", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="that bench.made scenes has written")
    parser.add_argument("out", type=Path, help="the picture to write")
    parser.add_argument("--split", default="test", help="train, val or test [test]")
    parser.add_argument("--count", type=int, default=25, help="pictures [25]")
    given = parser.parse_args(arguments)
    return serve(lambda: draw(given.folder, given.split, given.count).save(given.out))


def draw(folder: Path, split: str, count: int):
    """The sheet, five pictures a row."""
    from PIL import Image, ImageDraw, ImageFont

    captioned, asked = (_read(folder / f"{kind}_{split}.json") for kind in ("captions", "vqa"))
    cells = []
    for entry in captioned[:count]:
        name = f"{entry['filepath']}/{entry['filename']}"
        lines = [sentence["raw"] for sentence in entry["sentences"]]
        for question in asked:
            if question["image"] == name:
                given = Counter(question["answer"]).most_common()
                answers = ", ".join(f"{answer} {times}" for answer, times in given)
                lines.append(f"> {question['question']} {answers}")
        wrapped = [part for line in lines for part in textwrap.wrap(line, _LETTERS, subsequent_indent="   ")]
        cells.append((Image.open(folder / name), wrapped))
    if not cells:
        raise DataError(f"{folder}: no pictures asked for")
    side = max(image.height for image, _ in cells)
    height = side + _LINE * max(len(lines) for _, lines in cells) + 16
    columns = min(5, len(cells))
    sheet = Image.new("RGB", (columns * _WIDTH, -(-len(cells) // columns) * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, (image, lines) in enumerate(cells):
        x, y = number % columns * _WIDTH + 6, number // columns * height + 6
        sheet.paste(image, (x, y))
        for place, line in enumerate(lines):
            pen.text((x, y + side + 4 + _LINE * place), line, fill="black", font=font)
    return sheet


def _read(path: Path):
    if not path.is_file():
        raise DataError(f"{path}: not found; expected a folder that bench.made scenes has written")
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
