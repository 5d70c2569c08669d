"""Finds `fastpeft.kernels` in a bare checkout, where the folder lies beside the package.

An installed fastpeft has the folder inside the package, and Python then prefers the folder to this file.
"""

import importlib.util
import sys
from pathlib import Path

_folder = Path(__file__).resolve().parent.parent / "kernels"
if not _folder.is_dir():
    raise ModuleNotFoundError(f"fastpeft.kernels is neither installed nor at {_folder}", name=__name__)
_spec = importlib.util.spec_from_file_location(
    __name__, _folder / "__init__.py", submodule_search_locations=[str(_folder)]
)
# The import system hands out what is registered under the name when this file has run.
sys.modules[__name__] = _module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
