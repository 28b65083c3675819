"""A model that one can call: parameters, configuration, tokenizer, and the compiled functions on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qfunc

from . import decoder
from .cache import capacity, init_cache
from .config import ModelConfig
from .generate import generate

CHUNK = 8
"""Tokens per compiled loop while streaming: enough to hide the call, few enough to look fluent."""


@partial(jax.jit, static_argnames=("apply", "config"), donate_argnames=("cache",))
def _forward(params, ids, cache, *, apply: Callable, config: ModelConfig):
    return apply(params, ids, cache, config)


class Model:
    """A decoder with its parameters.

        model = qfunc.load_model("path")
        logits = model(ids)                              # [B, T, vocab]
        print(model.generate("The library", max_new_tokens=20))

    Attributes: `params`, nested dict in Hugging Face names, QTensors in it; `config`, a `ModelConfig`; `tokenizer` of the tokenizers
    package, or None; `mesh`, the devices that it is split over, or None; `notes`, what is odd about its checkpoint.
    """

    def __init__(self, params, config: ModelConfig, tokenizer: Any = None, *, mesh=None, notes: tuple[str, ...] = ()):
        self.params, self.config, self.tokenizer, self.mesh, self.notes = params, config, tokenizer, mesh, notes
        self._apply = decoder.apply
        if mesh is not None:
            from .parallel import parallel_apply
            self._apply = parallel_apply(mesh, params, config)

    def __call__(self, input_ids, cache=None):
        """The logits [B, T, vocab] of token ids [B, T] (or [T]: one text), in `config.dtype`.

        With a `cache` (of `init_cache` or an earlier call) the ids follow what it holds, and the result is (logits, new cache); the old
        one is donated and must not be used again. Raises: ValueError where the ids are out of range or the cache is full.
        """
        ids = self._checked(input_ids)
        if cache is None:
            return _forward(self.params, ids, None, apply=self._apply, config=self.config)[0]
        if int(cache["length"]) + ids.shape[1] > capacity(cache):
            raise ValueError(f"cache: {int(cache['length'])} of {capacity(cache)} positions are taken, {ids.shape[1]} more do not fit")
        return _forward(self.params, ids, cache, apply=self._apply, config=self.config)

    def _checked(self, ids):
        ids = np.asarray(ids)
        ids = ids[None] if ids.ndim == 1 else ids
        if not np.issubdtype(ids.dtype, np.integer) or ids.ndim != 2:
            raise ValueError(f"input_ids: expected integers [batch, tokens], found {ids.dtype} {ids.shape}")
        if ids.size and (ids.min() < 0 or ids.max() >= self.config.vocab_size):
            raise ValueError(f"input_ids: expected 0 to {self.config.vocab_size - 1}, found {ids.min()} to {ids.max()}")
        return jnp.asarray(ids, jnp.int32)

    def init_cache(self, batch: int, length: int) -> dict:
        """An empty key/value cache in the format of `config.cache`."""
        return init_cache(self.config, batch, length)

    def generate(self, prompt, max_new_tokens: int = 64, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
                 stream: bool = False):
        """Continue a text or token ids.

        Arguments: `prompt`, a string (needs a tokenizer) or ids [T] or [B, T]; `temperature` 0 is greedy; `top_p`, see
        `qfunc.layers.generate.sample`; `stream`: give an iterator of pieces as they come.
        Returns: the new text, or the new ids int32 [B, n] ([n] for [T]), which end with the id that ends a text where one was met.
        """
        text = isinstance(prompt, str)
        if text and self.tokenizer is None:
            raise ValueError("generate: this model has no tokenizer; pass token ids")
        ids = np.asarray(self.tokenizer.encode(prompt).ids if text else prompt)
        single = ids.ndim == 1
        pieces = generate(self._apply, self.params, self._checked(ids), self.config, max_new_tokens=max_new_tokens,
                          temperature=temperature, top_p=top_p, seed=seed, chunk=CHUNK if stream else max_new_tokens)
        found = (piece[0] for piece in pieces) if single else pieces
        if text:
            found = self._texts(found)
            return found if stream else "".join(found)
        return found if stream else np.concatenate(list(found), axis=-1)

    def _texts(self, pieces: Iterable[np.ndarray]) -> Iterator[str]:
        """Text as it grows; bytes of a character that is not complete yet are held back."""
        ids: list[int] = []
        shown = ""
        for piece in pieces:
            ids += [int(i) for i in piece if int(i) not in self.config.eos]
            text = self.tokenizer.decode(ids)
            if not text.endswith("\ufffd"):
                yield text[len(shown):]
                shown = text
        text = self.tokenizer.decode(ids)
        if text != shown:
            yield text[len(shown):]

    def quantize(self, rules, calibration: Iterable | None = None, **options) -> Model:
        """A model whose weights are quantized by `qfunc.quantize(params, rules)`; this one stays as it is.

        Arguments: `calibration`, batches of token ids [B, T] (or statistics of `qfunc.calibrate`), which static schemes need; `options`
        of `qfunc.quantize`.
        """
        if self.mesh is not None:
            raise ValueError("quantize: this model is split over a mesh; quantize it before, or load it with quantize=")
        if calibration is not None and not isinstance(calibration, dict):
            batches = ((self._checked(ids),) for ids in calibration)
            calibration = qfunc.calibrate(lambda params, ids: decoder.apply(params, ids, None, self.config)[0], self.params, batches)
        return Model(qfunc.quantize(self.params, rules, calibration=calibration, **options), self.config, self.tokenizer, notes=self.notes)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters, scales included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))

    def __repr__(self) -> str:
        schemes = {leaf.scheme.name for leaf in jax.tree.leaves(self.params, is_leaf=_packed) if _packed(leaf)}
        return (f"Model({self.config.family}, {self.config.num_hidden_layers} layers of {self.config.hidden_size}, "
                f"{self.nbytes / 1e6:.1f} MB, {', '.join(sorted(schemes)) or self.config.dtype})")


def _packed(leaf) -> bool:
    return isinstance(leaf, qfunc.QTensor)
