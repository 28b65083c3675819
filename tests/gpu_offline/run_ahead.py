"""Compile rows ahead of time and print one line of JSON for each. Arguments: ids of rows, `all`, or `-` for ids on standard input."""

import json
import os
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).parent


def run(row, made: dict):
    """What came out of a row's compilation, and what was expected; `made` are the compilations that there are, by program."""
    import ahead
    import compiled_rows

    from qfunc.kernels.triton import _lowering
    start = time.process_time()
    try:
        launched, target = compiled_rows.launch(row)
        # Rows that differ in sizes alone are one program.
        key = _lowering.program_of(launched), target
        if key not in made:
            made[key] = ahead.compile_launch(launched, target)
        found, wanted = made[key], compiled_rows.expected(launched, target)
        verdict = dict(vars(found), limit=target.shared_memory, wanted=wanted,
                       found=wanted is None or any(re.search(wanted, name) for name in found.instructions),
                       tile=[launched.constants.get(name) for name in ("BM", "BN", "RUN", "SWAP", "SPLIT")], warps=launched.num_warps)
    except Exception:                                           # every row reports, whatever happens to one
        verdict = {"error": traceback.format_exc(limit=-4)}
    return {"id": row.id, **verdict, "seconds": round(time.process_time() - start, 2)}


def main(names):
    """Compile rows by id, with an empty cache."""
    sys.path[:0] = [str(HERE)]
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        import compiled_rows
        made = {}
        given = sys.stdin.read().split() if names == ["-"] else names
        for name in {"all": tuple(compiled_rows.ALL)}.get(names[0], given):
            print(json.dumps(run(compiled_rows.ALL[name], made)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
