"""The exception for files: bad arguments raise ValueError or TypeError, bad checkpoints raise `CheckpointError`."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint is damaged, hostile or not understood. The message names file, tensor, what was expected and what was found."""
