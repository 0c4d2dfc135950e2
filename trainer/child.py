"""python -m trainer.child PARENT COMMAND…: become COMMAND, which gets SIGTERM when the process PARENT ends."""

import os
import signal
import sys

from trainer.process import die_with_parent

if __name__ == "__main__":
    die_with_parent(signal.SIGTERM, int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
