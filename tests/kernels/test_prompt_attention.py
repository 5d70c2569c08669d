"""prompt_attention's kernels against plain PyTorch in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastpeft.kernels import _prompt_attention_choice as choice
from fastpeft.kernels import prompt_attention as op
from fastpeft.kernels._launch import recording
from fastpeft.ops import dropout_mask as words
from tests.kernels.close import assert_close, error
from tests.thinned import paired, thinned

pytestmark = pytest.mark.usefixtures("poisoned_memory")

KINDS = ("shared", "per_sample", "bank")
NAMES = ("dq", "dk", "dv", "dprompt_k", "dprompt_v")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Case:
    """Inputs of one call, drawn afresh.

    Attributes:
        rows: queries.
        tokens: token keys.
        length: prompts; None for no prompt tensors at all.
        kind: whose the prompts are.
        bias: shape that broadcasts to (batch, heads, rows, tokens).
        batch: samples; by default 2, or more where there are few rows.
        heads: likewise.
        hidden: share of -inf in the bias.
        packed: q, k and v are slices of one tensor.
    """

    rows: int = 17
    tokens: int = 17
    length: int | None = 5
    kind: str = "shared"
    width: int = 32
    batch: int | None = None
    heads: int | None = None
    dtype: torch.dtype = torch.float32
    bias: tuple[int, ...] | None = None
    hidden: float = 0.3
    causal: bool = False
    dropout: float = 0.0
    packed: bool = False
    tasks: int = 3
    prompt_dtype: torch.dtype | None = None
    inputs: dict[str, Tensor | None] = field(init=False)
    options: dict = field(init=False)
    dout: Tensor = field(init=False)

    def __post_init__(self):
        # A handful of rows is too small a sample of rounding errors to compare two of them.
        few = min(self.rows, self.tokens + (self.length or 0)) < 8
        self.batch = self.batch or (4 if few else 2)
        self.heads = self.heads or (5 if few else 2)
        b, h, n, d = self.batch, self.heads, self.tokens, self.width

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64).to(self.dtype).to(device())

        if self.packed:
            q, k, v = random(b, n, 3, h, d).permute(2, 0, 3, 1, 4)
        else:
            q = random(b, self.rows, h, d).transpose(1, 2)
            k, v = random(b, n, 2, h, d).permute(2, 0, 3, 1, 4)
        pk = pv = index = None
        if self.length is not None:
            group = {"shared": (), "per_sample": (b,), "bank": (self.tasks,)}[self.kind]
            # As they come from a projection of keys and values.
            both = random(*group, self.length, 2, h, d).to(self.prompt_dtype or self.dtype)
            pk, pv = (t.transpose(-3, -2) for t in both.unbind(-3))
            if self.kind == "bank":
                index = torch.randint(0, self.tasks, (b,)).to(device())
        bias = None
        if self.bias is not None:
            bias = random(*self.bias)
            bias[(torch.rand(bias.shape) < self.hidden).to(device())] = float("-inf")
        columns = row_words = None
        if self.dropout:
            low, high = -(1 << 31), (1 << 31) - 1
            row_words = torch.randint(low, high, (b, h, self.rows), dtype=torch.int32).to(device())
            columns = torch.randint(low, high, (n + (self.length or 0),), dtype=torch.int32).to(device())
        self.inputs = {"q": q, "k": k, "v": v, "prompt_k": pk, "prompt_v": pv}
        self.options = {
            "bias": bias,
            "causal": self.causal,
            "scale": d**-0.5,
            "dropout": self.dropout,
            "row_words": row_words,
            "column_words": columns,
            "prompt_index": index,
        }
        self.dout = random(b, h, self.rows, d)

    def forward(self) -> tuple[Tensor, Tensor]:
        return op.forward(**self.inputs, **self.options)

    def backward(self, out: Tensor, lse: Tensor, **more) -> tuple[Tensor | None, ...]:
        return op.backward(self.dout, **self.inputs, out=out, lse=lse, **self.options, **more)

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Output, log-sum-exp and gradients of plain PyTorch."""
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in self.inputs.values()]
        out, lse = plain_attention(*leaves, **self.options)
        present = [t for t in leaves if t is not None]
        gradients = iter(torch.autograd.grad(out, present, self.dout.to(dtype)))
        return out.detach(), lse.detach(), [None if t is None else next(gradients) for t in leaves]

    def by_row_sums(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Gradients to queries and keys with P (dP - sum of dout * out) for those to logits, as a kernel has them.

        A row that sees one key has none, and autograd's softmax has exactly none; this is a rounding of two sums there.
        """
        leaves = {name: t if t is None else t.detach().to(dtype) for name, t in self.inputs.items()}
        wanted = {f"d{name}": t.requires_grad_() for name, t in leaves.items() if t is not None and name[-1] != "v"}
        asked = {name: self.options[name] for name in ("bias", "causal", "scale", "prompt_index")}
        s, v = logits(*leaves.values(), **asked)
        dout = self.dout.to(dtype)
        with torch.no_grad():
            p, kept = weights(s, *(self.options[name] for name in ("dropout", "row_words", "column_words")))
            out = (p * kept) @ v
            ds = p * (kept * (dout @ v.transpose(-1, -2)) - (dout * out).sum(-1, keepdim=True))
        return dict(zip(wanted, torch.autograd.grad(s, list(wanted.values()), ds), strict=True))


def keep_mask(row_words: Tensor, column_words: Tensor, p: float) -> Tensor:
    """fastpeft/ops/dropout_mask.py's decision, written once more."""
    z = row_words[..., None] ^ column_words
    z = z * 0x7FEB352D
    z = z ^ ((z >> 15) & 0x1FFFF)
    z = z * (0x846CA68B - (1 << 32))
    z = z ^ ((z >> 16) & 0xFFFF)
    return z >= round(p * (1 << 32)) - (1 << 31)


def plain_attention(q, k, v, pk, pv, bias, causal, scale, dropout, row_words, column_words, prompt_index):
    s, v = logits(q, k, v, pk, pv, bias, causal, scale, prompt_index)
    p, kept = weights(s, dropout, row_words, column_words)
    return (p * kept) @ v, torch.logsumexp(s.detach().double(), -1)


def logits(q, k, v, pk, pv, bias, causal, scale, prompt_index):
    """Of tokens and prompts, with the values of both."""
    batch, rows, tokens = q.shape[0], q.shape[2], k.shape[2]
    if pk is not None:
        pk, pv = (t if prompt_index is None else t[prompt_index] for t in (pk, pv))
        k, v = (torch.cat((t, p.expand(batch, -1, -1, -1)), 2) for t, p in ((k, pk), (v, pv)))
    s = scale * (q @ k.transpose(-1, -2))
    hidden = torch.zeros(rows, k.shape[2], dtype=torch.bool, device=q.device)
    if causal:
        hidden[:, :tokens] = torch.ones_like(hidden[:, :tokens]).triu(1)
    if bias is not None:
        bias = bias.to(s.dtype).expand(*s.shape[:3], tokens)
        s = s + torch.nn.functional.pad(bias, (0, k.shape[2] - tokens))
    return s.masked_fill(hidden, float("-inf")), v


def weights(s, dropout, row_words, column_words):
    """The softmax, and what dropout multiplies it with."""
    top = s.detach().amax(-1, keepdim=True)
    e = torch.exp(s - top.masked_fill(top == float("-inf"), 0.0))
    total = e.sum(-1, keepdim=True)
    p = e / total.masked_fill(total == 0.0, 1.0)
    kept = keep_mask(row_words, column_words, dropout).to(p.dtype) / (1.0 - dropout) if dropout else torch.ones_like(p)
    return p, kept


def check(case: Case, **more) -> None:
    """Output, log-sum-exp and all five gradients."""
    out, lse = case.forward()
    gradients = case.backward(out, lse, **more)
    exact_out, exact_lse, exact = case.plain(torch.float64)
    plain_out, plain_lse, plain = case.plain(case.dtype)
    assert out.dtype == case.dtype and out.transpose(1, 2).is_contiguous()
    assert_close("out", out, plain_out, exact_out)
    assert lse.dtype == torch.float32
    seen = exact_lse != float("-inf")
    assert torch.equal(lse == float("-inf"), ~seen)
    assert out[~seen].abs().max() == 0.0 if (~seen).any() else True
    assert_close("lse", lse[seen], plain_lse[seen].float(), exact_lse[seen])
    for given, gradient in zip(case.inputs.values(), gradients, strict=True):
        assert (gradient is None) == (given is None)
        assert given is None or (gradient.shape == given.shape and gradient.dtype == given.dtype)
    results = {
        name: [t.to(case.dtype) if i < 2 else t for i, t in enumerate(triple)]
        for name, *triple in zip(NAMES, gradients, plain, exact, strict=True)
        if triple[0] is not None
    }
    if case.tokens + (case.length or 0) == 1:
        # The softmax of one number is constant, so what is left is the rounding of a difference of products.
        for name in {"dq", "dk", "dprompt_k"} & set(results):
            assert (results.pop(name)[0].abs() <= 100 * torch.finfo(case.dtype).eps * case.rows).all()
    if case.tokens == 1:
        # A single token's share of the keys' gradient is too small a sample, too.
        for token, prompt in (("dk", "dprompt_k"), ("dv", "dprompt_v")):
            if token in results and prompt in results:
                both = zip(results.pop(token), results.pop(prompt), strict=True)
                results[f"{token} and {prompt}"] = [torch.cat((a.flatten(), b.flatten())) for a, b in both]
    # The backward pass has exp(s - lse) where plain PyTorch has exp(s - maximum) over a sum: a rounding of s - lse, of
    # the size of log2 of the keys, is a relative error of every weight, half of it on average in three roundings.
    spread = math.log2(case.tokens + (case.length or 0) + 1) / 2
    roundings = max(1.0, spread) if case.dtype == torch.float32 else 1.0
    # Where there are few keys, some rows see a single one.
    sums = case.by_row_sums(case.dtype) if case.tokens + (case.length or 0) < 8 else {}
    for name, (value, plain, exact) in results.items():
        likewise = sums.get(name, plain)
        assert_close(name, value, max(plain, likewise, key=lambda t: error(t, exact)), exact, roundings)


SIZES, LENGTHS = (1, 3, 17, 50, 65), (0, 1, 5, 17, 33)
QUERIES = ((1, 50), (3, 17), (17, 3), (65, 1), (1, 65), (50, 65), (130, 17))


@pytest.mark.parametrize("tokens, length", thinned(itertools.product(SIZES, LENGTHS), 7))
def test_tokens_and_prompts(tokens, length):
    check(Case(tokens, tokens, length, KINDS[(SIZES.index(tokens) + LENGTHS.index(length)) % 3]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("tokens", SIZES)
def test_all_tokens_and_prompts(tokens, length, kind):
    check(Case(tokens, tokens, length, kind, batch=3, heads=3))


@pytest.mark.parametrize("tokens", (1, 3, 17, 65))
def test_no_prompts(tokens):
    check(Case(tokens, tokens, None))


@pytest.mark.parametrize("rows, tokens", thinned(QUERIES, 2))
def test_other_number_of_queries(rows, tokens):
    check(Case(rows, tokens, 5, KINDS[QUERIES.index((rows, tokens)) % 3]))


def test_prompts_alone():
    check(Case(17, 0, 5))


@pytest.mark.parametrize("width, dtype", paired((8, 32, 40, 59, 64, 72, 80, 96, 128), (torch.float32, torch.float16)))
def test_head_dimensions(width, dtype):
    check(Case(33, 50, 17, "per_sample" if width % 16 else "shared", width, dtype=dtype, heads=1))


@pytest.mark.parametrize("kind, dtype", paired(KINDS, (torch.float32, torch.float16)))
def test_half_precision_over_many_blocks(kind, dtype):
    check(Case(65, 130, 33, kind, 40, dtype=dtype, heads=1))


BIASES = ((2, 2, 50, 65), (1, 2, 50, 65), (2, 1, 50, 65), (2, 1, 1, 65), (50, 65), (65,), (2, 2, 50, 1), (1, 1, 50, 65))


@pytest.mark.parametrize("shape, length", thinned(itertools.product(BIASES, (None, 5)), 3))
def test_bias(shape, length):
    check(Case(50, 65, length, bias=shape))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_rows_that_see_nothing(dtype):
    case = Case(33, 65, None, bias=(2, 1, 33, 65), dtype=dtype)
    case.options["bias"][0, :, 5] = float("-inf")
    case.options["bias"][1, :, :, :] = float("-inf")
    check(case)
    # Prompts are seen all the same.
    case = Case(33, 65, 3, bias=(2, 1, 33, 65), hidden=1.0, dtype=dtype)
    check(case)


def test_first_blocks_hidden():
    case = Case(17, 130, 3, bias=(130,), hidden=0.0)
    case.options["bias"][:70] = float("-inf")
    check(case)


@pytest.mark.parametrize(
    "length, rows, tokens",
    thinned(
        (
            (length, *sizes)
            for sizes in ((1, 1), (17, 17), (65, 65), (130, 130), (130, 50), (50, 130))
            for length in (None, 5)
        ),
        3,
        first=2,
    ),
)
def test_causal(rows, tokens, length):
    check(Case(rows, tokens, length, causal=True))


def test_causal_with_bias_and_dropout():
    check(Case(70, 70, 5, causal=True, bias=(2, 1, 1, 70), dropout=0.3))
    check(Case(70, 50, None, causal=True, dropout=0.3, heads=1))


@pytest.mark.parametrize("kind, dtype", paired(KINDS, (torch.float32, torch.float16)))
def test_dropout(kind, dtype):
    check(Case(65, 50, 17, kind, dropout=0.3, dtype=dtype))


def test_dropout_mask_is_that_of_the_library():
    seed, step, rows, size, p = torch.tensor(7), torch.tensor(3), 6, 50, 0.3
    expected = words.dropout_mask(seed, step, 5, (0, rows), size, p, torch.float32)
    key = words._mix64(words._mix64(seed + words._GOLDEN) + step * words._GOLDEN + 5)
    columns = words._word(words._mix64(key + torch.arange(size) * words._GOLDEN))
    row_words = words._word(words._mix64((key ^ words._MIX[0]) + torch.arange(rows) * words._GOLDEN))
    case = Case(rows, size - 10, 10, width=64, heads=1, batch=1, dropout=p)
    case.options["row_words"] = row_words.view(1, 1, rows).to(device())
    case.options["column_words"] = columns.to(device())
    # Uniform weights and one-hot values: the output is the mask.
    case.inputs["q"] = torch.zeros_like(case.inputs["q"])
    values = torch.eye(size, 64, device=device())
    case.inputs["v"], case.inputs["prompt_v"] = values[None, None, : size - 10], values[None, size - 10 :]
    out, _ = case.forward()
    assert torch.equal(out[0, 0, :, :size].cpu() > 0, expected > 0)
    assert torch.allclose(out[0, 0, :, :size].cpu() * size, expected)


@pytest.mark.parametrize("width", (59, 64, 80))
def test_packed(width):
    case = Case(50, 50, 5, width=width, packed=True, dtype=torch.float16)
    packed = torch.empty(2, 50, 3, 2, width, dtype=torch.float16, device=device())
    check(case, packed=packed)
    out, lse = case.forward()
    dq, dk, dv, *_ = case.backward(out, lse, packed=packed)
    for i, gradient in enumerate((dq, dk, dv)):
        assert gradient.data_ptr() == packed[:, :, i].data_ptr()
    assert torch.equal(torch.stack((dq, dk, dv)).permute(1, 3, 0, 2, 4), packed)
    loose = case.backward(out, lse)
    assert all(torch.equal(a, b) for a, b in zip((dq, dk, dv), loose, strict=False))
    assert all(gradient.transpose(-3, -2).is_contiguous() for gradient in loose)


def test_strides():
    case = Case(17, 33, 5, "per_sample", packed=False)
    _, k, _, pk, pv = case.inputs.values()
    case.inputs["q"] = torch.randn(3, 17, 2, 2, 48, device=device())[1:, :, :, 1, 16:].permute(0, 2, 1, 3)
    case.inputs["k"] = k[:1, :1].expand(2, 2, -1, -1)
    case.inputs["prompt_k"] = pk.transpose(-1, -2).contiguous().transpose(-1, -2)
    case.inputs["prompt_v"] = pv[:1].expand(2, -1, -1, -1)
    case.dout = torch.randn(2, 1, 17, 1, device=device()).expand(2, 2, 17, 32)
    check(case)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_another_dtype(kind):
    case = Case(33, 17, 5, kind, dtype=torch.float16, prompt_dtype=torch.float32)
    # What fp16 holds exactly, so that the conversion is not what is compared.
    for name in ("prompt_k", "prompt_v"):
        case.inputs[name] = case.inputs[name].half().float()
    out, lse = case.forward()
    gradients = case.backward(out, lse)
    assert [g.dtype for g in gradients] == [torch.float16] * 3 + [torch.float32] * 2
    same = replace(case, prompt_dtype=None)
    same.inputs = {name: t.half() for name, t in case.inputs.items()}
    same.options, same.dout = case.options, case.dout
    for gradient, other in zip(gradients, same.backward(out, lse), strict=True):
        assert torch.equal(gradient.half(), other)


@pytest.mark.parametrize(
    "needs",
    # Groups of one: each is a tuple.
    thinned(((needs,) for needs in itertools.product((False, True), repeat=5)), 5),
    ids=lambda n: "".join(map(str, map(int, n))),
)
def test_needs(needs):
    case = Case(17, 3, 5, dropout=0.3)
    out, lse = case.forward()
    everything = case.backward(out, lse)
    for need, gradient, full in zip(needs, case.backward(out, lse, needs=needs), everything, strict=True):
        assert torch.equal(gradient, full) if need else gradient is None
    launched = launches(case, needs)
    dq, dk, dv, dpk, dpv = needs
    assert ("prompt_attention_query_gradient" in launched) == dq
    assert ("prompt_attention_delta" in launched) == ((dk or dpk) and not dq)
    assert ("prompt_attention_token_gradients" in launched) == (dk or dv)
    assert ("prompt_attention_prompt_gradients" in launched) == (dpk or dpv)


def launches(case: Case, needs: tuple[bool, ...]) -> list[str]:
    """Names of the kernels that the backward pass would run on a GPU."""

    def meta(t):
        return t.to("meta") if isinstance(t, Tensor) else t

    inputs = {name: meta(t) for name, t in case.inputs.items()}
    options = {name: meta(t) for name, t in case.options.items()}
    with recording(90) as listed:
        out, lse = op.forward(**inputs, **options)
        del listed[:]
        op.backward(meta(case.dout), **inputs, out=out, lse=lse, **options, needs=needs)
    return [launch.name for launch in listed]


@pytest.mark.parametrize("kind, processors", thinned(itertools.product(KINDS, (1, 16, 1000)), 2))
def test_splits(kind, processors, monkeypatch):
    monkeypatch.setattr(op, "processors_of", lambda device: processors)
    check(Case(65, 3, 33, kind, batch=5, heads=1))


def test_bank_of_absent_tasks():
    case = Case(17, 17, 5, "bank", tasks=7)
    case.options["prompt_index"] = torch.tensor([6, 2], dtype=torch.int32, device=device())
    check(case)
    out, lse = case.forward()
    gradient = case.backward(out, lse)[3]
    assert gradient[[0, 1, 3, 4, 5]].abs().max() == 0.0
    assert gradient[[2, 6]].abs().amin(dim=0).max() > 0.0


@pytest.mark.parametrize("m, n", thinned(((16, 64), (64, 16), (32, 32), (128, 32), (16, 16)), 2))
def test_block_sizes(m, n, monkeypatch):
    monkeypatch.setattr(op, "choose", lambda *_: choice.Blocks(m, n, 4, 2))
    check(Case(65, 50, 17, "shared", causal=True, dropout=0.3, heads=1))
    check(Case(50, 65, 17, "bank", 40, bias=(2, 1, 50, 65), heads=1))


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_agree_to_the_bit(kind):
    # Two blocks of everything.
    case = Case(33, 18, 17, kind, batch=3, heads=1, dropout=0.3)
    first, second = case.forward(), case.forward()
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    for deterministic in (True, False):
        gradients = (case.backward(*first, deterministic=deterministic) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_lost_prompt_is_noticed():
    case = Case(17, 17, 33)
    out, _ = case.forward()
    exact, _, _ = case.plain(torch.float64)
    plain, _, _ = case.plain(torch.float32)
    assert_close("out", out, plain, exact)
    case.inputs["prompt_k"], case.inputs["prompt_v"] = (case.inputs[name][:, :-1] for name in ("prompt_k", "prompt_v"))
    out, _ = case.forward()
    with pytest.raises(AssertionError, match="relative error"):
        assert_close("out", out, plain, exact)


def test_reasons():
    case = Case(17, 17, 5, dropout=0.3)
    assert op.reasons(**case.inputs, **case.options) == []

    def refused(message, case=case, **changes):
        inputs = {name: changes.pop(name, t) for name, t in case.inputs.items()}
        options = {**case.options, **changes}
        found = op.reasons(**inputs, **options)
        assert len(found) == 1 and message in found[0], found
        with pytest.raises(ValueError, match="prompt_attention"):
            op.forward(**inputs, **options)

    q, k, _, pk, pv = case.inputs.values()
    refused("(B, H, Nq, D)", k=k[:, :1])
    refused("one dtype", q=q.half())
    refused("last stride", q=q.transpose(-1, -2).contiguous().transpose(-1, -2))
    refused("scale must be positive", scale=-1.0)
    refused("given together", prompt_v=None)
    refused("prompts must be", prompt_k=pk[:1], prompt_v=pv[:1])
    refused("do not fit a batch", prompt_k=pk.expand(3, -1, -1, -1), prompt_v=pv.expand(3, -1, -1, -1))
    refused("chooses from a bank", prompt_index=torch.zeros(2, dtype=torch.int64, device=device()))
    refused("floating-point", prompt_k=pk.int(), prompt_v=pv.int())
    refused("dropout probability", dropout=1.0)
    refused("dropout needs row_words", row_words=None)
    refused("dropout needs column_words", column_words=case.options["column_words"][:-1])
    refused("bias must be", bias=torch.ones(17, 17, dtype=torch.bool, device=device()))
    refused("no gradient for the bias", bias=torch.zeros(17, 17, device=device(), requires_grad=True))
    refused("does not broadcast", bias=torch.zeros(16, 17, device=device()))
    bank = Case(17, 17, 5, "bank")
    refused("must be int32", case=bank, prompt_index=bank.options["prompt_index"].float())
    refused("needs a bank", case=Case(17, 17, None), prompt_index=torch.zeros(2, dtype=torch.int64, device=device()))
    wide = Case(3, 3, None, width=136)
    refused("head dimension", case=wide)


def test_backward_refuses_what_does_not_fit():
    case = Case(17, 17, 5)
    out, lse = case.forward()
    for name, changed in (
        ("dout", {"dout": case.dout[:, :, :-1]}),
        ("out", {"out": out.half()}),
        ("lse", {"lse": lse.transpose(0, 1)}),
        ("packed", {"packed": torch.empty(2, 17, 2, 2, 32, device=device())}),
        ("packed", {"packed": torch.empty(2, 3, 17, 2, 32, device=device()).transpose(1, 2)}),
    ):
        arguments = {"dout": case.dout, "out": out, "lse": lse} | changed
        with pytest.raises(ValueError, match=f"prompt_attention: {name} must"):
            op.backward(**arguments, **case.inputs, **case.options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tokens, length, kind, dtype",
    [
        (197, 0, "shared", torch.float16),
        (197, 50, "shared", torch.float32),
        (197, 200, "bank", torch.float16),
        (257, 1, "per_sample", torch.float16),
        pytest.param(257, 200, "shared", torch.float32, marks=pytest.mark.exhaustive),
        pytest.param(577, 10, "bank", torch.float32, marks=pytest.mark.exhaustive),
        pytest.param(577, 50, "per_sample", torch.float16, marks=pytest.mark.exhaustive),
    ],
)
def test_sizes_of_vision_transformers(tokens, length, kind, dtype):
    check(Case(tokens, tokens, length, kind, 80 if tokens == 257 else 64, dtype=dtype, packed=True))
    check(Case(1, tokens, length, kind, 64, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_random(seed):
    def pick(*values):
        return values[int(torch.randint(len(values), ()))]

    torch.manual_seed(seed)
    rows, tokens = pick(1, 3, 17, 50, 65, 197), pick(1, 3, 17, 50, 65, 197)
    batch, heads = pick(1, 2, 4), pick(1, 2, 5)
    bias = pick(None, (1, 1, 1, tokens), (batch, 1, 1, tokens), (batch, heads, rows, tokens), (1, heads, rows, tokens))
    check(
        Case(
            rows,
            tokens,
            pick(None, 0, 1, 5, 17, 33, 200),
            pick(*KINDS),
            pick(32, 40, 59, 64, 72, 80, 96, 128),
            batch,
            heads,
            dtype=pick(torch.float32, torch.float16),
            bias=bias,
            causal=pick(False, False, True),
            dropout=pick(0.0, 0.3),
        )
    )
