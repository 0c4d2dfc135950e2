"""events.jsonl, read while it is being written."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from trainer import events


def test_a_line_is_read_once_and_only_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    assert events.read_from(file, 0) == ([], 0)
    log = events.EventLog(file)
    log.write(events.Stopped(step=3))
    first, offset = events.read_from(file, 0)
    assert [e.step for _, e in first] == [3]
    line = events.Stopped(step=4).model_dump_json().encode()
    with file.open("ab") as half:
        half.write(line[:10])
        half.flush()
        assert events.read_from(file, offset) == ([], offset)
        half.write(line[10:] + b"\n")
    second, end = events.read_from(file, offset)
    assert [(o, e.step) for o, e in second] == [(end, 4)]
    assert end == file.stat().st_size
    log.close()


def test_every_event_comes_back_as_it_was() -> None:
    event = events.Evaluated(step=2, loss=1.5, perplexity=4.4, sequences=8, seconds=0.1)
    assert events.parse(event.model_dump_json()) == event
    with pytest.raises(ValidationError):
        events.parse('{"type": "surprise", "step": 1}')


def test_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_bytes(b'{"type": "stopped", "step": 1}\n{"type": "stop')  # the power went here
    log = events.EventLog(file)
    log.write(events.Stopped(step=2))
    log.close()
    assert [event.step for event in events.read(file)] == [1, 2]
