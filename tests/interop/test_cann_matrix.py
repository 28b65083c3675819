"""Every scheme row on real layer shapes under torch_npu's own checks and the eager rules, the refused ones, and calls that are wrong."""

import csv

import npu_cpu
import npu_matrix
import npu_mutants
import pytest

pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def calls():
    return npu_cpu.install()


def test_the_list_of_refused_combinations_is_the_committed_one():
    with npu_matrix.REFUSED.open(newline="") as file:
        head, *listed = (tuple(row) for row in csv.reader(file))
    assert head == npu_matrix.HEAD
    assert listed == npu_matrix.refused(), "run tests/support/npu_matrix.py --write and look at what changed"
    assert all(" needs " in row[-1] for row in listed)


def _distinct():
    seen = {}
    for row, kind, _, _, _, columns, outs, extra in npu_matrix.cases():
        seen.setdefault((row, kind), {})[columns, outs, extra] = None
    return {key: list(shapes) for key, shapes in seen.items()}


def test_a_sample_of_every_row_is_accepted_or_refused_by_place(rng):
    # One shape, type and generation of every row's matrices and experts, drawn afresh; the whole table is `make conformance`.
    counts = {"accepted": 0, "alignment": 0, "generation": 0}
    single = {row: ("linear", "block")[rng.integers(2)] for row in npu_matrix.rows()}
    for (row, kind), shapes in _distinct().items():
        if kind not in ("moe", single[row]):
            continue
        shape = shapes[rng.integers(len(shapes))]
        homes = npu_matrix.homes(row, kind == "moe")
        soc = homes[rng.integers(len(homes))] if homes else "A2"
        dtype = ("bfloat16", "float16")[rng.integers(2)]
        found, rule = npu_matrix.verdict(npu_matrix.rows()[row], kind, *shape, soc, dtype)
        assert found != "fault", (row, kind, shape, soc, dtype, rule)
        counts[found] += 1
    assert counts["accepted"] >= 60, counts


@pytest.mark.slow
def test_the_whole_matrix(capsys):
    assert npu_matrix.main([]) == 0


def test_wrong_calls_are_refused():
    # The committed list, each mistake made anew: by whom it was refused then, it is refused now.
    listed = npu_mutants.listed()
    wanted = {tuple(entry[name] for name in npu_mutants.HEAD[:-1]): entry["refused by"] for entry in listed}
    rows = {(entry["row"], entry["layer kind"], entry["soc"]) for entry in listed}
    found = {}
    for row, kind, soc, name, index, function, args, named in npu_mutants.recorded(rows):
        for argument, change, (new_args, new_named) in npu_mutants.mutants(function, args, named):
            key = (row, kind, soc, name, str(index), argument, change)
            if key in wanted:
                found[key] = npu_mutants.judged(soc, name, function, new_args, new_named)
    assert found == wanted
    by = list(wanted.values())
    assert len(by) >= 200 and by.count("Meta") >= 50 and by.count("rules") >= 100


def test_the_table_of_operators_is_the_code_s():
    from qfunc.interop.cann._soc import ROWS
    text = (npu_matrix.REFUSED.parent / "ascend_operators.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines() if line.startswith("| `")]
    told = {row[0].strip("`"): (row[4], row[5]) for row in rows}
    assert told == {kind: (" ".join(row.linear), " ".join(row.moe)) for kind, row in ROWS.items()}
