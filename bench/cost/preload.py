"""What every process that measures memory needs, imported once in the one that all of them are forked from."""

from __future__ import annotations

import bench.cost.peak  # noqa: F401
from fastpeft._compat import import_timm

import_timm()
