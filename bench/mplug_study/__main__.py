"""The mPLUG study's figures on your own checkpoint and data.

    python -m bench.tables mplug-fig3 --backbone mplug_base@checkpoints/mplug_base.pth --data data --out out/mplug
    python -m bench.tables mplug-fig5 ... --out out/mplug       # the same runs, by cost
    python -m bench.tables mplug-fig4 ... --methods lora full --ratios 0.1 1 --sizes 8
    python -m bench.tables mplug-fig3 ... --tabulate            # no runs, the figure of what is there

Every method is trained by the study's Table II: at its reference size on every share of the data, and with every size
on all of it (--product: every size on every share), without and with the output layer. `--data` holds coco/ and vqa/,
or what `python -m bench.made scenes` writes. Runs are kept in DIR/mplug.csv and never done twice; the same command goes
on after any interruption, and workers on many machines share a --storage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from bench.mplug_study import corpora, plan
from bench.mplug_study.job import SCHEMA, Base, MPlugJob
from bench.mplug_study.methods import TUNINGS
from bench.mplug_study.protocol import BATCH, CAPTION, PARTS, Protocol, of_study
from bench.mplug_study.tables import FIGURES, write
from bench.tables import study
from bench.tables.errors import TableError, unknown
from bench.tables.results import Results
from fastpeft._serve import GOES_ON, serve
from fastpeft.metrics import ptb
from fastpeft.metrics.captions import TOKENIZERS
from fastpeft.trainer import launch
from fastpeft.trainer.feature_store import DEFAULT_LIMIT, GIBIBYTE, FeatureStore
from fastpeft.trainer.report import Reporter

_MODELS = ("mplug_base", "mplug_large", "mplug")
_CLASSIFIER = {"without": (False,), "with": (True,), "both": (False, True)}
RESULTS = "mplug.csv"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 2 for a request that cannot be served."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "name", metavar="NAME", help=", ".join(f"{name} ({spec.title})" for name, spec in FIGURES.items())
    )
    parser.add_argument("--backbone", metavar="NAME[@FILE]", help=f"{', '.join(_MODELS)}, and its checkpoint")
    parser.add_argument("--image-size", type=int, default=256, metavar="PIXELS", help="default: the study's 256")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with coco/ and vqa/, or of scenes")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results, studies, tables and figures")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help=f"{', '.join(TUNINGS)}; default: the figure's")
    parser.add_argument("--ratios", nargs="+", type=float, metavar="SHARE", help="of the data; default: the study's")
    parser.add_argument("--sizes", nargs="+", type=int, metavar="N", help="of the modules; default: the study's")
    parser.add_argument("--classifier", choices=tuple(_CLASSIFIER), default="both", help="train the output layer too")
    parser.add_argument("--product", action="store_true", help="every size on every share of the data")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each setting [1]")
    parser.add_argument(
        "--quick", action="store_true", help="two shares and sizes, a tenth of the steps, greedy search"
    )
    parser.add_argument(
        "--tokenizer", choices=TOKENIZERS, default="java", help="of captions; python does without Java [java]"
    )
    parser.add_argument(
        "--grad-accumulation", type=int, default=PARTS, metavar="N", help=f"parts of a batch of {BATCH} [{PARTS}]"
    )
    parser.add_argument(
        "--workers", type=int, default=launch.cores(), metavar="N", help="processes that read images; default: a core's"
    )
    parser.add_argument("--storage", metavar="URL", help="of the studies; default: an SQLite file in --out")
    parser.add_argument(
        "--features-gb", type=float, default=DEFAULT_LIMIT / GIBIBYTE, metavar="N", help="of image tokens kept in --out"
    )
    parser.add_argument("--tabulate", action="store_true", help="no runs: the figure of the results that are there")
    options = parser.parse_args(arguments)
    return serve(lambda: _serve(options), GOES_ON)


def _serve(options: argparse.Namespace) -> None:
    methods, sweep = _checked(options)
    spec, protocol, base = FIGURES[options.name], _protocol(options), _base(options)
    there = corpora.find(options.data)
    wanted = [there[kind] for kind in spec.kinds if kind in there]
    say = Reporter(True)
    for kind in spec.kinds:
        if kind not in there:
            say.say(f"not in the data: {'captions' if kind == 'caption' else 'questions'}")
    if not wanted:
        raise TableError(f"{options.data}: it has nothing that {options.name} is about")
    results = Results(options.out / RESULTS, SCHEMA)
    if not options.tabulate:
        if CAPTION in (corpus.kind for corpus in wanted):
            _check_java(options.tokenizer, say)
        features = FeatureStore(options.out / "features", int(options.features_gb * GIBIBYTE), say.warn)
        todo = plan.experiments(base, wanted, protocol, methods, sweep)
        run(todo, results, options.out, options.storage, features, say)
    tables = write(options.name, results, wanted, base, protocol, options.out)
    print("\n".join(table.markdown() for table in tables))
    print(f"tables: {options.out / options.name}.md, .tex; figures: {options.out / 'figures'}; results: {results.path}")


def run(
    experiments: list[plan.Experiment],
    results: Results,
    out: Path,
    storage: str | None,
    features: FeatureStore | None,
    say: Reporter,
    look: Callable[[list[MPlugJob]], None] = lambda jobs: None,
) -> None:
    """Have every run of some experiments in the results.

    Args:
        experiments: in the order in which they are to be done.
        results: where rows go.
        out: folder of runs, studies and curves.
        storage: of the studies; None for an SQLite file in the folder.
        features: where image tokens are kept.
        say: what speaks to the user.
        look: called with each list of runs before it is begun, and with [] after each run; may raise.
    """
    total = sum(experiment.size for experiment in experiments)
    store = study.storage(storage, out)
    done = 0

    def count(job: MPlugJob) -> None:
        nonlocal done
        done += 1
        advance(1)
        found = results.find(**job.key())
        say.say(f"[{done}/{total}] {job}: {found['metric']} {100 * results.score(found):.1f}")
        look([])

    with say.bar("runs", total) as advance:
        for experiment in experiments:
            for jobs in experiment.batches(results):
                look(jobs)
                study.run_all(jobs, results, out / "runs", store, count, features)


def _protocol(options: argparse.Namespace) -> Protocol:
    return of_study(
        options.quick,
        options.seeds,
        tokenizer=options.tokenizer,
        grad_accumulation=options.grad_accumulation,
        workers=options.workers,
    )


def _check_java(tokenizer: str, say: Reporter) -> None:
    """Look for Java before the first run, and say what is done without.

    Raises:
        TableError: captions cannot be scored.
    """
    if ptb.java() is not None:
        return
    if tokenizer == "java":
        raise TableError(
            "--tokenizer java needs Java, and no 'java' that runs was found; install it, or give --tokenizer python"
        )
    say.say("METEOR is left out: it needs Java, and no 'java' that runs was found")


def _checked(options: argparse.Namespace) -> tuple[list[str], plan.Sweep]:
    if options.name not in FIGURES:
        raise unknown("table", options.name, FIGURES)
    for name in options.methods or ():
        if name not in TUNINGS:
            raise unknown("method", name, TUNINGS)
    if options.backbone is None or options.data is None:
        missing = "--backbone" if options.backbone is None else "--data"
        raise TableError(f"{missing} is missing; {options.name} needs --backbone NAME@FILE and --data DIR")
    if options.seeds < 1 or options.image_size < 1:
        raise TableError("--seeds and --image-size must be at least 1")
    if not 0 <= options.features_gb < float("inf"):
        raise TableError(f"--features-gb must be a number of gigabytes from 0, got {options.features_gb}")
    if options.grad_accumulation < 1 or BATCH % options.grad_accumulation:
        raise TableError(
            f"--grad-accumulation must divide the batch of {BATCH} samples, got {options.grad_accumulation}; give "
            f"{PARTS} for the study's {BATCH // PARTS} samples at once"
        )
    if options.workers < 0:
        raise TableError(f"--workers must be at least 0, got {options.workers}")
    for ratio in options.ratios or ():
        if not 0 < ratio <= 1:
            raise TableError(f"--ratios are shares above 0 and up to 1, got {ratio:g}")
    for size in options.sizes or ():
        if size < 1:
            raise TableError(f"--sizes must be at least 1, got {size}")
    sweep = plan.Sweep(
        None if options.ratios is None else tuple(sorted(set(options.ratios))),
        None if options.sizes is None else tuple(sorted(set(options.sizes))),
        _CLASSIFIER[options.classifier],
        options.product,
    )
    return list(options.methods or FIGURES[options.name].methods), sweep


def _base(options: argparse.Namespace) -> Base:
    name, _, checkpoint = options.backbone.partition("@")
    if name not in _MODELS:
        raise unknown("model", name, _MODELS)
    fields = {"name": name, "image_size": options.image_size}
    return Base(options.backbone, fields | ({"checkpoint": checkpoint} if checkpoint else {}))


if __name__ == "__main__":
    sys.exit(main())
