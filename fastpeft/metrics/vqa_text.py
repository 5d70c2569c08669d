"""Answers as the VQA challenge compares them: its treatment of punctuation, numbers, articles and contractions."""

from __future__ import annotations

import re

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The challenge's evaluator passes a flag where a number of replacements is meant; results depend on it only in answers
# of more than 32 sentences.
_PERIODS = 32
_NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}  # fmt: skip
_ARTICLES = frozenset(("a", "an", "the"))
# Written with all their apostrophes. The challenge's list restores a single one that is missing.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def _restored() -> dict[str, str]:
    """From a contraction that lacks one of its apostrophes to the whole one."""
    found = {}
    for whole in _CONTRACTIONS:
        for at, character in enumerate(whole):
            if character == "'":
                found[whole[:at] + whole[at + 1 :]] = whole
    # The one entry of the challenge's list that takes an apostrophe away.
    return found | {"somebody'd": "somebodyd"}


_RESTORED = _restored()


def strip_punctuation(answer: str) -> str:
    """Take punctuation out, as is done with the annotators' answers too.

    A character goes without trace where it stands beside a space anywhere in the answer, or if a number in the answer
    has a comma; elsewhere a space takes its place. A period goes unless a digit follows.
    """
    numeric = _DIGIT_COMMA_DIGIT.search(answer) is not None
    cleaned = answer
    for character in _PUNCTUATION:
        if character in answer:
            beside = f"{character} " in answer or f" {character}" in answer
            cleaned = cleaned.replace(character, "" if numeric or beside else " ")
    return _PERIOD.sub("", cleaned, count=_PERIODS)


def normalise(answer: str) -> str:
    """A prediction in the form in which it is compared: lower case, digits for number words, no articles."""
    words = strip_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    numbered = (_NUMBERS.get(word, word) for word in words)
    return " ".join(_RESTORED.get(word, word) for word in numbered if word not in _ARTICLES)
