"""Dropout masks as a function of counters: same counters, same mask; other counters, another one."""

from __future__ import annotations

import pytest
import torch

from fastpeft.ops.dropout_mask import dropout_mask

SIZE = 4096


def mask(seed=1, step=2, site=3, samples=(0, 4), size=SIZE, p=0.3, dtype=torch.float32):
    return dropout_mask(torch.tensor(seed), torch.tensor(step), site, samples, size, p, dtype)


def kept(**counters):
    return mask(**counters) != 0


def test_the_same_counters_give_the_same_mask():
    assert torch.equal(mask(), mask())


def test_known_values():
    # A change of the hash would silently break the resumption of runs begun before it.
    drawn = kept(seed=1234, step=5, site=6, samples=(7, 2), size=24, p=0.5).int().tolist()
    assert ["".join(map(str, row)) for row in drawn] == ["000010100110100011101010", "000001010001000010101010"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.25, 0.5, 0.9, 0.999])
def test_values_and_rate(p, dtype):
    drawn = mask(p=p, dtype=dtype, samples=(0, 32))
    assert drawn.dtype == dtype and drawn.shape == (32, SIZE)
    scale = torch.ones((), dtype=dtype).mul_(1 / (1 - p))
    assert ((drawn == 0) | (drawn == scale)).all()
    zeros, count = (drawn == 0).double().mean().item(), drawn.numel()
    assert abs(zeros - p) <= 4 * (p * (1 - p) / count) ** 0.5


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_a_probability_outside_is_an_error(p):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        mask(p=p)


@pytest.mark.parametrize("samples, shape", [((0, 3), (3, 5)), ((9, 1), (1, 5)), ((0, 0), (0, 5)), (None, (5,))])
def test_shapes(samples, shape):
    assert mask(samples=samples, size=5).shape == shape


def agreement(one, other):
    """Share of elements on which two masks agree, and its standard error if they are independent; rate 0.5."""
    return (one == other).double().mean().item(), 0.5 / one.numel() ** 0.5


@pytest.mark.parametrize(
    "change",
    [
        *({"seed": s} for s in (0, 2, -1, 1 << 40, (1 << 62) - 1)),
        *({"step": s} for s in (1, 3, 4, 1000, 1 << 33)),
        *({"site": s} for s in (0, 4, 64, 4096, 3 + 64 * 64)),
        {"samples": (4, 4)},
        {"samples": (1 << 20, 4)},
        {"seed": 2, "step": 1},
        {"step": 3, "site": 2},
    ],
    ids=str,
)
def test_other_counters_give_an_independent_mask(change):
    share, error = agreement(kept(p=0.5), kept(p=0.5, **change))
    assert abs(share - 0.5) < 4.5 * error


def test_samples_are_independent_of_each_other():
    signs = kept(samples=(0, 64), p=0.5).double() * 2 - 1
    correlation = signs @ signs.T / SIZE
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 5.5 / SIZE**0.5  # of 2016 pairs, each of standard error 1 / sqrt(SIZE)


def test_elements_are_independent_of_each_other():
    signs = kept(samples=(0, 4096), size=64, p=0.5).double() * 2 - 1
    correlation = signs.T @ signs / 4096
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 5.5 / 4096**0.5


def test_every_element_and_every_sample_has_the_right_rate():
    drawn = kept(samples=(0, 2048), size=512, p=0.25).double()
    for over, count in ((0, 2048), (1, 512)):
        assert ((drawn.mean(over) - 0.75).abs() < 5.5 * (0.1875 / count) ** 0.5).all()


def test_pairs_of_neighbours_take_all_four_values_equally_often():
    drawn = kept(samples=(0, 256), p=0.5).long()
    for pairs in (2 * drawn[:, 1:] + drawn[:, :-1], 2 * drawn[1:] + drawn[:-1]):
        shares = torch.bincount(pairs.flatten(), minlength=4) / pairs.numel()
        assert ((shares - 0.25).abs() < 5 * (0.1875 / pairs.numel()) ** 0.5).all()


def test_a_window_of_the_samples_is_a_window_of_the_mask():
    whole = mask(samples=(0, 10))
    assert torch.equal(mask(samples=(3, 4)), whole[3:7])


def test_fewer_elements_are_the_first_ones():
    # A block that computes only its first rows draws what the whole block would have drawn for them.
    assert torch.equal(mask(size=100), mask()[:, :100])
    assert torch.equal(mask(size=100, samples=None), mask(samples=None)[:100])


def test_a_higher_probability_drops_more_of_the_same():
    low, high = kept(p=0.2), kept(p=0.6)
    assert (low | ~high).all()


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_the_mask_carries_no_gradient(kind):
    assert not mask(dtype=kind).requires_grad


def test_counters_are_tensors_under_compile():
    calls = []

    def backend(graph, _inputs):
        calls.append(graph)
        return graph.forward

    compiled = torch.compile(dropout_mask, backend=backend, fullgraph=True)
    for step in range(4):
        arguments = (torch.tensor(1), torch.tensor(step), 3, (0, 4), 64, 0.3, torch.float32)
        assert torch.equal(compiled(*arguments), dropout_mask(*arguments))
    assert len(calls) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device to compare with")
def test_devices_draw_the_same():
    counters = [torch.tensor(1, device="cuda"), torch.tensor(2, device="cuda")]
    drawn = dropout_mask(*counters, 3, (0, 4), SIZE, 0.3, torch.float32)
    assert torch.equal(drawn.cpu(), mask())
