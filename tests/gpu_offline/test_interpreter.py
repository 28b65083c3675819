"""Every kernel in Triton's interpreter, on the launches that `describe` makes: one process runs all cases, each case is one test."""


import cases
import pytest
import selected

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("torch", reason="torch is not installed")

OFFLINE = [pytest.param(name, marks=() if name in cases.USUAL else pytest.mark.gpu_offline) for name in cases.ALL]


@pytest.fixture(scope="module")
def verdicts(request):
    """Verdict by case, of the cases of this module that were selected."""
    return selected.verdicts(request, "run_interpreter.py", TRITON_INTERPRET="1")


def _products(verdict):
    assert verdict["formula"] <= 1, "further from the float64 formula than its operands and its last rounding explain"
    assert verdict["reference"] is None or verdict["reference"] <= 1, "further from the reference than two roundings explain"
    assert verdict["bits"] is not False, "an int32 sum with one scale on each side equals the reference bit for bit"
    assert verdict["zeros"], "a zero row, or a row without an expert, is not exactly zero"


def _rows(verdict):
    assert all(verdict["shapes"]), "shape or type of a result"
    assert (verdict["codes"], verdict["scales"], verdict["points"]) == (0, 0, 0), "codes, scales and zero points are the reference's"
    assert not verdict["formula"], "codes are those of the float64 formula"


def _fronts(verdict):
    assert verdict["scale"] < 2e-6 if "float32" in verdict["id"] else verdict["scale"] < 5e-3
    assert verdict["different"] < 0.02 and verdict["largest"] <= 1, "a last bit of the layer in front moves few codes, by one step"


def _take(verdict):
    assert verdict["different"] == 0 and verdict["outside"], "rows equal `take` bit for bit, and ids out of range give NaN"


def _whole(verdict):
    assert verdict["relative"] < 1e-6 and verdict["zeros"]


def _ptx(verdict):
    assert verdict["different"] == 0, "a nibble of some byte is decoded to another number than its value"


def _faults(verdict):
    assert verdict["sound"] <= 1 and verdict["noticed"], "a wrong launch went unnoticed"


CHECKS = {"dense": _products, "grouped": _products, "rows": _rows, "fronts": _fronts, "take": _take, "whole": _whole, "ptx": _ptx,
          "faults": _faults}


@pytest.mark.parametrize("name", OFFLINE)
def test_case(verdicts, name):
    verdict = verdicts[name]
    assert "error" not in verdict, verdict["error"]
    CHECKS[cases.ALL[name].kind](verdict)


def test_the_usual_run_is_small_and_covers_every_kernel():
    usual = [cases.ALL[name] for name in cases.USUAL]
    assert len(usual) <= 120
    assert {case.kind for case in usual} == set(CHECKS)
    assert {case.scheme for case in cases.ALL.values() if case.kind == "dense"} == set(cases.NAMES)
