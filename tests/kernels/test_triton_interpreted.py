"""The GPU lowering from the float activation to the result, executed: its launches run in Triton's interpreter, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("torch", reason="torch is not installed")


@pytest.mark.gpu_offline
def test_every_transformation_equals_the_reference():
    cheap = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"        # everything is compiled for one run
    environment = {**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore", "XLA_FLAGS": cheap}
    done = subprocess.run([sys.executable, str(Path(__file__).parent / "interpreted_lowering.py")], capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    verdicts = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(verdicts) == 21
    for verdict in verdicts:
        assert verdict["alike"] and verdict["ran"] == ["interpreted"], verdict
        # Float32 sums in another order; a result of bfloat16 may then round to its neighbour in few places.
        assert verdict["error"] < 1e-5, verdict
