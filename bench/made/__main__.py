"""Make a data set on the spot, or convert one, to VTAB-1k's folder layout or COCO's and VQAv2's files.

    python -m bench.made clevr --out data/vtab-1k              # scenes rendered to CLEVR's rules, two tasks
    python -m bench.made scenes --out data/scenes              # pictures with captions and questions
    python -m bench.made tfds --task eurosat --tfds-dir ~/tensorflow_datasets --out data/vtab-1k

The options of a maker: python -m bench.made NAME --help
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path

import bench.made
from bench.tables.errors import unknown
from fastpeft._serve import GOES_ON, serve


def makers() -> dict[str, Callable[..., None]]:
    """The functions `make` of this package's modules, by the modules' names."""
    names = [module.name for module in pkgutil.iter_modules(bench.made.__path__) if not module.name.startswith("_")]
    found = {name: importlib.import_module(f"bench.made.{name}") for name in names}
    return {name: module.make for name, module in found.items() if hasattr(module, "make")}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 2 for a request that cannot be served."""
    arguments = sys.argv[1:] if arguments is None else arguments
    found = makers()
    if not arguments or arguments[0].startswith("-"):
        return serve(lambda: _list(found)) or (0 if arguments else 2)
    return serve(lambda: _make(found, *arguments), GOES_ON)


def _make(found: dict[str, Callable[..., None]], name: str, *rest: str) -> None:
    if name not in found:
        raise unknown("data set", name, found)
    found[name](**vars(_parser(name, found[name]).parse_args(rest)))


def _list(found: dict[str, Callable[..., None]]) -> None:
    print(inspect.cleandoc(__doc__ or ""), end="\n\n")
    for name, make in found.items():
        print(f"{name:10} {_summary(make)}")


def _parser(name: str, make: Callable[..., None]) -> argparse.ArgumentParser:
    """Options from a maker's keywords, with the words of its docstring."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.made {name}", description=_summary(make))
    said = _arguments(make)
    hints = typing.get_type_hints(make)
    for keyword in inspect.signature(make).parameters.values():
        flag, kind = f"--{keyword.name.replace('_', '-')}", _plain(hints.get(keyword.name, str))
        needed = keyword.default is inspect.Parameter.empty
        says = said.get(keyword.name, "")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=bool(keyword.default), help=says)
            continue
        shown = says if needed or keyword.default is None else f"{says} [{keyword.default}]"
        value = keyword.name.upper() if kind is not Path else "DIR"
        given = {"required": True} if needed else {"default": keyword.default}
        parser.add_argument(flag, type=kind, metavar=value, help=shown.replace("%", "%%"), **given)
    return parser


def _plain(hint: object) -> type:
    """The type of an option's value; of `X | None` X."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return typing.cast(type, hint)


def _summary(make: Callable[..., None]) -> str:
    return (inspect.getdoc(make) or "").split("\n")[0]


def _arguments(make: Callable[..., None]) -> dict[str, str]:
    """What the docstring's Args section says of each keyword."""
    section = re.search(r"Args:\n(.*?)(?:\n\S|\Z)", inspect.getdoc(make) or "", re.DOTALL)
    found = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section[1] if section else "", re.DOTALL | re.MULTILINE)
    return {name: " ".join(text.split()).rstrip(".") for name, text in found}


if __name__ == "__main__":
    sys.exit(main())
