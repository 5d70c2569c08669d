"""What the on-device program concludes from results: what is proven, and how the goals stand. Made-up results."""

from __future__ import annotations

import pytest

from bench.device_parts import acceptance, proof
from bench.device_parts.rows import Results, failed

CHIP = ("cuda", 90)


def verified(operator: str, backend: str, passed: bool = True) -> dict[str, dict]:
    kinds = ("bfloat16", "float16", "float32")
    return {f"operator/{operator}/{backend}/{kind}/a case": {"passed": passed} for kind in kinds}


def timed(operator: str, **milliseconds: float) -> dict[str, dict]:
    """A problem with forward and both passes of each backend; the forward pass takes a third."""
    variants = {
        name.replace("_", ":"): {
            "passed": True,
            "forward": {"median_ms": both / 3},
            "both": {"median_ms": both},
        }
        for name, both in milliseconds.items()
    }
    return {f"{operator}/bfloat16/a problem": {"variants": variants}}


def concluded(verify: dict, ops: dict, chip=CHIP) -> list[str]:
    return proof.lines(Results({"verify": verify, "ops": ops}, chip))


def test_right_and_faster_everywhere_is_proven_the_faster_first():
    rows = verified("prompt_attention", "triton") | verified("prompt_attention", "cuda")
    lines = concluded(rows, timed("prompt_attention", reference=3.0, triton=2.0, cuda=1.0))
    assert lines[-1] == '    ("prompt_attention", "cuda", 90): ("cuda", "triton"),'
    assert eval(f"{{{lines[-1]}}}") == {("prompt_attention", "cuda", 90): ("cuda", "triton")}


def test_one_backend_is_still_a_tuple():
    lines = concluded(verified("layer_norm", "triton"), timed("layer_norm", reference=3.0, triton=2.0))
    assert eval(f"{{{lines[-1]}}}") == {("layer_norm", "cuda", 90): ("triton",)}


@pytest.mark.parametrize(
    ("verify", "ops", "reason"),
    [
        (verified("adapter", "triton", False), timed("adapter", reference=3.0, triton=1.0), "1 of 1 cases in bfloat16"),
        (verified("adapter", "triton"), timed("adapter", reference=1.0, triton=1.1), "slower than the reference in 1"),
        (verified("adapter", "triton"), timed("adapter", reference=1.0), "not timed"),
        (
            {"operator/adapter/triton/float32/a": {"passed": True}},
            timed("adapter", reference=3.0, triton=1.0),
            "no case verified in bfloat16",
        ),
        (
            verified("adapter", "triton") | {"operator/adapter/triton/float32/b": {"error": "a crash"}},
            timed("adapter", reference=3.0, triton=1.0),
            "1 of 2 cases in float32 wrong or failed",
        ),
    ],
)
def test_what_is_missing_for_a_proof_is_told(verify, ops, reason):
    lines = concluded(verify, ops)
    assert lines[-1] == "no line for fastpeft/ops/proven.py yet"
    assert reason in lines[0] and lines[0].startswith("not proven: adapter, triton")


def test_a_case_that_is_refused_is_no_counterexample():
    rows = verified("mlp", "cuda") | {"operator/mlp/cuda/float32/b": {"unavailable": "too wide"}}
    assert '("mlp", "cuda", 90): ("cuda",)' in concluded(rows, timed("mlp", reference=3.0, cuda=1.0))[-1]


def test_a_format_that_is_refused_is_no_counterexample_unless_it_is_the_one_that_is_timed():
    ops = timed("mlp", reference=3.0, cuda=1.0)
    refused = {"unavailable": "float32 is not one of float16 and bfloat16"}
    rows = verified("mlp", "cuda") | {"operator/mlp/cuda/float32/a case": refused}
    assert '("mlp", "cuda", 90): ("cuda",)' in concluded(rows, ops)[-1]
    rows |= {"operator/mlp/cuda/bfloat16/a case": refused}
    assert "no case verified in bfloat16" in concluded(rows, ops)[0]


def test_only_the_variant_that_users_get_is_proven():
    rows = verified("mlp", "triton:fused") | verified("mlp", "triton:beside")
    lines = concluded(rows, timed("mlp", reference=3.0, triton_fused=1.0, triton_beside=2.0))
    assert "mlp, triton:fused: the default of this chip is beside" in lines[0]
    assert lines[-1].endswith('("triton",),')


def test_interpreted_kernels_and_runs_in_little_prove_nothing():
    rows, ops = verified("mlp", "triton"), timed("mlp", reference=3.0, triton=1.0)
    assert "interpreted" in concluded(rows, ops, ("cpu", 3))[0]
    assert concluded(rows, ops, ("cpu", 3))[-1] == "no line for fastpeft/ops/proven.py yet"
    assert len(concluded(rows, ops, None)) == 1


def goals(parts: dict, chip=CHIP) -> dict[str, str]:
    lines = acceptance.table(Results(parts, chip)).splitlines()
    start = lines[0].index("measured")
    return {line[:40].strip(): line[start:] for line in lines[1:-1]}


def step(median: float, memory: float | None = None, **more: float) -> dict[str, float]:
    found = {"median_ms": median, **more}
    return found if memory is None else found | {"total_bytes": memory, "reserved_bytes": 2 * memory}


def test_goals_name_the_variant_and_pair_like_memory_with_like():
    base = "vit_base_patch16_224-224px/b64/bfloat16"
    compiled = {"median_ms": 40.0, "reserved_bytes": 4e9}
    parts = {
        "steps": {
            f"{base}/train/vpt-deep-200-batch-mask": {
                "variants": {"triton": step(20.0, 1e9), "reference": step(30.0, 1e9), "literal": step(90.0, 4e9)}
            },
            f"{base}/train/own": {
                "variants": {"vpt-deep-200-batch-mask triton": step(11.0), "vpt-deep-1 triton": step(10.0)}
            },
            "vit_huge_patch14_224-224px/b64/bfloat16/train/full": {
                "variants": {"triton": step(500.0, of_gemm_ceiling=0.7)}
            },
        },
        "compiled": {
            f"{base}/train/vpt-deep-200-batch-mask": {
                "variants": {"triton": step(20.0, 1e9), "literal-compiled": compiled}
            },
            f"{base}/inference/vpt-deep-200": {
                "variants": {"triton-merged": step(9.0), "plain-compiled": step(10.0), "plain": step(15.0)}
            },
        },
    }
    found = goals(parts)
    assert found["VPT-Deep p=200, batch mask, against lite"] == (
        "literal: 4.50x as fast, 0.25x total memory (triton); "
        "literal-compiled: 2.00x as fast, 0.50x reserved memory (triton)"
    )
    assert found["VPT-Deep p=200, batch mask, against own"] == "1.10x (triton)"
    assert found["Fraction of the measured GEMM ceiling, V"] == "full 0.70 (triton)"
    assert found["Inference p=200 merged against the plain"] == "0.90x (triton-merged)"
    assert found["LoRA against own VPT p=1"] == "not measured"


def test_other_batches_and_devices_do_not_count_for_the_goals():
    row = {"variants": {"triton": step(1.0, 1.0), "literal": step(9.0, 9.0)}}
    parts = {"steps": {"vit_base_patch16_224-224px/b256/bfloat16/train/vpt-deep-200-batch-mask": row}}
    assert set(goals(parts).values()) == {
        "not measured",
        "literal: not measured; literal-compiled: not measured",
        "peft: not measured; peft-compiled: not measured",
    }
    parts = {"steps": {"vit_base_patch16_224-224px/b64/bfloat16/train/vpt-deep-200-batch-mask": row}}
    assert "literal: not measured" in goals(parts, ("cpu", 3))["VPT-Deep p=200, batch mask, against lite"]


def test_goals_say_whether_what_is_fast_was_shown_to_be_right():
    last = acceptance.table(Results({"verify": {"a": {"passed": True}, "b": {"passed": False}}}, CHIP)).splitlines()[-1]
    assert last == "verify: 1 rows right, 1 wrong, 0 failed"
    assert "not run" in acceptance.table(Results({}, CHIP)).splitlines()[-1]


def test_a_row_fails_by_its_variants_too():
    assert failed({"variants": {"triton": {"error": "a crash"}}})
    assert failed({"passed": False})
    assert not failed({"variants": {"liger": {"unavailable": "not installed"}}, "passed": True})
