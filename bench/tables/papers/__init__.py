"""The tables, one module a table or a family of them.

Every module of this package defines `TABLES`, from the name on the command line to a `TableSpec`. Adding a file adds
its tables.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from bench.tables.errors import TableError
from bench.tables.protocol import Row
from bench.tables.spec import TableSpec


@functools.cache
def tables() -> dict[str, TableSpec]:
    """All tables, in the order of their names' numbers.

    Raises:
        TableError: two tables have the same name, or two rows of the same name differ.
    """
    found: dict[str, TableSpec] = {}
    rows: dict[str, Row] = {}
    for info in pkgutil.iter_modules(__path__):
        for name, spec in importlib.import_module(f"{__name__}.{info.name}").TABLES.items():
            if name in found:
                raise TableError(f"two tables are called '{name}'")
            found[name] = spec
            for row in spec.rows:
                if rows.setdefault(row.name, row) != row:
                    raise TableError(f"{name}: its row '{row.name}' is another than that of an earlier table")
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def _order(name: str) -> tuple[str, bool, int]:
    paper, _, number = name.partition("-")
    digits = "".join(letter for letter in number if letter.isdigit())
    return paper, number.startswith("fig"), int(digits or 0)
