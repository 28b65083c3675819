"""How strong the judges are: right calls with one thing wrong, and who refuses them.

    python tests/support/npu_mutants.py --write        # tests/data/ascend_wrong_calls.csv anew, and the counts

The right calls are those that the bridge makes for each scheme row on small shapes, recorded on the meta device. A mutant differs in one
thing: a dimension one larger, one axis more, the last axes swapped, another type, a wrong number for a type that torch has not, an argument
left out, a value that the form does not have. Mutants that are legal calls of another kind survive and are not listed.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from pathlib import Path

import npu_matrix
import npu_rules

LIST = Path(__file__).parents[1] / "data" / "ascend_wrong_calls.csv"
HEAD = ("row", "layer kind", "soc", "operator", "call", "argument", "change", "refused by")
# One row of each kind of weight is enough: others make the same calls.
ROWS = (
    ("ModelSlim W8A8", "linear", "A2"), ("ModelSlim W8A8_DYNAMIC", "linear", "A2"), ("ModelSlim W4A4_DYNAMIC", "linear", "A2"),
    ("ModelSlim W4A8_DYNAMIC g256", "linear", "A2"), ("compressed-tensors W4A8 dynamic", "linear", "A2"),
    ("ModelSlim W8A16", "linear", "A2"),
    ("AWQ W4A16 g128", "linear", "A2"), ("GPTQ W8A16 g128", "linear", "A2"), ("ModelSlim WFP8AFP8_DYNAMIC", "linear", "A5"),
    ("ModelSlim W8A8_MXFP8", "linear", "A5"), ("ModelSlim W4A8_MXFP", "linear", "A5"), ("ModelSlim W4A4_MXFP4", "linear", "A5"),
    ("ModelSlim W4A4_MXFP4_DUALSCALE", "linear", "A5"), ("W8A8 block", "linear", "A2"), ("DeepSeek block FP8", "linear", "A5"),
    ("ModelSlim W8A8_DYNAMIC", "moe", "A2"), ("ModelSlim W4A4_DYNAMIC", "moe", "A2"), ("ModelSlim W4A8_DYNAMIC g256", "moe", "A2"),
    ("AWQ W4A16 g128", "moe", "A2"), ("GPTQ W8A16 g128", "moe", "A2"), ("ModelSlim W8A16", "moe", "A2"),
    ("ModelSlim W8A8_MXFP8", "moe", "A5"), ("ModelSlim W4A8_MXFP", "moe", "A5"), ("ModelSlim W4A4_MXFP4", "moe", "A5"),
    ("ModelSlim W8A8", "moe", "A2"), ("DeepSeek block FP8", "moe", "A5"), ("ModelSlim WFP8AFP8_DYNAMIC", "moe", "A5"),
)


def recorded(rows=ROWS) -> list:
    """[(row, kind, soc, operator name, index among the row's calls of it, overload, args, named)] of right calls."""
    from torch.utils._python_dispatch import TorchDispatchMode
    out = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "npu":
                seen.append((function._schema.name.removeprefix("npu::"), function, args, dict(kwargs or {})))
            return function(*args, **(kwargs or {}))

    for row, kind, soc in rows:
        seen: list = []
        scheme = npu_matrix.rows()[row]
        with Recorder():
            if kind == "moe":
                npu_matrix.run_moe(scheme, 1024, 512, 8, 2, soc, "bfloat16")
            else:
                npu_matrix.run_linear(scheme, 1024, 512, soc, "bfloat16", bias=True)
        counts: Counter = Counter()
        known = set()
        for name, function, args, named in seen:
            key = (name, *map(_shape, (*args, *named.values())), *named)
            if key not in known:
                known.add(key)
                out.append((row, kind, soc, name, counts[name], function, args, named))
                counts[name] += 1
    return out


def _shape(value):
    if hasattr(value, "shape"):
        return tuple(value.shape), value.dtype, tuple(value.stride())
    if isinstance(value, (list, tuple)):
        return tuple(map(_shape, value))
    return value


def _places(function, args, named):
    """(argument name, tensor, put) of every tensor of a call; put(tensor) gives the changed (args, named)."""
    def positional(i, wrap):
        return lambda value: ((*args[:i], [value] if wrap else value, *args[i + 1:]), named)

    def keyword(key, wrap):
        return lambda value: (args, {**named, key: [value] if wrap else value})

    entries = [(a.name, value, positional, i) for i, (a, value) in enumerate(zip(function._schema.arguments, args, strict=False))]
    entries += [(key, value, keyword, key) for key, value in named.items()]
    for name, value, put, at in entries:
        if hasattr(value, "stride"):
            yield name, value, put(at, False)
        elif isinstance(value, (list, tuple)) and value and hasattr(value[0], "stride"):
            yield name, value[0], put(at, True)


def mutants(function, args, named):
    """(argument, change, (args, named)) of every mutant of a call."""
    import torch

    def like(shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    for name, value, put in _places(function, args, named):
        shape = tuple(value.shape)
        for d in range(len(shape)):
            yield name, f"dim {d} + 1", put(like((*shape[:d], shape[d] + 1, *shape[d + 1:]), value.dtype))
        yield name, "one axis more", put(like((*shape, 1), value.dtype))
        if len(shape) > 1 and shape[-1] != shape[-2]:
            yield name, "last axes swapped", put(like((*shape[:-2], shape[-1], shape[-2]), value.dtype))
        for dtype in (torch.int8, torch.int32, torch.float32, torch.float16):
            if dtype != value.dtype:
                yield name, f"as {str(dtype).removeprefix('torch.')}", put(like(shape, dtype))
    for key, value in named.items():
        yield key, "left out", (args, {k: v for k, v in named.items() if k != key})
        if isinstance(value, bool):
            yield key, "negated", (args, {**named, key: not value})
        elif isinstance(value, int):
            yield key, "another number", (args, {**named, key: 44 if value > 200 else value + 5})
        elif isinstance(value, list) and value and isinstance(value[0], int):
            yield key, "another list", (args, {**named, key: [value[0] + 3, *value[1:]]})


def judged(soc: str, name: str, function, args, named) -> str | None:
    """Who refuses a call: `Meta` (torch_npu's schema and Meta function), `rules`, or None."""
    from npu_cpu import OWN_META
    try:
        function(*args, **named)
    except Exception:                               # noqa: BLE001 - any refusal counts
        if name not in OWN_META:
            return "Meta"
    try:
        with npu_rules.on(soc):
            npu_rules.check(name, function, args, named)
    except npu_rules.Refused:
        return "rules"
    return None


def listed() -> list[dict]:
    """The committed list."""
    with LIST.open(newline="") as file:
        return list(csv.DictReader(file))


def main(arguments) -> int:
    found, alive, total = [], Counter(), Counter()
    for row, kind, soc, name, index, function, args, named in recorded():
        assert judged(soc, name, function, args, named) is None, f"a right call is refused: {row} {kind} {name}"
        for argument, change, (new_args, new_named) in mutants(function, args, named):
            judge = judged(soc, name, function, new_args, new_named)
            total[change.split(" ")[0], judge] += 1
            if judge is None:
                alive[name] += 1
            else:
                found.append((row, kind, soc, name, str(index), argument, change, judge))
    by = Counter(entry[-1] for entry in found)
    every = len(found) + sum(alive.values())
    print(f"{every} mutants: {by['Meta']} refused by torch_npu's schemas and Meta functions, {by['rules']} more by the eager rules, "
          f"{sum(alive.values())} are other legal calls or pass")
    for change in dict.fromkeys(change for change, _ in total):
        print(f"  {change:10s} Meta {total[change, 'Meta']:5d}  rules {total[change, 'rules']:5d}  pass {total[change, None]:5d}")
    print("  passing by operator:", dict(alive))
    if "--write" in arguments:
        # Every distinct mistake once: rows that make the same call make the same mistakes.
        distinct = {(e[3], e[5], e[6], e[7], e[1]): e for e in reversed(found)}
        with LIST.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([HEAD, *reversed(distinct.values())])
        print(f"wrote {len(distinct)} wrong calls to {LIST.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
