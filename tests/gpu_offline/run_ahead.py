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


def run(row):
    """What came out of a row's compilation, and what was expected."""
    import ahead
    import compiled_rows
    start = time.process_time()
    try:
        launched, target = compiled_rows.launch(row)
        made = ahead.compile_launch(launched, target)
        wanted = compiled_rows.expected(launched, target)
        verdict = dict(vars(made), limit=target.shared_memory, wanted=wanted,
                       found=wanted is None or any(re.search(wanted, name) for name in made.instructions),
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
        given = sys.stdin.read().split() if names == ["-"] else names
        for name in {"all": tuple(compiled_rows.ALL)}.get(names[0], given):
            print(json.dumps(run(compiled_rows.ALL[name])), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
