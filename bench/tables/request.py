"""The backbones of a request: which is meant for which of a table's roles."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bench.tables.errors import TableError, unknown
from bench.tables.job import Backbone
from bench.tables.spec import Role, TableSpec

# A path may hold an equals sign too, but not before the model's name.
_NAMED = re.compile(r"([\w.-]+)=(.*)", re.DOTALL)


def backbones_of(spec: TableSpec, given: Sequence[str], sizes: Sequence[str]) -> dict[str, Backbone]:
    """Backbones by role.

    Args:
        spec: the table.
        given: of the form [ROLE=]NAME[@WEIGHTS]. Without a role it is for every role, if all roles are of one and the
            same backbone; of a table with one role the role's name may be left out.
        sizes: of the form [ROLE=]PIXELS; without a role for all of them.

    Raises:
        TableError: an unknown role, one given twice, a size that is none, a backbone that could be for several roles.
    """
    named = _by_role(spec, given, "backbone")
    if "" in named and len({(role.backbone, role.weights) for role in spec.roles}) > 1:
        raise TableError(
            f"--backbone {named['']}: this table has several; say which it is, one or more of "
            + ", ".join(f"{role.name}=NAME@WEIGHTS ({role})" for role in spec.roles)
        )
    if not named and spec.roles:
        raise TableError(f"--backbone is missing: [ROLE=]NAME[@WEIGHTS] for {', '.join(map(_asked, spec.roles))}")
    pixels = _by_role(spec, sizes, "image size")
    found = {}
    for role in spec.roles:
        text = named.get(role.name, named.get(""))
        if text is not None:
            size = _pixels(pixels.get(role.name, pixels.get("", str(role.image_size))))
            found[role.name] = Backbone.parse(text, size, role.model)
    return found


def _by_role(spec: TableSpec, given: Sequence[str], kind: str) -> dict[str, str]:
    known, found = [role.name for role in spec.roles], {}
    for text in given:
        match = _NAMED.fullmatch(text)
        role, value = match.groups() if match else ("", text)
        if role and role not in known:
            raise unknown("role", role, known)
        if role in found:
            raise TableError(f"two {kind}s for {role or 'all roles'}: '{found[role]}' and '{value}'")
        found[role] = value
    return found


def _pixels(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise TableError(f"--image-size must be a number of pixels, got '{text}'")
    return int(text)


def _asked(role: Role) -> str:
    return f"{role.name} ({role})"
