"""Where two or more fine-tuned models look: Grad-CAM and Integrated Gradients side by side.

    python -m bench.analyses.attributions --adapters FT=out/full VPT=out/vpt --data data/vtab-1k/dtd --out out/look.png
    python -m bench.analyses.attributions --adapters out/full out/vpt --images a.jpg b.jpg --out out/look.png

--adapters are folders that the trainer wrote. Of --data the test images are shown that the first model and the second
classify differently; --show chooses others. A row is an image; beside it, for each model, the map and what the model
takes the image for. Maps explain the true class where there is a label, else the class that the model chose.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from bench.analyses import command
from bench.analyses.errors import AnalysisError
from bench.analyses.gradcam import grad_cam
from bench.analyses.images import SPLITS, ImageSet, open_files, open_set
from bench.analyses.integrated import integrated_gradients
from bench.analyses.runs import Run, check_labels, open_runs, probabilities
from fastpeft._serve import serve
from fastpeft.trainer.report import Reporter

KINDS = ("grad-cam", "integrated-gradients")
# By the first model's and the second's being right.
SHOWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disagree": lambda first, second: first != second,
    "only-first": lambda first, second: first & ~second,
    "only-second": lambda first, second: ~first & second,
    "both-wrong": lambda first, second: ~first & ~second,
    "both-right": lambda first, second: first & second,
    "any": lambda first, second: torch.ones_like(first),
}
_BASELINES = ("mean", "black")
# A sum of steps that misses more of the logit's difference is not to be read.
_MISSED = 0.05
# As often the steps of such an image are doubled.
_DOUBLINGS = 3
# Of the largest attributions so many are shown alike, as a few pixels would leave all others dark.
_BRIGHTEST = 99.5
_CELL = 1.75


@dataclass(frozen=True)
class Panel:
    """One map of one model.

    Attributes:
        run: the model's name.
        kind: one of `KINDS`.
        values: (side, side), not negative.
        predicted: class.
        probability: of that class.
        target: the class that is explained.
        missed: share of the logit's difference that the steps missed; None for Grad-CAM.
    """

    run: str
    kind: str
    values: np.ndarray
    predicted: int
    probability: float
    target: int
    missed: float | None


@dataclass(frozen=True)
class Row:
    """An image and its maps.

    Attributes:
        file: where it is.
        pixels: (side, side, 3) in [0, 1], as the first model sees it.
        label: true class, or None.
        panels: in the order of the columns.
    """

    file: str
    pixels: np.ndarray
    label: int | None
    panels: list[Panel]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 2 for a request that cannot be served."""
    parser = command.parser("bench.analyses.attributions", __doc__)
    parser.add_argument("--adapters", nargs="+", required=True, metavar="[NAME=]DIR", help="folders of trained models")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--data", metavar="[NAME=]WHERE[:SPLIT]", help="a VTAB-1k task folder, a class folder, mnist")
    given.add_argument("--images", nargs="+", type=Path, metavar="FILE", help="image files without labels")
    parser.add_argument("--split", default="test", choices=SPLITS, help="where --data names none")
    parser.add_argument("--show", choices=SHOWN, help="which images of --data; default: disagree, any for one model")
    parser.add_argument("--count", type=int, default=6, metavar="N", help="of these at most so many, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of that draw")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--layer", metavar="PATH", help="of Grad-CAM; default: the last block's first norm")
    parser.add_argument("--steps", type=int, default=128, metavar="N", help="of Integrated Gradients, at first")
    parser.add_argument("--baseline", default="mean", choices=_BASELINES, help="colour that gradients start from")
    parser.add_argument("--target", choices=("true", "predicted"), help="class that is explained; default: see above")
    parser.add_argument("--weights", metavar="WEIGHTS", help="where the base model's weights are, if they moved")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")
    parser.add_argument("--device", metavar="DEVICE", help="default: the GPU if there is one")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .png, .svg or .pdf; .csv beside it")
    options = parser.parse_args(arguments)
    return serve(lambda: _serve(options))


def _serve(options: argparse.Namespace) -> None:
    for name, least in (("count", 1), ("steps", 2), ("batch_size", 1)):
        command.at_least(f"--{name.replace('_', '-')}", getattr(options, name), least)
    out = command.picture(options.out)
    if options.images and (options.show or options.target == "true"):
        raise AnalysisError("--show and --target true need --data, whose images have labels")
    if len(options.adapters) < 2 and options.show not in (None, "any"):
        raise AnalysisError(f"--show {options.show} compares two models; give a second folder to --adapters")
    images = open_files(options.images) if options.images else open_set(options.data, options.split)
    say = Reporter(True)
    runs = open_runs(options.adapters, command.device_of(options.device), options.weights, say)
    labelled = not options.images
    if labelled:
        check_labels(images, runs)
        images = _chosen(images, runs, options, say)
    by_label = labelled and options.target != "predicted"
    total = len(images) * len(runs)
    with say.bar("attributions", total) as advance:
        rows = [_row(images, index, runs, options, by_label, labelled, advance) for index in range(len(images))]
    worst = max((panel.missed for row in rows for panel in row.panels if panel.missed is not None), default=0.0)
    if "integrated-gradients" in options.kinds:
        say.say(f"integrated gradients: the steps miss at most {worst:.2%} of a logit's difference")
    if worst > _MISSED:
        say.warn(f"that is more than {_MISSED:.0%}; the attributions are not to be read, raise --steps")
    command.draw(figure(rows, runs[0].class_names, options.kinds), out)
    command.write(out.with_suffix(".csv"), _csv(rows, runs[0].class_names))
    print(f"figure: {out}; numbers: {out.with_suffix('.csv')}")


def _chosen(images: ImageSet, runs: Sequence[Run], options: argparse.Namespace, say: Reporter) -> ImageSet:
    """The images that are shown, of those that the two first models tell apart as asked."""
    show = options.show or ("disagree" if len(runs) > 1 else "any")
    labels = torch.tensor(images.source.labels)
    right = []
    for run in runs[:2] if show != "any" else ():
        predicted = probabilities(run, images, options.batch_size, say).argmax(1)
        right.append(predicted == labels)
        say.say(f"{run.name}: {right[-1].float().mean():.1%} of {len(images):,} images right")
    if show == "any":
        return images.thinned(options.count, options.seed)
    fitting = SHOWN[show](*right).nonzero()[:, 0].tolist()
    if not fitting:
        raise AnalysisError(f"--show {show}: none of the {len(images):,} images of {images.name}; ask for others")
    say.say(f"{show}: {len(fitting):,} images")
    found = ImageSet(images.name, images.split, images.source.subset(fitting), images.class_names)
    return found.thinned(options.count, options.seed)


def _row(
    images: ImageSet,
    index: int,
    runs: Sequence[Run],
    options: argparse.Namespace,
    by_label: bool,
    labelled: bool,
    advance: Callable[[int], None],
) -> Row:
    label = images.source.labels[index] if labelled else None
    found: dict[str, list[Panel]] = {kind: [] for kind in options.kinds}
    pixels = None
    for run in runs:
        image = run.data(images)[index][0]
        pixels = run.pixels(image).numpy() if pixels is None else pixels
        for panel in explain(run, image, label if by_label else None, options):
            found[panel.kind].append(panel)
        advance(1)
    return Row(images.file(index), pixels, label, [panel for kind in options.kinds for panel in found[kind]])


def explain(run: Run, image: Tensor, label: int | None, options: argparse.Namespace) -> list[Panel]:
    """The maps of one model for one image (3, side, side), of the label's class or of the one that it predicts."""
    batch = image.unsqueeze(0).to(run.device)
    with torch.no_grad():
        chances = run.model(batch).float().softmax(1)[0]
    probability, predicted = (value.item() for value in chances.max(0))
    target = predicted if label is None else label
    targets = torch.tensor([target], device=run.device)
    panels = []
    for kind in options.kinds:
        missed = None
        if kind == "grad-cam":
            values = grad_cam(run.model, batch, targets, options.layer)[0]
        else:
            start = run.black() if options.baseline == "black" else torch.zeros(1, 3, 1, 1)
            # Most images need few steps; where a logit jumps along the path, many.
            for doubled in range(_DOUBLINGS + 1):
                steps = options.steps << doubled
                found = integrated_gradients(run.model, batch, targets, start, steps, options.batch_size)
                if found.share_missed.item() <= _MISSED:
                    break
            values, missed = found.values[0].abs().sum(0), found.share_missed.item()
        panels.append(Panel(run.name, kind, values.float().cpu().numpy(), predicted, probability, target, missed))
    return panels


def figure(rows: Sequence[Row], class_names: Sequence[str], kinds: Sequence[str]) -> Figure:
    """A row an image: the image, then each model's map, kind by kind."""
    columns = 1 + len(rows[0].panels)
    drawn = Figure(figsize=(_CELL * columns, (_CELL + 0.25) * len(rows) + 0.35), layout="constrained")
    grid = drawn.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    for line, row in zip(grid, rows, strict=True):
        line[0].imshow(row.pixels)
        said = Path(row.file).name if row.label is None else class_names[row.label]
        line[0].set_xlabel(said, fontsize="small")
        for axes, panel in zip(line[1:], row.panels, strict=True):
            _draw_panel(axes, panel, row, class_names)
    grid[0][0].set_title("image", fontsize="medium")
    for axes, panel in zip(grid[0][1:], rows[0].panels, strict=True):
        axes.set_title(f"{panel.run}\n{panel.kind}", fontsize="medium")
    return drawn


def _draw_panel(axes, panel: Panel, row: Row, class_names: Sequence[str]) -> None:
    if panel.kind == "grad-cam":
        top = panel.values.max()
        side = row.pixels.shape[0] - 0.5
        # Colours fade out where there is no evidence, so that the image stays to be seen.
        share = panel.values / top if top > 0 else panel.values
        axes.imshow(row.pixels.mean(axis=2), cmap="gray", vmin=0, vmax=1)
        axes.imshow(share, cmap="turbo", vmin=0, vmax=1, alpha=0.75 * share**0.5, extent=(-0.5, side, side, -0.5))
    else:
        top = np.percentile(panel.values, _BRIGHTEST)
        axes.imshow(panel.values, cmap="inferno", vmin=0, vmax=top if top > 0 else 1)
    colour = "black" if row.label is None else "tab:green" if panel.predicted == row.label else "tab:red"
    axes.set_xlabel(f"{class_names[panel.predicted]} {panel.probability:.0%}", fontsize="small", color=colour)


def _csv(rows: Sequence[Row], class_names: Sequence[str]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "label", "model", "kind", "predicted", "probability", "explained", "missed"))
    for row in rows:
        label = "" if row.label is None else class_names[row.label]
        for panel in row.panels:
            missed = "" if panel.missed is None else f"{panel.missed:.6f}"
            predicted, target = class_names[panel.predicted], class_names[panel.target]
            writer.writerow(
                (row.file, label, panel.run, panel.kind, predicted, f"{panel.probability:.6f}", target, missed)
            )
    return text.getvalue()


if __name__ == "__main__":
    sys.exit(main())
