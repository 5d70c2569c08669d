"""Tensors and wiring of an ONNX file, read without the onnx package.

An ONNX file is one protocol-buffers message. Only the fields below are looked at; the numbers are those of the ONNX
format's published definition.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastpeft.errors import FastPEFTError

_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_OPERATOR = 1, 2, 4
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_FLOAT32 = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation: its operator and the names of the values it reads and writes."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Graph:
    """The operations in order, and the float32 constants by name."""

    nodes: tuple[Node, ...]
    tensors: dict[str, np.ndarray]


def read_onnx(path: Path) -> Graph:
    """Read the float32 constants and the operations of an ONNX file.

    Raises:
        FastPEFTError: The file is not ONNX, or is cut short.
    """
    try:
        return _graph(memoryview(path.read_bytes()))
    # What a damaged message can lead to: wrong lengths, text that is none, a number in place of a message.
    except (OSError, ValueError, IndexError, TypeError, OverflowError) as error:
        raise FastPEFTError(f"{path}: cannot be read as an ONNX file: {error}") from error


def _graph(model: memoryview) -> Graph:
    nodes, tensors = [], {}
    for field, value in _fields(model):
        if field != _MODEL_GRAPH:
            continue
        for part, content in _fields(value):
            if part == _GRAPH_NODE:
                nodes.append(_node(content))
            elif part == _GRAPH_INITIALIZER:
                name, array = _tensor(content)
                if array is not None:
                    tensors[name] = array
    if not nodes:
        raise ValueError("it has no graph")
    return Graph(tuple(nodes), tensors)


def _node(message: memoryview) -> Node:
    found: dict[int, list[str]] = {_NODE_INPUT: [], _NODE_OUTPUT: [], _NODE_OPERATOR: []}
    for field, value in _fields(message):
        if field in found:
            found[field].append(str(value, "utf-8"))
    return Node("".join(found[_NODE_OPERATOR]), tuple(found[_NODE_INPUT]), tuple(found[_NODE_OUTPUT]))


def _tensor(message: memoryview) -> tuple[str, np.ndarray | None]:
    """Name and values; None for values that are not float32 stored as bytes."""
    name, kind, shape, raw = "", 0, [], None
    for field, value in _fields(message):
        if field == _TENSOR_NAME:
            name = str(value, "utf-8")
        elif field == _TENSOR_TYPE:
            kind = value
        elif field == _TENSOR_RAW:
            raw = value
        elif field == _TENSOR_DIMS:
            # One number a field, or all of them packed into one.
            shape += [value] if isinstance(value, int) else _packed(value)
    if kind != _FLOAT32 or raw is None:
        return name, None
    return name, np.frombuffer(raw, dtype="<f4").reshape(shape).copy()


def _packed(data: memoryview) -> list[int]:
    numbers, position = [], 0
    while position < len(data):
        number, position = _varint(data, position)
        numbers.append(number)
    return numbers


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field number and value: a number, or the bytes of a string, array or inner message."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        field, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, position = _varint(message, position)
            yield field, value
            continue
        if wire == _BYTES:
            length, position = _varint(message, position)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"unexpected wire type {wire}")
        if position + length > len(message):
            raise ValueError("it is cut short")
        yield field, message[position : position + length]
        position += length


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """A number of 7 bits a byte, lowest first, and the position after it."""
    number = shift = 0
    while True:
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
        shift += 7
        if shift > 63:
            raise ValueError("a number in it is too long")
