"""VPT, Table 4: segmentation of ADE20K by SETR-PUP."""

from __future__ import annotations

from bench.tables import cells
from bench.tables.layout import Entry, Layout
from bench.tables.protocol import ROWS, Row
from bench.tables.spec import TableSpec, View, label

_METHODS = ("full", "head-only", "bias", "vpt-deep", "vpt-deep+bias")
_METRICS = {
    "miou_single_scale": "mIoU, single scale", "miou_multi_scale": "mIoU, multi scale",
    "tunable_params": "tunable params (M)",
}  # fmt: skip


def _row(name: str) -> Row:
    # A segmentation model's rows are no classifier's: none of them is in the library yet.
    return Row(f"setr:{name}", {}, "sgd", ROWS["vpt-deep"].batch_size, (), title=name)


def segmentation(view: View) -> Layout:
    """Measures by methods."""
    table = Layout("ADE20K, SETR-PUP on ViT-L/16", ("", *map(label, view.rows), "full, ResNet-101 (paper)"))
    for metric, title in _METRICS.items():
        printed = [cells.cell("vpt_table04", method=row.title, metric=metric) for row in view.rows]
        other = cells.cell("vpt_table04", backbone="ResNet-101 (DeepLab v3+)", metric=metric)
        table.rows.append((title, [Entry(paper=view.paper(one)) for one in (*printed, other)]))
    return table


TABLES = {
    "vpt-4": TableSpec(
        "VPT, Table 4",
        tuple(map(_row, _METHODS)),
        segmentation,
        roles=(),
        needs_data=False,
        missing="a segmentation model (SETR-PUP) and its data (ADE20K)",
    )
}
