"""t-SNE of what several fine-tuned models hand to their heads, side by side and coloured by class.

    python -m bench.analyses.tsne --adapters FT=out/full VPT=out/vpt --data data/vtab-1k/dtd --out out/tsne.png

Distances between clusters and their sizes mean nothing in such a picture. What can be compared is printed with it: the
share of images whose nearest neighbours, in the embedding itself, are mostly of their own class.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from bench.analyses import command
from bench.analyses.errors import AnalysisError
from bench.analyses.images import SPLITS, open_set
from bench.analyses.runs import check_labels, embeddings, open_runs
from fastpeft._serve import serve
from fastpeft.trainer.report import Reporter

_NEIGHBOURS = 10
# Classes that a legend can name and colours can tell apart.
_NAMED = 20
_PER_ROW = 3


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 2 for a request that cannot be served."""
    parser = command.parser("bench.analyses.tsne", __doc__)
    parser.add_argument("--adapters", nargs="+", required=True, metavar="[NAME=]DIR", help="folders of trained models")
    parser.add_argument(
        "--data", required=True, metavar="[NAME=]WHERE[:SPLIT]", help="a task folder, class folder, mnist"
    )
    parser.add_argument("--split", default="test", choices=SPLITS, help="where --data names none")
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="at most so many, drawn at random")
    parser.add_argument("--perplexity", type=float, default=30.0, metavar="N", help="neighbours that count")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of images and of t-SNE")
    parser.add_argument("--weights", metavar="WEIGHTS", help="where the base model's weights are, if they moved")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")
    parser.add_argument("--device", metavar="DEVICE", help="default: the GPU if there is one")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .png, .svg or .pdf; .csv beside it")
    options = parser.parse_args(arguments)
    return serve(lambda: _serve(options))


def _serve(options: argparse.Namespace) -> None:
    command.at_least("--images", options.images, _NEIGHBOURS + 1)
    command.at_least("--batch-size", options.batch_size, 1)
    out = command.picture(options.out)
    images = open_set(options.data, options.split).thinned(options.images, options.seed)
    if not 0 < options.perplexity < len(images):
        raise AnalysisError(
            f"--perplexity {options.perplexity:g}: expected more than 0, less than {len(images)} images"
        )
    say = Reporter(True)
    runs = open_runs(options.adapters, command.device_of(options.device), options.weights, say)
    check_labels(images, runs)
    labels = np.asarray(images.source.labels)
    plots = {}
    for run in runs:
        embedded = embeddings(run, images, options.batch_size, say).numpy()
        share = neighbours_agree(embedded, labels)
        say.say(f"{run.name}: {share:.1%} of {len(images):,} images have their own class around them; t-SNE ...")
        plots[run.name] = (project(embedded, options.perplexity, options.seed), share)
    title = f"{images.name}, {images.split}: read-out embeddings of {len(images):,} images"
    command.draw(figure(plots, labels, images.class_names, title), out)
    command.write(out.with_suffix(".csv"), _csv(plots, labels, images.class_names))
    print(f"figure: {out}; points: {out.with_suffix('.csv')}")


def project(embedded: np.ndarray, perplexity: float, seed: int) -> np.ndarray:
    """t-SNE from the first two principal components: (n, d) -> (n, 2), the same for the same seed."""
    from sklearn.manifold import TSNE

    tsne = TSNE(2, perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed)
    return tsne.fit_transform(embedded.astype(np.float64))


def neighbours_agree(embedded: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose class is the commonest among their ten nearest others, by Euclidean distance."""
    from sklearn.neighbors import NearestNeighbors

    count = min(_NEIGHBOURS, len(embedded) - 1)
    near = NearestNeighbors(n_neighbors=count).fit(embedded)
    # Without a query a row is none of its own neighbours.
    found = near.kneighbors(return_distance=False)
    votes = np.zeros((len(labels), labels.max() + 1), dtype=int)
    np.add.at(votes, (np.arange(len(labels))[:, None], labels[found]), 1)
    return float((votes.argmax(axis=1) == labels).mean())


def figure(
    plots: dict[str, tuple[np.ndarray, float]], labels: np.ndarray, class_names: Sequence[str], title: str
) -> Figure:
    """A panel a model, a colour a class; the classes are named if a legend can hold them."""
    columns = min(len(plots), _PER_ROW)
    rows = -(-len(plots) // columns)
    present = sorted(set(labels.tolist()))
    drawn = Figure(figsize=(4 * columns, 4.1 * rows + 0.9), layout="constrained")
    colours = colormaps["tab10" if len(present) <= 10 else "tab20" if len(present) <= _NAMED else "nipy_spectral"]
    steps = colours.N if len(present) <= _NAMED else len(present)
    grid = drawn.subplots(rows, columns, squeeze=False).flat
    for axes, (name, (points, share)) in zip(grid, plots.items(), strict=False):
        for number, label in enumerate(present):
            own = points[labels == label]
            axes.scatter(*own.T, s=9, color=colours(number if steps == colours.N else number / steps), linewidths=0)
        axes.set_title(f"{name}: {share:.1%} among their own", fontsize="medium")
    for axes in drawn.axes:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_visible(bool(axes.collections))
    drawn.suptitle(title, fontsize="medium")
    if len(present) <= _NAMED:
        drawn.legend(
            drawn.axes[0].collections, [class_names[label] for label in present], loc="outside lower center",
            ncols=min(len(present), 2 + 2 * columns), frameon=False, fontsize="small", markerscale=2,
        )  # fmt: skip
    return drawn


def _csv(plots: dict[str, tuple[np.ndarray, float]], labels: np.ndarray, class_names: Sequence[str]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("model", "class", "x", "y"))
    for name, (points, _) in plots.items():
        for label, (x, y) in zip(labels.tolist(), points.tolist(), strict=True):
            writer.writerow((name, class_names[label], f"{x:.4f}", f"{y:.4f}"))
    return text.getvalue()


if __name__ == "__main__":
    sys.exit(main())
