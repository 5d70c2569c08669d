"""Attention over tokens and prompts on any CPU. See csrc/cpu/vector/prompt_attention.h.

    out = softmax(scale * q [k; k_p]^T + bias) [v; v_p]

Sums are fp32, whatever the inputs are. bf16 without bias, causal mask and dropout runs on the matrix unit where there
is one (fastpeft/native/attention.py).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastpeft.native import attention as matrix_unit
from fastpeft.native.memory import pool
from fastpeft.native.vector import library
from fastpeft.native.vector.library import call, form, pointer, side_by_side, type_reasons

# Takes the lengths of padded keys instead of a bias.
LENGTHS = True
ONE_MEMORY = True

# Threads find work for each of them, and not much more for one than for another.
_PIECES_A_THREAD = 4


class _Heads(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p if name == "data" else ctypes.c_int64) for name in ("data", "batch", "head", "row")
    ]

    @classmethod
    def of(cls, t: Tensor | None) -> _Heads:
        """Of (B, H, n, D); of (H, p, D) that the batch shares; of None."""
        if t is None:
            return cls()
        return cls(t.data_ptr(), t.stride(0) if t.dim() == 4 else 0, t.stride(-3), t.stride(-2))


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "queries", "tokens", "prompts", "dim")),
        *((name, _Heads) for name in ("q", "k", "v", "prompt_k", "prompt_v", "out")),
        ("lse", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("bias_batch", "bias_head", "bias_row", "bias_column")),
        ("row_words", ctypes.c_void_p),
        ("column_words", ctypes.c_void_p),
        ("threshold", ctypes.c_int32),
        ("keep_scale", ctypes.c_float),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("causal", "threads", "half")),
        *((name, _Heads) for name in ("dout", "dq", "dk", "dv")),
        ("dprompt_k", ctypes.c_void_p),
        ("dprompt_v", ctypes.c_void_p),
        ("parts", ctypes.c_int64),
    ]


def reasons(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None = None,
    prompt_v: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float,
    dropout: float = 0.0,
    row_words: Tensor | None = None,
    column_words: Tensor | None = None,
    prompt_index: Tensor | None = None,
    lengths: Tensor | None = None,
) -> list[str]:
    """Why `forward` and `backward` cannot run with these arguments, which are forward's; empty if they can."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], k.shape[3]):
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        return [f"q, k and v must be (B, H, Nq, D), (B, H, N, D) and (B, H, N, D), not {shapes}"]
    found = type_reasons(q)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        found.append(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    if q.shape[3] == 0:
        found.append("heads have no columns")
    if not scale > 0.0:
        found.append(f"the scale must be positive, not {scale}")
    found += _prompt_reasons(q, prompt_k, prompt_v, prompt_index)
    if lengths is not None:
        found += _lengths_reasons(lengths, q.shape[0])
        if not _on_matrix_unit(q, k, bias, causal, dropout):
            found.append("lengths are for the matrix unit")
    length = 0 if prompt_k is None else prompt_k.shape[-2]
    if bias is not None:
        found += _bias_reasons(bias, (*q.shape[:3], k.shape[2]))
    if not 0.0 <= dropout < 1.0:
        found.append(f"the dropout probability must be in [0, 1), not {dropout}")
    elif dropout > 0.0:
        expected = {"row_words": (row_words, q.shape[:3]), "column_words": (column_words, (k.shape[2] + length,))}
        for name, (words, shape) in expected.items():
            if words is None or words.dtype != torch.int32 or words.shape != shape:
                given = "None" if words is None else f"{words.dtype} {tuple(words.shape)}"
                found.append(f"dropout needs {name} of int32 {tuple(shape)}, not {given}")
    return found


def _prompt_reasons(q: Tensor, k: Tensor | None, v: Tensor | None, index: Tensor | None) -> list[str]:
    if k is None and v is None:
        return [] if index is None else ["prompt_index needs a bank of prompts"]
    if k is None or v is None:
        return ["prompt_k and prompt_v must be given together"]
    batch, heads, _, width = q.shape
    found = []
    if k.shape != v.shape or k.dim() not in (3, 4) or (k.shape[-3], k.shape[-1]) != (heads, width):
        found.append(f"prompts must be (H, p, D) or (.., H, p, D), not {tuple(k.shape)} and {tuple(v.shape)}")
    elif index is not None and (k.dim() != 4 or index.shape != (batch,)):
        found.append(
            f"prompt_index (B,) chooses from a bank (T, H, p, D), not {tuple(index.shape)} from {tuple(k.shape)}"
        )
    elif index is None and k.dim() == 4 and k.shape[0] != batch:
        found.append(f"prompts of {k.shape[0]} samples do not fit a batch of {batch}")
    if index is not None and index.dtype not in (torch.int32, torch.int64):
        found.append(f"prompt_index must be int32 or int64, not {index.dtype}")
    if not (k.is_floating_point() and v.is_floating_point()):
        found.append(f"prompts must be of a floating-point dtype, not {k.dtype} and {v.dtype}")
    return found


def _lengths_reasons(lengths: Tensor, batch: int) -> list[str]:
    if lengths.dtype == torch.int32 and lengths.shape == (batch,) and lengths.is_contiguous() and lengths.is_cpu:
        return []
    return [f"lengths must be contiguous int32 ({batch},) on the CPU, not {form(lengths)}"]


def _bias_reasons(bias: Tensor, shape: tuple[int, ...]) -> list[str]:
    found = []
    if not bias.is_floating_point():
        found.append(f"the bias must be of a floating-point dtype, not {bias.dtype}")
    if bias.requires_grad:
        found.append("there is no gradient for the bias")
    if bias.dim() > 4 or any(
        n not in (1, full) for n, full in zip(reversed(bias.shape), reversed(shape), strict=False)
    ):
        found.append(f"a bias of {tuple(bias.shape)} does not broadcast to {tuple(shape)}")
    return found


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None = None,
    prompt_v: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float,
    dropout: float = 0.0,
    row_words: Tensor | None = None,
    column_words: Tensor | None = None,
    prompt_index: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over tokens and prompts.

    Args:
        q: (B, H, Nq, D), fp32 or bf16, any strides; rows that do not lie side by side are copied.
        k: (B, H, N, D), like q.
        v: like k.
        prompt_k: (H, p, D) shared by the batch, (B, H, p, D), or with prompt_index a bank (T, H, p, D); another dtype
            than q's is converted. p may be 0.
        prompt_v: like prompt_k.
        bias: broadcastable to (B, H, Nq, N), added to the tokens' scores, -inf for what must not be seen. Every query
            sees the prompts. A row that sees nothing gives 0.
        causal: query i sees tokens 0..i and every prompt.
        scale: of the scores, positive.
        dropout: probability on the attention weights, with both words.
        row_words: int32 (B, H, Nq), random words of the rows.
        column_words: int32 (N + p,), random words of the keys, tokens first. A weight is kept as in
            fastpeft/ops/dropout_mask.py.
        prompt_index: integers (B,), 0 <= task < T.
        lengths: int32 (B,), tokens of each sample that are seen, 1 to N; only where the matrix unit serves.

    Returns:
        (B, H, Nq, D), a view of a contiguous (B, Nq, H, D), and its log-sum-exp (B, H, Nq) in fp32, natural, -inf for
        a row that sees nothing.
    """
    q, k, v = map(_readable, (q, k, v))
    prompts = _prompts(q, prompt_k, prompt_v, prompt_index)
    out = _rows_before_heads(q)
    if _on_matrix_unit(q, k, bias, causal, dropout):
        heads = [matrix_unit.Heads.strided(t) for t in (q, k, v, *prompts, out)]
        return out, matrix_unit.attention_forward(_shape(q, k, prompts[0]), *heads, scale, lengths)
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    arguments = _Arguments(q, k, v, *prompts, out, lse, bias, causal, scale, dropout, row_words, column_words)
    call("prompt_attention_forward", arguments.structure)
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None,
    prompt_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float,
    dropout: float = 0.0,
    row_words: Tensor | None = None,
    column_words: Tensor | None = None,
    prompt_index: Tensor | None = None,
    lengths: Tensor | None = None,
    needs: tuple[bool, bool, bool, bool, bool] = (True, True, True, True, True),
    packed: Tensor | None = None,
    one_memory: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `forward`. Equal inputs and numbers of threads give equal bits.

    Args:
        dout: (B, H, Nq, D), of q's dtype, any strides.
        q: as given to forward, and so are k, v, the prompts and everything from `bias` to `prompt_index`.
        k: see q.
        v: see q.
        prompt_k: see q.
        prompt_v: see q.
        out: what forward returned; not read where `reads_output` says so.
        lse: what forward returned.
        bias: see q.
        causal: see q.
        scale: see q.
        dropout: see q.
        row_words: see q.
        column_words: see q.
        prompt_index: see q.
        lengths: see q.
        needs: which of dq, dk, dv, dprompt_k, dprompt_v are wanted. The others cost nothing.
        packed: (B, N, 3, H, D), contiguous, q's dtype, with Nq = N: dq, dk and dv are written into its slices and are
            views of it.
        one_memory: k and v are one tensor, and there are no prompts: dk is the sum of its two gradients and dv None.

    Returns:
        dq, dk, dv, dprompt_k, dprompt_v in their inputs' shapes and dtypes, the first three each a view of a contiguous
        tensor with rows before heads, or of `packed`. None for what is not wanted and for absent prompts.
    """
    needs = (*needs[:3], *(need and prompt_k is not None for need in needs[3:]))
    if not any(needs):
        return (None,) * 5
    q, k, v, dout = map(_readable, (q, k, v, dout))
    prompts = _prompts(q, prompt_k, prompt_v, prompt_index)
    places = [None] * 3 if packed is None else [packed[:, :, i].transpose(1, 2) for i in range(3)]
    tokens = [
        (_rows_before_heads(t) if place is None else place) if need else None
        for t, place, need in zip((q, k, v), places, needs[:3], strict=True)
    ]
    together = one_memory and needs[1] and needs[2]
    if together and _on_matrix_unit(q, k, bias, causal, dropout):
        # It adds up what has one place.
        tokens[2] = tokens[1]
    if _on_matrix_unit(q, k, bias, causal, dropout):
        heads = [matrix_unit.Heads.strided(t) for t in (q, k, v, *prompts)]
        gradients = [matrix_unit.Heads.strided(t) for t in (dout, *tokens)]
        shape = _shape(q, k, prompts[0])
        sums = matrix_unit.attention_backward(shape, *heads, lse, scale, *gradients, needs[3:], lengths=lengths)
    else:
        out = _readable(out)
        arguments = _Arguments(q, k, v, *prompts, out, lse, bias, causal, scale, dropout, row_words, column_words)
        sums = _run_backward(arguments.structure, prompts[0], q, (dout, *tokens), needs[3:])
    found = [
        _of_prompts(t, prompt, prompt_index) if need else None
        for t, prompt, need in zip(sums, (prompt_k, prompt_v), needs[3:], strict=True)
    ]
    if together:
        dk, dv = tokens[1:]
        tokens[1:] = [dk if dk is dv else dk.add_(dv), None]
    return *tokens, *found


class _Arguments:
    """What the functions are handed, with the tensors that must live as long."""

    def __init__(
        self, q, k, v, prompt_k, prompt_v, out, lse, bias, causal, scale, dropout, row_words, column_words
    ) -> None:
        rows, keys = q.shape[:3], k.shape[2]
        if bias is not None:
            bias = bias.detach().float()
            if bias.shape[-1:] != (1,) and bias.dim() and bias.stride(-1) != 1:
                bias = bias.contiguous()
            bias = bias.expand(*rows, keys)
        words = [t.contiguous() for t in (row_words, column_words)] if dropout else [None, None]
        self.held = [q, k, v, prompt_k, prompt_v, out, lse, bias, *words]
        strides = (0, 0, 0, 0) if bias is None else bias.stride()
        self.structure = _Attention(
            **_shape(q, k, prompt_k)._asdict(), q=_Heads.of(q), k=_Heads.of(k), v=_Heads.of(v),
            prompt_k=_Heads.of(prompt_k), prompt_v=_Heads.of(prompt_v), out=_Heads.of(out), lse=lse.data_ptr(),
            bias=pointer(bias), bias_batch=strides[0], bias_head=strides[1], bias_row=strides[2],
            bias_column=strides[3] if keys > 1 else 0, row_words=pointer(words[0]), column_words=pointer(words[1]),
            threshold=round(dropout * (1 << 32)) - (1 << 31), keep_scale=1.0 / (1.0 - dropout), scale=scale,
            causal=causal, threads=torch.get_num_threads(), half=q.dtype == torch.bfloat16,
        )  # fmt: skip


def _run_backward(
    structure: _Attention,
    prompt_k: Tensor | None,
    q: Tensor,
    gradients: tuple[Tensor | None, ...],
    needs: tuple[bool, bool],
) -> list[Tensor | None]:
    """Write the tokens' gradients and return the prompts', in fp32."""
    batch, heads, _, dim = q.shape
    shared = prompt_k is not None and prompt_k.dim() == 3
    pieces = -(-_PIECES_A_THREAD * torch.get_num_threads() // heads)
    structure.parts = max(1, min(batch, pieces)) if shared else batch
    sums = [
        torch.zeros(structure.parts, heads, prompt_k.shape[-2], dim) if need and prompt_k is not None else None
        for need in needs
    ]
    for name, t in zip(("dout", "dq", "dk", "dv"), gradients, strict=True):
        setattr(structure, name, _Heads.of(t))
    structure.dprompt_k, structure.dprompt_v = map(pointer, sums)
    call("prompt_attention_backward", structure)
    return [t.sum(0) if shared and t is not None else t for t in sums]


def reads_output(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, dropout: float) -> bool:
    """Whether `backward` looks at the output."""
    return not _on_matrix_unit(q, k, bias, causal, dropout)


def _on_matrix_unit(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, dropout: float) -> bool:
    """Whether fastpeft/native/attention.py serves."""
    plain = bias is None and not causal and not dropout
    return plain and q.dtype == torch.bfloat16 and library.level() == "amx" and q.numel() > 0 and k.numel() > 0


def _shape(q: Tensor, k: Tensor, prompt_k: Tensor | None) -> matrix_unit.Shape:
    return matrix_unit.Shape(*q.shape[:3], k.shape[2], 0 if prompt_k is None else prompt_k.shape[-2], q.shape[3])


def _readable(t: Tensor) -> Tensor:
    """The tensor, or a copy of it where rows do not lie side by side, as in the gradient of a sum."""
    return t if side_by_side(t) else t.contiguous()


def _prompts(q: Tensor, k: Tensor | None, v: Tensor | None, index: Tensor | None) -> list[Tensor | None]:
    """Keys and values of prompts as the functions read them; None where there are none."""
    if k is None or k.shape[-2] == 0:
        return [None, None]
    found = []
    for t in (k, v):
        t = t.detach() if index is None else t.detach()[index.long()]
        t = _readable(t.to(q.dtype))
        # A distance of 0 between samples is how the functions are told that the batch shares the prompts.
        found.append(t.contiguous() if t.dim() == 4 and t.stride(0) == 0 else t)
    return found


def _of_prompts(sums: Tensor | None, prompt: Tensor, index: Tensor | None) -> Tensor:
    """Gradient of prompts as they were given, from that of each that was read."""
    if sums is None:
        return torch.zeros(prompt.shape, dtype=prompt.dtype)
    if index is not None:
        sums = torch.zeros(prompt.shape).index_add_(0, index.long(), sums.float())
    return sums.to(prompt.dtype)


def _rows_before_heads(like: Tensor) -> Tensor:
    """Empty (B, H, n, D) whose memory is (B, n, H, D), so that merging the heads is a view."""
    batch, heads, rows, width = like.shape
    return pool.empty(batch, rows, heads, width, dtype=like.dtype).transpose(1, 2)
