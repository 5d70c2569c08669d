"""mPLUG, base and large: see `MPlug` and `MPlugConfig`."""

from fastpeft.models.mplug.beams import Generation, Hypothesis
from fastpeft.models.mplug.config import MPlugConfig
from fastpeft.models.mplug.generation import generate, rank_answers
from fastpeft.models.mplug.model import MPlug
from fastpeft.models.mplug.stream import DecoderCache, Stream

__all__ = [
    "DecoderCache",
    "Generation",
    "Hypothesis",
    "MPlug",
    "MPlugConfig",
    "Stream",
    "generate",
    "rank_answers",
]
