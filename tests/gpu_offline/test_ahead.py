"""Every kernel compiled for every target without a GPU: it compiles, does not spill, fits, and holds the instruction that it should."""

import re
from fnmatch import fnmatchcase

import compiled_rows
import pytest
import selected

pytest.importorskip("triton", reason="triton is not installed")

OFFLINE = [pytest.param(name, marks=() if name in compiled_rows.USUAL else pytest.mark.gpu_offline) for name in compiled_rows.ALL]


@pytest.fixture(scope="module")
def verdicts(request):
    """Verdict by row, of the rows of this module that were selected."""
    return selected.verdicts(request, "run_ahead.py")


@pytest.mark.parametrize("name", OFFLINE)
def test_compiles(verdicts, name):
    verdict, allowed = verdicts[name], compiled_rows.exceptions(name)
    assert "error" not in verdict, verdict["error"]
    assert verdict["shared"] <= verdict["limit"], "more shared memory than the target has"
    assert verdict["spills"] <= sum(record.spills for record in allowed), "registers are spilled"
    wanted = next((record.instruction for record in allowed if record.instruction), verdict["wanted"])
    assert wanted is None or any(re.search(wanted, found) for found in verdict["instructions"]), f"expected {wanted}, found {verdict}"
    if compiled_rows.weight_in_registers(name):
        assert verdict["from_registers"] > 0, "the unpacked weight goes through shared memory"
    assert not verdict["flushes"], "subnormal numbers are flushed to zero"


def test_exceptions_are_of_rows_that_exist():
    unused = [record for record in compiled_rows.EXCEPTIONS if not any(fnmatchcase(name, record.rows) for name in compiled_rows.ALL)]
    assert not unused


def test_the_usual_run_is_small_and_covers_every_target_and_kernel():
    usual = [compiled_rows.ALL[name] for name in compiled_rows.USUAL]
    assert len(usual) <= 80
    assert {row.target for row in usual} == set(compiled_rows.TARGETS)
    assert {row.kind for row in usual} == {row.kind for row in compiled_rows.ALL.values()}
    assert {row.scheme for row in usual if row.kind == "dense"} == set(compiled_rows.SCHEMES)
