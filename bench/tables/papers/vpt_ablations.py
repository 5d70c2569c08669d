"""VPT, Figs. 5 to 8 and 11 to 14: what prompts are, where they enter, what the head reads, how they start."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bench.tables import cells, layouts
from bench.tables.backbones import fitted
from bench.tables.class_means import FromClassMeans
from bench.tables.experiment import Experiment
from bench.tables.job import Job
from bench.tables.layout import Layout
from bench.tables.papers.vpt_main import ADAPTERS, MLPS
from bench.tables.protocol import LENGTHS, ROWS, Row, held, of
from bench.tables.results import Results
from bench.tables.spec import Request, Runs, TableSpec, View, every_row, label

_SHALLOW, _DEEP = ROWS["vpt-shallow"], ROWS["vpt-deep"]
_DEFAULT = {"vpt-shallow": "default", "vpt-deep": "default"}


def _variant(like: str, name: str, title: str = "", **fields: object) -> Row:
    """Prompts with other fields."""
    method = {**ROWS[like].method, **fields}
    return of(f"{like}:{name}", like, method=method, title=title or name)


def _absent(like: str, name: str) -> Row:
    """A variant that the library lacks."""
    return of(f"{like}:{name}", like, method={}, title=name)


def _pooled(like: str, name: str) -> Row:
    # The final norm stays where it is, before the mean.
    return of(f"{like}:{name}", like, model={"global_pool": "avg", "fc_norm": False}, title=name)


_LOCATIONS = (
    _SHALLOW, *(_absent("vpt-shallow", name) for name in ("add", "add-1", "prepend-pixel", "concat-channel")),
    _DEEP, *(_absent("vpt-deep", name) for name in ("add", "add-1")),
)  # fmt: skip
# Names without the arrow, which has no place in a CSV.
_DEPTHS = ((1, 1), (1, 3), (1, 6), (1, 9), (12, 12), (9, 12), (6, 12), (3, 12))
_BY_DEPTH = tuple(_variant("vpt-deep", f"{i}-{j}", f"{i}→{j}", depth=[i, j]) for i, j in _DEPTHS)
_SAME_LENGTH = tuple(dataclasses.replace(row, name=f"{row.name}:same-p", search_as=row.name) for row in _BY_DEPTH)
_POOLS = tuple(
    row
    for like in (_SHALLOW, _DEEP)
    for row in (
        like, _pooled(like.name, "image-pool"), _absent(like.name, "prompt-pool"), _absent(like.name, "global-pool")
    )
)  # fmt: skip
_INPUTS = (
    _SHALLOW, held("vpt-shallow:p=1", "vpt-shallow", length=1), _variant("vpt-shallow", "prompt-fixed", trained=False),
    of("cls-learned", "vpt-shallow", method={"name": "class_token"}, searched={}, rates=_DEEP.rates),
    _DEEP, held("vpt-deep:p=1", "vpt-deep", length=1), _variant("vpt-deep", "prompt-fixed", trained=False),
)  # fmt: skip
_SHARED = (_DEEP, *(_variant("vpt-deep", f"shared-{how}", share=how) for how in ("intra", "inter", "all")))
# Length and start come from the classes of the task.
_MEANS = {"init": "class-means"}
_STARTS = (
    _DEEP,
    of("vpt-deep:cls", "vpt-deep", method={**_DEEP.method, **_MEANS}, searched={}, title="CLS"),
    _variant("vpt-deep", "prompt-fixed", "random-fixed", trained=False),
    of("vpt-deep:cls-fixed", "vpt-deep", method={**_DEEP.method, **_MEANS, "trained": False}, searched={},
       title="CLS-fixed"),
)  # fmt: skip


def _by_group(view: View, title: str, names: dict[str, str], notes: Sequence[str] = ()) -> Layout:
    """Variants by groups of tasks; the paper's numbers are Table 1's, of the rows that it has too."""
    table = Layout(title, ("variant", "total params", *layouts.group_heading(view)))
    for row in view.rows:
        file = "vpt_table01" if cells.cell("vpt_table01", method=row.name) else "vpt_table13"
        table.rows.append((names.get(row.name, label(row)), layouts.group_entries(view, row, file, against_full=False)))
    table.notes += [*notes, "The paper shows this as a figure; its numbers are those of Tables 1 and 13."]
    return table


def location(view: View) -> Layout:
    """Fig. 5."""
    table = _by_group(view, "Where prompts enter", {"vpt-shallow": "prepend", "vpt-deep": "prepend"})
    return _divided(table, view)


def length(view: View) -> Layout:
    """Fig. 6."""
    return _by_group(
        view,
        "Number of prompts, and the sizes of rivals",
        {"vpt-deep": "vpt-deep, best p", "adapter": "adapter, best r"},
    )


def depth(view: View) -> Layout:
    """Figs. 7 and 14."""
    return _by_group(view, "Blocks that prompts enter", {"vpt-deep": "1→12"})


def output(view: View) -> Layout:
    """Fig. 8."""
    return _divided(_by_group(view, "What the head reads", {"vpt-shallow": "CLS", "vpt-deep": "CLS"}), view)


def inputs(view: View) -> Layout:
    """Fig. 11."""
    names = {"vpt-shallow": "prompt-learned", "vpt-deep": "prompt-learned"}
    names |= {f"{like}:p=1": "prompt-learned, p = 1" for like in ("vpt-shallow", "vpt-deep")}
    notes = ["Fixed prompts are not dropped out.", "CLS-learned: the class token's embedding alone is trained."]
    return _divided(_by_group(view, "A longer input, or a learned one", names, notes), view)


def sharing(view: View) -> Layout:
    """Fig. 12."""
    return _by_group(view, "Shared prompts", _DEFAULT)


def start(view: View) -> Layout:
    """Fig. 13."""
    notes = ["CLS: one prompt a class, the mean of its images' final class tokens; above 200 classes 200 centroids."]
    return _by_group(view, "How prompts start", {"vpt-deep": "random"}, notes)


def _divided(table: Layout, view: View) -> Layout:
    """The table with shallow and deep prompts apart."""
    deep = [row.name.startswith("vpt-deep") for row in view.rows]
    for number, own in enumerate(deep):
        if number == 0 or own != deep[number - 1]:
            table.sections[number] = "VPT-deep" if own else "VPT-shallow"
    return table


@dataclass(frozen=True)
class SameLength(Experiment):
    """A row with as many prompts as another row's search has chosen on the same task.

    Attributes:
        other: the other row on that task.
    """

    other: Experiment = field(kw_only=True)

    @property
    def size(self) -> int:
        """Number of runs."""
        lengths = {point["length"] for point in self.points}
        return len(self.other.points) + len(self.points) // len(lengths) + len(self.protocol.seeds)

    def batches(self, results: Results) -> Iterator[list[Job]]:
        """The other row's search, then this row's at its length, then the final runs."""
        yield self.other.search()
        length = int(self.other.chosen(results)["length"])
        row = dataclasses.replace(self.row, searched={"length": (length,)})
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(Experiment)}
        yield from Experiment(**own | {"row": row}).batches(results)


def plan_same_length(request: Request) -> Iterator[Runs]:
    """Fig. 14: every depth at the length that is best for all blocks."""
    for runs in every_row(request):
        if runs.row.name.endswith(":same-p"):
            other = dataclasses.replace(runs, row=fitted(_DEEP, runs.backbone.name))
            own = {field.name: getattr(runs, field.name) for field in dataclasses.fields(runs)}
            yield SameLength(**own, other=other)
        else:
            yield runs


def plan_start(request: Request) -> Iterator[Runs]:
    """Fig. 13: prompts that start at class means are made beforehand."""
    for runs in every_row(request):
        means = runs.row.parts[0].get("init") == _MEANS["init"]
        yield FromClassMeans.of(runs, request.out / "class-means") if means else runs


TABLES = {
    "vpt-fig5": TableSpec("VPT, Fig. 5", _LOCATIONS, location),
    "vpt-fig6": TableSpec(
        "VPT, Fig. 6",
        (*(held(f"vpt-deep:p={p}", "vpt-deep", length=p) for p in reversed(LENGTHS)), _DEEP, *MLPS, *ADAPTERS),
        length,
    ),
    "vpt-fig7": TableSpec("VPT, Fig. 7", (*_BY_DEPTH[:4], _DEEP, *_BY_DEPTH[4:]), depth),
    "vpt-fig8": TableSpec("VPT, Fig. 8", _POOLS, output),
    "vpt-fig11": TableSpec("VPT, Fig. 11", _INPUTS, inputs),
    "vpt-fig12": TableSpec("VPT, Fig. 12", _SHARED, sharing),
    "vpt-fig13": TableSpec("VPT, Fig. 13", _STARTS, start, plan=plan_start),
    "vpt-fig14": TableSpec("VPT, Fig. 14", (*_SAME_LENGTH[:4], _DEEP, *_SAME_LENGTH[4:]), depth, plan=plan_same_length),
}
