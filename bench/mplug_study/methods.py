"""The study's methods, each with the field that its size sweeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FULL = "full"


@dataclass(frozen=True)
class Tuning:
    """A method of the study.

    Attributes:
        name: in results and on the command line.
        title: as the study calls it.
        fields: of the method, as a configuration has them, but for its size.
        knob: the field that is its size; "" for full fine-tuning, which has none.
        reference: size at which the share of the data is swept.
        composes: "embedding" where modules are put before a block's input, "layer" where they are put into it.
        beside: methods that always go with it.
    """

    name: str
    title: str
    fields: Mapping[str, Any]
    knob: str = ""
    reference: int = 0
    composes: str = ""
    beside: tuple[Mapping[str, Any], ...] = field(default=())

    def method(self, size: int, classifier: bool) -> dict[str, Any] | list[dict[str, Any]]:
        """Section `method` of a configuration.

        Args:
            size: length, rank or hidden units.
            classifier: whether the output layer is trained too.
        """
        own = dict(self.fields) | ({self.knob: size} if self.knob else {})
        parts = [own, *map(dict, self.beside)]
        if classifier:
            parts.append({"name": "classifier"})
        return parts if len(parts) > 1 else own


# Where the study leaves a choice, docs/mplug.md says which is taken: LoRA's factors are shared by all heads, the
# parallel adapter has its own skip, prefixes stand before the hidden states of every block.
TUNINGS = {
    tuning.name: tuning
    for tuning in (
        Tuning("prompt", "prompt-tuning", {"name": "prompt_tuning"}, "length", 16, "embedding"),
        Tuning("prefix", "prefix-tuning", {"name": "prefix", "form": "hidden"}, "length", 16, "embedding"),
        Tuning("lora", "LoRA", {"name": "lora", "targets": ["q", "k"], "heads": "shared"}, "rank", 8, "layer"),
        Tuning("serial", "serial adapter", {"name": "serial_adapter"}, "hidden", 64, "layer"),
        Tuning("parallel", "parallel adapter", {"name": "parallel_adapter", "skip": True}, "hidden", 64, "layer"),
        Tuning(FULL, "full fine-tuning", {"name": "full"}),
    )
}
