"""Clocks of the GPU bench: CUDA events around graphs of launches on rotating buffers, and a stand-in for machines without a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

ROTATE = 200 << 20
"""Bytes of weights that launches rotate through: more than any cache keeps between two uses of the same buffer."""


def copies(weight_bytes: int) -> int:
    """How many copies of a weight make the rotation."""
    return max(2, min(16, -(-ROTATE // max(weight_bytes, 1))))


class Events:
    """CUDA events. `launches` are functions without arguments, one for each copy of the operands. `note` says of the last time how it was
    taken, where that was not from a graph."""

    name = "CUDA events"
    note = ""

    def torch(self, launches: Sequence[Callable], repeats: int) -> float:
        """Median seconds of one launch, from graphs of one launch for each copy; without a graph where capture is refused."""
        import torch
        for launch in launches:
            launch()
        torch.cuda.synchronize()
        graph, self.note = torch.cuda.CUDAGraph(), ""
        try:
            with torch.cuda.graph(graph):
                for launch in launches:
                    launch()
            play = graph.replay
        except RuntimeError as error:
            torch.cuda.synchronize()
            self.note = f"without a graph, launches included: {(str(error).splitlines() or [''])[0][:120]}"

            def play():
                for launch in launches:
                    launch()
        return self._median(play, repeats) / len(launches)

    def jax(self, run: Callable, count: int, repeats: int) -> float:
        """Median seconds of one of the `count` launches that the compiled function `run` makes."""
        import jax
        jax.block_until_ready(run())
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(run())
            times.append(time.perf_counter() - start)
        return statistics.median(times) / count

    def _median(self, play: Callable, repeats: int) -> float:
        import torch
        play()
        times = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            play()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times)


class Dry:
    """Runs everything once and returns the wall time: the numbers mean nothing, the steps are the same."""

    name, note = "dry run", ""

    def torch(self, launches: Sequence[Callable], repeats: int) -> float:
        """See `Events.torch`."""
        start = time.perf_counter()
        for launch in launches:
            launch()
        return (time.perf_counter() - start) / len(launches)

    def jax(self, run: Callable, count: int, repeats: int) -> float:
        """See `Events.jax`."""
        import jax
        start = time.perf_counter()
        jax.block_until_ready(run())
        return (time.perf_counter() - start) / count
