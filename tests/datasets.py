"""Real data sets, for tests that are skipped where they are not at hand: files of STIEFEL_TEST_DATA.

GSM8K is gsm8k-train.jsonl (openai/grade-school-math), CoLA is cola-train.tsv and cola-dev.tsv (nyu-mll/CoLA-baselines),
as their authors publish them. all-MiniLM-L6-v2 is a directory: a small pretrained encoder (sentence-transformers').
"""

import os
from pathlib import Path

DATA = Path(os.environ.get("STIEFEL_TEST_DATA", "datasets"))
GSM8K = DATA / "gsm8k-train.jsonl"
COLA, COLA_HELD_OUT = DATA / "cola-train.tsv", DATA / "cola-dev.tsv"
ENCODER = DATA / "all-MiniLM-L6-v2"
