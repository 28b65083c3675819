"""A model that one can call: parameters, configuration, tokenizer, and the compiled functions on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qfunc

from . import decoder
from .cache import batch_size, capacity, init_cache
from .config import ModelConfig
from .generate import generate, padded, unpadded
from .stack import stack_layers

CHUNK = 8
"""Tokens per compiled loop while streaming: enough to hide the call, few enough to look fluent."""


@partial(jax.jit, static_argnames=("apply", "config"), donate_argnames=("cache",))
def _forward(params, ids, cache, pad, *, apply: Callable, config: ModelConfig):
    return apply(params, ids, cache, config, pad=pad)


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

    def __call__(self, input_ids, cache=None, mask=None):
        """The logits [B, T, vocab] of token ids [B, T] (or [T]: one text), in `config.dtype`.

        Arguments: with a `cache` (of `init_cache` or an earlier call) the ids follow what it holds, and the result is (logits, new
        cache); the old one is donated and must not be used again. `mask` [B, T], where texts differ in length: true (or 1) for tokens,
        false for the padding in front of them or behind them, whose logits mean nothing.
        Raises: ValueError where the ids are out of range, the cache is full, or padding stands between tokens.
        """
        ids = self._checked(input_ids)
        self._check_batch(ids.shape[0])
        if mask is not None and cache is not None:
            raise ValueError("mask: expected none with a cache, whose own padding counts (`init_cache(..., pad=)`)")
        pad = None
        if mask is not None:
            unpadded(ids, mask)
            pad = jnp.asarray(np.asarray(mask, bool).argmax(1), jnp.int32)
        if cache is None:
            return _forward(self.params, ids, None, pad, apply=self._apply, config=self.config)[0]
        texts, room = batch_size(cache), capacity(cache)
        if ids.shape[0] != texts:
            raise ValueError(f"input_ids: expected the {texts} texts of the cache, found {ids.shape[0]}")
        if int(cache["length"]) + ids.shape[1] > room:
            raise ValueError(f"cache: {int(cache['length'])} of {room} positions are taken, {ids.shape[1]} more do not fit")
        return _forward(self.params, ids, cache, None, apply=self._apply, config=self.config)

    def _check_batch(self, texts: int) -> None:
        shares = 1 if self.mesh is None else self.mesh.shape.get("data", 1)
        if texts % shares:
            raise ValueError(f"input_ids: expected a multiple of {shares} texts, as the mesh splits them over its axis data, found {texts}")

    def _checked(self, ids):
        ids = np.asarray(ids)
        ids = ids[None] if ids.ndim == 1 else ids
        if not np.issubdtype(ids.dtype, np.integer) or ids.ndim != 2 or not ids.size:
            raise ValueError(f"input_ids: expected integers [batch, tokens], at least one, found {ids.dtype} {ids.shape}")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise ValueError(f"input_ids: expected 0 to {self.config.vocab_size - 1}, found {ids.min()} to {ids.max()}")
        return jnp.asarray(ids, jnp.int32)

    def init_cache(self, batch: int, length: int, pad=None) -> dict:
        """An empty key/value cache in the format of `config.cache`; `pad` [B], how many of the first slots of each text are padding."""
        return init_cache(self.config, batch, length, pad)

    def generate(self, prompt, max_new_tokens: int = 64, temperature: float = 0.0, top_p: float = 1.0, seed: int | Sequence[int] = 0,
                 stream: bool = False, mask=None):
        """Continue texts or token ids.

        Arguments:
            prompt: a string or a list of strings (they need a tokenizer), or ids: [T], [B, T], or a list of rows of any lengths.
            temperature: 0 is greedy; top_p: see `qfunc.layers.generate.sample`.
            seed: one number, or one per row; a row's draws depend on its own alone.
            stream: give an iterator of pieces as they come.
            mask: [B, T] for ids [B, T], false where they are padding, on either side.

        Returns: for a string or a list of them the new text or texts; for ids the new ids int32 [n] or [B, n], which end with the id that
        ends a text where one was met (rows that ended earlier repeat it). With `stream`, an iterator of pieces of that.
        """
        texts = isinstance(prompt, str) or (isinstance(prompt, Sequence) and bool(prompt) and all(isinstance(p, str) for p in prompt))
        single = isinstance(prompt, str) or (not texts and len(np.shape(prompt[0] if len(prompt) else prompt)) == 0)
        rows = [prompt] if single else list(prompt)
        if texts:
            rows = [self._encode(row) for row in rows]
        if mask is not None:
            rows = unpadded(prompt, mask)
        if not rows or min(len(row) for row in rows) == 0:
            raise ValueError("generate: expected prompts of at least one token, found an empty one")
        for row in rows:
            self._checked(row)
        self._check_batch(len(rows))
        ids, pad = padded(rows)
        pieces = generate(self._apply, self.params, ids, self.config, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
                          seed=seed, chunk=CHUNK if stream else max_new_tokens, pad=pad)
        if not texts:
            found = (piece[0] for piece in pieces) if single else pieces
            return found if stream else np.concatenate(list(found), axis=-1)
        grown = self._texts(pieces, len(rows))
        if stream:
            return (piece[0] for piece in grown if piece[0]) if single else grown
        whole = ["".join(parts) for parts in zip(*grown, strict=True)]
        return whole[0] if single else whole

    def _texts(self, pieces: Iterable[np.ndarray], count: int) -> Iterator[list[str]]:
        """What is new of each text; bytes of a character that is not complete yet are held back to the end."""
        ids: list[list[int]] = [[] for _ in range(count)]
        shown, ended = [""] * count, [False] * count

        def news(last: bool) -> list[str]:
            out = []
            for row, own in enumerate(ids):
                text = self.tokenizer.decode(own)
                held = text.endswith("\ufffd") and not last
                out.append("" if held else text[len(shown[row]):])
                shown[row] = shown[row] if held else text
            return out

        for piece in pieces:
            for row, new in enumerate(piece):
                for token in map(int, new):
                    ended[row] |= token in self.config.eos
                    ids[row] += [] if ended[row] else [token]
            yield news(False)
        yield news(True)

    def stacked(self) -> Model:
        """The same model with its layers as one stack under `lax.scan`: one layer is compiled instead of all, and decoding is slower.

        Raises: ValueError, naming the difference, where the layers are not alike, and for a model on a mesh.
        """
        if self.mesh is not None:
            raise ValueError("stacked: this model is split over a mesh, whose layers are unrolled")
        params, config = stack_layers(self.params, self.config)
        return Model(params, config, self.tokenizer, notes=self.notes)

    def quantize(self, rules, calibration: Iterable | None = None, **options) -> Model:
        """A model whose weights are quantized by `qfunc.quantize(params, rules)`; this one stays as it is.

        Arguments: `calibration`, batches of token ids [B, T] or [T], or texts where there is a tokenizer (or statistics of
        `qfunc.calibrate`), which static schemes need; `options` of `qfunc.quantize`.
        Raises: ValueError as `qfunc.quantize`, and where every weight that the rules name is packed already.
        """
        if self.mesh is not None:
            raise ValueError("quantize: this model is split over a mesh; quantize it before, or load it with quantize=")
        if calibration is not None and not isinstance(calibration, dict):
            batches = ((self._checked(self._encode(ids) if isinstance(ids, str) else ids),) for ids in calibration)
            calibration = qfunc.calibrate(lambda params, ids: decoder.apply(params, ids, None, self.config)[0], self.params, batches)
        params = qfunc.quantize(self.params, rules, calibration=calibration, **options)
        if self._schemes() and jax.tree.structure(params) == jax.tree.structure(self.params):
            raise ValueError(f"quantize: the weights are packed already ({', '.join(self._schemes())}); start from a float model, or load "
                             "the checkpoint with quantize=")
        return Model(params, self.config, self.tokenizer, notes=self.notes)

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            try:
                import tokenizers  # noqa: F401 (whether it is there is the question)
            except ImportError:
                raise ValueError("this model has no tokenizer, as the package tokenizers, which reads it, is not installed "
                                 "(pip install tokenizers); pass token ids") from None
            raise ValueError("this model has no tokenizer; pass token ids")
        return self.tokenizer.encode(text).ids

    def _schemes(self) -> list[str]:
        return sorted({leaf.scheme.name for leaf in jax.tree.leaves(self.params, is_leaf=_packed) if _packed(leaf)})

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters, scales included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))

    def __repr__(self) -> str:
        return (f"Model({self.config.family}, {self.config.num_hidden_layers} layers of {self.config.hidden_size}, "
                f"{self.nbytes / 1e6:.1f} MB, {', '.join(self._schemes()) or self.config.dtype})")


def _packed(leaf) -> bool:
    return isinstance(leaf, qfunc.QTensor)
