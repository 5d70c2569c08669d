"""What is measured, what is kept, and what is used afterwards; times are made up, since there is no device."""

from __future__ import annotations

import json
import multiprocessing
import threading
import warnings
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from fastpeft.kernels import _choices, _tune, layer_norm, mlp
from fastpeft.kernels._launch import recording
from fastpeft.kernels._tune import agree, forget, rounded, tuned, tuning

CPU = torch.device("cpu")
KERNEL = layer_norm._forward_kernel


class Pick(NamedTuple):
    size: int
    warps: int = 4


TABLE, FAST, SLOW = Pick(1), Pick(2), Pick(3)
KEY = {"rows": 64, "dtype": torch.float16}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(_choices.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(_tune.VARIABLE, raising=False)
    monkeypatch.setattr(_choices, "_warned", set())
    forget()
    yield tmp_path / "cache"
    forget()


class Launcher:
    """Stands for a launcher: notes with which choices it ran."""

    def __init__(self, candidates=(FAST, SLOW), seconds=None):
        self.candidates, self.ran, self.timed = candidates, [], 0
        self.seconds = seconds or {TABLE: 2.0, FAST: 1.0, SLOW: 3.0}

    def run(self, choice):
        self.ran.append(choice)
        return torch.arange(8.0), None

    def timer(self, runs):
        self.timed += 1
        seconds = []
        for run in runs:
            run()
            seconds.append(self.seconds[self.ran[-1]])
        return seconds

    def __call__(self, key=KEY, changed=()):
        self.ran.clear()
        result = tuned(KERNEL, CPU, key, TABLE, lambda: self.candidates, self.run, changed)
        assert torch.equal(result[0], torch.arange(8.0))
        return self.ran[-1]


def file_of():
    return _choices.path_of(_choices.chip_of(CPU))


def measured(launcher=None):
    launcher = launcher or Launcher()
    with tuning(timer=launcher.timer) as found:
        assert launcher() == FAST
    return found


def test_the_table_decides_until_something_was_measured():
    launcher = Launcher()
    assert launcher() == TABLE and launcher.ran == [TABLE]
    assert not file_of().exists()


def test_the_fastest_is_kept_and_used_by_later_launches_and_processes():
    launcher = Launcher()
    found = measured(launcher)
    assert launcher.timed == 1
    ((label, entry),) = found.items()
    assert label == "layer_norm._forward_kernel rows=64 dtype=float16"
    assert entry["choice"] == {"size": 2, "warps": 4} and entry["table"] == {"size": 1, "warps": 4}
    assert (entry["seconds"], entry["table_seconds"], entry["measured"]) == (1.0, 2.0, 3)
    assert launcher() == FAST and launcher.ran == [FAST]
    forget()
    assert launcher() == FAST and launcher.ran == [FAST] and launcher.timed == 1
    assert launcher({"rows": 80, "dtype": torch.float16}) == TABLE


def test_the_file_names_the_chip_by_its_numbers_alone():
    measured()
    data = json.loads(file_of().read_text())
    assert set(data["chip"]) == {"kind", "capability", "processors", "triton"}
    assert file_of().name.startswith("launch-") and not list(file_of().parent.glob("*.tmp"))


def test_what_was_measured_is_not_measured_again_unless_asked_for():
    launcher = Launcher()
    measured(launcher)
    measured(launcher)
    forget()
    assert measured(launcher) and launcher.timed == 1
    launcher.seconds[SLOW] = 0.5
    with tuning(again=True, timer=launcher.timer):
        assert launcher() == SLOW and launcher() == SLOW
    assert launcher.timed == 2
    forget()
    assert launcher() == SLOW


def test_a_gain_that_could_be_noise_is_none():
    launcher = Launcher(seconds={TABLE: 1.0, FAST: 0.99, SLOW: 3.0})
    with tuning(timer=launcher.timer) as found:
        assert launcher() == TABLE
    assert [entry["choice"]["size"] for entry in found.values()] == [1]


def test_the_variable_asks_for_it_and_turns_it_off(monkeypatch):
    launcher = Launcher()
    monkeypatch.setattr(_tune, "_Events", lambda device: launcher.timer)
    monkeypatch.setenv(_tune.VARIABLE, "1")
    # A CPU has no events: nothing is measured there, whatever is asked for.
    assert launcher() == TABLE and launcher.timed == 0
    measured(launcher)
    assert launcher() == FAST
    monkeypatch.setenv(_tune.VARIABLE, "0")
    assert launcher() == TABLE and launcher.ran == [TABLE]
    forget()
    assert launcher() == TABLE
    monkeypatch.setenv(_tune.VARIABLE, "")
    assert launcher() == FAST
    with tuning(False):
        assert launcher() == TABLE


def test_deterministic_algorithms_do_not_depend_on_a_file():
    launcher = Launcher()
    measured(launcher)
    torch.use_deterministic_algorithms(True)
    try:
        assert launcher() == TABLE
    finally:
        torch.use_deterministic_algorithms(False)
    assert launcher() == FAST


def test_tuning_reaches_other_threads():
    launcher = Launcher()
    ran = []
    with tuning(timer=launcher.timer):
        thread = threading.Thread(target=lambda: ran.append(launcher()))
        thread.start()
        thread.join()
    assert ran == [FAST]


def test_nothing_is_measured_while_a_stream_is_captured(monkeypatch):
    launcher = Launcher()
    with tuning(timer=launcher.timer):
        monkeypatch.setattr(_tune, "capturing", lambda device: True)
        assert launcher() == TABLE and launcher.ran == [TABLE] and launcher.timed == 0
        monkeypatch.setattr(_tune, "capturing", lambda device: False)
        assert launcher() == FAST
        monkeypatch.setattr(_tune, "capturing", lambda device: True)
        # What is known is used.
        assert launcher() == FAST and launcher.timed == 1


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format": 1}', '{"format": 2, "chip": {}, "choices": {}}', "\ufffd"]
)
def test_a_broken_file_is_one_warning(text):
    measured()
    path = file_of()
    path.write_text(text)
    forget()
    launcher = Launcher()
    with pytest.warns(RuntimeWarning, match="launch choices in .* are left out"):
        assert launcher() == TABLE
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launcher() == TABLE
        # It is replaced by the next one that measures.
        measured(launcher)
    forget()
    assert launcher() == FAST


def test_a_file_of_another_chip_is_left_out():
    measured()
    data = json.loads(file_of().read_text())
    data["chip"]["processors"] += 1
    file_of().write_text(json.dumps(data))
    forget()
    with pytest.warns(RuntimeWarning, match="not for"):
        assert Launcher()() == TABLE


def changed_entry(**fields):
    measured()
    data = json.loads(file_of().read_text())
    (entry,) = data["choices"].values()
    entry.update(fields)
    file_of().write_text(json.dumps(data))
    forget()
    return Launcher()


def test_a_choice_for_another_source_is_left_out():
    assert changed_entry(source="0123")() == TABLE


@pytest.mark.parametrize(
    "choice", [{"size": 7, "warps": 4}, {"size": 2}, {"size": "2", "warps": 4}, {"size": 2.0, "warps": 4}, None, [2, 4]]
)
def test_only_candidates_are_taken_from_a_file(choice):
    assert changed_entry(choice=choice)() == TABLE


def test_unknown_fields_are_ignored():
    assert changed_entry(since="a later version")() == FAST


def test_the_source_is_that_of_the_kernel_and_of_all_it_calls():
    sources = {}
    _tune._collect(mlp.mlp_forward_fused, sources)
    names = {name.rpartition(".")[2] for name in sources}
    assert {"mlp_forward_fused", "product", "grouped", "activate", "_quantised", "derivative"} <= names
    assert _tune._digest(mlp.mlp_forward_fused) != _tune._digest(mlp.mlp_backward_fused)


def test_a_folder_that_cannot_be_written_is_one_warning(own_folder):
    own_folder.write_text("a file")
    launcher = Launcher()
    with pytest.warns(RuntimeWarning) as caught:
        measured(launcher)
    assert len(caught) == 1
    assert launcher() == FAST


def _save(worker):
    for index in range(5):
        _choices.save(_choices.chip_of(CPU), f"{worker}/{index}", {"choice": {"size": index}, "source": "s"})


def test_writers_at_the_same_time_lose_nothing():
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_save, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(_choices.load(_choices.chip_of(CPU))) == 20


def launch_with(results, candidates, changed=()):
    """Measure with results by choice, all but the table's faster than it; the choice and the entry."""
    ran = []

    def run(choice, *given):
        ran.append(choice)
        return results(choice, *given)

    def timer(runs):
        return [2.0, *(1.0 + index for index in range(len(runs) - 1))]

    with tuning(timer=timer) as found:
        result = tuned(KERNEL, CPU, KEY, TABLE, lambda: candidates, run, changed)
    (entry,) = found.values()
    return ran[-1], entry, result


def test_a_candidate_that_fails_is_refused():
    def results(choice):
        if choice == FAST:
            raise RuntimeError("out of resource: shared memory")
        return torch.ones(4)

    chosen, entry, _ = launch_with(results, [FAST, SLOW])
    assert chosen == SLOW and entry["refused"] == [FAST._asdict()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_candidate_that_is_wrong_is_refused(dtype):
    exact = torch.randn(64, 64)

    def results(choice):
        found = exact.clone()
        if choice == FAST:
            found[3, 5:9] += 1
        return found.to(dtype)

    chosen, entry, _ = launch_with(results, [FAST, SLOW])
    assert chosen == SLOW and entry["refused"] == [FAST._asdict()]


def test_a_candidate_that_leaves_something_unwritten_is_refused():
    out = torch.zeros(8)

    def results(choice):
        out[: 7 if choice == SLOW else 8] = 1.0
        return out

    chosen, entry, result = launch_with(results, [FAST, SLOW])
    assert chosen == FAST and entry["refused"] == [SLOW._asdict()]
    assert torch.equal(result, torch.ones(8))


def test_what_is_changed_in_place_is_changed_once():
    total = torch.ones(8)

    def results(choice, given):
        return given.add_(1.0)

    chosen, entry, result = launch_with(results, [FAST, SLOW], (total,))
    assert chosen == FAST and entry["refused"] == []
    assert result is total and torch.equal(total, torch.full((8,), 2.0))


def test_rounding_agrees_and_nothing_else():
    exact = torch.randn(1000)
    for dtype in (torch.float16, torch.bfloat16):
        assert agree([(exact * (1 + torch.finfo(dtype).eps / 4)).to(dtype)], [exact.to(dtype)])
    assert agree([exact * (1 + 1e-6)], [exact]) and not agree([exact * 1.01], [exact])
    hidden = torch.tensor([1.0, float("-inf"), float("nan")])
    assert agree([hidden], [hidden.clone()])
    assert not agree([torch.tensor([1.0, 0.0, float("nan")])], [hidden])
    assert not agree([torch.tensor([1.0, float("-inf"), 0.0])], [hidden])
    assert agree([torch.zeros(3)], [torch.zeros(3)]) and not agree([torch.full((3,), 1.0)], [torch.zeros(3)])
    steps = torch.randint(256, (1000,), dtype=torch.uint8)
    assert agree([steps], [steps.clone()]) and not agree([steps.flip(0)], [steps])


def test_classes_of_sizes_are_narrow():
    for count in (*range(0, 300), 12608, 2**31 + 5):
        found = rounded(count)
        assert count <= found <= max(count, count * 5 / 4) and rounded(found) == found
    assert len({rounded(count) for count in range(1, 1025)}) <= 40


def test_recorded_launches_are_the_tables():
    x = torch.empty(64, 197, 768, dtype=torch.bfloat16, device="meta")
    arguments = (x, None, None, 1e-6)
    with tuning(timer=lambda runs: [1.0] * len(runs)) as found, recording(90) as launches:
        layer_norm.forward(*arguments)
    assert len(launches) == 1 and not found
    with recording(90, candidates=True) as launches:
        layer_norm.forward(*arguments)
    assert len(launches) > 2
    assert len({(launch.arguments["ROWS"], launch.num_warps) for launch in launches}) == len(launches)
