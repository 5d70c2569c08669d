"""Which parameters of a patched model are trained, and by whose account."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from fastpeft.engine.stack import EngineHost
from fastpeft.engine.view import ModelView, method_tensors


def hosts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The patched transformers in a model: (path with a trailing dot or empty, module)."""
    for path, module in model.named_modules():
        if isinstance(module, EngineHost):
            yield (f"{path}." if path else ""), module


def outermost(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """As `hosts`, without those that are part of another one."""
    found: list[tuple[str, nn.Module]] = []
    for path, host in hosts(model):
        if not any(path.startswith(outer) for outer, _ in found):
            found.append((path, host))
    return found


def view_of(host: nn.Module) -> ModelView:
    """A patched transformer as methods see it."""
    return ModelView(host, host.fastpeft_host.spec)


def owners(model: nn.Module) -> dict[str, str]:
    """Group of every parameter and buffer: a method's name for its tensors, "head", or "backbone"."""
    groups = dict.fromkeys(model.state_dict(), "backbone")
    for prefix, host in hosts(model):
        heads = tuple(f"{prefix}{head}." for head in host.fastpeft_host.spec.heads)
        groups |= {name: "head" for name in groups if name.startswith(heads)}
        groups |= {f"{prefix}{name}": owner for name, owner in method_tensors(host, view_of(host).blocks).items()}
    return groups


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer should get, each once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def parameter_groups(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """The trainable parameters by group: "head", a method's name, "backbone" (trained backbone weights)."""
    owner = owners(model)
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(owner.get(name, "backbone"), []).append((name, parameter))
    return groups
