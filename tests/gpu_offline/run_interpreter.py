"""Run cases in the interpreter and print one line of JSON for each: its verdict, or the error.

Arguments: ids of cases, `all`, `usual`, or `-` for ids on standard input.
"""

import json
import os
import sys
import time
import traceback
import zlib
from pathlib import Path

HERE = Path(__file__).parent


def checks():
    """Kind of case to its check. Imported late: the environment decides what triton and XLA are."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # The reference is compiled anew for every case and runs once.
    cheap = ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true")
    os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *cheap))
    sys.path[:0] = [str(HERE), str(HERE.parent / "support")]
    import check_faults
    import check_products
    import check_ptx
    import check_rows
    import check_take
    import check_whole
    return {"dense": check_products.dense, "grouped": check_products.grouped, "rows": check_rows.rows, "fronts": check_rows.fronts,
            "take": check_take.take, "whole": check_whole.whole, "ptx": check_ptx.every_byte,
            "faults": check_faults.noticed}


def run(check, case):
    """The verdict of a case; its random numbers depend on its name alone."""
    import numpy as np
    start = time.process_time()
    try:
        verdict = check(case, np.random.default_rng(zlib.crc32(case.id.encode())))
    except Exception:                                           # every case reports, whatever happens to one
        verdict = {"error": traceback.format_exc(limit=-6)}
    return {**verdict, "id": case.id, "seconds": round(time.process_time() - start, 3)}


def main(names):
    """Run cases by id."""
    table = checks()
    import cases
    given = sys.stdin.read().split() if names == ["-"] else names
    for name in {"all": tuple(cases.ALL), "usual": cases.USUAL}.get(names[0], given):
        print(json.dumps(run(table[cases.ALL[name].kind], cases.ALL[name])), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
