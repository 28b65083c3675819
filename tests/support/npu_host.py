"""torch_npu's operators without an Ascend: its own schemas and its own Meta functions inside a CPU-only torch.

Three text files of the torch_npu wheel are enough: the list of schemas, the file of Meta functions (shape, dtype and argument checks), and
its pure-Python table of error codes. The wheel is fetched with pip once, the three files are kept in a cache, and nothing of it is ever
installed or put on `sys.path`: beside a CPU torch the whole package breaks `import torch`.

    host = npu_host.host()           # loads once per process; skips the test where the wheel cannot be had
    host.soc("A5")                   # what the few Meta functions that ask are told
    torch.ops.npu.npu_quant_matmul(...)

`QFUNC_TORCH_NPU_WHEEL` names a wheel already at hand, `QFUNC_CACHE` the folder of caches (default: `qfunc` in the user's cache folder).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import types
import warnings
import zipfile
from pathlib import Path

VERSION = "2.13.0"
SCHEMAS = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
META = "torch_npu/op_plugin/meta/_meta_registrations.py"
ERRORS = "torch_npu/utils/_error_code.py"
# The same three files are in the wheels of every Python and machine. They are executed, so they must be the ones that were read.
PINNED = {
    SCHEMAS: "bef3405c40a65818acab7b3873a057ae627273d4a315f7f1e8088879a0aadc1e",
    META: "0cec395d7b449afdc0b0c49bb73c258885e58a7bbfe20570a983632e900009d7",
    ERRORS: "2ea80b31f7aa675daa9b611337642f42771a7fa0bd5a0b8888880e127a077a2b",
}
GROUPS = ("symint", "custom", "quant", "autograd")      # operators listed twice are registered in their SymInt form
SOC = {"A2": 220, "A3": 250, "A5": 260}                 # NpuVariables.h: the first of 910B, of 910_93, and 950
# torch_npu.<name> is 256 + the number of the ACL data type (custom_dtype/Init.h).
HANDLES = {"int4": 285, "hifloat8": 290, "float8_e5m2": 291, "float8_e4m3fn": 292, "float8_e8m0fnu": 293,
           "float4_e2m1fn_x2": 296, "float4_e1m2fn_x2": 297}


class Unavailable(RuntimeError):
    """The wheel cannot be had, or must not be used here."""


def cache() -> Path:
    root = os.environ.get("QFUNC_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qfunc"
    return Path(root)


def files() -> Path:
    """The folder that holds the three files; fetched, checked against their pinned hashes, and kept."""
    folder = cache() / f"torch_npu-{VERSION}"
    given = os.environ.get("QFUNC_TORCH_NPU_WHEEL")
    if not _sound(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            fresh = Path(work) / "files"
            _unpack(Path(given) if given else _download(Path(work)), fresh)
            if not _sound(fresh):
                raise Unavailable(f"the wheel is not torch_npu {VERSION} as the tests know it: {', '.join(_unlike(fresh))} differ")
            shutil.rmtree(folder, ignore_errors=True)
            try:
                fresh.rename(folder)
            except OSError:                             # another worker was first
                if not _sound(folder):
                    raise
    return folder


def _unlike(folder: Path) -> list[str]:
    return [name for name, digest in PINNED.items()
            if not (folder / name).is_file() or hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest]


def _sound(folder: Path) -> bool:
    return not _unlike(folder)


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", f"torch-npu=={VERSION}", "--no-deps", "--only-binary=:all:", "--quiet",
               "--python-version=3.11", "--platform=manylinux_2_28_x86_64", "--dest", str(work)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired as late:
        raise Unavailable("pip did not fetch torch_npu's wheel within 300 s") from late
    wheels = list(work.glob("*.whl"))
    if not wheels:
        raise Unavailable(f"pip could not fetch torch_npu {VERSION}: {done.stderr.strip()[-300:] or done.returncode}")
    return wheels[0]


def _unpack(wheel: Path, folder: Path):
    if not wheel.is_file():
        raise Unavailable(f"QFUNC_TORCH_NPU_WHEEL names no file: {wheel}")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        for name in PINNED:
            if name not in held:
                raise Unavailable(f"{wheel.name} holds no {name}")
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(name))


class Host:
    """torch_npu's operators in this process. `schemas`: name.overload -> text; `metas`: names with a Meta function of torch_npu's own."""

    def __init__(self, folder: Path):
        self.schemas: dict[str, str] = {}
        self.metas: list[str] = []
        self.state = {"soc": SOC["A2"], "cann": "9.1.0"}
        self._keep: list = []                           # a Library takes its registrations away when it is collected
        self._define(folder / SCHEMAS)
        self._execute(folder)

    def soc(self, name: str):
        self.state["soc"] = SOC[name]

    def _define(self, path: Path):
        import torch
        import yaml
        library = torch.library.Library("npu", "FRAGMENT")
        self._keep.append(library)
        # torch warns of the annotations of some schemas that no test calls.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            listed = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            for group in GROUPS:
                for item in listed.get(group) or []:
                    text = item["func"] if isinstance(item, dict) else item
                    name = text.split("(", 1)[0]
                    if "(" in text and name not in self.schemas:
                        library.define(text)
                        self.schemas[name] = text

    def _execute(self, folder: Path):
        import torch
        stubs = self._stubs(folder)
        # Only for the time of the execution: what later asks whether torch_npu is installed must hear that it is not.
        sys.modules.update(stubs)
        real = torch.library.impl
        torch.library.impl = self._recorder(real)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                errors = stubs["torch_npu.utils._error_code"]
                exec(compile((folder / ERRORS).read_text(), ERRORS, "exec"), errors.__dict__)
                scope = {"__name__": "npu_meta", "__file__": META}
                exec(compile((folder / META).read_text(), META, "exec"), scope)
        finally:
            torch.library.impl = real
            for name in stubs:
                del sys.modules[name]
        self._keep.append(scope)

    def _recorder(self, real):
        def impl(library, name, *rest, **named):
            # torch_npu also replaces a few of torch's own Meta functions, for its device alone.
            if library.ns != "npu":
                return lambda function: function
            self.metas.append(name)
            return real(library, name, *rest, **named)
        return impl

    def _stubs(self, folder: Path) -> dict[str, types.ModuleType]:
        """What the Meta file and the table of error codes take from torch_npu, and no more."""
        import torch

        def numbers(version):
            return tuple(int(part) for part in re.findall(r"\d+", version)[:3])

        state = self.state
        contents = {
            "torch_npu": {**HANDLES, **{name: getattr(torch, name) for name in ("uint8", "int8", "float16", "bfloat16", "float32")}},
            "torch_npu.npu": {},
            "torch_npu.npu.utils": {
                "get_cann_version": lambda module="CANN": state["cann"],
                "_is_gte_cann_version": lambda version, module="CANN": numbers(state["cann"]) >= numbers(version)},
            "torch_npu.npu._backends": {"get_soc_version": lambda: state["soc"]},
            "torch_npu.utils": {},
            "torch_npu.utils.utils": {"_is_interactive_command_line": lambda: True},
            "torch_npu.utils._error_code": {},
        }
        stubs = {}
        for name, items in contents.items():
            stubs[name] = types.ModuleType(name)
            stubs[name].__dict__.update(items, __path__=[])
            parent, _, last = name.rpartition(".")
            if parent:
                setattr(stubs[parent], last, stubs[name])
        return stubs


@functools.cache
def load() -> Host:
    """The host of this process. Raises Unavailable where the wheel cannot be had or a real torch_npu could be imported."""
    if importlib.util.find_spec("torch_npu") is not None:
        raise Unavailable("a real torch_npu can be imported here, and the same operators cannot be registered twice")
    if importlib.util.find_spec("yaml") is None:
        raise Unavailable("PyYAML is needed to read torch_npu's list of schemas")
    return Host(files())


_refused: list[str] = []


def host() -> Host:
    """`load()` for tests: skips, saying why, where there is no host."""
    import pytest
    pytest.importorskip("torch")
    if not _refused:                                    # one failed download is enough for a process
        try:
            return load()
        except Unavailable as reason:
            _refused.append(str(reason))
    pytest.skip(f"no torch_npu operators: {_refused[0]}")
