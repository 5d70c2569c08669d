"""VPT or FT, Tables 1 to 15 and 20, Fig. 4 and 14 to 16: strategies, training sets of all sizes, other backbones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bench.tables.layout import Layout
from bench.tables.papers.vpt_backbones import TABLES as BACKBONES
from bench.tables.protocol import Row
from bench.tables.spec import MAIN, Role, TableSpec, View
from bench.tables.training_set import DEFAULT, ONE_SHOT, TrainingSet
from bench.tables.vpt_or_ft import FT, LORA, STRATEGIES, VPT, by_task, plan

_DEFAULT = {"default_split": DEFAULT}
_ONE_SHOT = {"one-shot": ONE_SHOT}
_OTHERS = ("natural", "specialized")
_STRUCTURED = ("structured",)


def _sizes(*sizes: int) -> dict[str, TrainingSet]:
    return {f"n_train={size}": TrainingSet(size) for size in sizes}


_SWIN = BACKBONES["vpt-2"].role(MAIN)
# As the VPT paper's Table 5 has them, so that runs are shared.
_MAE = dataclasses.replace(BACKBONES["vpt-5"].role("mae"), name=MAIN)
_MOCO = dataclasses.replace(BACKBONES["vpt-5"].role("mocov3"), name=MAIN)


def _table(
    title: str,
    what: str,
    groups: tuple[str, ...],
    files: Sequence[str],
    rows: tuple[Row, ...] = (FT, VPT),
    sets: dict[str, TrainingSet] = _DEFAULT,
    role: Role | None = None,
    tasks: tuple[str, ...] | None = None,
) -> TableSpec:
    """A table of this paper.

    Args:
        title: of the specification.
        what: it shows.
        groups: of its tasks.
        files: of the paper's cells, one a group, or one for all.
        rows: its strategies.
        sets: training sets by `setting` of the paper's cells.
        role: of its backbone; the paper's main one if None.
        tasks: names, if it has not all of its groups.
    """
    by_group = dict(zip(groups, [*files] * len(groups) if len(files) == 1 else files, strict=False))

    def lay_out(view: View) -> list[Layout]:
        return [
            by_task(view, what if len(sets) == 1 else f"{what}: {images.size:,}", by_group, setting, images)
            for setting, images in sets.items()
        ]

    # The lengths that the paper takes from the VPT paper are those of its main backbone.
    runs = plan(tuple(sets.values()), lengths=role is None)
    return TableSpec(title, rows, lay_out, (role or Role(),), groups, tasks, runs)


def _three(first: int, what: str, role: Role) -> dict[str, TableSpec]:
    """The three tables of another backbone, one a group."""
    groups = ("natural", "specialized", "structured")
    return {
        f"vptft-{first + n}": _table(
            f"VPT or FT, Table {first + n}", f"{what}, {group} tasks", (group,), (f"vpt_or_ft_table{first + n:02}",),
            role=role,
        )
        for n, group in enumerate(groups)
    }  # fmt: skip


_SCALE = _sizes(400, 800, 5000, 10000)
_CURVE = _sizes(400, 800, 5000, 10000, 20000)
_FILE5, _FILE6 = "vpt_or_ft_table05", "vpt_or_ft_table06"

TABLES = {
    "vptft-1": _table(
        "VPT or FT, Table 1", "Four strategies, natural and specialized tasks", _OTHERS, ("vpt_or_ft_table01",),
        STRATEGIES,
    ),
    "vptft-2": _table(
        "VPT or FT, Table 2", "Four strategies, structured tasks", _STRUCTURED, ("vpt_or_ft_table02",), STRATEGIES
    ),
    "vptft-3": _table(
        "VPT or FT, Table 3", "One image a class, natural and specialized tasks", _OTHERS, ("vpt_or_ft_table03",),
        sets=_ONE_SHOT,
    ),
    "vptft-4": _table(
        "VPT or FT, Table 4", "One image a class, structured tasks", _STRUCTURED, ("vpt_or_ft_table04",),
        sets=_ONE_SHOT,
    ),
    "vptft-5": _table(
        "VPT or FT, Table 5", "Numbers of training images, natural and specialized tasks", _OTHERS, (_FILE5,),
        sets=_SCALE,
    ),
    "vptft-6": _table(
        "VPT or FT, Table 6", "Numbers of training images, structured tasks", _STRUCTURED, (_FILE6,), sets=_SCALE
    ),
    "vptft-fig4": _table(
        "VPT or FT, Fig. 4", "400 to 20,000 training images", (*_OTHERS, *_STRUCTURED), (_FILE5, _FILE5, _FILE6),
        sets=_CURVE,
    ),
    **{
        f"vptft-fig{14 + n}": _table(
            f"VPT or FT, Fig. {14 + n}", f"400 to 20,000 training images, {group} tasks", (group,), (file,),
            sets=_CURVE,
        )
        for n, (group, file) in enumerate(
            (("natural", _FILE5), ("specialized", _FILE5), ("structured", _FILE6))
        )
    },
    **_three(7, "Swin-B", _SWIN),
    **_three(10, "MAE", _MAE),
    **_three(13, "MoCo v3", _MOCO),
    "vptft-20": _table(
        "VPT or FT, Table 20", "LoRA", ("natural",), ("vpt_or_ft_table20",), (FT, LORA), _sizes(400, 800, 10000),
        tasks=("cifar100",),
    ),
}  # fmt: skip
