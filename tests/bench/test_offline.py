"""The offline study: its folders, its order, its tables."""

from __future__ import annotations

import shutil
import tarfile

import numpy as np
import pytest

pytest.importorskip("optuna")

from bench.offline import __main__ as command
from bench.offline import data, plan, tables
from bench.offline.run import ShortJob
from bench.tables.job import Backbone
from bench.tables.results import FIELDS, KEY, Results
from fastpeft.data.vtab import open_vtab

CLASSES = 4


def _write(folder, name, lines):
    (folder / name).write_text("".join(f"{path} {label}\n" for path, label in lines))


def _images(folder, names):
    from PIL import Image

    found = []
    for number, name in enumerate(names):
        pixels = np.random.default_rng(len(name) + number).integers(0, 60, (8, 8, 3), dtype=np.uint8)
        pixels[..., number % 3] += 40 * (number % CLASSES)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
        found.append((name, number % CLASSES))
    return found


@pytest.fixture
def given(tmp_path):
    """A small `cifar`, its pool in a tar, and no `dtd10`."""
    cifar = tmp_path / "vtab" / "cifar"
    own = _images(cifar, [f"images/train/{i}.png" for i in range(20)])
    test = _images(cifar, [f"images/test/{i}.png" for i in range(8)])
    for name, lines in (
        ("train800", own[:16]), ("val200", own[16:]), ("train800val200", own), ("test", test),
    ):  # fmt: skip
        _write(cifar, f"{name}.txt", lines)
    (cifar / "classes.txt").write_text("a\nb\nc\nd\n")
    pool = tmp_path / "pool"
    lines = _images(pool, [f"images/pool/{i}.png" for i in range(24)])
    _write(pool, data._POOL_LIST, lines)
    with tarfile.open(cifar / data.POOL, "w") as archive:
        for path in sorted(pool.rglob("*.*")):
            archive.add(path, path.relative_to(pool))
    return cifar.parent


@pytest.fixture
def small(monkeypatch, given):
    """Digits and shapes in numbers that a test can draw."""

    def draw(name):
        def make(out):
            lines = _images(out / name, [f"images/{i}.png" for i in range(12)])
            for split, part in (("train800", lines[:4]), ("val200", lines[4:8]), ("train800val200", lines[:8])):
                _write(out / name, f"{split}.txt", part)
            _write(out / name, "test.txt", lines[8:])

        return make

    monkeypatch.setattr(data.mnist, "make", draw("mnist"))
    monkeypatch.setattr(data.dsprites, "make", draw("dsprites_ori"))
    scales = {8: "cifar100-400", 16: "cifar100-800", 20: "cifar100", 40: "cifar100-5000"}
    monkeypatch.setattr(data, "SCALES", scales)
    return given


@pytest.fixture
def trained(monkeypatch):
    """Runs that train nothing: smaller rates are better, later seeds too; the jobs in their order."""
    done = []

    def run(self, runs, features=None):
        done.append(self)
        accuracy = 0.9 - self.setting["base_lr"] / 10 + self.seed / 10000
        rest = dict.fromkeys([name for name in FIELDS if name not in KEY], "1")
        return self.key() | rest | {"accuracy": f"{accuracy:.4f}", "trained_parameters": 7, "backbone_parameters": 70}

    monkeypatch.setattr(ShortJob, "run", run)
    # Side by side nothing would be trained by `run`.
    monkeypatch.setattr(ShortJob, "alone", True)
    return done


@pytest.fixture
def unqueued(monkeypatch):
    """Runs one after another without a queue, which has tests of its own and takes its time."""

    def run_all(jobs, results, runs, store, advance, features):
        for job in jobs:
            if not results.has(**job.key()):
                results.add(job.run(runs))
        for job in jobs:
            advance(job)

    monkeypatch.setattr(command.study, "run_all", run_all)


@pytest.fixture(autouse=True)
def one_figure(monkeypatch):
    """Of a study's figures one, as each takes its time."""
    monkeypatch.setattr(command.catalogue, "KINDS", command.catalogue.KINDS[2:3])
    monkeypatch.setattr(command.catalogue.sensitivity, "heatmaps", lambda rows: None)


def ask(given, tmp_path, *more):
    arguments = ["--data", str(given), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *more]
    return command.main(arguments)


def test_folders(small, tmp_path):
    roots, missing = data.prepare(small, tmp_path / "work")
    assert missing == [f"dtd10: not in {small}"]
    assert set(roots) == {part.folder for part in plan.PARTS.values()} - {"dtd10"}
    own = open_vtab(small, "cifar", "final")[0]
    for size, name in {8: "cifar100-400", 16: "cifar100-800", 40: "cifar100-5000"}.items():
        final, names = open_vtab(roots[name], name, "final")
        assert len(final["train"].labels) == size and names == list("abcd")
        pixels = [path.read_bytes() for path in final["train"].paths]
        assert pixels[:20] == [path.read_bytes() for path in own["train"].paths][:size]
        assert [path.read_bytes() for path in final["test"].paths] == [path.read_bytes() for path in own["test"].paths]
        search = open_vtab(roots[name], name, "search")[0]
        assert search["train"].labels + search["val"].labels == final["train"].labels
    name = plan.ONE_SHOT_TASK
    search, final = (open_vtab(roots[name], name, stage)[0] for stage in ("search", "final"))
    assert search["train"].labels == search["val"].labels == final["train"].labels == list(range(CLASSES))
    assert final["train"].paths == search["train"].paths
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(final["train"].paths, search["val"].paths, strict=True))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.txt")}
    data.prepare(small, tmp_path / "work")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.txt")}


def test_draws_of_another_folder_are_others(small, tmp_path):
    first, _ = data.prepare(small, tmp_path / "work")
    (tmp_path / "other").mkdir()
    shutil.copytree(small / "cifar", tmp_path / "other" / "cifar")
    listed = tmp_path / "other" / "cifar" / "test.txt"
    listed.write_text("".join(listed.read_text().splitlines(keepends=True)[1:]))
    second, _ = data.prepare(tmp_path / "other", tmp_path / "work")
    for name in ("cifar100-400", plan.ONE_SHOT_TASK):
        one, other = (open_vtab(roots[name], name, "final")[0]["test"].labels for roots in (first, second))
        assert one[1:] == other and second["mnist"] == first["mnist"]


def test_a_subset_of_the_data(small, tmp_path, trained, unqueued, capsys):
    (small / "cifar" / data.POOL).unlink()
    assert ask(small, tmp_path, "--methods", "linear") == 0
    assert {job.task for job in trained} == {"cifar100", "mnist", "dsprites_orientation"}
    said = capsys.readouterr().out
    assert "left out  dtd10: not in" in said and "left out  cifar100-5000: needs" in said


def test_every_run_once_and_in_order(small, tmp_path, trained, unqueued):
    parts = [part for part in plan.PARTS.values() if part.task != "dtd10"]
    wanted = sum(len(part.methods) * (len(part.protocol.seeds) + 2 * (not part.rates_of)) for part in parts)
    assert ask(small, tmp_path, "--tasks", "mnist") == 0
    assert [job.row.name for job in trained] == [name for name in plan.PARTS["mnist"].methods for _ in range(5)]
    assert ask(small, tmp_path) == 0 and len(trained) == wanted
    # All methods of a task before the next task; what was there already is not run again.
    assert list(dict.fromkeys(job.task for job in trained[40:])) == [p.task for p in parts if p.task != "mnist"]
    for job in trained:
        if job.stage == "final":
            assert job.setting == {"base_lr": min(job.row.rates), "weight_decay": plan.DECAY}
    assert {job.task for job in trained if job.stage == "search"} == {p.task for p in parts if not p.rates_of}
    assert {job.protocol.epochs for job in trained if job.task == plan.ONE_SHOT_TASK} == {plan.ONE_SHOT_EPOCHS}
    assert ask(small, tmp_path) == 0 and len(trained) == wanted


def test_minutes(small, tmp_path, trained, monkeypatch, capsys):
    clock = iter(range(0, 10000, 30))
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
    assert ask(small, tmp_path, "--tasks", "mnist", "--minutes", "2") == 0
    assert 0 < len(trained) < 8 and "2 minutes are over" in capsys.readouterr().out
    assert ask(small, tmp_path, "--tasks", "mnist") == 0
    assert len(trained) == len({str(job) for job in trained}) == 40


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks", "cifar10"], "unknown task 'cifar10'; did you mean 'cifar100'?"),
        (["--methods", "vptdeep"], "unknown method 'vptdeep'; did you mean 'vpt-deep'?"),
        (["--minutes", "0"], "--minutes: expected a positive number, got 0"),
    ],
)
def test_requests_that_cannot_be_served(arguments, message, given, tmp_path, capsys):
    assert ask(given, tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_no_such_folder(tmp_path, capsys):
    assert ask(tmp_path / "nowhere", tmp_path) == 2
    assert "nowhere: no such folder; --data is the folder" in capsys.readouterr().err


def test_tables_are_the_same_again(small, tmp_path, trained, unqueued):
    assert ask(small, tmp_path) == 0
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.suffix in (".md", ".tex")}
    assert len(kept) == 12
    for text in kept.values():
        assert b"DINOv2 ViT-S/14" in text and b"112 px" in text and b"epochs" in text
    for name in kept:
        (tmp_path / "out" / name).unlink()
    assert ask(small, tmp_path, "--tabulate") == 0
    assert kept == {name: (tmp_path / "out" / name).read_bytes() for name in kept}
    # The usual study's data scales; one image a class is another protocol, with one task.
    (figure,) = (tmp_path / "out" / "figures").rglob("samples.svg")
    assert figure.parent.name.endswith("-112-offline-10") and "offline-10" in figure.read_text()
    found = tables.tables(Results(tmp_path / "out" / "results.csv").rows())
    assert dict(found["methods"].rows)["linear"][0].text == "7"
    # 0.9 - 0.005 and the mean of 42, 44 and 82 in ten thousandths.
    assert dict(found["methods"].rows)["linear"][1].text == "90.1 ± 0.2"
    assert "0.05: 89.5*" in dict(found["settings"].rows)["linear"][0].text


def test_tables_of_nothing(tmp_path):
    for table in tables.tables([]).values():
        assert table.markdown() and table.latex()


def test_a_real_run(small, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "BACKBONE", Backbone("vit_tiny_patch16_224", "random", 32))
    quick = plan.OfflineProtocol(2, 1, False, (42,))
    part = plan.Part("mnist", "mnist", "MNIST-1k", ("linear", "lora"), quick)
    monkeypatch.setattr(plan, "PARTS", {"mnist": part})
    assert ask(small, tmp_path) == 0
    rows = Results(tmp_path / "out" / "results.csv").rows()
    assert [(row["method"], row["stage"]) for row in rows] == [
        (name, stage) for name in ("linear", "lora") for stage in ("search", "search", "final")
    ]
    assert {row["protocol"] for row in rows} == {"offline-2"} and {row["image_size"] for row in rows} == {"32"}
    assert not [path for path in (tmp_path / "work" / "runs").iterdir() if path.suffix != ".lock"]


def test_heads_start_small(tmp_path):
    row = plan.ROWS["lora"]
    job = ShortJob(
        backbone=plan.BACKBONE, root=tmp_path, task="mnist", folder="mnist", row=row, protocol=plan.USUAL,
        stage="final", point=(("base_lr", 0.02), ("weight_decay", 1e-4)), seed=42,
    )  # fmt: skip
    config = job.config(tmp_path)
    assert config.train.head_init == "keep" and config.train.checkpoint_every == "5 epochs"
    assert config.train.epochs == 10 and config.train.batch_size == 64 and config.model.image_size == 112
