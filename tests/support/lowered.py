"""What a lowered function calls: the custom calls and quantized operations that can be reached from its entry, with their number."""

import hashlib
import re
from collections import Counter

import jax

FUNCTION = re.compile(r"^  func\.func (?:public|private)? ?@([\w.$-]+)\(.*?(?=^  func\.func|\Z)", re.M | re.S)
CALL = re.compile(r"(?:func\.)?call @([\w.$-]+)\(")
CUSTOM = re.compile(r"custom_call @([\w.$-]+)\(.*?(?:name = \"([\w.$-]+)\"|$)", re.M)


def reached(text: str) -> Counter:
    """Names of functions called and of custom calls (the label of a Triton call, else its target), each with how often it is met on the
    way from `main`; the body of a loop counts once."""
    bodies = {m[1]: m[0] for m in FUNCTION.finditer(text)}
    found: Counter = Counter()

    def walk(name: str, times: int):
        body = bodies[name]
        for inner in CALL.findall(body):
            found[inner] += times
            if inner in bodies:
                walk(inner, times)
        for target, label in CUSTOM.findall(body):
            found[label or target] += times

    walk("main", 1)
    return found


def operations(found: Counter) -> Counter:
    """(primitive, implementation) of the quantized operations among them, with their number."""
    counted: Counter = Counter()
    for name, times in found.items():
        if m := re.fullmatch(r"((?:quantized?_)[a-z_]+?)_(triton|xla|reference|native)(?:_\d+)?", name):
            counted[m[1], m[2]] += times
    return counted


def kernels(found: Counter) -> Counter:
    """Triton kernels among them, with their number."""
    return Counter({name.removeprefix("qfunc_"): times for name, times in found.items() if name.startswith("qfunc_")})


def lower(fn, *args, platform: str = "cuda", **options) -> str:
    """The lowered text of a function for a platform that need not be here; arguments may be shapes."""
    return jax.jit(fn, **options).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def without_compiling(monkeypatch):
    """Lower for sm_90 inside the context, with images that hold no code and are not kept on disk."""
    from qfunc.kernels.triton import _image, _target
    monkeypatch.setattr(_image, "_images", {})
    monkeypatch.setattr(_image, "find", lambda program, target: _image._images.get((program, target)))
    monkeypatch.setattr(_image, "write", lambda path, data: None)
    monkeypatch.setattr(_image, "_compile", uncompiled)
    monkeypatch.setattr(_image, "triton_version", lambda: "3.6.0")
    return _target.lowering_for("sm_90")


def uncompiled(program, target):
    """An image without code, in the place of a compilation: for tests of what is called, not of what it does."""
    from qfunc.kernels.triton._image import Image
    code = hashlib.sha256(repr((program, target)).encode()).hexdigest().encode()
    return Image(program.name, 0, program.warps, target, "0", code)
