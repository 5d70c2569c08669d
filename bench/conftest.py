"""Benchmarks are measurements: one process, one table at the end, the machine noted in what they save."""

from __future__ import annotations

import pytest

from bench import generation
from bench.cost import compare
from bench.cost.session import Session, add_options
from bench.cost.table import render
from bench.mplug_cost import benchmark as mplug
from bench.tables.errors import TableError
from bench.timing import environment

_COMPARED: pytest.StashKey[list[dict]] = pytest.StashKey()
# What pytest-benchmark notes of a machine and is another in every run, or is nobody's business.
_FLEETING = ("node", "cpu", "release", "python_build")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the cost table, of generation, and of mPLUG's steps."""
    add_options(parser)
    generation.add_options(parser)
    mplug.add_options(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """One table instead of pytest-benchmark's fifty, which --benchmark-verbose brings back."""
    config.stash[_COMPARED] = []
    if hasattr(config.option, "benchmark_quiet"):
        config.option.benchmark_quiet = True


def pytest_sessionstart(session: pytest.Session) -> None:
    """A mistake on the command line ends a run before it begins."""
    mplug.Runs.of(session.config, Session.of(session.config).settings)


@pytest.fixture(scope="session")
def cost_session(request: pytest.FixtureRequest) -> Session:
    """The run of the cost table."""
    return Session.of(request.config)


@pytest.hookimpl(optionalhook=True)  # without pytest-benchmark there is nothing to add to
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Leave out what changes from run to run, so that a warning about another machine means one."""
    for name in _FLEETING:
        machine_info.pop(name, None)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    """Leave out what a checkout is called."""
    for name in ("project", "branch"):
        commit_info.pop(name, None)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    """Add versions, device, command and date to the file that `--benchmark-json` writes."""
    session = Session.begun(config)
    for one in output_json["benchmarks"]:
        # Objects of this run, of which the names say all.
        one.pop("params", None)
        one.pop("options", None)
    output_json["fastpeft"] = environment(session.settings.device if session else "cpu")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_compare_machine_info(config: pytest.Config, compared_benchmark: dict) -> None:
    """Keep the run that `--benchmark-compare` names."""
    config.stash[_COMPARED].append(compared_benchmark)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The tables, and ratios beside those of the run that is compared."""
    generation.write_table(terminalreporter, config)
    runs = mplug.Runs.begun(config)
    if runs is not None and runs.records:
        terminalreporter.section("mPLUG")
        terminalreporter.write_line(mplug.render(runs.records))
    session = Session.begun(config)
    if session is None or not session.records:
        return
    terminalreporter.section("cost table")
    terminalreporter.write_line(render(session.rows, session.records, session.accuracies))
    for document in config.stash[_COMPARED]:
        terminalreporter.section(f"ratios, against the run of {document.get('datetime', 'unknown date')[:10]}")
        try:
            found = compare.lines(compare.compare(compare.records_of(document, "--benchmark-compare"), session.records))
        except TableError as error:
            found = [str(error)]
        for line in found:
            terminalreporter.write_line(line)
