"""The reader of ONNX files against the onnx package."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fastpeft import FastPEFTError
from fastpeft.models._onnx import Node, read_onnx

MATRIX = np.arange(12, dtype=np.float32).reshape(3, 4)


def write(path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"], name="a name"),
        helper.make_node("Add", ["product", "b"], ["y"], axis=1),
    ]
    constants = [
        numpy_helper.from_array(MATRIX, "w"),
        numpy_helper.from_array(np.float32(2.5), "scalar"),
        numpy_helper.from_array(np.zeros((0, 3), np.float32), "empty"),
        numpy_helper.from_array(np.arange(3), "integers"),
        helper.make_tensor("b", TensorProto.FLOAT, [4], np.ones(4, np.float32).tobytes(), raw=True),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 4])]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, constants)
    onnx.save(helper.make_model(graph, producer_name="test"), path)


def test_nodes_and_constants(tmp_path):
    write(tmp_path / "x.onnx")
    graph = read_onnx(tmp_path / "x.onnx")
    assert graph.nodes == (Node("MatMul", ("x", "w"), ("product",)), Node("Add", ("product", "b"), ("y",)))
    assert sorted(graph.tensors) == ["b", "empty", "scalar", "w"], "float32 alone"
    assert np.array_equal(graph.tensors["w"], MATRIX)
    assert np.array_equal(graph.tensors["b"], np.ones(4))
    assert (graph.tensors["scalar"].shape, graph.tensors["empty"].shape) == ((), (0, 3))
    graph.tensors["w"][0, 0] = 1  # the file is closed, the values are the caller's


def test_every_truncation_is_an_error(tmp_path):
    """Or gives everything: what follows the graph, such as the format's version, is not read."""
    write(tmp_path / "x.onnx")
    content = (tmp_path / "x.onnx").read_bytes()
    whole = read_onnx(tmp_path / "x.onnx")
    for length in range(len(content)):
        (tmp_path / "x.onnx").write_bytes(content[:length])
        try:
            graph = read_onnx(tmp_path / "x.onnx")
        except FastPEFTError as error:
            assert "x.onnx: cannot be read as an ONNX file" in str(error)
        else:
            assert graph.nodes == whole.nodes
            assert graph.tensors.keys() == whole.tensors.keys()


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_an_error(tmp_path, seed):
    path = tmp_path / "x.onnx"
    path.write_bytes(np.random.RandomState(seed).bytes(200))
    with pytest.raises(FastPEFTError, match="cannot be read as an ONNX file"):
        read_onnx(path)


def test_damaged_bytes_are_never_another_exception(tmp_path):
    write(tmp_path / "x.onnx")
    content = bytearray((tmp_path / "x.onnx").read_bytes())
    random = np.random.RandomState(0)
    for _ in range(500):
        damaged = content.copy()
        for position in random.randint(len(content), size=3):
            damaged[position] = random.randint(256)
        (tmp_path / "x.onnx").write_bytes(damaged)
        try:
            read_onnx(tmp_path / "x.onnx")
        except FastPEFTError:
            pass
