"""Effect sizes, Holm's correction and the tables of the tests: against SciPy, statsmodels and numbers by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("statsmodels")
from scipy import stats

from bench.analyses import accuracies
from bench.analyses.effects import hedges_g, holm, interval, rank_biserial
from bench.analyses.errors import AnalysisError
from bench.analyses.significance import main, on_tasks, over_tasks
from bench.tables import statistics
from bench.tables.errors import TableError
from bench.tables.results import FIELDS, Results


def results(path, rows, **common):
    """A result file of (method, task, seed, accuracy)."""
    file = Results(path)
    base = dict.fromkeys(FIELDS, "") | {"stage": "final", "backbone": "b@w", "image_size": 32, "protocol": "paper-100"}
    for method, task, seed, accuracy in rows:
        file.add(base | {"method": method, "task": task, "seed": seed, "accuracy": accuracy} | common)
    return path


TASKS = ("svhn", "dtd", "eurosat", "dmlab", "kitti", "sun397")


@pytest.fixture
def measured(tmp_path):
    """Three methods on six tasks, four seeds."""
    random = np.random.default_rng(0)
    rows = []
    for method, lead in (("vpt-deep", 0.05), ("full", 0.0), ("linear", -0.2)):
        for number, task in enumerate(TASKS):
            for seed in range(4):
                rows.append((method, task, seed, round(0.5 + 0.05 * number + lead + 0.02 * random.normal(), 6)))
    return results(tmp_path / "results.csv", rows)


def test_holm_by_hand():
    # Sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2 (not below the one before), 0.5 * 1.
    assert holm([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([]) == [] and holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])


def test_rank_biserial_by_hand():
    # Differences 1, -2, 3, 0: ranks 1, 2, 3; (1 + 3 - 2) / 6.
    assert rank_biserial([2, 1, 4, 5], [1, 3, 1, 5]) == pytest.approx(1 / 3)
    assert rank_biserial([2, 3], [1, 1]) == 1 and rank_biserial([1, 1], [2, 3]) == -1
    assert math.isnan(rank_biserial([1, 2], [1, 2]))
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 15))
    favour = stats.wilcoxon(a, b, alternative="greater").statistic
    assert rank_biserial(a, b) == pytest.approx(2 * favour / (15 * 16 / 2) - 1)


def test_hedges_g_and_the_interval():
    a, b = [3.0, 5.0, 7.0], [1.0, 2.0, 3.0]
    cohen = 3 / math.sqrt((4 + 1) / 2)
    # The exact factor for four degrees of freedom; the usual approximation is 1 - 3 / (4 * 4 - 1) = 0.8.
    exact = math.gamma(2) / (math.sqrt(2) * math.gamma(1.5))
    assert hedges_g(a, b) == pytest.approx(cohen * exact) and exact == pytest.approx(0.8, abs=3e-3)
    assert hedges_g(b, a) == -hedges_g(a, b)
    assert math.isnan(hedges_g([1.0], b))
    low, high = interval(a, b)
    found = stats.ttest_ind(a, b, equal_var=False)
    half = stats.t.ppf(0.975, found.df) * math.sqrt(4 / 3 + 1 / 3)
    assert (low, high) == pytest.approx((3 - half, 3 + half))
    assert all(map(math.isnan, interval([1], [2, 3])))


# None of these numbers is a binary fraction: the mean of three equal ones differs from them in the last digit.
@pytest.mark.parametrize("second", [[60.3] * 3, [70.1] * 3, [60.3] * 5])
@pytest.mark.filterwarnings("error")
def test_samples_without_variance_say_nothing(second):
    first = [70.1] * 3
    assert math.isnan(hedges_g(first, second)) and math.isnan(hedges_g(second, first))
    assert all(map(math.isnan, (*interval(first, second), *interval(second, first))))


@pytest.mark.filterwarnings("error")
def test_one_sample_that_varies_is_enough():
    constant, varied = [70.1] * 3, [60.3, 61.9, 59.2, 60.0]
    # SciPy from the sums themselves, which for a constant sample are known without rounding.
    known = (np.mean(varied), np.std(varied, ddof=1), 4, 70.1, 0.0, 3)
    expected = stats.ttest_ind_from_stats(*known, equal_var=False).statistic
    half = stats.t.ppf(0.975, 3) * np.std(varied, ddof=1) / 2
    gap = np.mean(varied) - 70.1
    assert expected == pytest.approx(gap / (np.std(varied, ddof=1) / 2))
    assert interval(varied, constant) == pytest.approx((gap - half, gap + half), rel=1e-12)
    assert interval(constant, varied) == pytest.approx((-gap - half, -gap + half), rel=1e-12)
    greater = stats.ttest_ind_from_stats(*known, equal_var=False, alternative="greater").pvalue
    assert statistics.welch(varied, constant).p == pytest.approx(greater, rel=1e-9)
    assert hedges_g(varied, constant) == -hedges_g(constant, varied)
    correction = math.gamma(5 / 2) / (math.sqrt(5 / 2) * math.gamma(2))
    assert hedges_g(varied, constant) == pytest.approx(gap / (np.std(varied, ddof=1) / math.sqrt(2)) * correction)


def test_the_interval_covers_as_often_as_it_says():
    random = np.random.default_rng(0)
    drawn = ((random.normal(0, 1, 5), random.normal(0, 3, 5)) for _ in range(400))
    covered = sum(low <= 0 <= high for low, high in (interval(a, b) for a, b in drawn))
    assert 0.92 < covered / 400 < 0.98


def test_tests_are_scipys(measured):
    known = accuracies.read(measured).by_method
    rivals = {name: known[name] for name in ("full", "linear")}
    over = over_tasks(known["vpt-deep"], rivals)
    for one in over:
        pairs = np.array(
            [[np.mean(list(known[name][task].values())) for task in TASKS] for name in ("vpt-deep", one.rival)]
        )
        assert one.p == pytest.approx(stats.wilcoxon(*pairs, alternative="greater").pvalue)
        assert one.difference == pytest.approx((pairs[0] - pairs[1]).mean()) and one.tasks == 6
        assert one.wins == (pairs[0] > pairs[1]).sum()
    assert over[1].p == 2.0**-6 and over[1].effect == 1 and over[1].holm == 2 * 2.0**-6
    within = on_tasks(known["vpt-deep"], rivals)
    assert [(one.rival, one.task) for one in within] == [(name, task) for name in rivals for task in TASKS]
    for one in within:
        a, b = (list(known[name][one.task].values()) for name in ("vpt-deep", one.rival))
        assert one.p == pytest.approx(stats.ttest_ind(a, b, equal_var=False, alternative="greater").pvalue)
    assert [one.holm for one in within] == pytest.approx(holm([one.p for one in within]))


def test_seeds_that_cannot_be_tested_take_no_part_in_the_correction():
    ours = {"dtd": {0: 50.0, 1: 52.0}, "svhn": {0: 50.0}, "eurosat": {0: 70.0, 1: 70.0}}
    theirs = {"dtd": {0: 40.0, 1: 41.0}, "svhn": {0: 49.0}, "eurosat": {0: 60.0, 1: 60.0}, "kitti": {0: 1.0}}
    found = {one.task: one for one in on_tasks(ours, {"full": theirs, "none": {"kitti": {0: 1.0}}})}
    assert set(found) == {"dtd", "svhn", "eurosat"}
    assert found["svhn"].p is None and found["svhn"].holm is None and found["eurosat"].p is None
    assert found["dtd"].holm == found["dtd"].p


@pytest.mark.filterwarnings("error")
def test_seeds_that_agree_are_a_dash_with_a_reason(tmp_path, capsys):
    rows = [(method, task, seed, 0.701 - 0.1 * (method == "full") + 0.01 * seed * (task == "dtd"))
            for method in ("vpt-deep", "full") for task in ("dtd", "svhn") for seed in range(3)]  # fmt: skip
    assert main([str(results(tmp_path / "some.csv", rows))]) == 0
    said = capsys.readouterr().out
    assert "| full, svhn | 3 / 3 | +10.00 | - | - | - | - |" in said and "of 1 tests" in said
    assert f"{statistics.CONSTANT} So it is with the interval and the effect." in said
    assert main([str(results(tmp_path / "none.csv", [row for row in rows if row[1] == "dtd"]))]) == 0
    assert statistics.CONSTANT not in capsys.readouterr().out


def test_the_command(measured, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([str(measured), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert (
        "Wilcoxon signed-rank" in said and "b@w at 32 px, protocol paper-100." in said and "| linear | 6 | 6 |" in said
    )
    assert "Below 0.05: " in said and "of 12 tests" in said and "no smaller than 0.016" in said
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(written) == {"wilcoxon.md", "wilcoxon.tex", "welch.md", "welch.tex", "welch.png", "welch.svg"}
    assert main([str(measured), "--out", str(out)]) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == written
    assert main([str(measured), "--rivals", "linear"]) == 0
    assert "full" not in capsys.readouterr().out.split("Welch's t\n")[-1]


def test_bad_requests_are_one_line(measured, tmp_path, capsys):
    lone = results(tmp_path / "lone.csv", [("full", "dtd", 0, 0.5)])
    apart = results(tmp_path / "apart.csv", [("full", "dtd", 0, 0.5), ("vpt-deep", "svhn", 0, 0.5)])
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for arguments, expected in (
        ([str(tmp_path / "none.csv")], "no such result file"),
        ([str(tmp_path / "other.csv")], "its columns are not those"),
        ([str(measured), "--method", "vpt-deeb"], "did you mean 'vpt-deep'?"),
        ([str(measured), "--rivals", "lora"], "unknown method"),
        ([str(measured), "--rivals", "vpt-deep"], "cannot be its own rival"),
        ([str(lone), "--method", "full"], "full has no rival in it"),
        ([str(apart)], "no rival has a task in common"),
        ([str(measured), "--where", "colour=red"], "expected FIELD=VALUE with a field of task"),
        ([str(measured), "--where", "task=none"], "no final runs with task=none"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1, error


def test_training_sets_are_never_mixed(measured, capsys):
    """Rows of another training set are no seeds of this one, be it for the same method or for its rival."""
    before = accuracies.read(measured)
    assert before.setup == "b@w at 32 px, protocol paper-100"
    results(measured, [("full", "dtd", 9, 0.01), ("lora", "dtd", 0, 0.99)], setting="n_train=400")
    with pytest.raises(AnalysisError, match=r"choose one with --where: .* setting=; .* setting=n_train=400$"):
        accuracies.read(measured)
    assert main([str(measured)]) == 2 and capsys.readouterr().err.count("\n") == 1
    assert accuracies.read(measured, ["setting="]) == before
    other = accuracies.read(measured, ["setting=n_train=400"])
    assert other.by_method == {"full": {"dtd": {9: 1.0}}, "lora": {"dtd": {0: 99.0}}}
    assert other.setup == "b@w at 32 px, protocol paper-100, n_train=400"


def test_setups_are_never_mixed(measured):
    results(measured, [("full", "dtd", 0, 0.5)], protocol="quick-10")
    with pytest.raises(AnalysisError, match=r"several set-ups; choose one with --where: .* protocol=quick-10"):
        accuracies.read(measured)
    assert list(accuracies.read(measured, ["protocol=quick-10"]).by_method) == ["full"]
    results(measured, [("full", "dtd", 0, 0.5)], point="base_lr=1")
    with pytest.raises(AnalysisError, match="two runs with the seed 0; choose one with --where point="):
        accuracies.read(measured, ["protocol=paper-100"])
    results(measured, [("full", "dtd", 9, 0.9)], stage="search", protocol="paper-100")
    found = accuracies.read(measured, ["protocol=paper-100", "point="])
    assert found.of("full")["dtd"].keys() == {0, 1, 2, 3}
    with pytest.raises(TableError, match="unknown method"):
        found.of("none")
