"""The cost table in little, and what is made of fabricated timings: the table, ratios, regressions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import check
from bench.cost import accuracy, compare, methods, operators, selection, settings
from bench.cost.accuracy import Accuracies
from bench.cost.measure import COMPILED, EAGER, FLOOR, Clock, Measurements, against, measure, steps_of
from bench.cost.methods import INFERENCE, LITERAL, OURS, PEFT, TRAIN
from bench.cost.selection import Row, choose
from bench.cost.session import Replay, Session
from bench.cost.settings import Settings
from bench.cost.table import render
from bench.tables.errors import TableError
from bench.tables.results import FIELDS, Results
from fastpeft.ops.choose import OPERATORS

LITTLE = Settings(model="test_vit", image_size=32, batch=2, turns=3, compiler="aot_eager")
ROOT = Path(__file__).resolve().parents[2]
# Seconds of three turns by the implementation of a row.
TURNS = {OURS: [0.3, 0.1, 0.2], LITERAL: [0.6, 0.4, 0.5], PEFT: [0.8, 1.0, 0.9]}


def record(row="vpt-deep-200", phase=TRAIN, who=OURS, mode=EAGER, settings=None, **figures):
    about = {"model": "vit", "image_size": 0, "batch": 4, "dtype": "bf16", "device": "a chip", "threads": 2}
    found = {"row": row, "phase": phase, "who": who, "mode": mode, "batch": 4, "settings": about | (settings or {})}
    return found | figures


def fabricated(steps, phase, mode):
    """As `measure` returns, without a clock."""
    found = {who: {"turns": TURNS[who if who in TURNS else LITERAL]} for who in steps.who}
    for figures in found.values():
        figures |= against(figures, found[steps.base]) | ({"saved_bytes": 3 << 20} if phase == TRAIN else {})
    return found | ({FLOOR: {"turns": [0.1, 0.05, 0.2]}} if mode == EAGER else {})


def test_rows_are_the_papers_in_its_order_and_all_operators():
    rows = choose(None)
    papers = [row for row in rows if row.method]
    assert [row.name for row in papers][:6] == ["full", "linear", "partial-1", "mlp-3", "sidetune", "bias"]
    assert len(papers) == 13 and [row.name for row in papers if row.missing] == ["sidetune"]
    assert str(Row("adapter-64", "adapter", "r=64").paper("train_latency")) == "294.4"
    assert Row("lora-qkv-8").paper("train_latency") is None
    assert tuple(row.name for row in rows if row.operator) == OPERATORS
    assert [row.name for row in choose(["vpt-deep-*", "mlp"])] == ["vpt-deep-1", "vpt-deep-200", "mlp"]
    with pytest.raises(TableError, match=r"unknown row of the cost table 'vpt-depe-1'; did you mean 'vpt-deep-1'\?"):
        choose(["vpt-depe-1"])


def test_settings_that_cannot_be_are_one_line_and_usual_ones_are_a_devices(monkeypatch):
    for wrong in ({"dtype": "bf15"}, {"batch": 0}, {"turns": 0}):
        with pytest.raises(TableError):
            Settings(**wrong)
    assert Settings.usual("cuda").batch == 64 and Settings.usual("cuda").dtype == "bf16"
    assert Settings.usual("cpu", batch=3, dtype=None).batch == 3
    for level, expected in (("amx", (4, "bf16")), ("avx512", (2, "fp32")), ("avx2", (2, "fp32"))):
        monkeypatch.setattr(settings._native, "cpu_level", lambda level=level: level)
        found = Settings.usual("cpu")
        assert (found.batch, found.dtype) == expected


@pytest.mark.parametrize("name", ["vpt-deep-1", "lora-qkv-8", "lora_linear"])
@pytest.mark.parametrize("phase", [TRAIN, INFERENCE])
def test_all_implementations_of_a_row_are_measured(name, phase):
    steps = steps_of(Row(name), LITTLE)
    found = measure(steps, phase, EAGER)
    assert list(found) == [*steps.who, FLOOR] and (PEFT in found) == ("lora" in name)
    for who in steps.who:
        assert "error" not in found[who], found[who]
        assert len(found[who]["turns"]) == 3 and min(found[who]["turns"]) > 0
        assert (found[who].get("saved_bytes", 0) > 0) == (phase == TRAIN)
        assert 0 < found[who]["ratio_p25"] <= found[who]["ratio_p75"]
    assert found[steps.base]["ratio"] == 1.0 and "ratio" not in found[FLOOR]


def test_compiled_ratios_are_to_what_ran_eagerly_in_the_same_turns():
    found = measure(steps_of(Row("adapter"), LITTLE), TRAIN, COMPILED)
    assert list(found) == [OURS, operators.REFERENCE] and found[operators.REFERENCE]["ratio"] != 1.0
    assert found[OURS]["saved_bytes"] > 0


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operators_products_are_those_of_its_least_work(operator):
    forward, backward = operators.products(operator, 2)
    module = operators.cases(operator)
    problem = module.problem(torch.float32, torch.device("cpu"), **operators.call_of(operator, 2))
    found = [sum(2 * b * m * k * n for b, m, k, n in part) for part in (forward, backward)]
    least = problem.work
    assert found[0] <= least.forward_flops and found[1] <= least.backward_flops
    # LayerNorm has none; else only low-rank terms, and what attention computes twice, are left out.
    assert operator == "layer_norm" or found[0] > 0.9 * least.forward_flops
    assert operator == "layer_norm" or found[1] > 0.75 * least.backward_flops


def test_steps_of_an_implementation_that_fails_are_a_reason_and_the_others_figures():
    class Broken:
        who, base, settings = (OURS, LITERAL), LITERAL, LITTLE

        def prepare(self, phase, who, compiled):
            if who == OURS:
                raise RuntimeError("no such thing")
            return lambda: None

        def kept(self, step):
            return step, torch.nn.Identity()

        def floor(self, phase):
            return None

    found = measure(Broken(), TRAIN, EAGER)
    assert found[OURS]["error"] == "RuntimeError: no such thing" and found[LITERAL]["ratio"] == 1.0


def test_a_model_that_cannot_have_a_method_is_no_error():
    found = measure(steps_of(Row("adapter-256", "adapter", "r=256"), LITTLE), INFERENCE, EAGER)
    assert found[OURS] == {"unavailable": "Adapter: reduction 256 leaves no unit at width 64"}


def test_a_clock_times_the_second_of_two_steps():
    taken = []
    clock = Clock(lambda: taken.append(len(taken)), "cpu")
    clock()
    assert taken == [0, 1] and len(clock.seconds) == 1


def test_groups_are_measured_once_with_peaks_of_both_phases():
    said, asked = [], []

    def peaks(row, settings, who):
        asked.append(who)
        return {TRAIN: 10 if who == OURS else 20, INFERENCE: 5}

    measurements = Measurements(LITTLE, said.append, fabricated, peaks)
    row = Row("vpt-deep-1", "vpt-deep", "p=1")
    ours = measurements.figures(row, TRAIN, OURS, EAGER)
    assert ours["peak_ratio"] == 0.5 and ours["saved_ratio"] == 1.0 and ours["floor"] == 0.1
    assert ours["ratio"] == pytest.approx(0.4) and ours["ratio_p25"] == pytest.approx(0.325)
    assert measurements.figures(row, INFERENCE, LITERAL, EAGER)["peak_bytes"] == 5
    assert "unavailable" in measurements.figures(row, TRAIN, PEFT, EAGER)
    assert (
        asked == [OURS, LITERAL] and len(said) == 2 and said[0].startswith("vpt-deep-1, train, eager: fastpeft 200 ms")
    )


def test_nothing_is_compiled_when_time_is_up_and_the_table_says_so():
    session = Session(choose(["vpt-deep-1"]), LITTLE, Accuracies(), print, "auto", minutes=0)
    (row, phase, who), *_ = session.cells(COMPILED)
    assert session.figures(row, phase, who, COMPILED) == {
        "unavailable": "not compiled within 0 minutes (--bench-minutes)"
    }
    assert Session(choose(["vpt-deep-1"]), LITTLE, Accuracies(), print, "none").cells(COMPILED) == []


def test_the_trained_share_is_the_papers():
    steps = steps_of(Row("full"), LITTLE)
    assert steps.trained_percent() == 100.0 and steps_of(Row("mlp"), LITTLE).trained_percent() is None
    # 6 blocks, 64 wide: 200 prompts each, and a head of 100 classes.
    model = sum(p.numel() for p in methods.plain(LITTLE).parameters())
    prompts, head = 6 * 200 * 64, 64 * 100 + 100
    found = steps_of(Row("vpt-deep-200"), LITTLE).trained_percent()
    assert found == pytest.approx(100 * (prompts + head) / (model + prompts))


def test_a_replay_lets_the_time_of_every_turn_pass():
    replay = Replay()
    replay.of([0.5, 0.25])
    seen = [replay.now()]
    for _ in range(2):
        replay()
        seen.append(replay.now())
    assert seen == [0.0, 0.5, 0.75]


def test_the_table_has_a_block_a_row_with_floor_accuracy_and_the_papers_cells():
    times = {"median_ms": 200.0, "floor_ms": 100.0, "ratio": 0.4, "saved_bytes": 3 << 20, "peak_bytes": 5 << 20}
    records = [
        record(**times, tuned_percent=2.19),
        record(who=LITERAL, **times | {"median_ms": 500.0, "ratio": 1.0}),
        record(phase=INFERENCE, median_ms=40.0, floor_ms=50.0, ratio=0.8),
        record(mode=COMPILED, unavailable="no compiler"),
    ]
    rows = choose(["vpt-deep-200", "sidetune", "mlp"])
    text = render(rows, records, Accuracies({"vpt-deep": 78.4}, "Accuracy: somewhere."))
    lines = [" ".join(line.replace("|", " ").split()) for line in text.splitlines()]
    assert any(line.startswith("sidetune -") and line.endswith("10.09 164.6 1.2 66.9 0.91") for line in lines)
    assert "vpt-deep-200 F 25 100 12.5 50 78.40 2.19 2.19 360.1 25.8 140.8 1.85" in lines
    assert "fastpeft 50 200 2.00 0.40 5 3 10 40 0.80 0.80 -" in lines
    assert "literal 125 500 5.00 1.00 5 3 - - - - -" in lines
    assert "Without figures, no compiler: vpt-deep-200 train by fastpeft, compiled." in lines
    assert "Without figures, not in the library: sidetune." in lines
    assert "vit, batch 4, bf16, a chip, 2 threads." in lines and "Accuracy: somewhere." in lines


def _results(path, rows):
    for task, method, seed, value, *rest in rows:
        backbone, stage = [*rest, *("small", "final")[len(rest) :]]
        about = dict.fromkeys(FIELDS, "") | {"image_size": "224", "protocol": "quick-10", "backbone": backbone}
        about |= {"stage": stage, "task": task, "method": method, "seed": seed, "accuracy": value}
        Results(path).add(about)
    return path


def test_accuracies_are_means_over_tasks_that_all_methods_have(tmp_path):
    path = tmp_path / "results.csv"
    rows = [("a", "full", 1, 0.5), ("a", "full", 2, 0.7), ("b", "full", 1, 0.8), ("a", "lora", 1, 0.9)]
    _results(path, [*rows, ("a", "full", 1, 0.1, "large"), ("a", "full", 1, 0.0, "small", "search")])
    found = accuracy.read(path)
    assert found.percent == pytest.approx({"full": 60.0, "lora": 90.0})
    assert found.of(Row("lora-qkv-8")) == pytest.approx(90.0) and found.of(Row("bias", "bias")) is None
    assert found.about.startswith("Accuracy: mean over a of small at 224 px, protocol quick-10; 1 other kinds")


def test_accuracies_of_other_training_sets_are_not_those_of_the_task(tmp_path):
    path = _results(tmp_path / "results.csv", [("a", "full", 1, 0.5), ("a", "lora", 1, 0.9)])
    (full, lora) = Results(path).rows()
    for setting in ("one-shot", "n_train=400"):
        for method in ("full", "lora", "linear"):
            Results(path).add(full | {"method": method, "setting": setting, "accuracy": "0.125"})
    assert accuracy.read(path).percent == pytest.approx({"full": 50.0, "lora": 90.0})
    other = tmp_path / "other.csv"
    Results(other).add(lora | {"setting": "one-shot"})
    with pytest.raises(TableError, match="no final run"):
        accuracy.read(other)


def test_accuracies_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(TableError, match="there is no file"):
        accuracy.read(tmp_path / "results.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(TableError, match="columns"):
        accuracy.read(tmp_path / "other.csv")
    with pytest.raises(TableError, match="no final run"):
        accuracy.read(_results(tmp_path / "search.csv", [("a", "full", 1, 0.0, "small", "search")]))
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path)
    assert accuracy.read(None).percent == {}
    (tmp_path / "offline").mkdir()
    _results(tmp_path / "offline" / "results.csv", [("a", "linear", 1, 0.25)])
    assert accuracy.read(None).percent == {"linear": 25.0}


def test_ratios_are_compared_and_only_ours_regress():
    before = [record(ratio=0.5, saved_ratio=0.4), record(who=PEFT, ratio=1.0), record(row="full", ratio=0.9)]
    after = [record(ratio=0.56, saved_ratio=0.43), record(who=PEFT, ratio=2.0)]
    found = compare.compare(before, after)
    assert [str(change) for change in found.regressions()] == [
        "vpt-deep-200, train, fastpeft, eager, time: 0.500 -> 0.560 (+12.0%)"
    ]
    assert found.alone == (("full", TRAIN, OURS, EAGER),)
    text = "\n".join(compare.lines(found))
    assert text.count("regressed") == 1 and "not in this run: full train" in text and "1 of our ratios" in text
    assert not compare.compare(before, [record(ratio=0.549, saved_ratio=0.2)]).regressions()


def test_runs_under_other_settings_are_not_compared():
    found = compare.compare([record(ratio=0.5)], [record(ratio=9.0, settings={"batch": 16})])
    assert found.different == "batch 4 then, 16 now" and not found.changes
    assert compare.lines(found) == ["not comparable: batch 4 then, 16 now"]
    assert compare.compare([], [record(ratio=1.0)]).different


def test_files_that_are_no_benchmarks(tmp_path):
    for text in ("{", "[]", '{"benchmarks": [{}]}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(TableError, match=r"x\.json"):
            compare.load(tmp_path / "x.json")
    with pytest.raises(TableError, match="No such file"):
        compare.load(tmp_path / "y.json")


def _checked(before, *runs):
    """Exit status of a check, what it said, and which rows it measured."""
    said, asked, left = [], [], list(runs)

    def run(rows, turns, seconds):
        asked.append(tuple(rows))
        return left.pop(0)

    return check.check(before, run, said.append), "\n".join(said), asked


def test_a_check_repeats_before_it_fails():
    before = [record(ratio=0.5, saved_ratio=0.5), record(row="full", ratio=0.5)]
    good = [record(ratio=0.52, saved_ratio=0.5), record(row="full", ratio=0.5)]
    bad = [record(ratio=0.6, saved_ratio=0.5), record(row="full", ratio=0.5)]
    status, said, asked = _checked(before, good)
    assert status == 0 and asked == [check.SELECTION] and "no ratio has regressed" in said
    status, said, asked = _checked(before, bad, good)
    assert status == 0 and asked == [check.SELECTION, ("vpt-deep-200",)] and "not so the second time" in said
    status, said, _ = _checked(before, bad, bad)
    assert status == 1 and "regressed, twice: vpt-deep-200, train, fastpeft, eager, time: 0.500 -> 0.600" in said
    # Another figure of the row that grew the second time only is no confirmation.
    worse = [record(ratio=0.5, saved_ratio=0.9), record(row="full", ratio=0.5)]
    assert _checked(before, bad, worse)[0] == 0


def test_a_row_that_cannot_be_measured_any_more_fails_the_check():
    said = []

    def broken(rows, turns, seconds):
        raise check.BrokenError("benchmarks failed; see above")

    assert check.check([record(ratio=0.5)], broken, said.append) == 1
    assert said == ["bench-check: benchmarks failed; see above"]


def test_a_check_misses_what_is_gone_and_refuses_what_differs():
    before = [record(ratio=0.5), record(row="full", ratio=0.5)]
    status, said, _ = _checked(before, [record(ratio=0.5)])
    assert status == 1 and "committed, but not measured now: full train" in said
    status, said, _ = _checked(before, [record(ratio=0.5, settings={"threads": 1})])
    assert status == 2 and "not comparable" in said and "threads 2 then, 1 now" in said


def test_a_check_misses_a_figure_that_could_not_be_measured():
    before = [record(ratio=0.5, peak_ratio=0.4), record(who=LITERAL, ratio=1.0, peak_ratio=1.0)]
    status, said, _ = _checked(before, [record(ratio=0.5, peak_error="killed"), before[1]])
    assert status == 1 and "committed, but not measured now: peak memory of vpt-deep-200 train" in said
    # Of another implementation it is said, and nothing more.
    status, said, _ = _checked(before, [before[0], record(who=LITERAL, ratio=1.0)])
    assert status == 0 and f"not measured in this run: peak memory of vpt-deep-200, train, {LITERAL}" in said


def test_a_machine_without_committed_results_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "default_path", lambda device: tmp_path / "device.json")
    monkeypatch.setattr(check, "run", lambda *_: pytest.fail("nothing to measure for"))
    assert check.main([]) == 0
    assert "nothing was compared: this machine has no committed results" in capsys.readouterr().out
    assert check.main(["--against", str(tmp_path / "none.json")]) == 0


def _run_pytest(folder, *options):
    quick = ["--bench-model", "test_vit", "--bench-image-size", "32", "--bench-batch", "2", "--bench-turns", "3"]
    quick += ["--bench-compile", "none", "--bench-dtype", "fp32", "--benchmark-storage", str(folder)]
    return [str(ROOT / "bench"), "--benchmark-only", "-p", "no:cacheprovider", *quick, *options]


@pytest.fixture
def without_a_clock(monkeypatch, no_worker):
    """Groups with fabricated timings, in this process."""

    def made(settings, say, peaks):
        return Measurements(settings, say, fabricated, lambda row, settings, who: {TRAIN: 2 << 20, INFERENCE: 1 << 20})

    monkeypatch.setattr("bench.cost.session.Measurements", made)


def test_pytest_prints_one_table_and_compares_with_a_run_before(tmp_path, monkeypatch, capsys, without_a_clock):
    path = tmp_path / "before.json"
    rows = ("--bench-rows", "vpt-deep-1,sidetune,mlp", "-p", "no:xdist")
    assert pytest.main(_run_pytest(tmp_path, *rows, "--benchmark-json", str(path))) == 0
    out = capsys.readouterr().out
    assert out.count("cost table") == 1 and "[4/4," in out and "tests ----" not in out and "sidetune" in out
    document = json.loads(path.read_text())
    assert "node" not in document["machine_info"] and document["fastpeft"]["versions"]["torch"]
    assert len(document["benchmarks"]) == 8
    for one in document["benchmarks"]:
        noted = one["extra_info"]
        assert one["stats"]["median"] * 1000 == pytest.approx(noted["median_ms"]) and noted["peak_bytes"] >= 1 << 20
        assert one["stats"]["data"] == pytest.approx(TURNS.get(noted["who"], TURNS[LITERAL]))
        noted["ratio"] /= 2 if noted["who"] == OURS else 1
    path.write_text(json.dumps(document))
    assert pytest.main(_run_pytest(tmp_path, *rows, "--benchmark-compare", str(path))) == 0
    out = capsys.readouterr().out
    assert "ratios, against the run of" in out and "4 of our ratios grew by more than 10%." in out
    assert "vpt-deep-1, train, fastpeft: time" in out and "+100.0%  regressed" in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--bench-rows", "vpt-depe-1"), "did you mean 'vpt-deep-1'"),
        (("--bench-batch", "0"), "batch must be at least 1"),
        (("--results", "nowhere.csv"), "there is no file nowhere.csv"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(tmp_path, capsys, no_worker, options, said):
    assert pytest.main([*_run_pytest(tmp_path), "-p", "no:xdist", *options]) == pytest.ExitCode.USAGE_ERROR
    found = capsys.readouterr()
    assert said in found.out + found.err and "Traceback" not in found.out + found.err


@pytest.mark.slow
def test_what_is_measured_in_a_process_of_its_own_is_in_the_table(tmp_path, no_worker):
    path = tmp_path / "measured.json"
    options = _run_pytest(tmp_path, "--bench-rows", "vpt-deep-1", "--benchmark-json", str(path))
    done = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    noted = [one["extra_info"] for one in json.loads(path.read_text())["benchmarks"]]
    assert [one["who"] for one in noted] == [OURS, LITERAL] * 2 and all(one["peak_bytes"] > 0 for one in noted)


def test_every_row_has_a_name_of_its_own():
    names = [row.name for row in selection.table()]
    assert len(names) == len(set(names))
