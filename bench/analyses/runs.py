"""Trained models to look into: the folders that the trainer writes, as a command names them: `[NAME=]DIR`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fastpeft
from bench.analyses.errors import AnalysisError
from bench.analyses.images import ImageSet, batches
from fastpeft.data import ImageDataset
from fastpeft.models.families import find_hosts
from fastpeft.predict import Predictor
from fastpeft.saving.files import CONFIG
from fastpeft.trainer.report import Reporter


@dataclass(frozen=True)
class Run:
    """A trained model.

    Attributes:
        name: for tables and figures.
        model: in evaluation mode.
        class_names: by label.
        side: of the square input in pixels.
        mean: channel means of pixels in [0, 1].
        std: channel deviations.
        resize: as of a configuration's `data.resize`.
    """

    name: str
    model: nn.Module
    class_names: list[str]
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def data(self, images: ImageSet) -> ImageDataset:
        """Images as the model was tested on them."""
        return ImageDataset(images.source, self.side, self.mean, self.std, resize=self.resize)

    def pixels(self, image: Tensor) -> Tensor:
        """A normalised image (3, side, side) as pixels in [0, 1], (side, side, 3)."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (image.cpu() * std + mean).clamp(0, 1).permute(1, 2, 0)

    def black(self) -> Tensor:
        """What the model is given for a black image, (1, 3, 1, 1)."""
        return -(torch.tensor(self.mean) / torch.tensor(self.std)).view(1, 3, 1, 1)


def open_runs(
    texts: Sequence[str], device: torch.device, weights: str | None = None, say: Reporter | None = None
) -> list[Run]:
    """Load adapters onto their base models.

    Args:
        texts: `[NAME=]DIR` each, DIR an adapter's folder or the run's folder that holds it; without a name the method's
            is taken.
        device: where the models go.
        weights: where the base model's weights are now, if they moved.
        say: told of what was loaded.

    Raises:
        FastPEFTError: a folder is not an adapter, or is damaged.
        AnalysisError: two have the same name or differ in their classes.
    """
    runs = []
    for text in texts:
        runs.append(_open(text, device, weights))
        if say is not None:
            say.say(f"{runs[-1].name}: {text.rpartition('=')[2]}")
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AnalysisError(f"two adapters are called {twice[0]}; name them with NAME=DIR")
    for run in runs[1:]:
        if run.class_names != runs[0].class_names:
            raise AnalysisError(f"{runs[0].name} and {run.name} were trained on different classes")
    return runs


def _open(text: str, device: torch.device, weights: str | None) -> Run:
    name, _, where = text.rpartition("=")
    folder = Path(where)
    if not (folder / CONFIG).is_file() and (folder / "adapter" / CONFIG).is_file():
        folder = folder / "adapter"
    predictor = Predictor(folder, weights)
    config = fastpeft.read_config(folder)
    return Run(
        name or _method_name(config),
        predictor.model.to(device),
        predictor.class_names,
        config["image_size"],
        tuple(config["mean"]),
        tuple(config["std"]),
        config.get("resize", "squash"),
    )


def _method_name(config: dict) -> str:
    own = config.get("fastpeft")
    if own is None:
        return str(config.get("peft_type", "adapter")).lower()
    parts = own["method"] if isinstance(own["method"], list) else [own["method"]]
    return "+".join(str(part["name"]) for part in parts)


def check_labels(images: ImageSet, runs: Sequence[Run]) -> None:
    """Refuse images whose classes are not the models'.

    Raises:
        AnalysisError: names or labels differ.
    """
    if images.class_names is None:
        raise AnalysisError(f"{images.name}: these images have no labels")
    if images.class_names != runs[0].class_names:
        raise AnalysisError(
            f"{images.name} has {len(images.class_names)} classes ({', '.join(images.class_names[:3])}, ...), but "
            f"{runs[0].name} was trained on {len(runs[0].class_names)} ({', '.join(runs[0].class_names[:3])}, ...)"
        )


def host_of(model: nn.Module) -> nn.Module:
    """The one transformer in a model.

    Raises:
        AnalysisError: there is none, or there are several.
    """
    found = find_hosts(model)
    if len(found) != 1:
        raise AnalysisError(f"expected a model with one transformer, got {type(model).__name__} with {len(found)}")
    return found[0][1]


@torch.no_grad()
def probabilities(run: Run, images: ImageSet, batch_size: int, say: Reporter) -> Tensor:
    """Of every class for every image, (n, classes) on the CPU."""
    data = run.data(images)
    found = [
        run.model(batch.to(run.device)).float().softmax(1).cpu()
        for batch in batches(data, batch_size, f"predicting with {run.name}", say)
    ]
    return torch.cat(found)


@torch.no_grad()
def embeddings(run: Run, images: ImageSet, batch_size: int, say: Reporter) -> Tensor:
    """The read-out embedding of every image, (n, d): what the head is given."""
    host = host_of(run.model)
    found: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Tensor]) -> None:
        found.append(arguments[0].float().cpu())

    head = _head(host)
    with _hooked(lambda: head.register_forward_pre_hook(keep)):
        for batch in batches(run.data(images), batch_size, f"embedding with {run.name}", say):
            run.model(batch.to(run.device))
    return torch.cat(found).flatten(1)


def _head(host: nn.Module) -> nn.Module:
    head = getattr(host, "head", None)
    if not isinstance(head, nn.Module):
        raise AnalysisError(f"a {type(host).__name__} has no head, before which its embedding could be read")
    return head


@contextmanager
def _hooked(register: Callable) -> Iterator[None]:
    handle = register()
    try:
        yield
    finally:
        handle.remove()
