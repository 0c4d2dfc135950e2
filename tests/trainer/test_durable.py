"""What a power cut may not leave: an empty file under its last name, a checkpoint whose events are lost.

No test cuts the power; these see to it that what must be on the disk first is asked for first.
"""

import os
from pathlib import Path

import pytest

from tests.distributed.case import spec
from tests.trainer.alone import alone
from trainer import durable, events
from trainer.events import EventLog
from trainer.prepare import prepare
from trainer.run import Run
from trainer.rundir import RunDir


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(what, name) of everything that is synced or renamed, in order; of events.jsonl also how many lines it has."""
    found: list[tuple[str, str]] = []
    sync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        file = Path(f"/proc/self/fd/{descriptor}").readlink()
        lines = f", {len(file.read_bytes().splitlines())} lines" if file.name == "events.jsonl" else ""
        found.append(("sync", file.name + lines))
        sync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        found.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    return found


def test_bytes_are_on_the_disk_before_they_get_their_name(tmp_path: Path, asked: list[tuple[str, str]]) -> None:
    file = tmp_path / "folder" / "meta.json"
    file.parent.mkdir()
    for text in (b"one", b"two"):
        durable.write(file, text)
        assert file.read_bytes() == text
    assert asked == 2 * [("sync", "meta.json.tmp"), ("rename", "meta.json"), ("sync", "folder")]
    assert [path.name for path in file.parent.iterdir()] == ["meta.json"]


def test_tokens_count_only_when_they_and_their_tokeniser_are_on_the_disk(
    tmp_path: Path, asked: list[tuple[str, str]]
) -> None:
    rundir = RunDir(tmp_path / "run")
    assert prepare(spec(tmp_path), rundir, 0, lambda _: None, lambda: False)
    named = asked.index(("rename", "meta.json"))
    before = {name for what, name in asked[:named] if what == "sync"}
    assert {"tokens.bin", "meta.json.tmp", *(path.name for path in rundir.tokenizer.iterdir())} <= before
    assert asked[named + 1] == ("sync", "data")


@pytest.mark.usefixtures("process_group")
def test_events_are_on_the_disk_before_a_checkpoint_behind_them_counts(
    tmp_path: Path, asked: list[tuple[str, str]]
) -> None:
    rundir, wanted = RunDir(tmp_path / "run"), alone(tmp_path)
    prepare(wanted, rundir, 0, lambda _: None, lambda: False)
    log = EventLog(rundir.events)
    run = Run(wanted, rundir, log.write, log.sync)
    for _ in range(3):
        run.train_step(lambda: False)
    run.save(wait=False)
    run.train_step(lambda: False)
    if run.writer.pending:
        run.commit()
    log.close()
    counts, syncs = asked.index(("rename", "COMPLETE")), [name for what, name in asked if what == "sync"]
    reported = [e for e in events.read(rundir.events) if not isinstance(e, events.Checkpointed)]
    # The fourth step's event too: the checkpoint is committed behind it.
    assert ("sync", f"events.jsonl, {len(reported)} lines") in asked[:counts]
    assert asked.index(("rename", "state.json")) < counts
    assert syncs.count("COMPLETE.tmp") == 1
