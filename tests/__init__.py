"""All tests. What is set here is set before anything is imported, and for the processes that tests start."""

import os

# The models are so small that a second thread gains nothing, and when another process has the core that it waits for it
# loses a hundredfold.
os.environ["OMP_NUM_THREADS"] = "1"
# As `python -m trainer` does.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
