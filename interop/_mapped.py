"""A file that is read through a mapping, and given back to the system piece by piece."""

from __future__ import annotations

import mmap
from functools import cached_property
from pathlib import Path


class MappedFile:
    """A file at `path`, mapped when its `memory` is first asked for."""

    path: Path

    @cached_property
    def memory(self) -> mmap.mmap:
        """The mapped file."""
        with open(self.path, "rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def release(self, tensors) -> None:
        """Give the pages of tensors (`offset`, `nbytes`) that were read back to the system; a view into them would read the file again."""
        for tensor in tensors:
            start = -(-tensor.offset // mmap.PAGESIZE) * mmap.PAGESIZE
            length = (tensor.offset + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
            if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
                self.memory.madvise(mmap.MADV_DONTNEED, start, length)
