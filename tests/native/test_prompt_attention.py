"""Attention with prompts: values and every gradient against float64, on every instruction set."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from fastpeft.native.vector import prompt_attention as op
from fastpeft.ops.dropout_mask import keep_by_words
from fastpeft.ops.prompt_attention import Words, prompt_attention
from tests.kernels.close import assert_close, error

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAMES = ("dq", "dk", "dv", "dprompt_k", "dprompt_v")
DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class Case:
    """Inputs of one call, drawn afresh.

    Attributes:
        rows: queries.
        tokens: token keys.
        length: prompts; None for no prompt tensors at all.
        kind: whose the prompts are: "shared", "per_sample" or "bank".
        bias: shape that broadcasts to (batch, heads, rows, tokens), or None.
        packed: q, k and v are slices of one tensor.
    """

    rows: int = 17
    tokens: int = 17
    length: int | None = 5
    kind: str = "shared"
    width: int = 32
    batch: int = 2
    heads: int = 3
    dtype: torch.dtype = torch.float32
    prompt_dtype: torch.dtype | None = None
    bias: tuple[int, ...] | None = None
    causal: bool = False
    dropout: float = 0.0
    packed: bool = False
    inputs: dict[str, Tensor | None] = field(init=False)
    options: dict = field(init=False)
    dout: Tensor = field(init=False)

    def __post_init__(self):
        b, h, n, d = self.batch, self.heads, self.tokens, self.width

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape).to(self.dtype)

        if self.packed:
            q, k, v = random(b, n, 3, h, d).permute(2, 0, 3, 1, 4)
        else:
            q = random(b, self.rows, h, d).transpose(1, 2)
            k, v = random(b, n, 2, h, d).permute(2, 0, 3, 1, 4)
        pk = pv = index = None
        if self.length is not None:
            group = {"shared": (), "per_sample": (b,), "bank": (3,)}[self.kind]
            both = random(*group, self.length, 2, h, d).to(self.prompt_dtype or self.dtype)
            pk, pv = (t.transpose(-3, -2) for t in both.unbind(-3))
            if self.kind == "bank":
                index = torch.randint(0, 3, (b,))
        bias = rows = columns = None
        if self.bias is not None:
            bias = torch.randn(self.bias).to(self.dtype)
            bias[torch.rand(self.bias) < 0.3] = float("-inf")
        if self.dropout:
            low, high = -(1 << 31), (1 << 31) - 1
            rows = torch.randint(low, high, (b, h, self.rows), dtype=torch.int32)
            columns = torch.randint(low, high, (n + (self.length or 0),), dtype=torch.int32)
        self.inputs = {"q": q, "k": k, "v": v, "prompt_k": pk, "prompt_v": pv}
        self.options = {
            "bias": bias,
            "causal": self.causal,
            "scale": d**-0.5,
            "dropout": self.dropout,
            "row_words": rows,
            "column_words": columns,
            "prompt_index": index,
        }
        self.dout = random(b, h, self.rows, d)

    def ours(self, **more) -> dict[str, Tensor]:
        """Output, log-sum-exp and gradients by the functions under test."""
        out, lse = op.forward(**self.inputs, **self.options)
        found = op.backward(self.dout, **self.inputs, out=out, lse=lse, **self.options, **more)
        named = {"out": out, "lse": lse} | dict(zip(NAMES, found, strict=True))
        return {name: t for name, t in named.items() if t is not None}

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same by plain PyTorch in one precision."""
        leaves = {name: None if t is None else t.detach().to(dtype).requires_grad_() for name, t in self.inputs.items()}
        out, lse = plain_attention(*leaves.values(), **self.options)
        present = {name: t for name, t in leaves.items() if t is not None}
        found = torch.autograd.grad(out, list(present.values()), self.dout.to(dtype))
        named = {f"d{name}": t for name, t in zip(present, found, strict=True)}
        return {"out": out.detach(), "lse": lse.detach()} | named

    def check(self) -> None:
        """Compare everything with float64."""
        assert not op.reasons(**self.inputs, **self.options)
        found, exact, baseline = self.ours(), self.plain(torch.float64), self.plain(self.dtype)
        assert found.keys() == exact.keys()
        seen = exact["lse"].isfinite()
        assert torch.equal(found["lse"].isfinite(), seen)
        for name, value in found.items():
            if name == "lse":
                assert value.dtype == torch.float32 and value.shape == exact[name].shape
                # The scores' rounding, in their own precision, is what moves it.
                limit = 2e-6 * exact[name][seen].abs().clamp_min(1).max() if seen.any() else 0.0
                assert ((value.double() - exact[name])[seen].abs() <= limit).all()
                continue
            source = self.inputs.get(name[1:], self.inputs["q"])
            assert value.dtype == source.dtype and value.shape == exact[name].shape, name
            if name != "dv" and self.tokens + (self.length or 0) == 1 and name.startswith("d"):
                # The only probability is 1, whatever the scores are.
                assert not exact[name].any() and not (value.abs() > 1e-5).any()
                continue
            assert_close(name, value.to(self.dtype), baseline[name], exact[name])


def plain_attention(q, k, v, pk, pv, bias, causal, scale, dropout, row_words, column_words, prompt_index):
    """The equation by matrix products over concatenated keys and values; a row that sees nothing gives 0."""
    batch, rows, tokens = q.shape[0], q.shape[2], k.shape[2]
    if pk is not None:
        pk, pv = (t if prompt_index is None else t[prompt_index] for t in (pk, pv))
        k, v = (torch.cat((t, p.expand(batch, -1, -1, -1)), 2) for t, p in ((k, pk), (v, pv)))
    s = scale * (q @ k.transpose(-1, -2))
    hidden = torch.zeros(rows, k.shape[2], dtype=torch.bool)
    if causal:
        hidden[:, :tokens] = torch.ones(rows, tokens, dtype=torch.bool).triu(1)
    if bias is not None:
        bias = bias.to(q.dtype).expand(*s.shape[:3], tokens)
        bias = torch.nn.functional.pad(bias, (0, k.shape[2] - tokens))
        s = s + bias.nan_to_num(neginf=0.0)
        hidden = hidden | (bias == -torch.inf)
    s = s.masked_fill(hidden, -torch.inf)
    # No derivative passes through a row that sees nothing.
    blind = (s == -torch.inf).all(-1, keepdim=True)
    p = s.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    lse = s.logsumexp(-1)
    if dropout:
        p = p * keep_by_words(row_words[..., None], column_words, dropout).to(p.dtype) / (1.0 - dropout)
    return p @ v, lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, tokens", [(1, 17), (3, 1), (16, 16), (33, 65), (50, 50), (65, 33), (97, 30)])
def test_lengths(level, rows, tokens, dtype):
    for length in (None, 0, 1, 5, 40):
        few = min(rows, tokens + (length or 0)) < 8
        # Of a handful of rows, rounding errors are too small a sample to compare two of them.
        Case(rows, tokens, length, batch=16 if few else 2, heads=5 if few else 2, dtype=dtype).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [4, 17, 32, 59, 64, 80, 96, 128, 200])
def test_widths(level, width, dtype):
    Case(20, 37, 3, width=width, dtype=dtype).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["shared", "per_sample", "bank"])
def test_whose_prompts(level, kind, dtype):
    Case(kind=kind, batch=5, dtype=dtype).check()
    Case(kind=kind, batch=5, dtype=torch.bfloat16, prompt_dtype=torch.float32).check()


@pytest.mark.parametrize("shape", [(), (30,), (1,), (20, 1), (20, 30), (3, 1, 1), (2, 1, 20, 30), (2, 3, 20, 30)])
def test_bias(level, shape):
    for length in (None, 4):
        Case(20, 30, length, bias=shape).check()


def test_a_bias_with_strides(level):
    case = Case(20, 30, 4)
    case.options["bias"] = torch.randn(30, 20).t()
    case.check()
    case.options["bias"] = torch.randn(1, 1, 1, 30).expand(2, 3, 20, 30)
    case.check()
    case.options["bias"] = torch.randn(2, 1, 20, 1).to(torch.bfloat16)
    case.check()


@pytest.mark.parametrize("rows, tokens", [(17, 17), (5, 40), (40, 5)])
def test_causal(level, rows, tokens):
    for length in (None, 3):
        Case(rows, tokens, length, causal=True, batch=3).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(level, dtype):
    Case(20, 33, 7, dropout=0.3, dtype=dtype).check()
    # Few weights are left: many rows, so that rounding errors are compared of enough of them.
    Case(40, 33, None, dropout=0.9, causal=True, batch=4, dtype=dtype).check()
    Case(20, 33, 3, dropout=0.1, bias=(20, 33), kind="bank", dtype=dtype).check()


def test_rows_that_see_nothing(level):
    case = Case(6, 9, None)
    case.options["bias"] = torch.zeros(6, 9)
    case.options["bias"][2] = -torch.inf
    found = case.ours()
    assert not found["out"][:, :, 2].any() and (found["lse"][:, :, 2] == -torch.inf).all()
    assert not found["dq"][:, :, 2].any()
    case.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_gradients(level, dtype):
    case = Case(33, 33, 5, packed=True, dtype=dtype)
    case.check()
    packed = torch.full((2, 33, 3, 3, 32), float("nan"), dtype=dtype)
    found = case.ours(packed=packed)
    apart = case.ours()
    for i, name in enumerate(NAMES[:3]):
        assert found[name].data_ptr() == packed[:, :, i].data_ptr() and torch.equal(found[name], apart[name])


def test_layouts_of_inputs_and_upstream_gradients(level):
    case = Case(12, 21, 6)
    b, h, _, d = case.inputs["q"].shape
    case.inputs["q"] = torch.randn(b, h, d, 12).transpose(2, 3)
    case.inputs["v"] = torch.randn(b, h, 21, 2 * d)[..., 3 : 3 + d]
    case.inputs["prompt_k"] = torch.randn(h, d, 6).transpose(1, 2)
    case.inputs["prompt_v"] = torch.randn(h, 9, d)[:, 1:7]
    case.dout = torch.randn(b, h, 1, 1).expand(b, h, 12, d)
    case.check()
    shared = torch.randn(2, h, 6, d)
    case.inputs["prompt_k"], case.inputs["prompt_v"] = (t.expand(b, h, 6, d) for t in shared)
    case.check()


def test_gradients_that_are_not_asked_for(level):
    case = Case(20, 29, 11, batch=3)
    whole = case.ours()
    for needs in itertools.product((False, True), repeat=5):
        found = case.ours(needs=needs)
        assert {name for name in NAMES if name in found} == {n for n, need in zip(NAMES, needs, strict=True) if need}
        for name in NAMES:
            if name in found:
                assert error(found[name], whole[name]) <= 1e-6, (name, needs)


def test_equal_bits_again_and_for_every_number_of_threads(level):
    threads = torch.get_num_threads()
    for kind in ("shared", "per_sample"):
        case = Case(40, 50, 7, kind, batch=5)
        torch.set_num_threads(1)
        first = case.ours()
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            again, once_more = case.ours(), case.ours()
            assert all(torch.equal(again[name], once_more[name]) for name in first)
            # Sums over a batch are cut where threads are; all else is not.
            exact = first.keys() if kind == "per_sample" else first.keys() - {"dprompt_k", "dprompt_v"}
            assert all(torch.equal(again[name], first[name]) for name in exact)
            assert all(error(again[name], first[name]) <= 1e-6 for name in first)
    torch.set_num_threads(threads)


def test_nothing_to_do(level):
    for changes in ({"batch": 0}, {"rows": 0}, {"tokens": 0, "length": None}, {"tokens": 0}):
        case = replace(Case(), **changes)
        found = case.ours()
        assert all(t.shape == case.inputs[n[1:]].shape for n, t in found.items() if n in NAMES)
        assert all(t.isfinite().all() for name, t in found.items() if name != "lse")


def test_nan_stays(level):
    case = Case(9, 20, None)
    case.inputs["q"][1, 2, 4, 3] = float("nan")
    out, lse = op.forward(**case.inputs, **case.options)
    assert out[1, 2, 4].isnan().all() and lse[1, 2, 4].isnan()
    assert out.isnan().sum() == out.shape[-1]


def test_large_scores(level):
    case = Case(20, 33, 3)
    case.inputs["q"] = case.inputs["q"] * 300.0
    found, exact = case.ours(), case.plain(torch.float64)
    assert all(t.isfinite().all() for t in found.values())
    assert error(found["out"], exact["out"]) <= 1e-4


def test_what_it_refuses():
    case = Case()
    inputs, options = case.inputs, case.options

    def said(**changes) -> str:
        mixed = {**inputs, **options, **changes}
        return "; ".join(op.reasons(**mixed))

    assert said() == ""
    assert "torch.float16 is neither" in said(**{name: t.half() for name, t in inputs.items()})
    assert "must be (B, H, Nq, D)" in said(q=inputs["q"][0])
    assert "one dtype" in said(k=inputs["k"].bfloat16())
    assert "the scale must be positive" in said(scale=-1.0)
    assert "dropout needs row_words" in said(dropout=0.5)
    assert "does not broadcast" in said(bias=torch.zeros(4, 4))
    assert "no gradient for the bias" in said(bias=torch.zeros(17, 17, requires_grad=True))
    assert "must be given together" in said(prompt_v=None)
    assert "prompt_index needs a bank" in said(prompt_k=None, prompt_v=None, prompt_index=torch.zeros(2).long())


@pytest.mark.parametrize("dtype", DTYPES)
def test_chosen_by_name(dtype):
    case = Case(20, 20, 6, packed=True, dropout=0.2, dtype=dtype)
    words = Words(case.options["row_words"], case.options["column_words"])
    mask = torch.rand(2, 1, 20, 20) < 0.8
    results = []
    for backend in ("cpu", "reference"):
        leaves = [t.detach().clone().requires_grad_() for t in case.inputs.values()]
        out = prompt_attention(*leaves, attn_mask=mask, dropout=0.2, words=words, backend=backend)
        out.backward(case.dout)
        results.append([out.detach(), *(t.grad for t in leaves)])
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert all(error(a, b) <= limit for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [None, (70, 1)])
@pytest.mark.parametrize("width", [32, 40, 96])
def test_keys_that_are_the_values_have_one_gradient(level, width, lengths, dtype):
    """A memory that is read twice gets the sum of both gradients in one place."""
    if lengths is not None and (level != "amx" or dtype == torch.float32):
        pytest.skip("lengths are the matrix unit's")
    q, memory = torch.randn(2, 2, 37, width).to(dtype), torch.randn(2, 2, 70, width).to(dtype)
    dout = torch.randn(2, 2, 37, width).to(dtype)
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    options = {"scale": width**-0.5} | ({} if lengths is None else {"lengths": lengths})
    out, lse = op.forward(q, memory, memory, None, None, **options)
    saved = (dout, q, memory, memory, None, None, out, lse)
    dq, dk, dv = op.backward(*saved, **options)[:3]
    one, both, none = op.backward(*saved, **options, one_memory=True)[:3]
    assert none is None and torch.equal(one, dq)
    exact = _memory_gradient(q, memory, dout, width**-0.5, lengths)
    assert_close("dk + dv", both, dk + dv, exact)
    # Who wants one of the two gets that one.
    needs = (False, False, True, False, False)
    assert torch.equal(op.backward(*saved, **options, needs=needs, one_memory=True)[2], dv)


def _memory_gradient(q: Tensor, memory: Tensor, dout: Tensor, scale: float, lengths: Tensor | None) -> Tensor:
    q, memory, dout = q.double(), memory.double().requires_grad_(), dout.double()
    scores = scale * q @ memory.transpose(-1, -2)
    if lengths is not None:
        scores = scores.masked_fill(torch.arange(memory.shape[2]) >= lengths[:, None, None, None], float("-inf"))
    return torch.autograd.grad(scores.softmax(-1) @ memory, memory, dout)[0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [197, 257, 577, 1025, 2300])
def test_lengths_of_models(level, tokens, dtype):
    for length in (0, 1, 200):
        Case(tokens, tokens, length, width=64, batch=1, heads=2, dtype=dtype).check()
