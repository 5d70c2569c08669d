"""Five tuning methods on a small mPLUG, captions and questions, on a computer without a network.

    python -m bench.mplug_offline --out bench/results/mplug_offline
    python -m bench.mplug_offline ... --minutes 60    # begin no run after an hour; the same command goes on from there
    python -m bench.mplug_offline ... --tabulate      # no runs: tables and figures of what is there

A DINOv2 ViT-S/14 and MiniLM become an mPLUG that is pre-trained for some minutes: it reads how captions of made scenes
begin and writes how they go on. Then every method's two learning rates are tried on validation, and the better is
trained on 10, 40 and 100% of other scenes' captions, and of questions, with modules of two sizes. Runs are kept in
DIR/mplug.csv and never done twice.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from bench.mplug_offline import plan, scenes
from bench.mplug_offline.pretrain import pretrained, untuned
from bench.mplug_study import plan as study_plan
from bench.mplug_study.__main__ import RESULTS, run
from bench.mplug_study.corpora import Corpus
from bench.mplug_study.job import SCHEMA, Base
from bench.mplug_study.protocol import CAPTION, VQA
from bench.mplug_study.tables import FIGURES, write
from bench.tables import files
from bench.tables.errors import TableError, unknown
from bench.tables.results import Results
from fastpeft._serve import GOES_ON, serve
from fastpeft.trainer.feature_store import DEFAULT_LIMIT, FeatureStore
from fastpeft.trainer.report import Reporter

_SWEEP = study_plan.Sweep(classifier=(False,))


class _OutOfTimeError(Exception):
    """The minutes that were given are over."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 2 for a request that cannot be served."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.mplug_offline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results, tables and figures")
    parser.add_argument(
        "--work", type=Path, default=Path("out/mplug_offline"), metavar="DIR", help="scenes, model, runs"
    )
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help=f"{CAPTION}, {VQA}; both")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help=f"{', '.join(plan.PROTOCOL.tunings)}; all")
    parser.add_argument("--minutes", type=float, metavar="N", help="begin no further run after so many")
    parser.add_argument("--tabulate", action="store_true", help="no runs: tables and figures of what is there")
    options = parser.parse_args(arguments)
    return serve(lambda: _serve(options), GOES_ON)


def _serve(options: argparse.Namespace) -> None:
    kinds, methods = options.kinds or (CAPTION, VQA), options.methods or tuple(plan.PROTOCOL.tunings)
    for name in kinds:
        if name not in (CAPTION, VQA):
            raise unknown("kind", name, (CAPTION, VQA))
    for name in methods:
        if name not in plan.PROTOCOL.tunings:
            raise unknown("method", name, plan.PROTOCOL.tunings)
    if options.minutes is not None and options.minutes <= 0:
        raise TableError(f"--minutes: expected a positive number, got {options.minutes:g}")
    results, say = Results(options.out / RESULTS, SCHEMA), Reporter(True)
    base = plan.base(options.work / "pretrained.safetensors")
    corpora = {CAPTION: Corpus("scenes-captions", CAPTION, {}), VQA: Corpus("scenes-vqa", VQA, {})}
    if not options.tabulate:
        end = None if options.minutes is None else time.monotonic() + 60 * options.minutes
        before, corpora = scenes.prepare(options.work / "scenes")
        # What a score is held against: answers from the words of a question alone, or always the same one.
        files.write(options.out / "scenes.json", (options.work / "scenes" / "scenes.json").read_text(encoding="utf-8"))
        _, outcome = pretrained(before, options.work, say)
        features = FeatureStore(options.work / "features", DEFAULT_LIMIT, say.warn)
        _note(outcome, base, corpora, options, features, say)

        def look_at_clock(jobs: list) -> None:
            left = not jobs or not all(results.has(**job.key()) for job in jobs)
            if end is not None and time.monotonic() > end and left:
                raise _OutOfTimeError

        todo = study_plan.experiments(base, [corpora[kind] for kind in kinds], plan.PROTOCOL, methods, _SWEEP)
        try:
            storage = f"sqlite:///{options.work / 'studies.db'}"
            run(todo, results, options.out, storage, features, say, look_at_clock)
        except _OutOfTimeError:
            say.say(f"{options.minutes:g} minutes are over; the same command goes on from here")
    for name in FIGURES:
        write(name, results, list(corpora.values()), base, plan.PROTOCOL, options.out)
    say.say(f"tables    {options.out}; results {results.path}")


def _note(
    outcome: dict,
    base: Base,
    corpora: dict[str, Corpus],
    options: argparse.Namespace,
    features: FeatureStore,
    say: Reporter,
) -> None:
    """Keep what pre-training measured beside the results, and what its model scores untuned."""
    path = options.out / "pretraining.json"
    if path.is_file():
        return
    kept = ("trained_parameters", "train_size", "history", "test_scores", "seconds", "precision", "threads", "versions")
    note = {name: outcome[name] for name in kept}
    note["untuned"] = {
        corpus.name: untuned(base, corpus, plan.PROTOCOL, options.work / "untuned" / kind, features, say)
        for kind, corpus in corpora.items()
    }
    files.write(path, json.dumps(note, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
