"""mPLUG, base and large: see `MPlug` and `MPlugConfig`."""

from fastpeft.models.mplug.config import MPlugConfig
from fastpeft.models.mplug.model import MPlug
from fastpeft.models.mplug.stream import DecoderCache, Stream

__all__ = ["DecoderCache", "MPlug", "MPlugConfig", "Stream"]
