"""The names inside a run directory: all that the trainer and whoever started it have in common. Imports no torch.

RUNDIR/
  spec.json                   what to train (TrainingSpec), written before the start
  events.jsonl                what happened, one event a line, appended by the trainer
  stop                        a request: present means "checkpoint and end at the next step boundary"
  lease                       until when a supervisor vouches for the run; past it, the same as a stop
  log.txt                     standard output and error of the processes
  data/                       the tokenised dataset
  data.lock                   held by the host that tokenises
  tokenizer/                  the tokeniser, as a Hugging Face directory
  checkpoints/step-00000200/  complete once COMPLETE is in it
  exports/step-00000200/      a checkpoint's model as a Hugging Face directory, whole once it is there
  exports/step-00000200.used  made by the service, last asked for at this file's time; locked while it is in use
  exports/lock                held by who makes or removes one
  base/                       configuration and code of the model that it started from, where that is an export of
                              another run, which need not last
  held.json                   steps of checkpoints that are kept whatever `checkpoints` says: others start from them
"""

import os
import time
from pathlib import Path

COMPLETE = "COMPLETE"
# In data/.
TOKENS, META = "tokens.bin", "meta.json"


def step_directory(step: int) -> str:
    """The name of a checkpoint's directory."""
    return f"step-{step:08d}"


class RunDir:
    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.spec = self.root / "spec.json"
        self.events = self.root / "events.jsonl"
        self.stop = self.root / "stop"
        self.lease = self.root / "lease"
        self.log = self.root / "log.txt"
        self.data = self.root / "data"
        self.data_lock = self.root / "data.lock"
        self.tokenizer = self.root / "tokenizer"
        self.checkpoints = self.root / "checkpoints"
        self.exports = self.root / "exports"
        self.base = self.root / "base"
        self.held = self.root / "held.json"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / step_directory(step)

    def export(self, step: int) -> Path:
        return self.exports / step_directory(step)

    def vouch_until(self, deadline: float) -> None:
        """`deadline`: seconds of this machine's monotonic clock. Written in place, which a full disk allows too."""
        descriptor = os.open(self.lease, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, f"{deadline:024.6f}\n".encode(), 0)
        finally:
            os.close(descriptor)

    def is_vouched_for(self) -> bool:
        """False once the supervisor has not been heard of for as long as it may. Without a lease nobody has to."""
        try:
            return time.monotonic() <= float(self.lease.read_text())
        except (FileNotFoundError, ValueError):
            # None, or one that a full disk left empty.
            return True

    def log_tail(self, size: int) -> str:
        """The last `size` bytes of the log, whole lines; empty if there is none."""
        try:
            with self.log.open("rb") as file:
                file.seek(0, os.SEEK_END)
                start = max(0, file.tell() - size)
                file.seek(start)
                text = file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        return text if start == 0 else text.partition("\n")[2]
