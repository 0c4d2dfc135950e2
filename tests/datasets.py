"""Real data sets, for tests that are skipped where they are not at hand: files of STIEFEL_TEST_DATA.

GSM8K is gsm8k-train.jsonl (openai/grade-school-math), CoLA is cola-train.tsv (nyu-mll/CoLA-baselines), as their authors
publish them.
"""

import os
from pathlib import Path

DATA = Path(os.environ.get("STIEFEL_TEST_DATA", "datasets"))
GSM8K, COLA = DATA / "gsm8k-train.jsonl", DATA / "cola-train.tsv"
