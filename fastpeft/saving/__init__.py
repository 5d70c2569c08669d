"""Adapters on disk: `adapter_config.json` beside `adapter_model.safetensors`. Reading them never runs code."""

from fastpeft.saving.adapter import load, save
from fastpeft.saving.files import read_config

__all__ = ["load", "read_config", "save"]
