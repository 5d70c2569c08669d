"""VPT, Tables 2, 5, 6 and 11 and Fig. 4: other backbones, other pre-training, other sizes."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.figure import Figure

from bench.figures import backbones
from bench.tables import cells, layouts
from bench.tables.layout import Layout
from bench.tables.measured import mean_of
from bench.tables.protocol import ROWS, Row, held
from bench.tables.spec import VTAB, Request, Role, Runs, TableSpec, View, every_row, label

_SWIN = Role(
    "main", "swin_base_patch4_window7_224", title="Swin-B",
    known_as=("swin_base_patch4_window7_224_22k.pth", "swin_base_patch4_window7_224.ms_in22k@hub"),
)  # fmt: skip
_MAE = Role(
    "mae", weights="MAE on ImageNet-1k", title="MAE", model=(("global_pool", "avg"), ("fc_norm", True)),
    known_as=("mae_pretrain_vit_base.pth", "vit_base_patch16_224.mae@hub"),
)  # fmt: skip
_MOCO = Role(
    "mocov3", weights="MoCo v3 on ImageNet-1k", title="MoCo v3",
    known_as=("linear-vit-b-300ep.pth.tar", "mocov3_linear-vit-b-300ep.pth.tar"),
)  # fmt: skip
_CONVNEXT = Role(
    "convnext", "convnext_base", title="ConvNeXt-Base",
    known_as=("convnext_base_22k_224.pth", "convnext_base.fb_in22k@hub"),
)  # fmt: skip
# Which of the several ResNet-50 of ImageNet-1k the paper took it does not say.
_RESNET = Role("resnet", "resnet50", "supervised on ImageNet-1k", title="ResNet-50", known_as=())
_SCALES = (
    Role("vit-b"),
    Role(
        "vit-l", "vit_large_patch16_224", title="ViT-L/16",
        known_as=("ViT-L_16.npz", "imagenet21k_ViT-L_16.npz", "vit_large_patch16_224.orig_in21k@hub"),
    ),
    Role(
        "vit-h", "vit_huge_patch14_224", title="ViT-H/14",
        known_as=("ViT-H_14.npz", "imagenet21k_ViT-H_14.npz", "vit_huge_patch14_224.orig_in21k@hub"),
    ),
)  # fmt: skip
_LARGE = Role("384", image_size=384, model=(("pos_resize", "vpt"),))
_SMALL = Role("224")

# A border of learned pixels around the image: what Table 6 calls VPT.
_BORDER = Row("vpt-border", {}, "sgd", 128, ROWS["vpt-deep"].rates, title="VPT")
# 196 patches and 380 prompts are as many rows as 384 pixels have patches.
_LONG = tuple(held(f"{name}:p=380", name, length=380) for name in ("vpt-shallow", "vpt-deep"))


def _rows(*names: str) -> tuple[Row, ...]:
    return tuple(ROWS[name] for name in names)


def swin(view: View) -> Layout:
    """Table 2."""
    return layouts.by_group(view, "Methods by groups of tasks, Swin-B", "vpt_table02")


def pretraining(view: View) -> Layout:
    """Table 5: MAE and MoCo v3 side by side."""
    fields = {"mae": {"pretraining": "mae_imagenet1k"}, "mocov3": {"pretraining": "mocov3_imagenet1k"}}
    table = layouts.by_groups_of(view, "Self-supervised backbones", "vpt_table05", fields)
    table.notes.append("MAE's read-out here is the mean of the patches, the paper's of patches and prompts.")
    return table


def convnets(view: View) -> Layout:
    """Table 6: ConvNeXt and ResNet side by side."""
    fields = {"convnext": {"backbone": "ConvNeXt-Base"}, "resnet": {"backbone": "ResNet-50"}}
    return layouts.by_groups_of(view, "Convolutional backbones", "vpt_table06", fields, {"vpt-border": "vpt"})


def resolution(view: View) -> Layout:
    """Table 11: 384 pixels, and prompts that make a sequence as long."""
    table = Layout("Larger images", ("method", "total params", *layouts.group_heading(view)))
    for role, title in (("384", "384 px"), ("224", "224 px")):
        rows = [row for row in view.rows if _at(role, row)]
        if rows:
            table.sections[len(table.rows)] = title
        for row in rows:
            setting = f"resolution={role}"
            if row.kind == "prompts":
                setting += ";p=380" if role == "224" else ";p in grid"
            name = row.name.partition(":")[0]
            entries = layouts.group_entries(view, row, "vpt_table11", role, printed_as=name, setting=setting)
            table.rows.append((label(row), entries))
    table.notes.append(layouts.WINS)
    return table


def _at(role: str, row: Row) -> bool:
    """Whether a row belongs to an image size."""
    long = row.name.endswith(":p=380")
    return not long if role == "384" else long or row.name == "full"


def plan_resolution(request: Request) -> Iterator[Runs]:
    """All rows at 384 pixels; full fine-tuning and the long sequences at 224."""
    return every_row(request, _at)


def scales(view: View) -> Layout:
    """Fig. 4: groups of tasks by size of the backbone."""
    roles = view.request.spec.roles
    groups, headings = view.groups(), layouts.group_heading(view)
    table = Layout("Backbone scales", ("method", *[role.title for role in roles] * len(groups)))
    table.over = tuple((heading, len(roles)) for heading in headings)
    for row in view.rows:
        entries = []
        for group, names in groups.items():
            for role in roles:
                mean = mean_of(view.found(role.name).get(row.name, {}), names)
                paper = view.paper(_printed_scale(role, row, group), role.name, view.whole(group), "{:.2f}")
                entries.append(layouts.number(mean, "{:.2f}", paper, ranked=row.name != "full"))
        table.rows.append((label(row), entries))
    table.notes.append("The paper prints numbers for ViT-B alone (Table 1). Bold: the best but for full fine-tuning.")
    return table


def _printed_scale(role: Role, row: Row, group: str) -> cells.Cell | None:
    """The paper's mean of a group, of ViT-B alone."""
    if role.name != "vit-b":
        return None
    return cells.cell("vpt_table01", method=row.name, task="group_mean", group=group, metric="accuracy")


def draw_scales(view: View) -> Figure | None:
    """Fig. 4 as the paper has it."""
    roles = view.request.spec.roles
    ours: dict[str, dict[str, list[float | None]]] = {}
    papers: dict[str, dict[str, list[float | None]]] = {}
    for heading, (group, names) in zip(layouts.group_heading(view), view.groups().items(), strict=True):
        for row in view.rows:
            tables = [view.found(role.name).get(row.name, {}) for role in roles]
            printed = [_printed_scale(role, row, group) for role in roles]
            ours.setdefault(heading, {})[row.name] = [mean_of(tasks, names) for tasks in tables]
            papers.setdefault(heading, {})[row.name] = [cell and cell.value for cell in printed]
    return backbones.by_backbone([role.title for role in roles], ours, papers)


TABLES = {
    "vpt-2": TableSpec(
        "VPT, Table 2",
        _rows("full", "linear", "mlp-3", "partial-1", "bias", "vpt-shallow", "vpt-deep"),
        swin,
        roles=(_SWIN,),
    ),
    "vpt-5": TableSpec(
        "VPT, Table 5",
        _rows("full", "linear", "partial-1", "bias", "adapter", "vpt-shallow", "vpt-deep"),
        pretraining,
        roles=(_MAE, _MOCO),
    ),
    "vpt-6": TableSpec(
        "VPT, Table 6",
        (*_rows("full", "linear", "partial-1", "mlp-3", "bias"), _BORDER),
        convnets,
        roles=(_CONVNEXT, _RESNET),
    ),
    "vpt-11": TableSpec(
        "VPT, Table 11", (*ROWS.values(), *_LONG), resolution, roles=(_LARGE, _SMALL), plan=plan_resolution, groups=VTAB
    ),
    "vpt-fig4": TableSpec(
        "VPT, Fig. 4", _rows("full", "linear", "vpt-shallow", "vpt-deep"), scales, roles=_SCALES, draw=draw_scales
    ),
}  # fmt: skip
