"""benchmarks.gpu without a GPU: what it counts, what it says of a device that is too small or missing, and one run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import Trial, flops_of_token, markdown, or_out_of_memory, peak_flops, row_of
from trainer.presets import PRESETS

ROOT = Path(__file__).parents[2]
TRIAL = Trial("llama-60m", "full", 32000, 128, 64, 256, "bf16", 2, rounds=3, switches=1)
BYTES = {"counted_bytes": 10**9, "estimated_bytes": 3 * 10**9}


def test_a_token_costs_six_flops_a_multiplying_parameter_and_attention() -> None:
    d, ffn, layers, vocabulary, length = 512, 1376, 8, 32000, 256
    weights = layers * (4 * d * d + 3 * d * ffn) + vocabulary * d + (2 * layers + 1) * d
    # Scores and values: 2·2·d FLOPs a pair of tokens, three times with the backward pass.
    assert flops_of_token(PRESETS["llama-60m"], vocabulary, length) == 6 * weights + layers * 3 * 4 * d * length


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        (None, None),
    ],
)
def test_a_device_has_the_peak_of_its_own_name_and_of_no_other(device: str | None, peak: float | None) -> None:
    assert peak_flops(device) == peak


def test_rates_are_of_the_tokens_and_the_devices_peak() -> None:
    found = BYTES | {"steps": [0.1, 0.02, 0.02], "switches": [2.0], "rest_bytes": 2 * 10**9, "peak_bytes": 4 * 10**9}
    row = row_of(TRIAL, found | {"out_of_memory": None}, "NVIDIA H200", period=100)
    assert row["tokens_per_second"] == pytest.approx(64 * 256 / (0.02 + 2.0 / 100))
    flops = flops_of_token(PRESETS["llama-60m"], 32000, 256)
    assert row["mfu"] == pytest.approx(row["tokens_per_second"] * flops / 989e12)
    assert (row["counted_to_rest"], row["estimated_to_peak"]) == (0.5, 0.75)


def test_there_is_no_mfu_where_the_type_has_another_peak() -> None:
    found = BYTES | {"steps": [0.1], "switches": [], "out_of_memory": None}
    assert row_of(replace(TRIAL, dtype="fp32"), found, "NVIDIA H200", period=100)["mfu"] is None


def _raising(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nAnd so on"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    ],
)
def test_what_does_not_fit_has_a_row_that_says_so(error: Exception) -> None:
    found = or_out_of_memory(lambda: _raising(error))
    assert found == {"out_of_memory": str(error).splitlines()[0]}
    rows = [row_of(TRIAL, BYTES | found, "NVIDIA H200", period=100)]
    last = markdown({"rows": rows}).splitlines()[-1]
    assert "out of memory" in last
    assert "estimated 3.00 GB" in last


def test_any_other_error_is_raised() -> None:
    with pytest.raises(RuntimeError, match="illegal memory access"):
        or_out_of_memory(lambda: _raising(RuntimeError("CUDA error: an illegal memory access was encountered")))


def _run(*command: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def test_without_a_device_it_refuses() -> None:
    done = _run(sys.executable, "-m", "benchmarks.gpu", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr


def test_what_fails_has_no_row_and_the_run_fails_when_the_others_are_done(tmp_path: Path) -> None:
    small = ["--vocabulary", "300", "--batch", "1", "--length", "16", "--rounds", "1", "--switches", "1"]
    out = tmp_path / "rows.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--cpu",
        "--variants",
        "galore:rank=999",
        "galore:rank=8",
        "--json",
    ]
    done = _run(*command, *small, "--out", str(out))
    assert done.returncode == 1
    assert "rank 999 is above" in done.stderr
    assert done.stderr.endswith("llama-tiny galore:rank=999: its process ended with 1; see above\n")
    found = json.loads(done.stdout)
    assert found == json.loads(out.read_text())
    assert found["arguments"]["model"] == ["llama-tiny"]
    (row,) = found["rows"]
    assert (row["model"], row["variant"], row["rank"]) == ("llama-tiny", "galore:rank=8", 8)
    assert row["step_seconds"] > 0
    assert row["switch_seconds"] > 0
    assert row["mfu"] is row["peak_bytes"] is row["out_of_memory"] is None


def test_the_script_says_how_it_is_used_and_what_is_too_old(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "gpu.sh")
    usage = _run("bash", script, "--help")
    assert usage.returncode == 0
    assert "pip download" in usage.stdout
    old = tmp_path / "torch-2.10.0.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.10.0\n")
    done = _run("bash", script, PYTHON=sys.executable, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "torch 2.10.0 is too old" in done.stderr
