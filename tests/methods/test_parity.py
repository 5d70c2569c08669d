"""Every method on every kind of vision transformer: the patched model is the literal one, but for rounding."""

from __future__ import annotations

import pytest
import torch

import fastpeft
from tests.thinned import paired, thinned
from tests.tiny import FEW, METHODS, VARIANTS, fits
from tests.twins import assert_same_step, measure

EVERYWHERE = [pytest.param(v, m, id=f"{v}-{m}") for v in VARIANTS for m in METHODS if fits(METHODS[m], v)]
ELSEWHERE = [p for p in EVERYWHERE if p.values[0] != "class_token" and p.values[1] in FEW]
TYPES = {
    "float32": (torch.float32, False, 1e-4),
    "bfloat16": (torch.bfloat16, False, 0.2),
    "autocast": (torch.float32, True, 0.2),
}


@pytest.mark.parametrize("variant, method", thinned(EVERYWHERE, 5))
def test_logits_and_gradients_in_float64(variant, method):
    assert_same_step(METHODS[method], variant, training=True)
    if variant == "class_token" or method in FEW:
        assert_same_step(METHODS[method], variant, training=False)


@pytest.mark.parametrize("method", [METHODS["vpt-deep"], METHODS["lora-dropout"], METHODS["prefix+adapter"]], ids=str)
@pytest.mark.parametrize(
    "options", [{"depth": 1}, {"depth": 4, "num_heads": 4}, {"num_heads": 1}, {"img_size": 8}], ids=str
)
def test_other_sizes(method, options):
    resolution = {"dynamic_img_size": True} if "img_size" in options else {}
    assert_same_step(method, "class_token", True, batch=1, **options, **resolution)


@pytest.mark.parametrize("mask", ["sample", "batch"])
@pytest.mark.parametrize("depth", [None, (1, 2), (2, 3)], ids=str)
def test_prompts_beside_low_rank_dropout(mask, depth):
    # Each row of each sample has its own mask then, prompt rows too, and both models must give it to the same row.
    prompts = fastpeft.VPT(4, dropout=0.2, dropout_mask=mask, depth=depth)
    for training in (True, False):
        assert_same_step(prompts + METHODS["lora-dropout"], "registers", training)


def test_sums_do_not_depend_on_the_order_of_independent_parts():
    for method in (fastpeft.LoRA(2) + fastpeft.VPT(4), fastpeft.Adapter(8) + fastpeft.PrefixTuning(4)):
        assert_same_step(method, "class_token", True)


@pytest.mark.parametrize("method, kind", paired([*METHODS], [*TYPES]))
def test_rounding_errors_are_at_most_twice_the_literal_models(kind, method):
    _check_errors(kind, "class_token", method)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant, method, kind",
    [(*pair.values, [*TYPES][number % len(TYPES)]) for number, pair in enumerate(ELSEWHERE)],
)
def test_rounding_errors_on_other_variants(variant, method, kind):
    _check_errors(kind, variant, method)


@pytest.mark.parametrize("method, kind", paired([*METHODS], ["float32", "bfloat16"]))
def test_rounding_errors_in_evaluation_mode(kind, method):
    _check_errors(kind, "class_token", method, training=False)


def _check_errors(kind, variant, method, training=True):
    dtype, autocast, cap = TYPES[kind]
    # Normalisation by the statistics of eight images amplifies any rounding as it likes: hidden layers of a head are
    # compared with their running statistics.
    training = training and not any(part.name == "mlp_head" for part in METHODS[method].parts())
    # Four models' errors may be luck, where a ReLU's input changes its sign in one alone: then more decide.
    for draws in (4, 32):
        errors = measure(METHODS[method], variant, dtype, training, autocast=autocast, draws=draws)
        assert len(errors) > 1
        # What a weak method adds to the logits may be few roundings of them, so the cap on it is its own size.
        caps = dict.fromkeys(errors, cap) | {"contribution": 1.0}
        wrong = {name: pair for name, pair in errors.items() if not pair[0] <= min(2 * pair[1], caps[name])}
        if not wrong:
            return
    assert not wrong, "relative errors (patched, literal) against float64"


def test_the_comparison_finds_a_wrong_factor(monkeypatch):
    from fastpeft.engine.extensions import LowRanks

    right = LowRanks.term

    def forgetful(self, *args):
        term = right(self, *args)
        return term and term._replace(scale=1.0)

    monkeypatch.setattr(LowRanks, "term", forgetful)
    with pytest.raises(AssertionError):
        assert_same_step(fastpeft.LoRA(2, alpha=3), "class_token", True)
    with pytest.raises(AssertionError):
        errors = measure(fastpeft.LoRA(2, alpha=3), "class_token", torch.bfloat16, True)
        assert all(pair[0] <= 2 * pair[1] for pair in errors.values())


def test_every_run_has_each_method_and_each_variant():
    usual = [case.values for case in thinned(EVERYWHERE, 5) if not case.marks]
    assert {variant for variant, _ in usual} == set(VARIANTS)
    assert {method for _, method in usual} == set(METHODS)
