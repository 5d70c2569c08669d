"""A table of the papers on your own backbone and data.

    python -m bench.tables vpt-1 --backbone vit_base_patch16_224@checkpoints/ViT-B_16.npz --data data/vtab-1k --out out
    python -m bench.tables vpt-13 ... --out out                 # the same runs, laid out by task
    python -m bench.tables vpt-1 ... --tabulate                 # no runs, the table of what is there
    python -m bench.tables vpt-1 ... --storage postgresql://... # on as many machines as you like
    python -m bench.tables vpt-5 --backbone mae=vit_base_patch16_224@mae.pth --backbone mocov3=...

Every setting of the protocol's grid is trained on train800 and scored on val200, the best of them is trained on both
with several seeds and tested. Runs are kept in DIR/results.csv and never done twice; the same command goes on after any
interruption.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from bench import mplug_study
from bench.figures import catalogue, style
from bench.tables import study
from bench.tables.backbones import lacking
from bench.tables.errors import TableError, unknown
from bench.tables.job import Job
from bench.tables.papers import tables
from bench.tables.request import backbones_of
from bench.tables.results import Results
from bench.tables.spec import Request, TableSpec, View
from bench.tables.tasks import Task, find
from fastpeft._serve import GOES_ON, serve
from fastpeft.trainer.feature_store import DEFAULT_LIMIT, GIBIBYTE, FeatureStore
from fastpeft.trainer.report import Reporter


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 2 for a request that cannot be served."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument in mplug_study.NAMES for argument in arguments):
        from bench.mplug_study.__main__ import main as other

        # A study of its own: what it asks for and varies is not what the tables of classification do.
        return other(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m bench.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        help=", ".join(f"{name} ({spec.title})" for name, spec in tables().items())
        + f"; {', '.join(mplug_study.NAMES)} (python -m bench.tables {mplug_study.NAMES[0]} --help)",
    )
    parser.add_argument(
        "--backbone", action="append", default=[], metavar="[ROLE=]NAME[@WEIGHTS]",
        help="a timm model, and its weights; once for each role of a table that has several",
    )  # fmt: skip
    parser.add_argument(
        "--image-size", action="append", default=[], metavar="[ROLE=]PIXELS", help="default: the paper's"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of task folders")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results.csv, studies and tables")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="final runs of each method and task")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="default: all that the data has")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="default: all rows of the table")
    parser.add_argument("--epochs", type=int, metavar="N", help="default: the protocol's")
    parser.add_argument("--quick", action="store_true", help="a thinned grid and few epochs")
    parser.add_argument("--storage", metavar="URL", help="of the studies; default: an SQLite file in --out")
    parser.add_argument(
        "--features-gb", type=float, default=DEFAULT_LIMIT / GIBIBYTE, metavar="N", help="of features kept in --out"
    )
    parser.add_argument("--tabulate", action="store_true", help="no runs: the table of the results that are there")
    options = parser.parse_args(arguments)
    return serve(lambda: _serve(options), GOES_ON)


def _serve(options: argparse.Namespace) -> None:
    request = _request(options)
    spec = request.spec
    results = Results(options.out / "results.csv")
    say = Reporter(True)
    _announce(request, say)
    if not options.tabulate and not spec.missing:
        if spec.measure is not None:
            spec.measure(request)
        _run(_without(request, say), options, results, say)
    _tabulate(request, options.name, results)


def _request(options: argparse.Namespace) -> Request:
    """What is asked for, checked as far as it can be before anything is run."""
    if options.name not in tables():
        raise unknown("table", options.name, [*tables(), *mplug_study.NAMES])
    spec = tables()[options.name]
    known = [row.name for row in spec.rows]
    for name in options.methods or ():
        if name not in known:
            raise unknown("method", name, known)
    if options.seeds < 1 or (options.epochs is not None and options.epochs < 2):
        raise TableError("--seeds must be at least 1 and --epochs at least 2")
    if not 0 <= options.features_gb < float("inf"):
        raise TableError(f"--features-gb must be a number of gigabytes from 0, got {options.features_gb}")
    rows = tuple(row for row in spec.rows if not options.methods or row.name in options.methods)
    backbones = backbones_of(spec, options.backbone, options.image_size)
    tasks = _tasks(spec, options.data, options.tasks)
    return Request(
        spec, rows, backbones, tasks, options.data, options.out, options.quick, options.seeds, options.epochs
    )


def _tasks(spec: TableSpec, root: Path | None, wanted: list[str] | None) -> dict[Task, str]:
    if root is None:
        if spec.needs_data:
            raise TableError("--data is missing: the folder that holds the task folders")
        return {}
    # Of the tasks that are asked for by name all are taken, of the others those that the paper's table has.
    tasks = {task: folder for task, folder in find(root, wanted)[0].items() if wanted or spec.takes(task)}
    if not tasks and spec.needs_data:
        raise TableError(f"{root}: none of the table's tasks; it is made of {', '.join(spec.tasks or spec.groups)}")
    return tasks


def _announce(request: Request, say: Reporter) -> None:
    spec = request.spec
    protocol = next((request.described(role) for role in request.backbones), "no backbone")
    say.say(f"{spec.title}: {len(request.rows)} methods, {len(request.tasks)} tasks; {protocol}")
    if spec.missing:
        say.say(f"not in the library: {spec.missing}")
    for line in View(request, []).notes():
        if "Not in the data: " in line:
            say.say("not in the data: " + line.partition("Not in the data: ")[2].rstrip("."))
    for role in spec.roles:
        if role.name not in request.backbones:
            say.say(f"no backbone given, left out: {role.name} ({role})")
    for row in request.rows:
        if row.missing:
            say.say(f"not in the library, left out: {row.name}")


def _without(request: Request, say: Reporter) -> Request:
    """The request without the backbones that the library does not know."""
    there = {}
    for role, backbone in request.backbones.items():
        reason = lacking(backbone.name)
        if reason is None:
            there[role] = backbone
        else:
            say.say(f"not in the library, left out: {backbone.name} ({reason})")
    return dataclasses.replace(request, backbones=there)


def _run(request: Request, options: argparse.Namespace, results: Results, say: Reporter) -> None:
    """Have every run of the table in the results."""
    plan = list(request.spec.plan(request))
    total = sum(runs.size for runs in plan)
    if not total:
        return
    store = study.storage(options.storage, request.out)
    features = FeatureStore(request.out / "features", int(options.features_gb * GIBIBYTE), say.warn)
    with say.bar("runs", total) as advance:
        done = 0

        def count(job: Job) -> None:
            nonlocal done
            done += 1
            advance(1)
            found = results.find(**job.key())
            say.say(f"[{done}/{total}] {job}: {float(found['accuracy']):.2%}")

        for runs in plan:
            for jobs in runs.batches(results):
                study.run_all(jobs, results, request.out / "runs", store, count, features)


def _tabulate(request: Request, name: str, results: Results) -> None:
    """Write the table of what is in the results."""
    view = View(request, results.rows())
    made = request.spec.lay_out(view)
    parts = made if isinstance(made, list) else [made]
    for part in parts:
        part.title = f"{request.spec.title}. {part.title}"
    parts[-1].notes += view.notes()
    request.out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(part.markdown() for part in parts)
    (request.out / f"{name}.md").write_text(text, encoding="utf-8")
    (request.out / f"{name}.tex").write_text("\n".join(part.latex() for part in parts), encoding="utf-8")
    print(text)
    print(f"tables: {request.out / name}.md, .tex; results: {results.path}")
    _draw(view, name)


def _draw(view: View, name: str) -> None:
    """Write the table's own figure and those of its studies."""
    request = view.request
    with style.titled(view.title()):
        figure = request.spec.draw(view)
    drawn = [] if figure is None else style.write(figure, request.out / catalogue.FOLDER / name)
    asked = {
        (str(backbone), str(backbone.image_size), request.protocol(role).name)
        for role, backbone in request.backbones.items()
    }
    drawn += catalogue.write(request.out, lambda study: (study.backbone, study.image_size, study.protocol) in asked)
    if drawn:
        print(f"figures: {request.out / catalogue.FOLDER}; all on one page: python -m bench.report {request.out}")


if __name__ == "__main__":
    sys.exit(main())
