"""Log records: plain lines, or JSON objects that a machine can read whatever is in them."""

from __future__ import annotations

import datetime
import json
import logging
import os
from collections.abc import Iterator

import pytest

from moeshm import logs


@pytest.fixture(autouse=True)
def _own_logger() -> Iterator[None]:
    """The package's logger as it was, afterwards."""
    logger = logging.getLogger("moeshm")
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before


def written(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines on standard error; standard output stays empty."""
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", as_json=False)
    logging.getLogger("moeshm.worker").info("%d calls", 3)
    (line,) = written(capsys)
    assert line.endswith(" INFO 3 calls")


@pytest.mark.parametrize(
    ("level", "n_lines"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)]
)
@pytest.mark.parametrize("as_json", [False, True])
def test_levels(
    capsys: pytest.CaptureFixture[str], level: str, n_lines: int, as_json: bool
) -> None:
    logs.configure(level, as_json)
    logger = logging.getLogger("moeshm.daemon")
    for number in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logger.log(number, "something")
    assert len(written(capsys)) == n_lines


def test_configured_twice_it_logs_once(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", as_json=False)
    logs.configure("info", as_json=True)
    logging.getLogger("moeshm").warning("once")
    assert len(written(capsys)) == 1


def test_other_packages_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger().handlers[:]
    logs.configure("debug", as_json=True)
    logging.getLogger("someone.else").debug("not ours")
    assert logging.getLogger().handlers == before
    assert written(capsys) == []


def test_a_json_record_has_the_documented_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", as_json=True)
    before = datetime.datetime.now(datetime.timezone.utc)
    logging.getLogger("moeshm.daemon").warning("process %d: %s", 12, "gone")
    record = json.loads(written(capsys)[0])
    time = datetime.datetime.fromisoformat(record.pop("time").replace("Z", "+00:00"))
    assert before - datetime.timedelta(seconds=1) < time
    assert time <= datetime.datetime.now(datetime.timezone.utc)
    assert record == {
        "level": "warning",
        "logger": "moeshm.daemon",
        "pid": os.getpid(),
        "message": "process 12: gone",
    }


def test_a_traceback_stays_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", as_json=True)
    try:
        raise RuntimeError("two\nlines")
    except RuntimeError:
        logging.getLogger("moeshm").exception("failed")
    (line,) = written(capsys)
    record = json.loads(line)
    assert record["message"] == "failed"
    assert record["traceback"].startswith("Traceback")
    assert record["traceback"].endswith("two\nlines")


@pytest.mark.parametrize(
    "text", ["line\nbreak", "\x00\x1b[0m", "ünïcode …", "half a \ud83d", "\udcff"]
)
def test_any_text_is_one_valid_line(capsys: pytest.CaptureFixture[str], text: str) -> None:
    """Among them a file name that is no UTF-8, as Python decodes it."""
    logs.configure("info", as_json=True)
    logging.getLogger("moeshm").info("cannot read %s", text)
    (line,) = written(capsys)
    assert json.loads(line)["message"].startswith("cannot read ")
