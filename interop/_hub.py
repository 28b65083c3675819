"""Checkpoints of the Hugging Face hub: which files of a repository are fetched, told from its list of them."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from qfunc._errors import CheckpointError

from ._refuse import refuse

BESIDES = ["*.json", "tokenizer*", "*.model"]
TWICE = "consolidated*.safetensors"
"""Weights in the original code's layout, which some repositories have besides those in transformers'."""


def fetch(name: str) -> Path:
    """The local folder of a repository `org/name`.

    Raises: CheckpointError, before weights are fetched, where several GGUF files are there to choose from; and where nothing is reachable.
    """
    try:
        import huggingface_hub as hub
    except ImportError:
        raise CheckpointError(f"{name}: no such file or folder; to read it as a hub id, install huggingface_hub "
                              "(pip install 'qfunc[hub]')") from None
    try:
        files = [entry.rfilename for entry in hub.model_info(name, timeout=10).siblings]
    except Exception:                               # offline, what was fetched before may still be there
        files = None
    wanted = ["*.safetensors", "*.gguf"] if files is None else _wanted(name, files)
    without = [TWICE] if any(fnmatchcase(file, "*.safetensors") and not fnmatchcase(file, TWICE) for file in files or ()) else None
    try:
        return Path(hub.snapshot_download(name, allow_patterns=[*BESIDES, *wanted], ignore_patterns=without))
    except Exception as error:                      # of the network, the hub or the disk, each with classes of its own
        reason = str(error).strip().partition("\n")[0]
        raise refuse(name, "", "a local path or a repository of the hub",
                     f"neither: no such file or folder here, and the hub says {type(error).__name__}: {reason}") from error


def _wanted(name: str, files: list[str]) -> list[str]:
    """Patterns of the weights: safetensors where there are some, else the one GGUF file, whole or in parts."""
    if any(file.endswith(".safetensors") for file in files):
        return ["*.safetensors"]
    found = sorted(file for file in files if file.lower().endswith(".gguf"))
    first = [file for file in found if "-of-" not in file or "-00001-of-" in file]
    if not found:
        raise refuse(name, "", "a repository with .safetensors files or a .gguf file", f"{len(files)} files, none of them")
    if len(first) != 1 or "/" in first[0]:
        raise refuse(name, "", "one .gguf file, at the top; fetch one of these and pass its path", ", ".join(first or found))
    return found
