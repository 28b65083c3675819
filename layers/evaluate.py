"""Perplexity of a text, and how far one model's predictions are from another's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qfunc._progress import track

from .model import Model


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Fields: `length`, `stride` of the windows; `tokens`, how many were predicted; `nll`, mean negative log likelihood in nats; against a
    second model, of the same tokens: `other_nll`, `divergence` = mean KL(second || this) in nats, `agreement` = fraction of positions
    where both find the same token most likely (None without one).
    """

    length: int
    stride: int
    tokens: int
    nll: float
    other_nll: float | None = None
    divergence: float | None = None
    agreement: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll)

    @property
    def other_perplexity(self) -> float | None:
        """exp(other_nll)."""
        return None if self.other_nll is None else math.exp(self.other_nll)


def token_stream(tokenizer, text: str, split: str | None = None, end: int | None = None) -> np.ndarray:
    """One stream of token ids, int32.

    Arguments: `split`: the text (less one newline at its end) consists of documents separated by this string; each is tokenized alone.
    `end`, an id put after each document, if any.
    """
    documents = text.removesuffix("\n").split(split) if split else [text]
    ids: list[int] = []
    for document in documents:
        ids += tokenizer.encode(document).ids
        ids += [] if end is None else [end]
    return np.asarray(ids, np.int32)


def windows(ids: Sequence[int], length: int, stride: int) -> Iterator[tuple[np.ndarray, int]]:
    """(ids [length + 1], how many of the last targets count) of each window; what is left of the stream at its end is not used.

    The first window counts all its targets; each other one starts `stride` tokens later and counts those that no window before counted.
    """
    if not 0 < stride <= length:
        raise ValueError(f"stride: expected 1 to the length {length}, found {stride}")
    for start in range(0, len(ids) - length, stride):
        yield np.asarray(ids[start:start + length + 1], np.int32), stride if start else length


def evaluate(model: Model, ids: Sequence[int], *, length: int = 512, stride: int | None = None, against: Model | None = None,
             batch: int = 8, progress: bool | None = None) -> Evaluation:
    """Perplexity of a stream of token ids in windows of `length` inputs.

    Arguments: `stride`: windows start so many tokens apart, by default `length` (no overlap); `against`, a second model of the same
    vocabulary; `batch`, windows at a time.
    Raises: ValueError where the stream is shorter than one window and its last target.
    """
    stride = length if stride is None else stride
    if length < 1 or batch < 1:
        raise ValueError(f"evaluate: expected length and batch of at least 1, found {length} and {batch}")
    found = list(windows(ids, length, stride))
    if not found:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {length} and its last target")
    if against is not None and against.config.vocab_size != model.config.vocab_size:
        raise ValueError(f"the models have vocabularies of {model.config.vocab_size} and {against.config.vocab_size} tokens")
    shares = math.lcm(*(own.mesh.shape.get("data", 1) for own in (model, against) if own is not None and own.mesh is not None))
    pieces = [found[i:i + batch] for i in range(0, len(found), batch)]
    total = np.zeros(5)

    def running(_) -> str:
        return f"perplexity {math.exp(total[1] / total[0]):.3f}" if total[0] else ""

    for piece in track(pieces, "evaluate", progress, running):
        texts = np.stack([text for text, _ in piece])
        counted = np.arange(length) >= length - np.asarray([count for _, count in piece])[:, None]
        # A mesh takes as many texts as it has shares: more of the last one, which do not count.
        more = -len(piece) % shares
        texts, counted = np.pad(texts, ((0, more), (0, 0)), "edge"), np.pad(counted, ((0, more), (0, 0)))
        logits = model(texts[:, :-1])
        others = None if against is None else against(texts[:, :-1])
        total += np.asarray(_sums(logits, others, jnp.asarray(texts[:, 1:]), jnp.asarray(counted)), np.float64)
    tokens = int(total[0])
    means = [float(x) for x in total[1:] / tokens]
    return Evaluation(length, stride, tokens, means[0], *(means[1:] if against is not None else ()))


@partial(jax.jit)
def _sums(logits, others, targets, counted):
    """Over the counted positions: their number, sums of -log p, -log p of the second model, KL(second || first), and agreements."""
    def of(logits):
        log = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        return log, -jnp.take_along_axis(log, targets[..., None], axis=-1)[..., 0]

    log, nll = of(logits)
    zero = jnp.zeros_like(nll)
    rows = [jnp.ones_like(nll), nll, zero, zero, zero]
    if others is not None:
        log2, nll2 = of(others)
        rows[2:] = [nll2, (jnp.exp(log2) * (log2 - log)).sum(-1), (logits.argmax(-1) == others.argmax(-1)).astype(jnp.float32)]
    return jnp.stack([jnp.where(counted, row, 0).sum() for row in rows])
