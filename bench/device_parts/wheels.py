"""Packages that a machine without a network is brought as wheels, in the folder `wheels/` of the checkout.

They are unpacked into a folder of their own that is put first on the path, of this process and of those it starts;
what is installed stays as it is.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "wheels"


def add(folder: Path = FOLDER) -> Path | None:
    """Make the wheels importable; None if there are none.

    Raises:
        RuntimeError: pip refuses them, in its last words.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        return None
    names = "\n".join(f"{wheel.name} {wheel.stat().st_size} {sys.version}" for wheel in wheels)
    target = Path(tempfile.gettempdir()) / f"fastpeft-wheels-{hashlib.sha256(names.encode()).hexdigest()[:12]}"
    if not target.is_dir():
        _install(wheels, target)
    sys.path.insert(0, str(target))
    importlib.invalidate_caches()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(target), os.environ.get("PYTHONPATH"))))
    return target


def _install(wheels: list[Path], target: Path) -> None:
    # Under another name until it is complete.
    with tempfile.TemporaryDirectory(dir=target.parent) as unfinished:
        place = Path(unfinished) / "site"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        done = subprocess.run([*command, "--target", place, *wheels], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"pip cannot unpack {FOLDER}: {done.stderr.strip().splitlines()[-1]}")
        os.replace(place, target)
