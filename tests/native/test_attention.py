"""Attention on the matrix unit against float64, forward and backward."""

from __future__ import annotations

import pytest
import torch

from fastpeft.native import blocked
from fastpeft.native.attention import Heads, Shape, attention_backward, attention_forward
from tests.kernels.close import assert_close, error
from tests.native.amx import BF16, needs_amx

pytestmark = needs_amx

# batch, heads, queries, tokens, prompts, head dimension
SHAPES = (
    (1, 1, 1, 1, 0, 32),
    (2, 2, 33, 33, 0, 64),
    (2, 3, 50, 50, 5, 64),
    (1, 2, 1, 17, 3, 32),
    (3, 2, 5, 40, 70, 80),
    (2, 2, 64, 64, 32, 80),
    (2, 2, 31, 31, 1, 48),
    (3, 1, 65, 65, 1, 128),
    (2, 2, 32, 32, 64, 16),
)
LARGE = ((2, 2, 197, 197, 0, 64), (2, 3, 197, 197, 200, 64), (1, 2, 257, 257, 1, 80), (1, 1, 577, 577, 50, 64))


class Case:
    """Inputs of a call, and its results by plain PyTorch in any format."""

    def __init__(self, batch, heads, queries, tokens, prompts, dim, shared):
        self.shape = Shape(batch, heads, queries, tokens, prompts, dim)
        self.scale = dim**-0.5
        self.q = torch.randn(batch, queries, heads, dim).to(BF16).transpose(1, 2)
        self.k, self.v = (torch.randn(batch, tokens, heads, dim).to(BF16).transpose(1, 2) for _ in range(2))
        size = (heads, prompts, dim) if shared else (batch, heads, prompts, dim)
        self.pk, self.pv = (torch.randn(size).to(BF16) if prompts else None for _ in range(2))
        self.dout = torch.randn(batch, queries, heads, dim).to(BF16).transpose(1, 2)

    def reference(self, dtype):
        leaves = [
            None if t is None else t.to(dtype).requires_grad_() for t in (self.q, self.k, self.v, self.pk, self.pv)
        ]
        q, k, v, pk, pv = leaves
        if pk is not None:
            k, v = (torch.cat((t, p.expand(len(t), -1, -1, -1)), 2) for t, p in ((k, pk), (v, pv)))
        scores = (q @ k.transpose(-1, -2)) * self.scale
        out = scores.softmax(-1) @ v
        names = [n for n, t in zip(("dq", "dk", "dv", "dpk", "dpv"), leaves, strict=True) if t is not None]
        gradients = torch.autograd.grad(out, [t for t in leaves if t is not None], self.dout.to(dtype))
        found = {"out": out.detach(), "lse": scores.detach().logsumexp(-1)}
        return found | dict(zip(names, gradients, strict=True))

    def strided(self, needs=(True,) * 5):
        """By the native functions on row-major tensors, all results poisoned before."""
        out = torch.full_like(self.q, float("nan"))
        arguments = (*map(Heads.strided, (self.q, self.k, self.v, self.pk, self.pv, out)),)
        lse = attention_forward(self.shape, *arguments, self.scale)
        found = {"out": out, "lse": lse}
        gradients = [
            torch.full_like(t, float("nan")) if need else None
            for t, need in zip((self.q, self.k, self.v), needs, strict=False)
        ]
        prompts = attention_backward(
            self.shape,
            *arguments[:-1],
            lse,
            self.scale,
            Heads.strided(self.dout),
            *map(Heads.strided, gradients),
            needs[3:],
        )
        names = ("dq", "dk", "dv", "dpk", "dpv")
        return found | {n: t for n, t in zip(names, (*gradients, *prompts), strict=True) if t is not None}

    def blocked(self):
        """The same with everything in blocks and queries, keys and values side by side."""
        batch, heads, _, tokens, _, dim = self.shape
        inner, rows = heads * dim, batch * tokens

        def rows_of(t):
            return t.transpose(1, 2).reshape(rows, inner)

        def filled(t):
            made = blocked.from_rows(t)
            if rows % blocked.BLOCK:
                made[-1, :, rows % blocked.BLOCK :] = float("nan")
            return made

        packed = filled(torch.cat([rows_of(t) for t in (self.q, self.k, self.v)], 1))
        out, dpacked = blocked.empty(rows, inner), blocked.empty(rows, 3 * inner)
        out.fill_(float("nan")), dpacked.fill_(float("nan"))
        parts = [Heads.blocked(packed, tokens, i * inner) for i in range(3)]
        dparts = [Heads.blocked(dpacked, tokens, i * inner) for i in range(3)]
        arguments = (*parts, *map(Heads.strided, (self.pk, self.pv)), Heads.blocked(out, tokens))
        lse = attention_forward(self.shape, *arguments, self.scale)
        dout = filled(rows_of(self.dout))
        gradient = Heads.blocked(dout, tokens)
        prompts = attention_backward(self.shape, *arguments[:-1], lse, self.scale, gradient, *dparts, (True, True))

        def heads_of(t):
            return t.reshape(batch, tokens, heads, dim).transpose(1, 2)

        gradients = [heads_of(t) for t in blocked.to_rows(dpacked, rows).split(inner, dim=1)]
        names = ("dq", "dk", "dv", "dpk", "dpv")
        found = {"out": heads_of(blocked.to_rows(out, rows)), "lse": lse}
        return found | {n: t for n, t in zip(names, (*gradients, *prompts), strict=True) if t is not None}


def check(found, case):
    exact, plain = case.reference(torch.float64), case.reference(BF16)
    assert error(found.pop("lse"), exact["lse"]) < 1e-5
    for name, value in found.items():
        if float(exact[name].norm()) < 1e-9:  # one key: its probability is 1 whatever it is
            assert float(value.norm()) < 0.05
            continue
        assert_close(name, value.to(BF16), plain[name], exact[name])


@pytest.mark.parametrize("shared", (True, False))
@pytest.mark.parametrize("shape", [*SHAPES, *(pytest.param(s, marks=pytest.mark.slow) for s in LARGE)])
def test_rows_apart_by_strides(shape, shared):
    case = Case(*shape, shared)
    check(case.strided(), case)


@pytest.mark.parametrize("shape", [s for s in (*SHAPES, *LARGE[:2]) if s[2] == s[3]])
def test_blocked(shape):
    case = Case(*shape, True)
    check(case.blocked(), case)


@pytest.mark.parametrize(
    "needs", [(True, False, False, False, False), (False, True, True, True, False), (False,) * 4 + (True,)]
)
def test_only_what_is_asked_for(needs):
    case = Case(2, 2, 40, 40, 9, 64, True)
    whole, part = case.strided(), case.strided(needs)
    names = [n for n, need in zip(("dq", "dk", "dv", "dpk", "dpv"), needs, strict=True) if need]
    assert set(part) == {"out", "lse", *names}
    assert all(torch.equal(part[n], whole[n]) for n in names)


@pytest.mark.parametrize("shared", (True, False))
def test_any_number_of_threads_gives_the_same(shared):
    case = Case(5, 2, 33, 33, 7, 64, shared)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.append(case.strided())
    torch.set_num_threads(before)
    for other in found[1:]:
        for name, value in found[0].items():
            # Sums over the batch are cut at other places.
            torch.testing.assert_close(
                other[name], value, rtol=1e-5 if "p" in name else 0, atol=1e-4 if "p" in name else 0
            )


def test_keys_with_much_in_common():
    """The rows of dS sum to zero whatever is rounded, or what the keys have in common comes through in dq."""
    ours, plain = 0.0, 0.0
    for _ in range(4):
        case = Case(2, 2, 50, 50, 3, 64, True)
        case.q = (0.2 * case.q).to(BF16)
        case.k, case.pk = ((0.3 * t + 6).to(BF16) for t in (case.k, case.pk))
        case.v, case.pv = ((t + 3).to(BF16) for t in (case.v, case.pv))
        exact = case.reference(torch.float64)["dq"]
        ours, plain = ours + error(case.strided()["dq"], exact), plain + error(case.reference(BF16)["dq"], exact)
    assert ours <= plain


def test_scores_of_any_size():
    """Probabilities of nearly 0 and 1, log-sum-exps far from 0, with keys missing to a whole block."""
    for size in (1e-3, 30.0, -30.0):
        case = Case(1, 2, 33, 33, 5, 64, True)
        case.q = (case.q.float() * abs(size)).to(BF16)
        if size < 0:
            # Every score is large and negative: what stands behind the last key must not win.
            case.k, case.pk = -case.k.abs(), -case.pk.abs()
            case.q = case.q.abs()
        found = case.strided()
        exact = case.reference(torch.float64)
        assert error(found["out"], exact["out"]) < 0.03
        assert all(value.isfinite().all() for value in found.values())
