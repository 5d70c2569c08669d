"""Visual prompts: where they start, which blocks they enter, who shares them, and their dropout."""

from __future__ import annotations

import pytest
import torch

import fastpeft
from fastpeft import VPT, MethodError
from tests.tiny import DIM, images, patched, timm, vit
from tests.twins import assert_same_step


def prompts(model):
    return {i: b.vpt.prompts for i, b in enumerate(model.blocks) if "vpt" in b._modules}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("prompts", [{"deep": False}, {"depth": (1, 2)}, {"depth": (2, 2)}, {"depth": (2, 3)}], ids=str)
@pytest.mark.parametrize("length", [4, 3])
def test_other_rows_may_be_attached_before_prompts_that_are_carried_on(prompts, length, training):
    prompts, rows = VPT(4, dropout=0.3, **prompts), fastpeft.PrefixTuning(length, form="hidden")
    assert_same_step(rows + prompts, "class_token", training)
    assert_same_step(prompts + rows, "class_token", training)


def test_other_rows_beside_prompts_that_are_carried_on_in_intermediates():
    rows, carried = fastpeft.PrefixTuning(4, form="hidden"), VPT(4, deep=False)
    x = images(dtype=torch.float64)
    one, other = (patched(method, dtype=torch.float64).eval() for method in (rows + carried, carried + rows))
    other.load_state_dict(one.state_dict())
    found, expected = one.forward_intermediates(x), other.forward_intermediates(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_rows_that_are_carried_on_must_be_there():
    class Early(VPT):
        name = ""

        def attach(self, model):
            model.carry(0, 2, self.length)

    with pytest.raises(MethodError, match=r"blocks\.0 inserts no 4 prompt rows to carry on; attach them before"):
        fastpeft.patch(vit(), Early(4))


@pytest.mark.parametrize("name, bound", [("vit_base_patch16_224", 0.0625), ("vit_large_patch16_224", 0.0579)])
def test_start_within_the_papers_bound(name, bound):
    model = fastpeft.patch(timm.create_model(name, depth=2), VPT(200))
    for tensor in prompts(model).values():
        assert tensor.shape == (200, model.embed_dim)
        assert tensor.abs().max() <= bound + 5e-5
        assert tensor.abs().max() > 0.995 * bound
        assert tensor.mean().abs() < 0.001
        assert abs(tensor.std() / (bound / 3**0.5) - 1) < 0.01


def test_bound_of_the_huge_model_and_of_other_patches():
    model = fastpeft.patch(timm.create_model("vit_huge_patch14_224", depth=1), VPT(50))
    assert 0.0560 < prompts(model)[0].abs().max() <= 0.05675
    grey = fastpeft.patch(vit(in_chans=1), VPT(200))
    assert prompts(grey)[0].abs().max() <= (6 / (64 + DIM)) ** 0.5


def test_every_block_draws_its_own():
    model = fastpeft.patch(vit(), VPT(4))
    assert not torch.equal(prompts(model)[0], prompts(model)[1])


@pytest.mark.parametrize(
    "method, blocks",
    [
        (VPT(4), [0, 1, 2]),
        (VPT(4, deep=False), [0]),
        (VPT(4, depth=(1, 1)), [0]),
        (VPT(4, depth=(1, 2)), [0, 1]),
        (VPT(4, depth=(2, 3)), [1, 2]),
        (VPT(4, depth=[3, 3]), [2]),
    ],
    ids=str,
)
def test_depth(method, blocks):
    model = fastpeft.patch(vit(), method)
    assert list(prompts(model)) == blocks
    carried = [b.fastpeft_block.carry_out for b in model.blocks]
    # The last inserted prompts go on as ordinary rows, but nobody reads them behind the last block.
    assert carried == [4 if blocks[-1] <= i < 2 else 0 for i in range(3)]


@pytest.mark.parametrize("depth", [(1, 4), (4, 4), (2, 9)])
def test_depth_beyond_the_model(depth):
    model = vit()
    with pytest.raises(MethodError, match=r"depth .* reaches beyond the model's 3 blocks"):
        fastpeft.patch(model, VPT(4, depth=depth))


@pytest.mark.parametrize("share, rows, distinct", [(None, 4, 3), ("intra", 1, 3), ("inter", 4, 1), ("all", 1, 1)])
def test_sharing(share, rows, distinct):
    model = fastpeft.patch(vit(), VPT(4, share=share, dropout=0.0)).eval()
    found = prompts(model)
    assert [tuple(p.shape) for p in found.values()] == [(rows, DIM)] * 3
    assert len({id(p) for p in found.values()}) == distinct
    count = sum(p.numel() for name, p in fastpeft.parameter_groups(model)["vpt"])
    assert count == rows * DIM * distinct
    # Sharing is a constraint on the values: the same values unshared are the same function.
    free = fastpeft.patch(vit(), VPT(4, dropout=0.0)).eval()
    with torch.no_grad():
        for index, tensor in prompts(free).items():
            tensor.copy_(found[index].expand(4, -1))
    torch.testing.assert_close(free(images()), model(images()))


def test_sharing_survives_an_optimizer_and_a_copy():
    import copy

    model = fastpeft.patch(vit(), VPT(4, share="inter"))
    twin = copy.deepcopy(model)
    assert len({id(p) for p in prompts(twin).values()}) == 1
    assert prompts(twin)[0] is not prompts(model)[0]


@pytest.mark.parametrize("init", ["uniform", "normal", "zero"])
def test_named_starts(init):
    torch.manual_seed(0)
    first = prompts(fastpeft.patch(vit(), VPT(64, init=init)))[1]
    spread = {"uniform": (6 / (3 * 64 + DIM)) ** 0.5 / 3**0.5, "normal": 0.02, "zero": 0.0}[init]
    assert abs(first.detach().std().item() - spread) <= 0.05 * spread


def test_start_from_a_tensor():
    one, each = torch.randn(4, DIM), torch.randn(3, 4, DIM, dtype=torch.float64)
    model = fastpeft.patch(vit(), VPT(4, init=one))
    for tensor in prompts(model).values():
        assert torch.equal(tensor, one) and tensor.data_ptr() != one.data_ptr()
    model = fastpeft.patch(vit(), VPT(4, init=each))
    for index, tensor in prompts(model).items():
        assert torch.equal(tensor, each[index].float())
    two = fastpeft.patch(vit(), VPT(4, depth=(2, 3), init=each[:2]))
    assert torch.equal(prompts(two)[2], each[1].float())


@pytest.mark.parametrize("shape", [(3, DIM), (4, DIM + 1), (2, 4, DIM), (4 * DIM,), (3, 1, DIM)])
def test_start_from_a_tensor_of_another_shape(shape):
    with pytest.raises(MethodError, match=r"init has shape .*expected \(4, 32\) or \(3, 4, 32\)"):
        fastpeft.patch(vit(), VPT(4, init=torch.zeros(shape)))


def test_start_from_a_file(tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "start.safetensors"
    start = torch.randn(4, DIM)
    save_file({"prompts": start}, file)
    model = fastpeft.patch(vit(), VPT(4, init=str(file), trained=False))
    assert all(torch.equal(tensor, start) and not tensor.requires_grad for tensor in prompts(model).values())
    fastpeft.save(model, tmp_path / "saved")
    file.unlink()
    # The adapter holds the prompts; the file that they came from may go.
    loaded = fastpeft.load(vit(), tmp_path / "saved")
    assert all(torch.equal(tensor, start) and not tensor.requires_grad for tensor in prompts(loaded).values())
    with pytest.raises(MethodError, match=r"init .*start\.safetensors cannot be read"):
        fastpeft.patch(vit(), VPT(4, init=str(file)))
    save_file({"other": start}, file)
    with pytest.raises(MethodError, match="holds other, expected a tensor 'prompts'"):
        fastpeft.patch(vit(), VPT(4, init=str(file)))


def test_prompts_that_are_not_trained():
    model = fastpeft.patch(vit(), VPT(4, trained=False))
    assert set(fastpeft.parameter_groups(model)) == {"head"}
    # Nothing before the head is trained or random, so it is a constant per image.
    assert fastpeft.frozen_prefix(model).start == len(model.blocks) + 1
    assert not torch.equal(fastpeft.patch(vit(), fastpeft.Linear())(images()), model(images()))
    with pytest.raises(MethodError, match="not trained need dropout 0"):
        VPT(4, trained=False, dropout=0.1)


def test_the_class_token_alone():
    model = fastpeft.patch(vit(), fastpeft.ClassToken())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["cls_token", "head.weight", "head.bias"]
    assert fastpeft.frozen_prefix(model) is None
    both = fastpeft.patch(vit("distilled"), fastpeft.ClassToken())
    assert both.cls_token.requires_grad and both.dist_token.requires_grad
    with pytest.raises(MethodError, match="reads no learned token"):
        fastpeft.patch(vit("average_pool"), fastpeft.ClassToken())


@pytest.mark.parametrize("method, rate", [(VPT(4), 0.1), (VPT(4, deep=False), 0.0), (VPT(4, False, 0.2), 0.2)], ids=str)
def test_default_dropout_is_the_papers(method, rate):
    model = fastpeft.patch(vit(), method)
    assert model.blocks[0].vpt.dropout == rate
    assert bool(fastpeft.get_rng_state(model)) == (rate > 0)


def rows(model, batch, block=0):
    """The rows that the latest training forward inserted."""
    extension = model.blocks[block].vpt
    return extension.rows(batch, torch.float32, model.fastpeft_host.noise()).detach()


def test_dropout_per_sample_and_per_batch():
    for mask in ("sample", "batch"):
        model = fastpeft.patch(vit(), VPT(50, dropout=0.25, dropout_mask=mask, init=torch.ones(50, DIM))).train()
        model(images(batch=8))
        drawn = rows(model, 8)
        assert drawn.shape == ((8, 50, DIM) if mask == "sample" else (50, DIM))
        assert drawn.unique().tolist() == pytest.approx([0.0, 4 / 3])
        zeros, count = (drawn == 0).float().mean().item(), drawn.numel()
        assert abs(zeros - 0.25) < 4 * (0.25 * 0.75 / count) ** 0.5
        assert not torch.equal(drawn, rows(model, 8, block=1))
        model(images(batch=8))
        assert not torch.equal(drawn, rows(model, 8))


def test_no_dropout_in_evaluation():
    model = fastpeft.patch(vit(), VPT(4, dropout=0.5)).eval()
    state = fastpeft.get_rng_state(model)
    assert torch.equal(model(images()), model(images()))
    assert fastpeft.get_rng_state(model) == state


def test_a_training_forward_is_a_function_of_the_counter():
    model = fastpeft.patch(vit(), VPT(4, dropout=0.5)).train()
    fastpeft.set_rng_state(model, seed=7, step=3)
    first = model(images())
    assert fastpeft.get_rng_state(model) == {"seed": 7, "step": 4}
    second = model(images())
    assert not torch.equal(first, second)
    fastpeft.set_rng_state(model, step=3)
    assert torch.equal(model(images()), first)
    fastpeft.set_rng_state(model, seed=8, step=3)
    assert not torch.equal(model(images()), first)


def test_a_smaller_batch_draws_the_first_samples_masks():
    model = fastpeft.patch(vit(), VPT(4, dropout=0.5)).train()
    fastpeft.set_rng_state(model, step=0)
    whole = model(images(batch=6))
    fastpeft.set_rng_state(model, step=0)
    torch.testing.assert_close(model(images(batch=6)[:2]), whole[:2])


def test_ranks_draw_different_masks():
    model = fastpeft.patch(vit(), VPT(4, dropout=0.5)).train()
    found = []
    for rank in (0, 1):
        fastpeft.set_rng_state(model, seed=1, step=0, rank=rank)
        found.append(model(images()))
    assert not torch.equal(*found)


def test_models_without_dropout_have_no_counter():
    model = fastpeft.patch(vit(), fastpeft.LoRA(2))
    assert fastpeft.get_rng_state(model) == {}
    fastpeft.set_rng_state(model, seed=1, step=2, rank=3)
