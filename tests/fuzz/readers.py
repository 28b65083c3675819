"""Feed damaged checkpoints to `qfunc.load` and `qfunc.interop.inspect`:

    python tests/fuzz/readers.py --minutes 10 [--seed 0] [--like "gguf*"] [--keep FOLDER]

Damaged are the recorded checkpoints and small ones of the other formats (`seeds.py`). Every input must load or raise CheckpointError,
within 5 seconds of processor time, and without memory far beyond the file. Anything else is printed with its seed, kept under FOLDER
(default: `fuzz-findings`), and makes the exit status 1. `--only SEED` runs one input and shows the traceback.
"""

from __future__ import annotations

import argparse
import fnmatch
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import seeds  # noqa: E402
from mutate import mutate  # noqa: E402

SEEDS = Path(__file__).parent.parent / "data" / "checkpoints"
LIMIT_SECONDS = 5
STUCK_SECONDS = 60
"""Seconds on the clock after which, twice, an input that uses no processor has hung, however busy the machine is."""
HEADROOM = 1 << 30
"""Bytes of address space that one load may take beyond what the process has after warming up."""


class TooSlow(BaseException):
    """The alarm went off. Not an Exception, so that no reader can swallow it."""


STUCK = [0]


def _alarm(signum, frame):
    if signum == signal.SIGALRM:
        STUCK[0] += 1
        if STUCK[0] == 1:               # somebody may have stopped the process meanwhile: it gets the time once more
            signal.alarm(STUCK_SECONDS)
            return
    raise TooSlow


def once(seed: int, sources: list[Path], work: Path) -> tuple[str, str]:
    """Run the input of a seed; returns (outcome, description). Outcomes: loaded, refused, or the name of what went wrong."""
    from qfunc import CheckpointError, load
    from qfunc.interop import inspect
    rng = random.Random(seed)
    source = rng.choice(sources)
    target = work / f"{seed}"
    what = f"{source.name}: {mutate(rng, source, target)}"
    signal.setitimer(signal.ITIMER_PROF, LIMIT_SECONDS)
    STUCK[0] = 0
    signal.alarm(STUCK_SECONDS)
    try:
        outcome = "loaded"
        for run in (inspect, load):
            try:
                run(target)
            except CheckpointError:
                outcome = "refused"
    except TooSlow:
        outcome = "slower than 5 s"
    except MemoryError:
        outcome = "MemoryError"
    except Exception as error:   # noqa: BLE001 - this is what the harness looks for
        outcome = type(error).__name__
        what += f"\n{traceback.format_exc(limit=-6)}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    if outcome in ("loaded", "refused"):
        shutil.rmtree(target, ignore_errors=True)
    return outcome, what


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--like", default="*", help="pattern of the recorded checkpoints to damage")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"))
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    made = seeds.write(work / "seeds")
    sources = sorted(p for p in SEEDS.glob(args.like) if p.is_dir()) + [p for p in made if fnmatch.fnmatch(p.name, args.like)]
    signal.signal(signal.SIGALRM, _alarm)
    signal.signal(signal.SIGPROF, _alarm)
    if args.only is not None:
        print(*once(args.only, sources, work), sep=": ")
        return
    from qfunc import load
    for source in sources[::10]:
        load(source)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + HEADROOM, size + HEADROOM))
    counts: dict[str, int] = {}
    slowest, seed, end = 0.0, args.seed, time.time() + 60 * args.minutes
    while time.time() < end:
        start = time.process_time()
        outcome, what = once(seed, sources, work)
        slowest = max(slowest, time.process_time() - start)
        counts[outcome] = counts.get(outcome, 0) + 1
        if outcome not in ("loaded", "refused"):
            print(f"seed {seed}: {outcome}: {what}", flush=True)
            args.keep.mkdir(parents=True, exist_ok=True)
            shutil.move(work / f"{seed}", args.keep / f"{seed}")
        seed += 1
    shutil.rmtree(work, ignore_errors=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{seed - args.seed} inputs in {args.minutes} minutes: {counts}; slowest {slowest:.2f} s of processor time, "
          f"peak memory {peak} MiB")
    sys.exit(1 if set(counts) - {"loaded", "refused"} else 0)


if __name__ == "__main__":
    main()
