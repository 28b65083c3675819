"""The GPU bench, dry: every step of it runs on a machine without a GPU, and a wrong result does not pass for a fast one."""

import importlib
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

import qfunc

pytest.importorskip("torch")
pytest.importorskip("triton")
FOLDER = Path(qfunc.kernels.__file__).parent / "bench"
PLAIN = ("torch bf16", "torch _int_mm", "torch _scaled_mm row", "XLA bf16", "XLA int8", "gemlite int4")


@pytest.fixture
def bench(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("QFUNC_TRITON_CACHE", str(tmp_path / "cache"))
    module = importlib.import_module("gpu")
    yield module
    for name in ("gpu", "gpu_peers", "gpu_timing"):
        sys.modules.pop(name, None)


def test_a_dry_run_goes_through_every_step(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.gpu_peers, "PEERS", {name: bench.gpu_peers.PEERS[name] for name in PLAIN})
    assert bench.main(["--dry-run", "--tokens", "3", "--schemes", "w4a16_g128,fp8_dynamic", "--out", str(tmp_path / "results")]) == 0
    (file,) = (tmp_path / "results").glob("*.json")
    result = json.loads(file.read_text())
    cells = {(c["shape"], c["scheme"], c["name"]): c for c in result["cells"]}
    assert {name for shape, scheme, name in cells if shape == "dense" and scheme is None} >= set(PLAIN) - {"torch _int_mm", "XLA int8"}
    for scheme in ("w4a16_g128", "fp8_dynamic"):
        own, kernel = cells["dense", scheme, "qfunc"], cells["dense", scheme, "kernel"]
        assert own["us"] > 0 and own["error"] < bench.TOLERANCE and own["floor_us"] > 0
        assert kernel["us"] is None and "not launched" in kernel["note"]
    assert cells["experts", "w4a16_g128", "qfunc"]["error"] < bench.TOLERANCE
    text = file.with_suffix(".md").read_text()
    assert "## experts (256 x 512, 4 experts)" in text and "| w4a16_g128 qfunc |" in text and "M = 3" in text


def test_a_wrong_result_is_no_result(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench.gpu_peers, "PEERS", {})
    right = qfunc.matmul
    monkeypatch.setattr(bench.qfunc, "matmul", lambda x, w: right(x, w) * jnp.asarray(1.02, x.dtype))
    assert bench.main(["--dry-run", "--tokens", "3", "--schemes", "w4a16_g128"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_a_spent_budget_is_said(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.gpu_peers, "PEERS", {})
    assert bench.main(["--dry-run", "--budget", "-1", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    assert {c["note"] for c in json.loads(file.read_text())["cells"]} == {"not reached within the budget"}


def test_without_a_gpu_it_says_so(bench, capsys, monkeypatch):
    monkeypatch.delenv("QFUNC_CUDA_CAPABILITY", raising=False)
    assert bench.main([]) == 1 and "no GPU is here" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_with_every_peer(bench, capsys):
    assert bench.main(["--dry-run"]) == 0 and ", 0 wrong" in capsys.readouterr().out
