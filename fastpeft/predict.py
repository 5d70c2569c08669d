"""Class names and probabilities from a saved adapter: `python -m fastpeft.predict ADAPTER_DIR IMAGE...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

import fastpeft
from fastpeft._serve import serve
from fastpeft.errors import FastPEFTError

_NEEDED = {
    "base_model": ("a string", lambda value: isinstance(value, str)),
    "image_size": ("a positive number of pixels", lambda value: type(value) is int and value > 0),
    "mean": ("three numbers", lambda value: _are_numbers(value)),
    "std": ("three numbers", lambda value: _are_numbers(value)),
    "class_names": ("a list of strings", lambda value: _is_list_of(value, str)),
}


def _is_list_of(value: object, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _are_numbers(value: object) -> bool:
    return _is_list_of(value, (int, float)) and len(value) == 3


class Predictor:
    """An adapter on its base model, rebuilt from what the adapter's config says.

    Attributes:
        model: In evaluation mode.
        class_names: By class index.
    """

    def __init__(self, folder: str | Path, weights: str | None = None) -> None:
        """Rebuild the model.

        Args:
            folder: A folder that the trainer wrote.
            weights: Where the base model's weights are now, if not where they were when the adapter was trained.

        Raises:
            FastPEFTError: The folder is not an adapter, or does not say what it was trained on.
        """
        from fastpeft.models.build import build_model, start_from

        config = fastpeft.read_config(folder)
        missing = [key for key in _NEEDED if key not in config]
        if missing:
            raise FastPEFTError(
                f"{folder}: its config does not say {', '.join(missing)}; save the adapter with these as metadata, "
                "as fastpeft.train does, or use fastpeft.load on a model of your own"
            )
        for key, (expected, fits) in _NEEDED.items():
            if not fits(config[key]):
                raise FastPEFTError(f"{folder}: {key} is {config[key]!r} in its config, expected {expected}")
        self.class_names: list[str] = list(config["class_names"])
        self._size, self._mean, self._std = config["image_size"], config["mean"], config["std"]
        self._resize = config.get("resize", "squash")
        classes = config.get("num_classes", len(self.class_names))
        with torch.random.fork_rng(devices=[]):
            # A base of random weights is the one that this seed gives.
            torch.manual_seed(config.get("init_seed", 0))
            model = build_model(
                config["base_model"],
                classes,
                self._size,
                weights=weights or config.get("weights"),
                **config.get("model_options", {}),
            )
        if config.get("start") is not None:
            start_from(model, config["start"])
        self.model: nn.Module = fastpeft.load(model, folder).eval()

    @torch.no_grad()
    def __call__(self, path: str | Path) -> torch.Tensor:
        """Probabilities of the classes for one image file.

        Raises:
            fastpeft.data.DataError: The file is not a readable image.
        """
        from fastpeft.data import load_image

        image = load_image(path, self._size, self._mean, self._std, resize=self._resize)
        return self.model(image.unsqueeze(0)).float().softmax(dim=1)[0]

    def lines(self, paths: Iterable[str | Path], top: int) -> Iterator[str | FastPEFTError]:
        """One line of the likeliest classes for each image, or the error of one that cannot be read."""
        for path in paths:
            try:
                probabilities = self(path)
            except FastPEFTError as error:
                yield error
                continue
            best = probabilities.topk(min(top, len(self.class_names)))
            shares = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            yield f"{path}: " + ", ".join(f"{self._name(index)} {share:.1%}" for share, index in shares)

    def _name(self, index: int) -> str:
        return self.class_names[index] if index < len(self.class_names) else f"class {index}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 2 if anything could not be read."""
    parser = argparse.ArgumentParser(prog="fastpeft.predict", description="Classify images with a saved adapter.")
    parser.add_argument("adapter", metavar="ADAPTER_DIR", help="folder written by fastpeft.train")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--top", type=int, default=3, metavar="K", help="how many classes to print (default: 3)")
    parser.add_argument("--weights", metavar="WEIGHTS", help="where the base model's weights are, if they moved")
    options = parser.parse_args(arguments)
    if options.top < 1:
        parser.error(f"--top must be at least 1, got {options.top}")
    return serve(lambda: _predict(options), "what was printed stands")


def _predict(options: argparse.Namespace) -> int:
    code = 0
    for line in Predictor(options.adapter, options.weights).lines(options.images, options.top):
        if isinstance(line, FastPEFTError):
            print(f"error: {' '.join(str(line).split())}", file=sys.stderr, flush=True)
            code = 2
        else:
            print(line, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
