"""The names inside a run directory: all that the trainer and whoever started it have in common. Imports no torch.

RUNDIR/
  spec.json                   what to train (TrainingSpec), written before the start
  events.jsonl                what happened, one event a line, appended by the trainer
  stop                        a request: present means "checkpoint and end at the next step boundary"
  log.txt                     standard output and error of the processes
  data/                       the tokenised dataset
  data.lock                   held by the host that tokenises
  tokenizer/                  the tokeniser, as a Hugging Face directory
  checkpoints/step-00000200/  complete once COMPLETE is in it
"""

import os
from pathlib import Path

COMPLETE = "COMPLETE"


def step_directory(step: int) -> str:
    """The name of a checkpoint's directory."""
    return f"step-{step:08d}"


class RunDir:
    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.spec = self.root / "spec.json"
        self.events = self.root / "events.jsonl"
        self.stop = self.root / "stop"
        self.log = self.root / "log.txt"
        self.data = self.root / "data"
        self.data_lock = self.root / "data.lock"
        self.tokenizer = self.root / "tokenizer"
        self.checkpoints = self.root / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / step_directory(step)

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
