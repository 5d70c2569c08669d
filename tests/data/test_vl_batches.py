"""From samples to padded batches, dealt to ranks, drawn by share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastpeft.data import DataError
from fastpeft.data.captions import read_captions
from fastpeft.data.draws import drawn_share
from fastpeft.data.vl_batches import CaptionCollate, VqaCollate, moved, tokenized
from fastpeft.data.vl_datasets import CaptionImages, CaptionPairs, VqaQuestions
from fastpeft.data.vl_transforms import EvalTransform, ImageFiles, TrainTransform
from fastpeft.data.vqa import TEMPLATES, read_vqa
from fastpeft.trainer.order import Deal, dealt_batches, evaluation_batches, parts_of
from tests.data.vl_files import CLS, SEP, WordTokenizer, caption_entries, question_entries, write_json


@pytest.fixture
def captions(tmp_path):
    return read_captions(write_json(tmp_path / "c.json", caption_entries(tmp_path)), tmp_path)


@pytest.fixture
def questions(tmp_path):
    return read_vqa(write_json(tmp_path / "q.json", question_entries(tmp_path)), tmp_path, training=True)


def images(paths, train=False):
    return ImageFiles(paths, TrainTransform(8) if train else EvalTransform(8), seed=1)


def pairs(captions, train=False, **fields):
    return CaptionPairs(captions, images([image.path for image in captions.images], train), **fields)


def test_caption_batch(captions):
    tokenizer, dataset = WordTokenizer(), pairs(captions, prefix="see: ")
    batch = CaptionCollate(tokenizer)([dataset[1], dataset[5]])
    assert batch.images.shape == (2, 3, 8, 8) and batch.indices.tolist() == [1, 5]
    assert tokenizer.text(batch.prompt_ids[0]) == "[CLS] a picture of" and batch.prompt_mask.all()
    assert tokenizer.text(batch.ids[1]) == "[CLS] see: picture 2 sentence 0 [SEP]"
    assert torch.equal(batch.images[1], EvalTransform(8)(np.asarray(_picture(captions.images[2].path))))
    none = CaptionCollate(tokenizer)([pairs(captions, prompt=None)[0]])
    assert none.prompt_ids is None and none.prompt_mask is None


def _picture(path):
    from PIL import Image

    return Image.open(path)


def test_padding_is_to_the_longest_on_the_right(captions):
    captions.images[0] = _with(captions.images[0], "one two three four five six", "one")
    batch = CaptionCollate(WordTokenizer())([pairs(captions)[0], pairs(captions)[1]])
    assert batch.ids.shape == (2, 8) and batch.mask.dtype == torch.bool
    assert batch.mask.sum(1).tolist() == [8, 3]
    assert batch.ids[1, 3:].tolist() == [0] * 5 and batch.ids[1, 2] == SEP and batch.ids[0, 0] == CLS
    cut = CaptionCollate(WordTokenizer(), max_length=5)([pairs(captions)[0]])
    assert cut.ids.shape == (1, 5) and SEP not in cut.ids, "a caption that is too long loses its end"


def _with(image, *sentences):
    from dataclasses import replace

    return replace(image, sentences=sentences)


def test_evaluation_has_one_sample_an_image(captions):
    dataset = CaptionImages(captions, images([image.path for image in captions.images]))
    batch = CaptionCollate(WordTokenizer())([dataset[i] for i in range(len(dataset))])
    assert len(dataset) == 3 and batch.ids is None and batch.mask is None
    assert batch.indices.tolist() == [0, 1, 2] and batch.prompt_ids.shape == (3, 4)


def test_vqa_batch(questions):
    tokenizer, dataset = WordTokenizer(), VqaQuestions(questions, images(questions.images))
    batch = VqaCollate(tokenizer, training=True)([dataset[0], dataset[1], dataset[2]])
    assert tokenizer.text(batch.question_ids[2]) == "[CLS] question: what {is} it? answer:"
    assert batch.counts.tolist() == [2, 1, 3] and len(batch.answer_ids) == len(batch.weights) == 6
    assert [tokenizer.text(row) for row in batch.answer_ids] == [
        f"[CLS] {answer} [SEP]" for answer in ("yes", "no", "2", "a", "b", "c")
    ]
    torch.testing.assert_close(batch.weights, torch.tensor([0.7, 0.3, 1, 0.5, 0.25, 0.25]))
    assert batch.indices.tolist() == [0, 1, 2] and torch.equal(batch.images[0], batch.images[2])
    # The weights of each question's answers sum to one.
    sums = torch.zeros(3).index_add(0, torch.repeat_interleave(torch.arange(3), batch.counts), batch.weights)
    torch.testing.assert_close(sums, torch.ones(3))


def test_vqa_evaluation_has_no_answers_and_no_cut(questions):
    dataset = VqaQuestions(questions, images(questions.images), template=TEMPLATES["original"])
    samples = [dataset[0], dataset[2]]
    batch = VqaCollate(WordTokenizer(), training=False, max_length=2)(samples)
    assert batch.question_ids.shape == (2, 4)
    assert batch[3:7] == (None,) * 4
    assert VqaCollate(WordTokenizer(), training=True, max_length=2)(samples).question_ids.shape == (2, 2)
    assert moved(batch, "meta").images.device.type == "meta" and moved(batch, "meta").weights is None
    with pytest.raises(DataError, match=r"template: expected a text with '\{question\}' in it"):
        VqaQuestions(questions, images(questions.images), template="Question:")


def test_of_a_long_question_the_end_is_cut_and_the_templates_stays(tmp_path):
    entries = question_entries(tmp_path)
    entries[0]["question"] = "Is it red or blue or green ?"
    entries[0]["object_label"] = "car&&tree"
    entries[1]["object_label"] = "dog&&cat"
    questions = read_vqa(write_json(tmp_path / "q.json", entries), tmp_path, training=True, objects=True)
    dataset = VqaQuestions(questions, images(questions.images))
    samples, tokenizer = [dataset[0], dataset[1], dataset[2]], WordTokenizer()

    def texts(**settings):
        batch = VqaCollate(tokenizer, ending=" Answer: ", **settings)(samples)
        rows = zip(batch.question_ids, batch.question_mask, strict=True)
        return [tokenizer.text(ids[mask]) for ids, mask in rows]

    assert texts(training=True, max_length=7) == [
        "[CLS] question: is it red or answer:",
        "[CLS] question: how many? answer: [SEP] dog",
        "[CLS] question: what {is} it? answer:",
    ]
    # As long as the template with its question, to the token, and one less.
    assert texts(training=True, max_length=11)[0] == "[CLS] question: is it red or blue or green ? answer:"
    assert texts(training=True, max_length=10)[0] == "[CLS] question: is it red or blue or green answer:"
    assert texts(training=True, max_length=5)[1:] == [
        "[CLS] question: how many? answer:",
        "[CLS] question: what {is} answer:",
    ]
    whole = "[CLS] question: is it red or blue or green ? answer: [SEP] car tree"
    assert texts(training=False, max_length=7)[0] == texts(training=True, max_length=30)[0] == whole
    with pytest.raises(
        DataError, match=r"max_length: 2 tokens leave no room for a question before ' Answer: ', which h"
    ):
        VqaCollate(tokenizer, training=True, max_length=2, ending=" Answer: ")


def test_a_question_without_answers_cannot_be_trained_on(tmp_path):
    entries = question_entries(tmp_path)
    del entries[1]["answer"]
    questions = read_vqa(write_json(tmp_path / "q.json", entries), tmp_path, training=False)
    dataset = VqaQuestions(questions, images(questions.images))
    result = VqaCollate(WordTokenizer(), training=True)([dataset[0], dataset[1]])
    assert isinstance(result, DataError) and "'Question: How many? Answer: ' has no answer to train on" in str(result)


def test_tokenizers_are_checked():
    tokenizer = WordTokenizer()

    def padded(texts, max_length):
        ids, mask = tokenizer(texts, max_length)
        return torch.nn.functional.pad(ids, (0, 4)), torch.nn.functional.pad(mask.long(), (0, 4))

    ids, mask = tokenized(padded, ["a b", "c"], None)
    assert ids.shape == (2, 3) and mask.dtype == torch.bool, "no wider than the longest"
    with pytest.raises(DataError, match="expected padding on the right only"):
        tokenized(lambda t, m: tuple(part.flip(1) for part in padded(t, m)), ["a b", "c"], None)
    with pytest.raises(DataError, match=r"one shape \(3, tokens\), got \(2, 3\) and \(2, 3\)"):
        tokenized(lambda t, m: tokenizer(t[:2], m), ["a b", "c", "d"], None)
    with pytest.raises(DataError, match="gave 5 tokens where 3 at most were asked for"):
        tokenized(lambda t, m: tokenizer(t, None), ["a b c d"], 3)


def test_shares_are_nested_and_over_pairs():
    whole = set(range(1000))
    before: set[int] = set()
    for percent, count in ((1, 10), (2, 20), (10, 100), (20, 200), (80, 800), (100, 1000)):
        chosen = drawn_share(1000, percent, seed=5)
        assert len(chosen) == count and (np.diff(chosen) > 0).all()
        assert before <= set(chosen) <= whole
        before = set(chosen)
    assert set(drawn_share(1000, 10, 5)) != set(drawn_share(1000, 10, 6))
    assert drawn_share(1000, 10, 5).tolist() == drawn_share(1000, 10, 5).tolist()
    assert len(drawn_share(30, 1, 0)) == 1
    # Pairs of one image, five in a row, are not drawn together.
    images_drawn = {pair // 5 for pair in drawn_share(1000, 20, 0)}
    assert len(images_drawn) > 100
    for percent in (0, 101, -1):
        with pytest.raises(DataError, match="more than 0 and at most 100 percent"):
            drawn_share(1000, percent, 0)


def test_a_sample_is_the_same_in_a_smaller_share(captions):
    whole, part = pairs(captions, train=True), pairs(captions, train=True, chosen=[2, 4])
    for dataset in (whole, part):
        dataset.set_epoch(3)
    assert len(part) == 2 and part[1].index == 4 and part[1].caption == whole[4].caption
    assert torch.equal(part[1].image, whole[4].image)
    assert not torch.equal(whole[2].image, whole[3].image), "two captions of an image have crops of their own"
    with pytest.raises(DataError, match="chosen: expected some of 6 samples, 0 to 5"):
        pairs(captions, chosen=[6])
    with pytest.raises(DataError, match="chosen: expected some of 6 samples"):
        pairs(captions, chosen=[])


@pytest.mark.parametrize("workers", [0, 2])
def test_training_order_over_ranks(captions, workers):
    deal = Deal(size=6, batch_size=4, seed=0, drop_last=False, parts=2)
    seen = []
    for rank in range(2):
        parts = parts_of(deal, rank, 2, epoch=0, first_step=0, epochs=2)
        dataset = pairs(captions, train=True)
        batches = dealt_batches(dataset, parts, workers, CaptionCollate(WordTokenizer()))
        seen.append([(batch.indices.tolist(), counted, batch.images) for batch, counted in batches])
    assert [counted for _, counted, _ in seen[0]] == [2, 1, 2, 1]
    for epoch in range(2):
        rows = [row for rank in seen for row in rank[2 * epoch : 2 * epoch + 2]]
        assert sorted(index for indices, *_ in rows for index in indices) == list(range(6))
    assert [indices for indices, *_ in seen[0][:2]] != [indices for indices, *_ in seen[0][2:]]
    # As one process would have prepared it.
    dataset = pairs(captions, train=True)
    dataset.set_epoch(1)
    indices, _, stacked = seen[1][2]
    assert torch.equal(stacked, torch.stack([dataset[index].image for index in indices]))


def test_evaluation_over_ranks_has_no_duplicates(captions):
    dataset = CaptionImages(captions, images([image.path for image in captions.images]))
    collate = CaptionCollate(WordTokenizer())
    for world in (1, 2, 5):
        ranks = [
            [i for batch in evaluation_batches(dataset, 2, rank, world, 0, collate) for i in batch.indices.tolist()]
            for rank in range(world)
        ]
        assert sorted(index for rank in ranks for index in rank) == [0, 1, 2]


def test_a_broken_image_reaches_the_reader_as_it_is(captions):
    captions.images[1].path.write_bytes(b"nothing")
    dataset = CaptionImages(captions, images([image.path for image in captions.images]))
    with pytest.raises(DataError, match="cannot be read as an image") as caught:
        list(evaluation_batches(dataset, 3, 0, 1, 0, CaptionCollate(WordTokenizer())))
    assert str(captions.images[1].path) in str(caught.value)
