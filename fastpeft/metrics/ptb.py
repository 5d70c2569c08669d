"""Captions as words, as COCO's evaluation makes them: Penn Treebank tokens in lower case, without most punctuation.

COCO's evaluation runs the tokenizer of Stanford CoreNLP, which needs Java. `python_tokens` makes the same tokens of
captions as people and models write them; its rules were found by asking that program, and are tested against it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from fastpeft.data.errors import DataError

# Tokens that the evaluation leaves out. Brackets are not among them: its list has them in upper case, while the
# tokenizer writes -lrb-.
REMOVED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
# Here quotes are not told apart, and dashes not made one.
_REMOVED_HERE = REMOVED | {'"', "---", "----"}
_JAR, _MAIN = "stanford-corenlp-3.4.1.jar", "edu.stanford.nlp.process.PTBTokenizer"

# Words that end in a period of their own, as does any single letter.
_ABBREVIATIONS = """
adj adm adv al ala alex apr ariz assn assoc asst atty aug ave bhd bldg blvd brig bros capt cf cie cmdr co col colo conn
corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen gov govs hon inc ind insp intl
invt jan jos jr jul jun kan kans ky lt ltd maj mar md mfg mich minn mlle mme mo mon mont mr mrs ms msgr mt mtg natl neb
nev nov oct okla penn pfc ph plc ppte ppty pres prof pte ptes pty ptys pvt rd rep reps rev rt sen sens sep sept seq sfc
sgt spc sq sr st ste supt sys tel tenn thu thurs tue tues univ va vs vt wed wis wisc wm wyo
""".split()
# Words that do if a number follows.
_NUMBERED = "art ca fig figs no nos op pp prop".split()
_IN_TWO = {"cannot": 3, "gonna": 3, "gotta": 3, "wanna": 3, "lemme": 3, "gimme": 3}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PLAIN = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": " -- ", "\u2014": " -- ", "\u2026": " ... "}
    | {"\u00bd": " 1/2 ", "\u00bc": " 1/4 ", "\u00be": " 3/4 ", "\u00a3": "#", "\u20ac": "$", "\u00a2": " cents "}
    | {"\u00a0": " ", "\u00ad": None}
)
# A letter; a letter or digit; and that none follows.
_L, _A, _END = r"[^\W\d_]", r"[^\W_]", r"(?![^\W_])"
_TOKEN = re.compile(
    "|".join(
        (
            r"(?:https?://|www\.)[^\s\"<>()]*[^\s\"<>().,!?;:']",
            rf"{_A}[\w.+-]*@[\w-]+(?:\.[\w-]+)+",
            rf"[#@]{_L}\w*",
            rf"[:;=]-?[()]|[:;]-?[dp]{_END}",
            r"<[a-z/][^>\s]*>",
            rf"'\d\ds?{_END}",
            # 2 1/2 is one number
            r"\d+[ -]\d+/\d+(?!\w)",
            # half-eaten/half-full; four-year-old, D.C.-based, and dog,t-shirt
            rf"{_A}+(?:-{_A}+)*(?:/{_A}+(?:-{_A}+)*)+",
            rf"{_A}(?:{_A}|[.,])*(?:-{_A}+)+(?:\.(?=[,;:]))?",
            # p.m. and Mr.
            rf"(?:{_L}\.)+{_L}(?:\.|{_END})",
            rf"(?:{'|'.join(_ABBREVIATIONS)}|{_L})\.{_END}",
            rf"(?:{'|'.join(_NUMBERED)})\.(?=\s*\d)",
            # 1,000 and 5:30
            r"[-+]?(?:\d*(?:[:.,]\d+)+|(?<!\w)\d+(?!\w|[-/]\w))",
            # rock 'n' roll, get 'em, 'tis
            r"'n'|'em|'t(?=(?:is|was)\b)",
            rf"'(?:s|m|d|ll|re|ve|n|til){_END}",
            # is n't
            rf"{_A}+?(?=n't{_END})|n't{_END}",
            # o'clock
            rf"[odln]'(?!(?:ll|re|ve){_END}){_L}{{2,}}|ma'am{_END}|y'(?=all{_END})",
            # In the original's case
            r"(?-i:[A-Z]+(?:&[A-Z]+)+)",
            # A space is missing, as in "dog.it"
            rf"{_L}+(?:\.{_L}{_A}*)+|{_A}+(?:_{_A}+)*(?:[!?]{_L}{_A}*)*(?:\.(?=[,;:]))?",
            r"\.{3}|-{2,4}|-{5,}|[!?]+|\S",
        )
    ),
    re.IGNORECASE,
)


def python_tokens(caption: str) -> list[str]:
    """The tokens of one caption, in lower case and without punctuation, made here."""
    found = []
    for token in _TOKEN.findall(caption.translate(_PLAIN)):
        # A number and its fraction stay one token, whatever is split at spaces later.
        token = token.lower().replace(" ", "\u00a0")
        at = _IN_TWO.get(token, len(token))
        for part in filter(None, (token[:at], token[at:])):
            for bracket in _BRACKETS.keys() & part:
                part = part.replace(bracket, _BRACKETS[bracket])
            if part not in _REMOVED_HERE:
                found.append(part)
    return found


def java_tokens(captions: Sequence[str]) -> list[list[str]]:
    """The tokens of captions, in lower case and without punctuation, made by CoreNLP as pycocoevalcap carries it.

    Raises:
        DataError: There is no Java that runs, no pycocoevalcap, or the program failed.
    """
    program = java()
    if program is None:
        raise DataError(
            "captions: COCO's tokenizer needs Java, and no 'java' that runs was found; install it (on Debian: apt-get "
            'install default-jre-headless), or choose tokenizer="python", which makes the same tokens of ordinary text'
        )
    if not captions:
        return []
    jar = package_folder() / "tokenizer" / _JAR
    command = [program, "-cp", str(jar), _MAIN, "-preserveLines", "-lowerCase", "-encoding", "utf-8"]
    # A line is a caption. Some numbers look at the line that follows; an empty one between shields them.
    lines = "".join(" ".join(caption.split()) + "\n\n" for caption in captions)
    result = subprocess.run(command, input=lines.encode(), capture_output=True, check=False)
    found = result.stdout.decode(errors="replace").split("\n")
    if result.returncode or len(found) < 2 * len(captions):
        said = (result.stderr.decode(errors="replace").strip().splitlines() or ["nothing"])[-1]
        raise DataError(f"captions: COCO's tokenizer failed under Java: it said '{said}'")
    lines_of_captions = found[: 2 * len(captions) : 2]
    return [
        [token for token in line.strip().split(" ") if token and token not in REMOVED] for line in lines_of_captions
    ]


@cache
def java() -> str | None:
    """The path of a Java that runs, or None. Some systems have a `java` that only says where to get one."""
    path = shutil.which("java")
    if path is None:
        return None
    try:
        works = subprocess.run([path, "-version"], capture_output=True, check=False, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return None
    return path if works else None


def package_folder() -> Path:
    """The folder of pycocoevalcap.

    Raises:
        DataError: It is not installed.
    """
    found = find_spec("pycocoevalcap")
    if found is None:
        raise DataError("captions are scored with pycocoevalcap, which is not installed; pip install 'fastpeft[vl]'")
    return Path(next(iter(found.submodule_search_locations)))
