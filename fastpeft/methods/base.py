"""What every tuning method is: a frozen dataclass that attaches itself to a model."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from fastpeft.engine.view import ModelView
from fastpeft.errors import MethodError

REGISTRY: dict[str, type[Method]] = {}


@dataclass(frozen=True)
class Method:
    """Base of the tuning methods.

    A subclass is a frozen dataclass with a `name`, and says in `attach` what it adds and trains. When it is called the
    backbone is frozen.

    Attributes:
        name: as in configs, in saved adapters and in the names of the method's tensors.
        backbone_dropout: train with the backbone's own dropout and stochastic depth. Off for everything but full
            fine-tuning, as in the VPT paper's protocol.
        stacks: of a model with several stacks of blocks (mPLUG's "image", "text", "fusion" and "decoder"), those that
            the method acts on; one may be a string. None for all but "image": a tower, which is a transformer of its
            own inside the model, is frozen and has nothing in it unless it is named. What trains a whole backbone,
            as `Full` and `BitFit` do, trains the blocks of named stacks, and without names everything, towers too.
    """

    name: ClassVar[str] = ""
    backbone_dropout: ClassVar[bool] = False
    stacks: tuple[str, ...] | None = field(default=None, kw_only=True)

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if cls.name:
            REGISTRY[cls.name] = cls

    def __post_init__(self) -> None:
        """Checks what every method has; a subclass with a `__post_init__` of its own calls this one."""
        if self.stacks is None:
            return
        stacks = names(self.stacks)
        sound = bool(stacks) and all(isinstance(stack, str) and stack for stack in stacks)
        check(
            sound and len(set(stacks)) == len(stacks),
            f"{type(self).__name__}: stacks must be names of stacks, each once, or None, got {self.stacks!r}",
        )
        object.__setattr__(self, "stacks", stacks)

    def attach(self, model: ModelView) -> None:
        """Add the method's tensors to the model and mark what it trains.

        Raises:
            MethodError: the method does not fit the model.
        """
        raise MethodError(f"{type(self).__name__} does not define attach()")

    def enter(self, model: ModelView) -> None:
        """`attach` to the stacks that the method is for."""
        self.attach(model.of(None if self.stacks is None else names(self.stacks)))

    def parts(self) -> tuple[Method, ...]:
        """The methods of a sum; a method alone is its own only part."""
        return (self,)

    def __add__(self, other: Method) -> Methods:
        if not isinstance(other, Method):
            return NotImplemented
        return Methods(self.parts() + other.parts())

    def to_dict(self) -> dict[str, Any] | list[dict[str, Any]]:
        """JSON-able form, read back by `from_dict`.

        Tensors (a prompt's initial value) are named by shape only: a saved adapter holds the trained values.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if fields["stacks"] is None:
            del fields["stacks"]
        return {"name": self.name, **{key: _plain(value) for key, value in fields.items()}}


@dataclass(frozen=True)
class Methods(Method):
    """A sum of methods, attached in order.

    Attributes:
        methods: the summands, each of another name.
    """

    methods: tuple[Method, ...]

    def __post_init__(self) -> None:
        check(self.stacks is None, f"a sum has no stacks of its own, its methods have, got {self.stacks!r}")
        names = [method.name for method in self.methods]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise MethodError(f"a sum holds each method once, got {', '.join(twice)} more than once")

    def parts(self) -> tuple[Method, ...]:
        return self.methods

    def attach(self, model: ModelView) -> None:
        for method in self.methods:
            method.enter(model)

    def to_dict(self) -> list[dict[str, Any]]:
        return [method.to_dict() for method in self.methods]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return "zero"
    return list(value) if isinstance(value, tuple) else value


def from_dict(data: dict[str, Any] | list[dict[str, Any]]) -> Method:
    """Build a method from `{"name": ..., field: value, ...}`, or a sum from a list of those.

    Raises:
        MethodError: unknown name or field (with the nearest valid one), or a value that the method refuses.
    """
    if isinstance(data, list):
        check(bool(data), "a list of methods needs at least one")
        parts = [from_dict(item) for item in data]
        return parts[0] if len(parts) == 1 else Methods(tuple(parts))
    if not isinstance(data, dict) or "name" not in data:
        raise MethodError(f"a method is a mapping with a name, got {data!r}")
    values = dict(data)
    name = values.pop("name")
    if not isinstance(name, str) or name not in REGISTRY:
        raise MethodError(
            f"unknown method {name!r}{_nearest(str(name), REGISTRY)}; known: {', '.join(sorted(REGISTRY))}"
        )
    cls = REGISTRY[name]
    known = {f.name for f in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            raise MethodError(f"method {name!r} has no field {key!r}{_nearest(key, known)}; it has: {_listed(known)}")
    try:
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except TypeError as error:
        raise MethodError(f"method {name!r}: {str(error).replace(cls.__name__ + '.__init__() ', '')}") from None


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check(condition: bool, message: str) -> None:
    """Raise MethodError with the message unless the condition holds."""
    if not condition:
        raise MethodError(message)


def is_count(value: Any, least: int = 1) -> bool:
    """Whether the value is an integer of at least `least` (and not a bool)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Whether the value is a finite number (and not a bool)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def names(value: Any) -> tuple[Any, ...]:
    """A field of names as a tuple; what is no sequence becomes its single element, and the checks judge that."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def is_probability(value: Any) -> bool:
    """Whether the value is a number in [0, 1)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1
