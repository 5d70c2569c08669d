"""A table of the papers on your own backbone and data.

    python -m bench.tables vpt-1 --backbone vit_base_patch16_224@checkpoints/ViT-B_16.npz --data data/vtab-1k --out out
    python -m bench.tables vpt-13 ... --out out                 # the same runs, laid out by task
    python -m bench.tables vpt-1 ... --tabulate                 # no runs, the table of what is there
    python -m bench.tables vpt-1 ... --storage postgresql://... # on as many machines as you like

Every setting of the protocol's grid is trained on train800 and scored on val200, the best of them is trained on both
with several seeds and tested. Runs are kept in DIR/results.csv and never done twice; the same command goes on after any
interruption.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.tables import study
from bench.tables.errors import TableError, unknown
from bench.tables.job import Backbone, Job
from bench.tables.measured import collect
from bench.tables.protocol import ROWS, Protocol, Row, best
from bench.tables.results import Results
from bench.tables.tasks import Task, find
from bench.tables.vtab import TABLES, TableSpec, differences
from fastpeft.errors import FastPEFTError
from fastpeft.trainer.feature_store import DEFAULT_LIMIT, GIBIBYTE, FeatureStore
from fastpeft.trainer.report import Reporter

SEARCH_SEED = 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 2 for a request that cannot be served."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "name", metavar="NAME", help=", ".join(f"{name} ({spec.title})" for name, spec in TABLES.items())
    )
    parser.add_argument("--backbone", required=True, metavar="NAME[@WEIGHTS]", help="a timm model, and its weights")
    parser.add_argument("--image-size", type=int, default=224, metavar="PIXELS")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of VTAB-1k task folders")
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
    try:
        _serve(options)
    except FastPEFTError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on from here", file=sys.stderr, flush=True)
        return 130
    return 0


def _serve(options: argparse.Namespace) -> None:
    if options.name not in TABLES:
        raise unknown("table", options.name, TABLES)
    spec = TABLES[options.name]
    for name in options.methods or ():
        if name not in spec.methods:
            raise unknown("method", name, spec.methods)
    if options.seeds < 1 or (options.epochs is not None and options.epochs < 2):
        raise TableError("--seeds must be at least 1 and --epochs at least 2")
    if not 0 <= options.features_gb < float("inf"):
        raise TableError(f"--features-gb must be a number of gigabytes from 0, got {options.features_gb}")
    methods = tuple(name for name in spec.methods if not options.methods or name in options.methods)
    tasks, missing = find(options.data, options.tasks)
    backbone = Backbone.parse(options.backbone, options.image_size)
    protocol = Protocol.of(backbone.name, options.quick, options.seeds, options.epochs)
    results = Results(options.out / "results.csv")
    say = Reporter(True)
    say.say(f"{spec.title}: {len(methods)} methods, {len(tasks)} tasks; {protocol.describe()}")
    if missing:
        say.say(f"not in the data: {', '.join(task.name for task in missing)}")
    for name in methods:
        if ROWS[name].missing:
            say.say(f"not in the library, left out: {name}")
    if not options.tabulate:
        _run(
            options, backbone, protocol, tasks, [ROWS[name] for name in methods if not ROWS[name].missing], results, say
        )
    _tabulate(options, spec, methods, backbone, protocol, tasks, results)


def _run(
    options: argparse.Namespace,
    backbone: Backbone,
    protocol: Protocol,
    tasks: dict[Task, str],
    rows: list[Row],
    results: Results,
    say: Reporter,
) -> None:
    """Have every run of the table in the results."""
    total = len(tasks) * sum(len(list(protocol.grid(row))) + len(protocol.seeds) for row in rows)
    store = study.storage(options.storage, options.out)
    features = FeatureStore(options.out / "features", int(options.features_gb * GIBIBYTE), say.warn)
    with say.bar("runs", total) as advance:
        done = 0

        def count(job: Job) -> None:
            nonlocal done
            done += 1
            advance(1)
            found = results.find(**job.key())
            say.say(f"[{done}/{total}] {job}: {float(found['accuracy']):.2%}")

        for task, folder in tasks.items():
            for row in rows:
                points = [tuple(point.items()) for point in protocol.grid(row)]

                def job(stage: str, point: tuple, seed: int, task=task, folder=folder, row=row) -> Job:
                    return Job(backbone, options.data, task.name, folder, row, protocol, stage, point, seed)

                search = [job("search", point, SEARCH_SEED) for point in points]
                study.run_all(search, results, options.out / "runs", store, count, features)
                scores = [(one.setting, float(results.find(**one.key())["accuracy"])) for one in search]
                chosen = tuple(best(scores).items())
                final = [job("final", chosen, seed) for seed in protocol.seeds]
                study.run_all(final, results, options.out / "runs", store, count, features)


def _tabulate(
    options: argparse.Namespace,
    spec: TableSpec,
    methods: tuple[str, ...],
    backbone: Backbone,
    protocol: Protocol,
    tasks: dict[Task, str],
    results: Results,
) -> None:
    """Write the table of what is in the results."""
    groups_of = {task.name: task.group for task in tasks}
    rows = [row for row in results.rows() if row["task"] in groups_of]
    table = spec.lay_out(collect(rows, backbone, protocol), groups_of, methods)
    table.title = f"{spec.title}. {table.title}: {backbone.name} at {backbone.image_size} px"
    table.notes.insert(0, f"Protocol: {protocol.describe()}.")
    table.notes.append("In round brackets the paper's number; a question mark where its reading is uncertain.")
    table.notes += differences(backbone.name, backbone.image_size, groups_of)
    options.out.mkdir(parents=True, exist_ok=True)
    text = table.markdown()
    (options.out / f"{options.name}.md").write_text(text, encoding="utf-8")
    (options.out / f"{options.name}.tex").write_text(table.latex(), encoding="utf-8")
    print(text)
    print(f"tables: {options.out / options.name}.md, .tex; results: {results.path}")


if __name__ == "__main__":
    sys.exit(main())
