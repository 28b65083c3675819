"""GGUF files."""

from qfunc._ggml import decode

__all__ = ["decode"]
