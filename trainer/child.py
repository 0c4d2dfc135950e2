"""python -m trainer.child PARENT COMMAND…: become COMMAND, which gets SIGTERM when the process PARENT ends.

COMMAND's own children find its process id in their environment: who it was that started them, even if it has ended.
"""

import os
import signal
import sys

from trainer.process import STARTED_BY, die_with_parent

if __name__ == "__main__":
    die_with_parent(signal.SIGTERM, int(sys.argv[1]))
    os.environ[STARTED_BY] = str(os.getpid())
    os.execvp(sys.argv[2], sys.argv[2:])
