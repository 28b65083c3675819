"""Checkpoints in and out: one reader a family, GGUF, safetensors, qfunc's own folders. `load` and `inspect` are the way in."""

from qfunc._lazy import attach as _attach

_PUBLIC = {
    "Checkpoint": "_checkpoint", "Inspection": "_inspect", "inspect": "_inspect", "load": "_checkpoint", "load_model": "model",
    "load_native": "native", "save_native": "native",
}

__all__ = list(_PUBLIC)
__getattr__, __dir__ = _attach(__name__, _PUBLIC)
