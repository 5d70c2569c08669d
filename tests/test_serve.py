"""How commands end: a status, and one line at most."""

from __future__ import annotations

import contextlib
import importlib
import io
import os

import pytest

from fastpeft import info
from fastpeft._serve import GOES_ON, UNREAD, serve
from fastpeft.errors import FastPEFTError


def failing(error: BaseException):
    def request():
        raise error

    return request


@pytest.fixture(params=["buffered", "at once"])
def unread(request):
    """A pipe whose reader has gone, as `head` does."""
    reader, writer = os.pipe()
    os.close(reader)
    buffered = request.param == "buffered"
    # As python -u writes.
    stream = os.fdopen(writer, "w") if buffered else io.TextIOWrapper(os.fdopen(writer, "wb", 0), write_through=True)
    yield stream
    # As when the process ends: nothing is left that could fail.
    stream.close()


@pytest.mark.parametrize("lines", [1, 20_000], ids=["in the buffer at the end", "more than a buffer"])
def test_output_that_nobody_reads_ends_quietly(unread, capfd, lines):
    def request():
        for number in range(lines):
            print("a line of a table", number)

    with contextlib.redirect_stdout(unread):
        assert serve(request) == UNREAD == 128 + 13
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("unread", ["buffered"], indirect=True)
def test_an_error_is_said_although_nobody_reads_the_output(unread, capfd):
    def request():
        print("half of it")
        raise FastPEFTError("and no more")

    with contextlib.redirect_stdout(unread):
        assert serve(request) == 2
    assert capfd.readouterr() == ("", "error: and no more\n")


def test_an_error_that_nobody_reads_is_no_other(unread):
    with contextlib.redirect_stderr(unread):
        assert serve(failing(FastPEFTError("unread"))) == 2


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (FastPEFTError("two\n  lines"), 2, "two lines"),
        (FileNotFoundError(2, "No such file or directory", "a.csv"), 2, "a.csv: No such file or directory"),
        # Of another pipe, while the output is read: no reason to be silent.
        (BrokenPipeError(32, "Broken pipe"), 2, "Broken pipe"),
        (KeyboardInterrupt(), 130, f"interrupted; {GOES_ON}"),
    ],
)
def test_a_failure_is_one_line(error, status, line, capsys):
    assert serve(failing(error), GOES_ON) == status
    assert capsys.readouterr().err == f"error: {line}\n"


def test_a_request_that_is_served(capsys):
    assert serve(lambda: print("done")) == 0
    assert capsys.readouterr() == ("done\n", "")
    assert serve(lambda: 1) == 1 and serve(lambda: 0) == 0


# Requests that print and do nothing else.
QUICK = {
    "check": ["--against", "none.json"],
    "cpu": ["--markdown"],
    "device": ["--part", "summary", "--tiny", "--out", "device.json"],
    "made": ["--help"],
    "mplug_cost": ["--markdown"],
    "native_ops": ["--markdown"],
    "offline.page": ["--help"],
    "scale": ["--only", "no such row", "--out", "scale.json"],
}


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("unread", ["buffered"], indirect=True)
def test_commands_whose_output_nobody_reads(unread, capfd, tmp_path, monkeypatch, name):
    pytest.importorskip("optuna")
    try:
        command = importlib.import_module(f"bench.{name}.__main__")
    except ModuleNotFoundError:
        command = importlib.import_module(f"bench.{name}")
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(unread):
        assert command.main(QUICK[name]) == UNREAD
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("unread", ["buffered"], indirect=True)
def test_a_report_that_nobody_reads(unread, capfd):
    with contextlib.redirect_stdout(unread):
        assert info.main() == UNREAD
    assert capfd.readouterr() == ("", "")
