"""What methods refuse, and how they are written down and read back."""

from __future__ import annotations

import json

import pytest
import torch

import fastpeft
from fastpeft import MethodError
from fastpeft.methods import REGISTRY, from_dict
from tests.tiny import METHODS, vit

NO_COUNT = (0, -1, 1.5, "3", True, None)
NO_RATE = (-0.1, 1.0, 2, "0.1", True, float("nan"))
NO_FLAG = (1, "yes", None)
NO_STACKS = ((), [], "", (1,), 5, ("text", None), ("text", "text"), {"text": 1}, [["text"]])

BAD = {
    ("VPT", "length"): NO_COUNT,
    ("VPT", "deep"): NO_FLAG,
    ("VPT", "dropout"): NO_RATE,
    ("VPT", "dropout_mask"): ("image", None, 1),
    ("VPT", "depth"): (3, (1,), (0, 2), (2, 1), (1, 2, 3), ("1", "2"), (1.0, 2.0), "12"),
    ("VPT", "share"): ("some", True, 1),
    ("VPT", "init"): ("ones", None, 0.1, [0.1], "start.npy"),
    ("VPT", "trained"): NO_FLAG,
    ("PrefixTuning", "length"): NO_COUNT,
    ("PrefixTuning", "form"): ("kvs", None, ["kv"]),
    ("PrefixTuning", "mlp"): (0, -1, 1.5, "8", True),
    ("LoRA", "rank"): NO_COUNT,
    ("LoRA", "alpha"): (0, -1, "8", True, float("nan"), float("inf")),
    ("LoRA", "targets"): ((), ("q", "q"), 5, (1, 2), [["q"]], None),
    ("LoRA", "dropout"): (*NO_RATE, None),
    ("LoRA", "cross"): NO_FLAG,
    ("LoRA", "heads"): ("own", None, 12, ["each"]),
    ("PromptTuning", "length"): NO_COUNT,
    ("Classifier", "part"): (None, 1, ["head"], True),
    ("Adapter", "reduction"): NO_COUNT,
    ("Adapter", "init"): ("zero", None),
    ("SerialAdapter", "hidden"): NO_COUNT,
    ("SerialAdapter", "bias"): NO_FLAG,
    ("SerialAdapter", "locations"): ((), ("mlp",), ("attn", "mlp"), 5, None, "attention"),
    ("ParallelAdapter", "hidden"): NO_COUNT,
    ("ParallelAdapter", "bias"): NO_FLAG,
    ("ParallelAdapter", "skip"): NO_FLAG,
    ("ParallelAdapter", "scale"): ("1", None, True, float("nan"), float("inf")),
    ("ParallelAdapter", "locations"): ((), ("mlp",), 5),
    ("Partial", "k"): NO_COUNT,
    ("MLPHead", "k"): (*NO_COUNT, 1),
    ("MLPHead", "dropout"): (*NO_RATE, None),
    **{(cls.__name__, "stacks"): NO_STACKS for cls in REGISTRY.values()},
}


def kind(name):
    return getattr(fastpeft, name)


def needed(name):
    return {"length": 4} if name in ("VPT", "PrefixTuning", "PromptTuning") else {}


@pytest.mark.parametrize("name, field", BAD)
def test_bad_values_are_named(name, field):
    for value in BAD[name, field]:
        with pytest.raises(MethodError) as caught:
            kind(name)(**{**needed(name), field: value})
        assert str(caught.value).startswith(f"{name}: "), value
        assert field in str(caught.value), value


def test_no_field_is_left_untested():
    import dataclasses

    fields = {(cls.__name__, f.name) for cls in REGISTRY.values() for f in dataclasses.fields(cls)}
    assert {f for f in fields if f[0] in {name for name, _ in BAD}} == set(BAD)


def test_fields_that_contradict_each_other():
    with pytest.raises(MethodError, match="deep=False already means depth"):
        fastpeft.VPT(4, deep=False, depth=(1, 2))
    with pytest.raises(MethodError, match="heads='shared' goes with the targets q, k and v, got q, o"):
        fastpeft.LoRA(targets=("q", "o"), heads="shared")
    with pytest.raises(MethodError, match="heads='each' goes with the targets q, k and v, got qkv"):
        fastpeft.LoRA(targets="qkv", heads="each")
    with pytest.raises(MethodError, match="a sum has no stacks of its own, its methods have"):
        fastpeft.methods.base.Methods((fastpeft.LoRA(), fastpeft.BitFit()), stacks=("text",))


def test_one_target_may_be_a_string():
    assert fastpeft.LoRA(targets="qkv").targets == ("qkv",)
    assert fastpeft.SerialAdapter(locations="ffn").locations == ("ffn",)


def test_one_stack_may_be_a_string_and_a_list_is_a_tuple():
    for cls in REGISTRY.values():
        made = cls(**{**needed(cls.__name__), "stacks": "text"})
        assert made.stacks == ("text",)
        assert cls(**{**needed(cls.__name__), "stacks": ["text", "decoder"]}).stacks == ("text", "decoder")
        assert from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize(
    "method, message",
    [
        (fastpeft.LoRA(targets=("q", "w")), r"blocks\.0 has no projection 'w'; it has: qkv, q, k, v, o, fc1, fc2"),
        (fastpeft.Partial(4), r"k=4, but the model has 3 blocks"),
        (fastpeft.Adapter(33), r"reduction 33 leaves no unit at width 32"),
        (fastpeft.VPT(2, depth=(2, 4)), r"depth \(2, 4\) reaches beyond the model's 3 blocks"),
        (fastpeft.LoRA(stacks=("text",)), "has no stack 'text'; its blocks are one stack without a name"),
        (fastpeft.PromptTuning(2), "has no stack here whose input can be prompted; fastpeft.VPT puts"),
        (fastpeft.Classifier(), "has no output layer of that kind; train_head trains a head"),
        (fastpeft.SerialAdapter(8, locations=("cross",)), "no block attends to a memory, as the location"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model(method, message):
    with pytest.raises(MethodError, match=message):
        fastpeft.patch(vit(), method)


def test_roles_that_a_gated_mlp_lacks():
    with pytest.raises(MethodError, match=r"has no projection 'fc1'; it has: qkv, q, k, v, o$"):
        fastpeft.patch(vit("gated_mlp"), fastpeft.LoRA(targets=("q", "fc1")))


def test_a_head_without_a_classifier():
    with pytest.raises(MethodError, match="no head; create it with num_classes > 0"):
        fastpeft.patch(vit(num_classes=0), fastpeft.MLPHead(3))


@pytest.mark.parametrize("method", METHODS)
def test_written_as_json_and_read_back(method):
    written = json.loads(json.dumps(METHODS[method].to_dict()))
    assert from_dict(written) == METHODS[method]


def test_an_initial_tensor_is_written_as_zeros_of_the_same_shape():
    method = fastpeft.VPT(4, init=torch.ones(4, 32))
    assert from_dict(json.loads(json.dumps(method.to_dict()))) == fastpeft.VPT(4, init="zero")


@pytest.mark.parametrize(
    "data, message",
    [
        ({"name": "vptt", "length": 4}, r"unknown method 'vptt' \(did you mean 'vpt'\?\); known: adapter, bitfit,"),
        (
            {"name": "lora", "ranks": 4},
            r"no field 'ranks' \(did you mean 'rank'\?\); it has: alpha, cross, dropout, heads, rank, stacks, targets",
        ),
        ({"name": "vpt"}, r"method 'vpt': missing 1 required positional argument: 'length'"),
        ({"name": "linear", "k": 3}, r"no field 'k'.* it has: stacks"),
        ({"length": 4}, r"a method is a mapping with a name"),
        ("vpt", r"a method is a mapping with a name"),
        ({"name": "vpt", "length": 0}, r"VPT: length must be"),
        ({"name": None}, r"unknown method None"),
        ({"name": ["vpt"]}, r"unknown method \['vpt'\]"),
        ([], r"at least one"),
    ],
    ids=str,
)
def test_bad_descriptions(data, message):
    with pytest.raises(MethodError, match=message):
        from_dict(data)


def test_sums():
    total = fastpeft.VPT(4) + fastpeft.LoRA(2) + fastpeft.BitFit()
    assert [part.name for part in total.parts()] == ["vpt", "lora", "bitfit"]
    assert (fastpeft.VPT(4) + (fastpeft.LoRA(2) + fastpeft.BitFit())).parts() == total.parts()
    assert from_dict([fastpeft.VPT(4).to_dict()]) == fastpeft.VPT(4)
    with pytest.raises(MethodError, match="each method once, got vpt more than once"):
        fastpeft.VPT(4) + fastpeft.VPT(5)
    with pytest.raises(TypeError):
        fastpeft.VPT(4) + 3


def test_methods_are_values():
    method = fastpeft.LoRA(8, targets=["q", "v"])
    assert method == fastpeft.LoRA() and hash(method) == hash(fastpeft.LoRA())
    with pytest.raises(AttributeError):
        method.rank = 4
