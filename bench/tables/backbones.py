"""What the VPT paper's protocol says of each backbone: batch sizes and prompt lengths (Table 9)."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from dataclasses import dataclass

from bench.tables.errors import TableError
from bench.tables.protocol import LENGTHS, Row


@dataclass(frozen=True)
class Sizes:
    """Batch sizes by what is trained, and the lengths of prompts.

    Attributes:
        linear: of heads on frozen features.
        partial: of the last blocks.
        deep: of everything else but prompts: what goes through all blocks.
        prompts: of fewer than a hundred; of more it is half.
        lengths: that are searched.
    """

    linear: int
    partial: int
    deep: int
    prompts: int
    lengths: tuple[int, ...] = LENGTHS

    def of(self, kind: str) -> int:
        """By a row's kind."""
        return {"linear": self.linear, "partial": self.partial, "prompts": self.prompts}.get(kind, self.deep)


_USUAL = Sizes(2048, 1280, 128, 128)
# The first whose word is in the timm name.
_BY_NAME = (
    ("vit_large", Sizes(2048, 640, 64, 64)),
    ("vit_huge", Sizes(1024, 240, 28, 28)),
    ("swin", Sizes(1024, 1024, 128, 80, (50, 10, 5, 1))),
    ("convnext", Sizes(1024, 1024, 128, 128, (11, 9, 7, 5, 3, 1))),
    ("resnet", Sizes(2048, 2048, 384, 256, (11, 9, 7, 5, 3, 1))),
)


def sizes(backbone: str) -> Sizes:
    """Those of a timm name; ViT-B/16's if the paper has no such backbone."""
    return next((found for word, found in _BY_NAME if word in backbone), _USUAL)


def fitted(row: Row, backbone: str) -> Row:
    """A row with a backbone's batch size and lengths; lengths that are no grid of the paper's stay."""
    own = sizes(backbone)
    searched = {key: own.lengths if values == LENGTHS else values for key, values in row.searched.items()}
    return dataclasses.replace(row, batch_size=own.of(row.kind), searched=searched)


@functools.cache
def lacking(backbone: str) -> str | None:
    """Why the library cannot run a timm model, or None.

    Raises:
        TableError: timm has no such model.
    """
    import torch

    from fastpeft._compat import import_timm
    from fastpeft.errors import UnsupportedModelError
    from fastpeft.models.families import find_hosts

    timm = import_timm()
    if not timm.is_model(backbone):
        near = difflib.get_close_matches(backbone, timm.list_models(), n=1)
        raise TableError(
            f"--backbone {backbone}: timm has no such model" + (f"; did you mean {near[0]}?" if near else "")
        )
    with torch.device("meta"):
        model = timm.create_model(backbone, pretrained=False)
    hosts = find_hosts(model)
    if not hosts:
        return f"no family of models has a {type(model).__name__}"
    try:
        for _, module, family in hosts:
            family.describe(module)
    except UnsupportedModelError as error:
        return str(error)
    return None
