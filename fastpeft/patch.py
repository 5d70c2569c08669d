"""`patch` and `unpatch`: give a model's blocks to the engine, and take them back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from fastpeft.engine.adopt import Adopted, adopt, release
from fastpeft.engine.block import BlockState
from fastpeft.engine.clock import DropoutClock
from fastpeft.engine.head import DeepHead
from fastpeft.engine.hooks import replaced
from fastpeft.engine.stack import MEMORIES, EngineHost, HostState
from fastpeft.engine.view import ModelView
from fastpeft.errors import FastPEFTError, MethodError, UnsupportedModelError
from fastpeft.methods.base import Method
from fastpeft.models.families import find_hosts
from fastpeft.models.wrappers import register_all, wrapped
from fastpeft.ops.choose import asked
from fastpeft.parameters import hosts, outermost, view_of


@dataclass
class PatchRecord:
    """What `patch` did to a model, kept on the model.

    Attributes:
        method: the tuning method, None for a plain patch.
        train_head: whether the head is trained with it.
        backend: as asked for.
        left_alone: (path, reason) of what the engine does not run.
        required_grad: `requires_grad` of every parameter before the method came, by name in the module that keeps the
            record; empty without a method, which is the only thing that changes it.
        merged: measured error by projection, if `merge` has folded the method.
    """

    method: Method | None = None
    train_head: bool = True
    backend: str = "auto"
    left_alone: list[tuple[str, str]] = field(default_factory=list)
    required_grad: dict[str, bool] = field(default_factory=dict)
    merged: dict[str, float] | None = None


def record_of(model: nn.Module) -> PatchRecord | None:
    """The record of the model or of what it wraps (as a PeftModel or DistributedDataParallel does), None if none."""
    records = [keeper.__dict__["fastpeft_record"] for keeper in _keepers(model)]
    return next((record for record in records if record.method is not None), records[0] if records else None)


def _keepers(model: nn.Module) -> list[nn.Module]:
    """The modules, outermost first, that `patch` was called on."""
    return [module for module in model.modules() if "fastpeft_record" in module.__dict__]


def patch(
    model: nn.Module,
    method: Method | None = None,
    *,
    train_head: bool = True,
    strict: bool = True,
    backend: str = "auto",
    memory: str | None = None,
) -> nn.Module:
    """Let the engine run a model's transformer blocks, in place.

    Without a method nothing changes but speed and memory: same function, parameters, `state_dict()` keys and
    `requires_grad`. With a method the backbone is frozen, the method's tensors are added, and the head that is there is
    trained as it is, whatever module it is. Of one that Hugging Face peft has wrapped, what peft trains is trained.

    Args:
        model: a transformer of a known family, or a module that holds some (a Hugging Face PeftModel, say).
        method: the tuning method, or a sum of them.
        train_head: train the head; only with a method.
        strict: what the engine cannot run is an error; otherwise it is left as it is and listed by `summary`.
        backend: of every operator that has it: "auto", which takes what has been measured to be right and faster on the
            chip at hand, "reference" (plain PyTorch), "triton", "cuda" or "xformers". The environment variables
            FASTPEFT_BACKEND and FASTPEFT_BACKEND_<OPERATOR> come first; they are read here.
        memory: what training keeps for the backward pass. "fast" keeps all it needs; "balanced" the derivative of the
            MLP's activation in eight bits, where weights and biases of the MLP are frozen and activations in half
            precision; "small" the blocks' inputs, and runs each block again, unless a hook of every module watches
            the blocks. None leaves it as it is, "fast" at first.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: with `strict`, naming the model or the layers that the engine cannot run.
        MethodError: the method does not fit the model, or the model carries another method already.
        BackendError: no backend has that name.
    """
    backends = asked(backend)
    if memory not in (None, *MEMORIES):
        raise FastPEFTError(f"memory must be one of {', '.join(MEMORIES)}, got {memory!r}")
    if method is not None and not isinstance(method, Method):
        raise MethodError(f"method must be a fastpeft method such as fastpeft.VPT(length=50), got {method!r}")
    register_all()
    record = record_of(model)
    # A record without a transformer is left over from one that was unpatched, or replaced, from inside.
    fresh = record is None or next(hosts(model), None) is None
    if fresh:
        record = _adopt_hosts(model, strict, backend)
    if fresh or backend != "auto":
        record.backend = backend
        for _, host in hosts(model):
            host.fastpeft_host.backends = backends
    if memory is not None:
        for _, host in hosts(model):
            host.fastpeft_host.memory = memory
    if method is not None:
        try:
            _add_method(model, record, method, train_head)
        except BaseException:
            if fresh:
                _release_hosts(model)
            raise
    return model


def _adopt_hosts(model: nn.Module, strict: bool, backend: str) -> PatchRecord:
    found = find_hosts(model)
    record = PatchRecord(backend=backend)
    described = []
    for path, host, family in found:
        if isinstance(host, EngineHost) and any(_extensions(block.module) for block in view_of(host).blocks):
            raise FastPEFTError(f"{path or 'the model'} carries the method of a model around it; patch that one")
        try:
            spec = family.describe(host)
        except UnsupportedModelError as error:
            record.left_alone.append((path, str(error)))
            continue
        prefix = f"{path}." if path else ""
        record.left_alone += [(prefix + block, reason) for block, reason in spec.left_alone]
        if not isinstance(host, EngineHost):
            described.append((host, family, spec))
    if not found:
        record.left_alone.append(
            ("", f"no transformer that fastpeft knows in {type(model).__name__}; it knows timm's VisionTransformer")
        )
    if strict and record.left_alone:
        listed = "; ".join(f"{path or type(model).__name__}: {reason}" for path, reason in record.left_alone)
        raise UnsupportedModelError(f"cannot run {listed}. With strict=False it is left as it is and listed")
    for host, family, spec in described:
        state = HostState(spec)
        for path, block_spec in spec.blocks:
            block = host.get_submodule(path)
            block.fastpeft_block = BlockState(block_spec, state)
            adopt(block, family.block)
        host.fastpeft_host = state
        adopt(host, family.host)
    model.fastpeft_record = record
    return record


def _add_method(model: nn.Module, record: PatchRecord, method: Method, train_head: bool) -> None:
    if record.merged is not None:
        raise MethodError("the model's method was merged; unpatch it, or start from a fresh model")
    if record.method is not None:
        if record.method.to_dict() == method.to_dict() and record.train_head == train_head:
            return
        raise MethodError(
            f"the model already carries {_name(record.method)}; to train several methods together patch a plain model "
            f"with their sum, such as {_name(record.method)} + {_name(method)}"
        )
    targets = outermost(model)
    if len(targets) != 1:
        raise MethodError(
            f"a method goes to one transformer, but the model has {len(targets)}"
            + (f" ({', '.join(path or 'itself' for path, _ in targets)}); patch the one you mean" if targets else "")
        )
    _, host = targets[0]
    state: HostState = host.fastpeft_host
    if state.spec.left_alone:
        path, reason = state.spec.left_alone[0]
        raise MethodError(f"{_name(method)} needs every block, but {path} is left alone: {reason}")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    view = view_of(host)
    heads = _parameters_of_heads(view) if train_head else []
    try:
        model.requires_grad_(False)
        for parameter in heads:
            parameter.requires_grad_(True)
        method.enter(view)
        view.settle()
    except BaseException:
        for _, inner in hosts(host):
            _strip(inner)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
        raise
    rests = not all(part.backbone_dropout for part in method.parts())
    clock = None
    if any(block.module._modules[name].draws for block in view.every_block() for name in _extensions(block.module)):
        clock = DropoutClock(int(torch.randint(1 << 62, (), device="cpu")))
        host.add_module("fastpeft_clock", clock.to(next(host.parameters()).device))
    for _, inner in hosts(host):
        # A tower that the method left out stays as it is.
        if inner is host or any(_extensions(block.module) for block in view_of(inner).blocks):
            inner.fastpeft_host.backbone_eval, inner.fastpeft_host.clock = rests, clock
    record.method, record.train_head = method, train_head
    record.required_grad = before
    for keeper in _keepers(model):
        del keeper.fastpeft_record
    model.fastpeft_record = record
    model.train(model.training)


def _parameters_of_heads(view: ModelView) -> list[nn.Parameter]:
    """What of the output layers is trained: everything, whatever modules they are.

    Raises:
        MethodError: another library has wrapped one and trains nothing of it.
    """
    found = []
    for name, head in zip(view.spec.heads, view.outputs(), strict=True):
        parameters = list(head.parameters())
        if parameters and wrapped(head):
            # It may hold copies that do not run: the wrapper's own choice stands.
            parameters = [parameter for parameter in parameters if parameter.requires_grad]
            if not parameters:
                raise MethodError(
                    f"{name} is a {type(head).__module__}.{type(head).__name__} that trains nothing; activate its "
                    "adapter for training, or pass train_head=False"
                )
        found += parameters
    return found


def _name(method: Method) -> str:
    return " + ".join(type(part).__name__ for part in method.parts())


def _extensions(block: nn.Module) -> tuple[str, ...]:
    return block.fastpeft_block.extensions


def _strip(host: nn.Module) -> None:
    """Remove everything that methods added to a host."""
    view = ModelView(host, host.fastpeft_host.spec)
    for block in view.blocks:
        for name in _extensions(block.module):
            delattr(block.module, name)
        state = block.module.fastpeft_block
        state.extensions, state.carry_in, state.carry_out = (), 0, 0
    for head in view.heads():
        if isinstance(head, DeepHead):
            release(head)
            del head.mlp
    host._modules.pop("fastpeft_clock", None)
    host.fastpeft_host.clock = None
    host.fastpeft_host.backbone_eval = False


def _release_hosts(model: nn.Module) -> None:
    """Undo `_adopt_hosts`, and what methods added."""
    for _, host in list(hosts(model)):
        _strip(host)
        for path, _ in host.fastpeft_host.spec.blocks:
            block = host.get_submodule(path)
            release(block)
            del block.fastpeft_block
        release(host)
        del host.fastpeft_host
    for keeper in _keepers(model):
        del keeper.fastpeft_record


def unpatch(model: nn.Module, discard: bool = False) -> nn.Module:
    """Give a model its own classes back, in place.

    Args:
        model: a patched model; one that is not patched is returned as it is.
        discard: drop the method's tensors if it has not been merged.

    Returns:
        The same model, with `requires_grad` as it was before the method was added.

    Raises:
        MethodError: the method's tensors would be lost.
        FastPEFTError: somebody holds on to a forward of the engine.
    """
    for path, module in model.named_modules():
        if isinstance(module, Adopted) and replaced(module):
            raise FastPEFTError(
                f"the forward of {path or 'the model'} was wrapped after it was patched (by accelerate's hooks, say); "
                "take the wrapper off before unpatching, and put it back afterwards"
            )
    extras = sorted({name for _, host in hosts(model) for b in view_of(host).blocks for name in _extensions(b.module)})
    deep_head = any(isinstance(module, DeepHead) for module in model.modules())
    extras += ["mlp_head"] if deep_head else []
    if extras and not discard:
        fold = "" if deep_head else "fold it with fastpeft.merge, "
        raise MethodError(
            f"unpatching would lose {', '.join(extras)}: {fold}keep it with fastpeft.save, or pass discard=True"
        )
    records = [(keeper, keeper.__dict__["fastpeft_record"]) for keeper in _keepers(model)]
    rested = any(host.fastpeft_host.backbone_eval for _, host in hosts(model))
    _release_hosts(model)
    for keeper, record in records:
        for name, parameter in keeper.named_parameters():
            parameter.requires_grad_(record.required_grad.get(name, parameter.requires_grad))
    return model.train(model.training) if rested else model


def refresh(model: nn.Module) -> nn.Module:
    """Read the structure of a patched model again, after parts of it were replaced or its weights edited by hand.

    Frozen weights that a backend has packed are packed again. Changes in place show by themselves, and so do replaced
    parameters; edits through `.data` do not: call this, or `train()` or `eval()`, which look at samples of the values.

    Raises:
        UnsupportedModelError: the model is no longer one that the engine can run.
    """
    known = {path: family for path, _, family in find_hosts(model)}
    for prefix, host in hosts(model):
        spec = known[prefix[:-1] if prefix else ""].describe(host)
        if [path for path, _ in spec.blocks] != [path for path, _ in host.fastpeft_host.spec.blocks]:
            raise UnsupportedModelError(
                f"{prefix or 'the model'} has other blocks than when it was patched; unpatch it and patch it again"
            )
        host.fastpeft_host.spec = spec
        for path, block_spec in spec.blocks:
            state = host.get_submodule(path).fastpeft_block
            state.spec, state.packs = block_spec, None
    return model
