"""The Fréchet distance between data sets, on the features of a model that you name.

    python -m bench.analyses.fid --backbone inception@pt_inception-2015-12-05-6726825d.pth \\
        --data imagenet:val --data data/vtab-1k/svhn --data data/vtab-1k/dtd --out out/fid
    python -m bench.analyses.fid ... --results out/vtab/results.csv --methods full vpt-deep

The first --data is the reference: the images that the model was trained on, or a sample of them. A file STATS.npz that
--keep-statistics wrote, or pytorch-fid, stands for the images that it was made of. With --results the distances to the
reference are set beside the difference between two methods' accuracies.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from bench.analyses import accuracies, command, gaps
from bench.analyses.errors import AnalysisError
from bench.analyses.extractors import Extractor, open_extractor
from bench.analyses.frechet import Gaussian, Moments, distance
from bench.analyses.images import ImageSet, batches, open_set
from bench.tables import cells
from bench.tables.layout import Entry, Layout
from fastpeft._serve import serve
from fastpeft.data import ImageDataset
from fastpeft.data.resize import RESIZE_MODES
from fastpeft.trainer.report import Reporter

_STATISTICS = ".npz"


@dataclass(frozen=True)
class Measured:
    """A set of images as a normal distribution of features.

    Attributes:
        name: of the set.
        gaussian: its moments.
    """

    name: str
    gaussian: Gaussian

    @property
    def count(self) -> str:
        """How many images, in words."""
        return "?" if self.gaussian.count is None else f"{self.gaussian.count:,}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 2 for a request that cannot be served."""
    parser = command.parser("bench.analyses.fid", __doc__)
    parser.add_argument("--backbone", required=True, metavar="NAME@WEIGHTS", help="a timm model, or inception@FILE")
    parser.add_argument(
        "--data", action="append", required=True, metavar="[NAME=]WHERE[:SPLIT]",
        help="a VTAB-1k task folder, a folder of train/<class>, of images, mnist, digits or STATS.npz; several times",
    )  # fmt: skip
    parser.add_argument("--split", default="train", choices=("train", "val", "test"), help="where --data names none")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="tables and figures")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="default: the model's own")
    parser.add_argument("--resize", default="squash", choices=RESIZE_MODES)
    parser.add_argument("--images", type=int, metavar="N", help="of each set at most so many, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of that draw")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")
    parser.add_argument("--device", metavar="DEVICE", help="default: the GPU if there is one")
    parser.add_argument("--keep-statistics", action="store_true", help="write DIR/NAME.npz for later comparisons")
    parser.add_argument("--results", type=Path, metavar="CSV", help="of bench.tables, for the methods' differences")
    parser.add_argument("--methods", nargs=2, default=("full", "vpt-deep"), metavar="METHOD", help="in CSV")
    parser.add_argument("--where", nargs="+", default=[], metavar="FIELD=VALUE", help="which rows of CSV")
    options = parser.parse_args(arguments)
    return serve(lambda: _serve(options))


def _serve(options: argparse.Namespace) -> None:
    command.at_least("--batch-size", options.batch_size, 1)
    if options.images is not None:
        command.at_least("--images", options.images, 2)
    if len(options.data) < 2:
        raise AnalysisError("a distance is between two: give --data at least twice, the reference first")
    known = None if options.results is None else accuracies.read(options.results, options.where)
    sources = [_source(text, options) for text in options.data]
    names = [name for name, _ in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AnalysisError(f"two sets are called {twice[0]}; name them with NAME=WHERE")
    if known is not None:
        gaps.gaps(dict.fromkeys(names[1:], 0.0), known, *options.methods)
    out = command.folder(options.out)
    extractor = open_extractor(options.backbone, options.image_size, command.device_of(options.device))
    say = Reporter(True)
    # The size and the resizing are part of what the features are of.
    key = f"{extractor.name}, {options.resize}"
    say.say(f"features of {key}")
    found = []
    for name, source in sources:
        if isinstance(source, Path):
            measured = Measured(name, read_statistics(source, key))
        else:
            measured = Measured(name, gaussian_of(source, extractor, options.resize, options.batch_size, say))
            if options.keep_statistics:
                write_statistics(out / f"{_file_name(name)}{_STATISTICS}", measured.gaussian, key)
        say.say(f"{name}: {measured.count} images")
        found.append(measured)
    matrix = distances(found, say)
    table = lay_out(found, matrix, key)
    for note in _caveats(found):
        say.warn(note)
        table.notes.append(note)
    command.write(out / "fid.md", table.markdown())
    command.write(out / "fid.tex", table.latex())
    command.write(out / "fid.csv", _csv(found, matrix))
    for suffix in (".png", ".svg"):
        command.draw(figure(names, matrix, key), out / f"fid{suffix}")
    print(table.markdown())
    if known is not None:
        _compare(options, known, found, matrix, out)
    print(f"tables and figures: {out}")


def _source(text: str, options: argparse.Namespace) -> tuple[str, ImageSet | Path]:
    name, _, where = text.rpartition("=")
    if where.endswith(_STATISTICS):
        return name or Path(where).stem, Path(where)
    images = open_set(text, options.split).thinned(options.images, options.seed)
    return images.name, images


def gaussian_of(images: ImageSet, extractor: Extractor, resize: str, batch_size: int, say: Reporter) -> Gaussian:
    """The moments of a set's features, in one pass."""
    data = ImageDataset(images.source, extractor.side, extractor.mean, extractor.std, resize=resize, cache_bytes=0)
    moments = None
    for batch in batches(data, batch_size, images.name, say):
        features = extractor(batch).numpy()
        moments = moments or Moments(features.shape[1])
        moments.add(features)
    return moments.gaussian()


def distances(found: list[Measured], say: Reporter) -> np.ndarray:
    """Between every two sets, (n, n)."""
    matrix = np.zeros((len(found), len(found)))
    pairs = [(i, j) for i in range(len(found)) for j in range(i)]
    with say.bar("distances", len(pairs)) as advance:
        for i, j in pairs:
            matrix[i, j] = matrix[j, i] = distance(found[i].gaussian, found[j].gaussian)
            advance(1)
    return matrix


def lay_out(found: list[Measured], matrix: np.ndarray, key: str) -> Layout:
    """The distances as a table; beside those to the reference, the papers' of the same task."""
    reference = found[0].name
    table = Layout("Fréchet distance between data sets", ("data", "images", *(one.name for one in found)))
    for row, one in enumerate(found):
        entries = [Entry(one.count)]
        for column in range(len(found)):
            printed = cells.cell("vpt_or_ft_table19", task=gaps.task_of(one.name), metric="fid")
            paper = "" if column or not row or printed is None else str(printed)
            entries.append(Entry(number(matrix[row, column]), None, paper))
        table.rows.append((one.name, entries))
    table.notes.append(f"Features: {key}. Reference: {reference}.")
    if any(entry.paper for _, entries in table.rows for entry in entries):
        table.notes.append(
            "In round brackets the paper's distance, of Inception features, from a reference that it does not name."
        )
    return table


def number(value: float) -> str:
    """A distance in four digits, without an exponent where a reader can do without."""
    return f"{value:,.0f}" if value >= 1000 else "0" if value == 0 else f"{value:#.4g}"


def _caveats(found: list[Measured]) -> list[str]:
    """What keeps the distances from being compared, in sentences."""
    width = found[0].gaussian.mean.size
    counts = {one.name: one.gaussian.count for one in found}
    notes = []
    few = [name for name, count in counts.items() if count is not None and count <= width]
    if few:
        notes.append(
            f"No more images than the {width:,} features: {', '.join(few)}. Their covariances are singular and the "
            "distances too large; compare them with distances of as many images only."
        )
    if len({count for count in counts.values() if count is not None}) > 1:
        notes.append(
            "The sets differ in size. The distance's bias falls with the number of images; --images N takes as many "
            "of each."
        )
    return notes


def _compare(
    options: argparse.Namespace, known: accuracies.Accuracies, found: list[Measured], matrix: np.ndarray, out: Path
) -> None:
    """The distances beside two methods' accuracies."""
    first, second = options.methods
    reference = found[0].name
    to_reference = {one.name: float(matrix[0, column]) for column, one in enumerate(found) if column}
    rows = gaps.gaps(to_reference, known, first, second)
    table = Layout(f"{second} against {first} and the distance to {reference}", ("task", "distance", "difference"))
    for gap in sorted(rows, key=lambda gap: gap.distance):
        table.rows.append((gap.task, [Entry(number(gap.distance)), Entry(f"{gap.difference:+.2f}")]))
    table.notes += [f"Accuracies: {known.setup}, in points.", f"{gaps.correlation(rows)}."]
    command.write(out / "fid-gaps.md", table.markdown())
    command.write(out / "fid-gaps.tex", table.latex())
    for suffix in (".png", ".svg"):
        command.draw(gaps.figure(rows, reference, first, second), out / f"fid-gaps{suffix}")
    print(table.markdown())


def figure(names: list[str], matrix: np.ndarray, key: str) -> Figure:
    """The distances as a grid of colours with their numbers."""
    side = 1.6 + 0.62 * len(names)
    drawn = Figure(figsize=(side + 1, side), layout="constrained")
    axes = drawn.add_subplot()
    image = axes.imshow(matrix, cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize="small")
    axes.set_yticks(range(len(names)), names, fontsize="small")
    middle = matrix.max() / 2
    for (row, column), value in np.ndenumerate(matrix):
        axes.text(
            column, row, number(value), ha="center", va="center", fontsize="x-small",
            color="black" if value > middle else "white",
        )  # fmt: skip
    drawn.colorbar(image, ax=axes, shrink=0.8, label="Fréchet distance")
    axes.set_title(key, fontsize="small")
    return drawn


def _csv(found: list[Measured], matrix: np.ndarray) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("first", "second", "distance"))
    for i, one in enumerate(found):
        writer.writerows((one.name, found[j].name, f"{matrix[i, j]:.9g}") for j in range(i + 1, len(found)))
    return text.getvalue()


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def write_statistics(path: Path, gaussian: Gaussian, extractor: str) -> None:
    """Write the moments, as pytorch-fid writes them, with what they are of."""
    memory = io.BytesIO()
    np.savez(memory, mu=gaussian.mean, sigma=gaussian.covariance, count=gaussian.count, extractor=extractor)
    command.write(path, memory.getvalue())


def read_statistics(path: Path, extractor: str) -> Gaussian:
    """Read moments that `write_statistics` or pytorch-fid wrote; nothing in the file is executed.

    Raises:
        AnalysisError: the file is neither's, or is of another extractor.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
            count = int(file["count"]) if "count" in file else None
            said = str(file["extractor"]) if "extractor" in file else None
    except FileNotFoundError:
        raise AnalysisError(f"{path}: no such file of statistics") from None
    except KeyError as error:
        raise AnalysisError(f"{path}: expected the arrays mu and sigma, {error.args[0]}") from None
    except (OSError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise AnalysisError(f"{path}: cannot be read as a file of statistics: {error}") from None
    if said is not None and said != extractor:
        raise AnalysisError(f"{path}: statistics of {said}, expected {extractor}")
    try:
        return Gaussian(mean, covariance, count)
    except AnalysisError as error:
        raise AnalysisError(f"{path}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
