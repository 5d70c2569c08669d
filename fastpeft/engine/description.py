"""What the engine needs to know about a model: roles and module paths, no library's classes."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

ROLES = ("q", "k", "v", "o", "fc1", "fc2")
# The same four of a block that also attends to a memory.
CROSS_ROLES = {"q": "cross_q", "k": "cross_k", "v": "cross_v", "o": "cross_o"}


@dataclass(frozen=True)
class Projection:
    """Where the weight of a role lies.

    Attributes:
        path: module path of the linear layer inside the block.
        start: first output row of the weight that belongs to the role.
        stop: one behind the last.
        in_features: width of the input.
    """

    path: str
    start: int
    stop: int
    in_features: int

    @property
    def out_features(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class BlockSpec:
    """A transformer block by roles: with LayerNorm before its branches,

        x = x + drop_path1(scale1(attn(norm1(x))))
        x = x + drop_path2(scale2(mlp(norm2(x))))

    or, with `post_norm`, behind its sums,

        x = norm1(x + proj_drop(attn(x)))
        x = cross_norm(x + cross_proj_drop(attn(x, memory)))        with `cross`
        x = norm2(x + drop2(mlp(x)))

    Every path names a child module of the block. A role that the engine cannot reach (the linear layers inside a gated
    MLP, say) is missing from `roles`; its container is then called as a module.

    Attributes:
        roles: role -> projection. Besides the six of `ROLES` there may be "qkv", the fused projection as a whole, and
            with `cross` there are the four of `CROSS_ROLES`.
        fused_qkv: q, k and v are slices of one linear layer, in this order.
        inner: further modules the engine calls one by one, by role: "norm1", "norm2", "q_norm", "k_norm", "attn_drop",
            "attn_norm", "proj_drop", "scale1", "scale2", "drop_path1", "drop_path2", "act", "drop1", "mlp_norm",
            "drop2", and with `cross` "cross_drop", "cross_norm" and "cross_proj_drop".
        attn: path of the attention container.
        mlp: path of the MLP container.
        inner_linears: of an MLP that is called as a module, but is known to treat every row by itself: the paths of its
            linear layers. Empty if it is not known, and all rows then go through it together.
        layer_norms: of `inner`, the roles that are a LayerNorm over the last dimension with `weight`, `bias` and `eps`,
            and nothing else.
        layer_scales: of `inner`, the roles that multiply by their parameter `gamma`, (d,), and nothing else.
        activation: name of `inner["act"]`, or of what a post-norm block applies, in
            `fastpeft.ops.activation.FUNCTIONS`; None if it has none.
        post_norm: LayerNorm stands behind the sums.
        cross: path of the container of attention to a memory; "" if there is none.
        containers: of a post-norm block, the modules whose forward spans several steps: "attn_out", "cross_out",
            "hidden", "ffn_out" -> path.
        stack: of a model with several stacks of blocks, the one that it belongs to.
    """

    dim: int
    num_heads: int
    head_dim: int
    scale: float
    roles: dict[str, Projection]
    fused_qkv: bool
    inner: dict[str, str]
    attn: str
    mlp: str
    inner_linears: tuple[str, ...] = ()
    layer_norms: tuple[str, ...] = ()
    layer_scales: tuple[str, ...] = ()
    activation: str | None = None
    post_norm: bool = False
    cross: str = ""
    containers: dict[str, str] = field(default_factory=dict)
    stack: str = ""

    @property
    def opaque_mlp(self) -> bool:
        return "fc1" not in self.roles

    @property
    def unknown_mlp(self) -> bool:
        return self.opaque_mlp and not self.inner_linears


@dataclass
class HostSpec:
    """A transformer that the engine can run, as a family file describes it.

    Attributes:
        family: name shown to the user.
        blocks: (path inside the host, block spec), in order.
        stem: names of the host's children and parameters that come before the blocks.
        final: names of the children between the last block and the head.
        heads: names of the output layers; linear ones, unless somebody put another module there.
        read_tokens: of the stem, the learned tokens whose rows the head reads.
        patch_area: pixels times channels of a patch, for the prompts' initial range.
        known_readout: what comes after the blocks is the family's own, so that its read-out rows are known.
        left_alone: (path, reason) of what the engine will not run.
        inputs: of a model with several stacks, those whose input learned rows may be put before -> path of the block
            that they then belong to.
        classifiers: parameters of an output layer that is not one of `heads`, by what is to be trained of it.
        towers: stacks that are transformers of their own inside this one -> path of the child that is it or holds it.
            The host reads their rows. A method acts on those that it names.
        unread: paths of modules that the host holds and never runs: a tower's own read-out. Nothing trains them.
    """

    family: str
    dim: int
    blocks: list[tuple[str, BlockSpec]]
    stem: tuple[str, ...]
    final: tuple[str, ...]
    heads: tuple[str, ...]
    patch_area: int
    known_readout: bool = True
    read_tokens: tuple[str, ...] = ()
    left_alone: list[tuple[str, str]] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    classifiers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    towers: dict[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    @property
    def stacks(self) -> tuple[str, ...]:
        """Names of the stacks that the blocks belong to, in order."""
        return tuple(dict.fromkeys(block.stack for _, block in self.blocks))


def child(module: nn.Module, path: str) -> nn.Module:
    """`module.get_submodule(path)` without its error checking, for paths known to exist."""
    for name in path.split("."):
        module = module._modules[name]
    return module
