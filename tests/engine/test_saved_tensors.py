"""What a training step keeps for the backward pass, by the list of saved tensors and their bytes.

Sizes are distinct, so that a shape says what it is: 2 images, 17 rows, width 32, 2 heads of 16, 128 hidden units, 4
prompts, rank 3, adapters 5 wide.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import fastpeft
from fastpeft import _native
from tests.tiny import DIM, METHODS, images, labels, patched, randomise, vit

ROW = (2, 17, 32)
UNIT = 2 * 17 * 32 * 4  # bytes of one activation of the block's width
HEADS, HIDDEN, STATISTIC, LOG_SUM = (2, 2, 17, 16), (2, 17, 128), (2, 17, 1), (2, 2, 17)
NORM = [ROW, STATISTIC, STATISTIC]  # LayerNorm: its input, mean and deviation
FLAT = (34, 32)  # a product's input: saved for the gradient of a trained factor only

# A frozen block: the two norms' inputs, q, k, v, attention's output and log-sum-exp, the activation's input. No input
# of the four frozen products is among them, except attention's output, which its own backward needs.
FROZEN = [*NORM, HEADS, HEADS, HEADS, HEADS, LOG_SUM, *NORM, HIDDEN]
FROZEN_BYTES = 2 * UNIT + 3 * UNIT + UNIT + 4 * UNIT + 4 * (2 * 17 * 4) + 2 * 2 * 17 * 4


@dataclass
class Saved:
    """What a forward saved: parameters by name, anything else by shape."""

    parameters: Counter
    shapes: Counter
    bytes: int
    others: list[Tensor]


def saved(model: nn.Module, call) -> Saved:
    """Run `call()` and list what it saves for the backward pass; bytes count every storage once, parameters' none."""
    owners = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters()}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    own = [t for t in kept if t.untyped_storage().data_ptr() in owners]
    others = [t for t in kept if t.untyped_storage().data_ptr() not in owners]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in others}
    return Saved(
        Counter(owners[t.untyped_storage().data_ptr()] for t in own),
        Counter(tuple(t.shape) for t in others),
        sum(storages.values()),
        others,
    )


def block_step(method, index: int = 1, first: bool = False, rows: int | None = None) -> Saved:
    """One forward of one block; the first block's input needs no gradient."""
    model = patched(method).train()
    x = torch.randn(ROW, requires_grad=not first)
    return saved(model, lambda: model.blocks[index](x, rows=rows))


@pytest.fixture(autouse=True)
def plain_operators(monkeypatch):
    """What a native operator saves is laid out otherwise; `test_native_operators_save_no_more` counts it."""
    monkeypatch.setenv("FASTPEFT_BACKEND", "reference")


def shapes(*expected) -> Counter:
    """The shapes as a bag."""
    return Counter(expected)


def test_a_frozen_block_saves_nothing_before_the_first_trained_parameter():
    for method in (fastpeft.Linear(), fastpeft.MLPHead(2), fastpeft.Partial(1)):
        found = block_step(method, index=0, first=True)
        assert not found.parameters and not found.shapes and found.bytes == 0


def test_a_frozen_block_in_the_way_of_a_gradient():
    found = block_step(fastpeft.Linear())
    assert found.shapes == shapes(*FROZEN)
    assert found.bytes == FROZEN_BYTES
    block = "blocks.1."
    assert found.parameters == Counter(
        [
            *(block + f"{norm}.{part}" for norm in ("norm1", "norm2") for part in ("weight", "bias")),
            *(block + f"{layer}.weight" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
        ]
    )


def test_bitfit_saves_no_more_than_a_frozen_block():
    found = block_step(fastpeft.BitFit())
    assert found.shapes == shapes(*FROZEN)
    assert found.bytes == FROZEN_BYTES


def test_lora_saves_its_input_and_its_inner_rows():
    """The input of the fused projection, and rank numbers a row."""
    found = block_step(fastpeft.LoRA(3, targets=("qkv",)))
    assert found.shapes == shapes(*FROZEN, FLAT, (34, 3))
    assert found.bytes == FROZEN_BYTES + UNIT + 34 * 3 * 4


def test_lora_on_some_slices_keeps_q_k_v_in_one_tensor():
    """Terms are added in place: no second copy of the slices beside the one that a slice without a term keeps alive."""
    found = block_step(fastpeft.LoRA(3, targets=("q", "v")))
    factors = (6 * 32 + 96 * 6) * 4  # A stacked, and B with zeros in k's columns
    assert found.bytes == FROZEN_BYTES + UNIT + 34 * 6 * 4 + factors


def test_lora_on_the_output_projection_saves_its_inner_rows_only():
    """Its input is attention's output, which is there anyway."""
    found = block_step(fastpeft.LoRA(3, targets=("o",)))
    assert found.shapes == shapes(*FROZEN, FLAT, (34, 3))
    assert found.bytes == FROZEN_BYTES + 34 * 3 * 4


def test_lora_on_the_second_mlp_layer_saves_the_activation():
    found = block_step(fastpeft.LoRA(3, targets=("fc2",)))
    assert found.shapes == shapes(*FROZEN, (34, 128), (34, 3))
    assert found.bytes == FROZEN_BYTES + 4 * UNIT + 34 * 3 * 4


def test_an_adapter_saves_its_input_and_its_hidden_rows():
    found = block_step(fastpeft.SerialAdapter(5, locations=("ffn",)))
    # ReLU is undone from its output, which is the up-projection's input.
    assert found.shapes == shapes(*FROZEN, FLAT, (2, 17, 5), (34, 5))
    assert found.bytes == FROZEN_BYTES + UNIT + 34 * 5 * 4


def test_the_vpt_papers_adapter_saves_its_input_and_its_hidden_rows():
    found = block_step(fastpeft.Adapter(8))
    assert found.shapes == shapes(*FROZEN, FLAT, (2, 17, 4), (34, 4))
    assert found.bytes == FROZEN_BYTES + UNIT + 2 * 34 * 4 * 4


def test_prompts_save_their_own_rows_once_a_batch():
    """Keys and values are 21 rows long; the prompts' norm is saved for 4 rows, not for 4 a sample."""
    found = block_step(fastpeft.VPT(4, dropout=0.0))
    longer = (2, 2, 21, 16)
    frozen = Counter(FROZEN) - Counter({HEADS: 2})
    assert found.shapes == frozen + shapes(longer, longer, (4, 1), (4, 1))
    # The tokens' q lies in a tensor of its own; of k and v only the copies beside the prompts' are kept.
    assert found.bytes == FROZEN_BYTES - 2 * UNIT + 2 * 2 * 2 * 21 * 16 * 4 + 2 * 4 * 4
    assert found.parameters["blocks.1.vpt.prompts"] == 1


def test_the_first_blocks_tokens_need_no_gradient():
    """Only the prompts' rows go through norm and projection backward; no norm of token rows is saved."""
    found = block_step(fastpeft.VPT(4, dropout=0.0), index=0, first=True)
    inside = block_step(fastpeft.VPT(4, dropout=0.0))
    assert inside.shapes - found.shapes == shapes(*NORM)
    assert not found.shapes - inside.shapes


def test_the_last_block_saves_the_read_out_row_only():
    """One query and one row of the MLP; keys and values of all rows."""
    found = block_step(fastpeft.LoRA(3, targets=("fc1",)), index=2, rows=1)
    assert found.shapes == shapes(
        *NORM, HEADS, HEADS, (2, 2, 1, 16), (2, 2, 1, 16), (2, 2, 1), (2, 1, 32), (2, 1, 1), (2, 1, 1), (2, 1, 128),
        (2, 32), (2, 3),
    )  # fmt: skip


@pytest.mark.skipif(_native.library() is None, reason=f"the native library is {_native.status()}")
@pytest.mark.parametrize("method", ("linear", "bitfit", "lora-qkv", "vpt-deep", "vpt-deep-batch-mask", "prefix-kv"))
def test_native_operators_save_no_more(method, monkeypatch):
    plain = block_step(METHODS[method])
    for operator in ("PROMPT_ATTENTION", "LAYER_NORM"):
        monkeypatch.setenv(f"FASTPEFT_BACKEND_{operator}", "cpu")
    assert block_step(METHODS[method]).bytes <= plain.bytes


def frozen_tensors(model: nn.Module) -> list[Tensor]:
    """The frozen parameters, flat and sorted, so that any copy or transpose of one is equal to it."""
    return [p.detach().flatten().sort().values for p in model.parameters() if not p.requires_grad and p.numel() > DIM]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_no_copy_of_a_frozen_weight_is_saved(name, half):
    """What is saved of a frozen parameter is its own storage, also where fp32 masters meet a bf16 backbone."""
    dtype = torch.bfloat16 if half else torch.float32
    model = randomise(fastpeft.patch(vit(dtype=dtype), METHODS[name])).train()
    x = images(batch=2, dtype=dtype)
    found = saved(model, lambda: nn.functional.cross_entropy(model(x), labels(2)))
    frozen = frozen_tensors(model)
    for tensor in found.others:
        values = tensor.detach().flatten().sort().values
        assert not any(values.shape == f.shape and torch.equal(values, f) for f in frozen), tuple(tensor.shape)


@pytest.mark.parametrize("name", ["linear", "mlp-3", "partial-1", "vpt-last-two"])
def test_blocks_before_the_first_trained_parameter_save_nothing(name):
    model = patched(METHODS[name]).train()
    found = saved(model, lambda: model(images(batch=2)))
    first = {"linear": 3, "mlp-3": 3, "partial-1": 2, "vpt-last-two": 1}[name]
    blocks = {int(parameter.split(".")[1]) for parameter in found.parameters if parameter.startswith("blocks.")}
    assert blocks == set(range(first, 3))


def test_a_step_of_peft_lora_saves_less_when_patched():
    """peft keeps the scaled product beside its factors, and every row of the last block."""
    peft = pytest.importorskip("peft")
    counts = []
    for prepare in (lambda m: m, fastpeft.patch):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=3, target_modules=["qkv", "attn.proj", "fc1", "fc2"])
        model = prepare(peft.get_peft_model(vit(), config))
        counts.append(saved(model, lambda m=model: m(images(batch=2))).bytes)
    assert counts[1] < counts[0]
