"""The record of a run while it runs says what was spent: a killed run goes on with the time that is left."""

from __future__ import annotations

import json
import time

import pytest

from regraft import record
from regraft.budget import budget_from
from regraft.errors import RunError
from regraft.record import read_record, spending, write_record

OPTIONS = {"seed": 0}


def spent(folder):
    found = read_record(folder)
    assert (found["status"], found["options"]) == ("running", OPTIONS)
    return found["spent"]


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_time_is_noted_again_and_again_until_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "EVERY", 0.02)
    budget = budget_from("1h", spent=100.0)
    with spending(tmp_path, OPTIONS, budget):
        first = spent(tmp_path)
        assert first >= 100
        until(lambda: spent(tmp_path) > first)
    write_record(tmp_path, {"status": "finished", "options": OPTIONS})
    time.sleep(0.1)
    assert read_record(tmp_path)["status"] == "finished"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_stops_a_run_does_not_lose_the_time(tmp_path, error):

    def work():
        with spending(tmp_path, OPTIONS, budget_from("1h")):
            time.sleep(0.05)
            raise error

    with pytest.raises(error):
        work()
    assert spent(tmp_path) >= 0.05


def test_a_note_that_cannot_be_written_is_missed_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "EVERY", 0.02)
    tried = []

    def full(path, document):
        tried.append(path)
        raise OSError(28, "No space left on device")

    with spending(tmp_path, OPTIONS, budget_from("1h")):
        monkeypatch.setattr(record, "write_json", full)
        until(lambda: len(tried) > 1)
    assert json.loads((tmp_path / "record.json").read_bytes())["status"] == "running"
    with pytest.raises(RunError, match="No space left"), spending(tmp_path, OPTIONS, budget_from("1h")):
        pass


def test_a_finished_record_is_believed_as_it_was_written_only(tmp_path):
    written = write_record(tmp_path, {"status": "finished", "options": OPTIONS, "forward_passes": 24})
    assert read_record(tmp_path) == written
    whole = (tmp_path / "record.json").read_bytes()
    for changed in (whole.replace(b"24", b"25"), whole.replace(b"finished", b"fhnished"), whole.replace(b"24", b"NaN")):
        (tmp_path / "record.json").write_bytes(changed)
        with pytest.raises(RunError, match=f"choose another --out, or remove {tmp_path}"):
            read_record(tmp_path)
    earlier = {name: value for name, value in written.items() if name != "digest"}
    (tmp_path / "record.json").write_text(json.dumps(earlier))
    assert read_record(tmp_path) == earlier
