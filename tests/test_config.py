"""Configuration files: what is read, and how every mistake is named in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastpeft.config import ConfigError, load_config, parse_interval

TEXT = """
model: {name: vit_small_patch14_dinov2, image_size: 112}
data: {name: mnist}
method:
  name: vpt
  length: 10
train:
  epochs: 15
  lr: {vpt: 3e-2, head: 3e-3}
  warmup_epochs: 2
  cache_features: off
out: out/run
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(TEXT)
    return path


def error(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_values_are_read_as_they_are_written(file):
    config = load_config(file)
    # YAML 1.1 would read 3e-2 as text and off as false.
    assert config.train.lr == {"vpt": 0.03, "head": 0.003}
    assert config.train.cache_features == "off"
    assert config.method == {"name": "vpt", "length": 10}
    assert config.train.batch_size == 64


def test_overrides_reach_any_depth(file):
    config = load_config(file, ["train.epochs=3", "train.lr.head=1", "method=[{name: linear}, {name: bitfit}]"])
    assert config.train.epochs == 3 and config.train.lr["head"] == 1.0
    assert [part["name"] for part in config.method] == ["linear", "bitfit"]
    assert load_config(file, ["method=[{name: vpt, length: 1}]", "method.0.length=7"]).method[0]["length"] == 7
    assert load_config(file, ["data.train_size=100", "out=there"]).out == "there"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epochz=3", "train.epochz: unknown key; did you mean 'epochs'?"),
        ("optim.lr=3", "optim: unknown key; expected one of: data, method, model, out, train"),
        ("train.epochs=ten", "train.epochs: input should be a valid integer, got 'ten'"),
        ("train.epochs=true", "train.epochs: input should be a valid integer, got True"),
        ("train.epochs=0", "train.epochs: input should be greater than 0, got 0"),
        ("train.batch_size='32'", "train.batch_size: input should be a valid integer, got '32'"),
        ("train.optimizer=adam", "train.optimizer: input should be 'sgd' or 'adamw', got 'adam'"),
        ("train.lr.vpt=-1", "train.lr: the rate of group 'vpt' must be greater than 0, got -1"),
        ("train.lr={}", "train: give train.base_lr, or train.lr with a rate for every trained group"),
        ("train.warmup_epochs=15", "train.warmup_epochs (15) must be below train.epochs (15)"),
        ("train.checkpoint_every=5", "train.checkpoint_every: input should be a valid string, got 5"),
        ("train.checkpoint_every=5 minutes", "expected a number and a unit, such as '1 epoch' or '50 steps'"),
        (
            "data.name=imagenet",
            "data.name: unknown data 'imagenet'; expected one of: coco_caption, digits, fgvc, folder",
        ),
        ("data.name=vtab", "data: data 'vtab' needs data.root"),
        ("data.augment=crop_flip", "data: augment 'crop_flip' needs resize 'crop'"),
        ("model.mean=[0.5]", "model.mean: list should have at least 3 items"),
        ("method.name=vtp", "method.name: unknown method 'vtp'; did you mean 'vpt'?"),
        ("method.lenght=3", "method.lenght: unknown field of method 'vpt'; did you mean 'length'?"),
        ("method.length=many", "method: method 'vpt': "),
        ("method=[]", "method: the list of methods is empty"),
        ("method=[{name: vpt, length: 1}, {name: vpt, length: 2}]", "method: a sum holds each method once"),
        ("method={length: 3}", "method.name: the method has no name"),
        ("train=3", "train: input should be a valid dictionary"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(file, override, expected):
    message = error(file, override)
    assert message.startswith("command line: ")
    assert expected in message


def test_a_mistake_in_the_file_names_the_file(file):
    file.write_text(TEXT.replace("epochs: 15", "epochen: 15"))
    assert error(file).startswith(f"{file}: train.epochen: unknown key; did you mean 'epochs'?")


def test_a_missing_section_is_named(file):
    file.write_text(TEXT.replace("data: {name: mnist}", ""))
    assert error(file) == f"{file}: data: missing"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: [1, 2", ":1: not valid YAML"),
        ("model: {}\nmodel: {}\n", ":2: not valid YAML: the key 'model' is given twice"),
        ("just text", ": expected the sections model, data, method, train and the key out"),
        ("model: !!python/object/apply:os.system ['true']", "not valid YAML: could not determine a constructor"),
        ("", ": expected the sections"),
    ],
)
def test_a_file_that_is_no_configuration(file, text, expected):
    file.write_text(text)
    assert expected in error(file)


def test_files_that_cannot_be_read(tmp_path):
    assert "No such file" in error(tmp_path / "absent.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x81")
    assert "not a text file" in error(tmp_path / "bytes.yaml")


@pytest.mark.parametrize("item", ["epochs", "=3", "train..epochs=3", "out.x=1"])
def test_overrides_that_are_none(file, item):
    error(file, item)


def test_identity_leaves_out_what_changes_no_result(file):
    same = load_config(file, ["out=elsewhere", "data.workers=4"])
    assert same.identity() == load_config(file).identity()
    assert load_config(file, ["train.seed=1"]).identity() != load_config(file).identity()


def test_intervals():
    assert parse_interval("1 epoch") == (1, "epoch")
    assert parse_interval("250 steps") == (250, "step")
    for text in ("0 steps", "epoch", "-1 steps", "1.5 epochs", "3"):
        with pytest.raises(ValueError):
            parse_interval(text)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_are_valid(path):
    load_config(path)
