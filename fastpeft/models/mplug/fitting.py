"""A file's tensors brought into a model: everything is checked first, and then everything is copied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastpeft.errors import FastPEFTError
from fastpeft.models.mplug.keys import TIED, TIED_GROUP, Found, Layout, published_name, same
from fastpeft.models.mplug.positions import resize_positions

_POSITIONS = "visual_encoder.pos_embed"


@dataclass(frozen=True)
class LoadReport:
    """What happened to a checkpoint's tensors.

    Attributes:
        source: the file.
        used: the model's names of what was loaded.
        renamed: (name in the file, the model's) of those whose names differ.
        dropped: names in the file of what was left out on purpose, by the reason.
        unexpected: names in the file of what nothing is known about; not used either.
        initial: the model's names of what the file was not to have, and that keeps its values.
        resized: what became of the image tower's position table, if it was of another image size.
        placeholders: classes and functions that the file names and that were not looked up.
    """

    source: str
    used: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...] = ()
    dropped: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unexpected: tuple[str, ...] = ()
    initial: tuple[str, ...] = ()
    resized: str = ""
    placeholders: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.used)} tensors loaded, {len(self.renamed)} of them renamed"]
        if self.resized:
            lines.append(self.resized)
        if self.dropped:
            groups = ", ".join(f"{group} ({len(names)})" for group, names in self.dropped.items())
            lines.append(f"left out on purpose: {groups}")
        for what, names in (
            ("unexpected, not used", self.unexpected),
            ("kept as they were", self.initial),
            ("classes not looked up", self.placeholders),
        ):
            if names:
                lines.append(f"{what} ({len(names)}): {some(names)}")
        return "\n  ".join(lines)


def some(names: tuple[str, ...] | list[str], count: int = 4) -> str:
    """The first few of many names."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def fit(
    model: nn.Module,
    found: dict[str, Found],
    label: str,
    part: Callable[[str], bool] = lambda name: True,
    optional: Callable[[str], bool] = lambda name: False,
) -> LoadReport:
    """Copy a file's tensors into a model.

    Args:
        model: an `MPlug`; unchanged if anything is wrong.
        found: the file's tensors by the model's names; those that it does not have are sorted out here.
        label: the file's name, for the report and errors.
        part: whether the file is to have a tensor of this name of the model.
        optional: whether it may lack it nevertheless.

    Raises:
        FastPEFTError: a tensor is missing, of another shape or not finite, tied tensors differ, or the file is of
            another model.
    """
    found = dict(found)
    wanted = model.state_dict(keep_vars=True)
    layout = Layout(wanted)
    dropped = _untie(found, label)
    unexpected = []
    for name in [name for name in found if name not in wanted]:
        given, _, shape = found.pop(name)
        group = layout.group(name)
        if group is not None:
            dropped.setdefault(group, []).append(given)
        elif layout.contradicts(name):
            raise FastPEFTError(f"{label}: it has {given} {shape}, for which the model has no place")
        else:
            unexpected.append(given)
    absent = [name for name in wanted if part(name) and name not in found]
    _check_present([name for name in absent if not optional(name)], found, unexpected, label)
    resized = _resize(model, found, label)
    _check_tensors(wanted, found, label)
    with torch.no_grad():
        for name, entry in found.items():
            wanted[name].copy_(entry.tensor)
    return LoadReport(
        source=label,
        used=tuple(found),
        renamed=tuple((entry.given, name) for name, entry in found.items() if entry.given != name),
        dropped={group: tuple(dict.fromkeys(names)) for group, names in dropped.items()},
        unexpected=tuple(unexpected),
        initial=tuple(name for name in absent if optional(name)),
        resized=resized,
    )


def _untie(found: dict[str, Found], label: str) -> dict[str, list[str]]:
    """Take the second names of tied tensors out; a file may have either name, but not two different tensors."""
    dropped: dict[str, list[str]] = {}
    for second, name in TIED.items():
        if second not in found:
            continue
        entry = found.pop(second)
        first = found.setdefault(name, entry)
        if first is entry:
            continue
        if not same(first.tensor, entry.tensor):
            raise FastPEFTError(
                f"{label}: {entry.given} {entry.shape} and {first.given} {first.shape} are one tensor in this model, "
                "and in the file they differ"
            )
        dropped.setdefault(TIED_GROUP, []).append(entry.given)
    return dropped


def _check_present(lacking: list[str], found: dict[str, Found], unexpected: list[str], label: str) -> None:
    if not lacking:
        return
    text = f"{label}: {len(lacking)} of the model's tensors are not in it: {some([published_name(n) for n in lacking])}"
    if not found:
        text += f"; it has {some(unexpected) or 'none of them'}"
    raise FastPEFTError(text)


def _resize(model: nn.Module, found: dict[str, Found], label: str) -> str:
    """Bring the position table of the image tower to the model's image size, and say so."""
    if _POSITIONS not in found:
        return ""
    given, table, shape = found[_POSITIONS]
    wanted = model.visual_encoder.pos_embed.shape
    if table.ndim != 3 or table.shape[1] == wanted[1]:
        return ""
    high, wide = model.visual_encoder.patch_embed.grid_size
    if high != wide or wanted[1] != high * wide + 1:
        raise FastPEFTError(f"{label}: {given} has shape {shape}; the model's {tuple(wanted)} is not of a square grid")
    found[_POSITIONS] = Found(given, resize_positions(table, high, f"{label}: {given}"), shape)
    return f"position table of the image tower brought from {table.shape[1]} rows to {wanted[1]}"


def _check_tensors(wanted: dict[str, Tensor], found: dict[str, Found], label: str) -> None:
    wrong = [name for name, entry in found.items() if entry.tensor.shape != wanted[name].shape]
    if wrong:
        given, _, shape = found[wrong[0]]
        expected = tuple(wanted[wrong[0]].shape)
        # Published tables lack the batch axis of timm's.
        while len(expected) > len(shape) and expected[0] == 1:
            expected = expected[1:]
        more = f" (and {len(wrong) - 1} more do not fit)" if len(wrong) > 1 else ""
        raise FastPEFTError(f"{label}: {given} has shape {shape}, expected {expected}{more}")
    for name, entry in found.items():
        if not entry.tensor.is_floating_point():
            raise FastPEFTError(
                f"{label}: {entry.given} holds {entry.tensor.dtype}, expected the floating-point numbers of {name}"
            )
        # Shapes alone are compared on the meta device, which has no numbers.
        if not entry.tensor.is_meta and not entry.tensor.isfinite().all():
            raise FastPEFTError(f"{label}: {entry.given} has values that are not finite numbers; the file is damaged")
