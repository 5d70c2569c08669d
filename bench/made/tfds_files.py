"""Data sets as TensorFlow Datasets prepares them, read without TensorFlow: folders, shards, records, examples.

    <tfds dir>/<name>[/<config>]/<version>/dataset_info.json
    <tfds dir>/<name>[/<config>]/<version>/<name>-<split>.tfrecord-00000-of-00004

An image's number is its place in its split, shard after shard, as in TensorFlow Datasets' slices `split[a:b]`.
"""

from __future__ import annotations

import functools
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpeft.data import DataError

# Lengths of a record: its size, and a checksum of the size; behind the bytes is a checksum of these.
_HEADER, _FOOTER = struct.Struct("<QI"), 4
_FORMATS = ("tfrecord", "array_record")

Example = dict[str, list[Any]]


@dataclass(frozen=True)
class Split:
    """A split of a prepared data set.

    Attributes:
        name: such as "train".
        shards: files, in order.
        lengths: examples in each.
        form: "tfrecord" or "array_record".
    """

    name: str
    shards: tuple[Path, ...]
    lengths: tuple[int, ...]
    form: str

    def __len__(self) -> int:
        return sum(self.lengths)

    def read(self, start: int, stop: int) -> Iterator[Example]:
        """Examples `start` to `stop`, in order.

        Raises:
            DataError: a shard is missing, shorter than it should be or damaged, or its format cannot be read here.
        """
        before = 0
        for path, length in zip(self.shards, self.lengths, strict=True):
            first, last = max(start - before, 0), min(stop - before, length)
            if first < last:
                if not path.is_file():
                    raise DataError(f"{path}: shard not found; prepare the data set again")
                records = _tfrecords if self.form == "tfrecord" else _array_records
                yield from (_parse(record, path) for record in records(path, first, last))
            before += length


@dataclass(frozen=True)
class Prepared:
    """A prepared data set.

    Attributes:
        folder: its files.
        version: of the data set.
        splits: by name.
    """

    folder: Path
    version: str
    splits: dict[str, Split]

    def split(self, name: str) -> Split:
        """A split that must be there."""
        if name not in self.splits:
            raise DataError(f"{self.folder}: no split '{name}'; it has {', '.join(self.splits) or 'none'}")
        return self.splits[name]

    def label_names(self, feature: str) -> list[str] | None:
        """Names of a class label's values; None where there are none."""
        path = self.folder / f"{feature.replace('/', '-')}.labels.txt"
        return path.read_text(encoding="utf-8").splitlines() if path.is_file() else None


def find(root: Path, name: str, version: str) -> Prepared:
    """The newest prepared version of a data set among those with the same first number.

    Args:
        root: TensorFlow Datasets' data folder.
        name: of the data set, with its configuration: "eurosat/rgb".
        version: that is wanted, such as "3.0.2".

    Raises:
        DataError: it is not there.
    """
    home = root / name
    if not home.is_dir():
        there = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        raise DataError(f"{home}: not prepared; {root} has {', '.join(there) or 'no data sets'}")
    found = {_numbers(path.name): path for path in home.iterdir() if (path / "dataset_info.json").is_file()}
    fit = {numbers: path for numbers, path in found.items() if numbers and numbers[0] == _numbers(version)[0]}
    if not fit:
        there = ", ".join(sorted(path.name for path in found.values()))
        raise DataError(f"{home}: no version {_numbers(version)[0]}.*.* in it, it has {there or 'none'}; "
                        "other versions have other images")  # fmt: skip
    return _open(fit.get(_numbers(version), fit[max(fit)]))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")) if version.replace(".", "").isdigit() else ()


def _open(folder: Path) -> Prepared:
    file = folder / "dataset_info.json"
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        form = info.get("fileFormat") or "tfrecord"
        splits = {one["name"]: _split(folder, info["name"], form, one) for one in info["splits"]}
        version = info["version"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: cannot be read as the description of a prepared data set: {error!r}") from None
    if form not in _FORMATS:
        raise DataError(f"{file}: files of format '{form}'; expected {' or '.join(_FORMATS)}")
    return Prepared(folder, version, splits)


def _split(folder: Path, data_set: str, form: str, described: dict[str, Any]) -> Split:
    name, lengths = described["name"], tuple(int(length) for length in described["shardLengths"])
    template = described.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    shards = []
    for number in range(len(lengths)):
        file = template
        for key, value in (
            ("DATASET", data_set), ("SPLIT", name), ("FILEFORMAT", form),
            ("SHARD_X_OF_Y", f"{number:05d}-of-{len(lengths):05d}"),
            ("SHARD_INDEX", f"{number:05d}"), ("NUM_SHARDS", f"{len(lengths):05d}"),
        ):  # fmt: skip
            file = file.replace(f"{{{key}}}", value)
        shards.append(folder / file)
    return Split(name, tuple(shards), lengths, form)


def _tfrecords(path: Path, first: int, last: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        for number in range(last):
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                raise DataError(f"{path}: {number} records; expected {last} at the least")
            size, checksum = _HEADER.unpack(header)
            if checksum != _masked(_crc32c(header[:8])):
                raise DataError(f"{path}: record {number} is damaged, or the file is no TFRecord file")
            if number < first:
                file.seek(size + _FOOTER, os.SEEK_CUR)
                continue
            record = file.read(size)
            if len(record) < size or len(file.read(_FOOTER)) < _FOOTER:
                raise DataError(f"{path}: ends in the middle of record {number}")
            yield record


def _array_records(path: Path, first: int, last: int) -> Iterator[bytes]:
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError:
        raise DataError(
            f"{path}: reading ArrayRecord files needs the package array-record: pip install array-record; TFRecord "
            "files need none"
        ) from None
    try:
        reader = ArrayRecordReader(str(path))
        count = reader.num_records()
    # The reader raises whatever its C++ half calls it.
    except Exception as error:
        raise DataError(f"{path}: cannot be read as an ArrayRecord file: {error}") from error
    if count < last:
        raise DataError(f"{path}: {count} records; expected {last} at the least")
    step = 256
    for start in range(first, last, step):
        yield from reader.read(start, min(start + step, last))


@functools.cache
def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


def _crc32c(data: bytes) -> int:
    value, table = 0xFFFFFFFF, _crc_table()
    for byte in data:
        value = table[(value ^ byte) & 0xFF] ^ value >> 8
    return value ^ 0xFFFFFFFF


def _masked(crc: int) -> int:
    """As the files have it."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _parse(record: bytes, path: Path) -> Example:
    """The features of a serialised tf.train.Example, by name."""
    from google.protobuf.message import DecodeError

    example = example_type()()
    try:
        example.ParseFromString(record)
    except DecodeError as error:
        raise DataError(f"{path}: a record is no tf.train.Example: {error}") from None
    found = {}
    for name, feature in example.features.feature.items():
        kind = feature.WhichOneof("kind")
        found[name] = [] if kind is None else list(getattr(feature, kind).value)
    return found


@functools.cache
def example_type() -> Any:
    """The message class of tf.train.Example, declared here so that TensorFlow is not needed."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="fastpeft_example.proto", package="fastpeft.example", syntax="proto3"
    )

    def message(name: str) -> descriptor_pb2.DescriptorProto:
        return file.message_type.add(name=name)

    def add(to: descriptor_pb2.DescriptorProto, name: str, number: int, kind: int, of: str = "", **more: Any) -> None:
        fields = {"label": field.LABEL_OPTIONAL} | ({"type_name": of} if of else {}) | more
        to.field.add(name=name, number=number, type=kind, **fields)

    for name, kind in (("Bytes", field.TYPE_BYTES), ("Float", field.TYPE_FLOAT), ("Int64", field.TYPE_INT64)):
        add(message(f"{name}List"), "value", 1, kind, label=field.LABEL_REPEATED)
    feature = message("Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(("Bytes", "Float", "Int64"), start=1):
        of = f".fastpeft.example.{name}List"
        add(feature, f"{name.lower()}_list", number, field.TYPE_MESSAGE, of, oneof_index=0)
    features = message("Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    add(entry, "key", 1, field.TYPE_STRING)
    add(entry, "value", 2, field.TYPE_MESSAGE, ".fastpeft.example.Feature")
    of = ".fastpeft.example.Features.FeatureEntry"
    add(features, "feature", 1, field.TYPE_MESSAGE, of, label=field.LABEL_REPEATED)
    add(message("Example"), "features", 1, field.TYPE_MESSAGE, ".fastpeft.example.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("fastpeft.example.Example"))
