"""Every family of models through `to_torch`, in floating point, against the same function in JAX: whole texts, the cache, generation."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qfunc.layers import generate
from qfunc.layers.cache import FORMATS, init_cache
from qfunc.layers.decoder import apply

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from qfunc.interop.cann import to_array, to_torch  # noqa: E402

_spec = importlib.util.spec_from_file_location("families_of_layers", Path(__file__).parents[1] / "layers" / "test_families.py")
families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(families)

USUAL = ("gpt_oss", "deepseek_v3")


def close(got, want, tolerance=2e-5):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(to_array(g), np.float32), np.asarray(w, np.float32)
        np.testing.assert_allclose(g, w, atol=tolerance * max(1.0, float(np.abs(w).max())))


def as_tensors(tree):
    return jax.tree.map(lambda leaf: torch.from_numpy(np.array(leaf)), tree)


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in USUAL else pytest.mark.slow) for case in families.CASES])
def test_logits_and_cache(case, tmp_path):
    _, params, config = families.build(case, tmp_path)
    ids = np.random.default_rng(0).integers(3, 96, (2, 8)).astype(np.int32)
    run = jax.jit(apply, static_argnums=3)
    torch_apply = to_torch(apply, rules="reference")
    own = as_tensors(params)

    want, _ = run(params, ids, None, config)
    got, none = torch_apply(own, torch.from_numpy(ids).long(), None, config)
    assert none is None
    close(got, want)

    mine, kept = torch_apply(own, torch.from_numpy(ids[:, :5]), as_tensors(init_cache(config, 2, 12)), config)
    steps = [mine]
    for i in range(5, 8):
        before = kept["layers"][0]["k"]["codes"].clone()
        mine, new = torch_apply(own, torch.from_numpy(ids[:, i:i + 1]), kept, config)
        assert torch.equal(kept["layers"][0]["k"]["codes"], before)         # an old cache is never written to
        steps, kept = [*steps, mine], new
    close(torch.cat(steps, 1), want)
    assert int(kept["length"]) == 8 and len(torch_apply._traces) == 3       # the whole text, the prompt, one token


@pytest.mark.parametrize("form", [pytest.param(form, marks=() if form == "int8_token" else pytest.mark.slow)
                                  for form in sorted(set(FORMATS) - {"float", "int8"})])
def test_quantized_caches(form, tmp_path):
    _, params, config = families.build("qwen3", tmp_path)
    config = config.replace(cache=form, num_hidden_layers=1, windows=(None,))
    ids = np.random.default_rng(1).integers(3, 96, (2, 6)).astype(np.int32)
    torch_apply, run = to_torch(apply, rules="reference"), jax.jit(apply, static_argnums=3)
    want, kept = run(params, ids[:, :5], init_cache(config, 2, 8), config)
    got, mine = torch_apply(as_tensors(params), ids[:, :5], init_cache(config, 2, 8), config)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-2)        # a code at a rounding border may differ in the two
    for g, w in zip(jax.tree.leaves(mine), jax.tree.leaves(kept), strict=True):
        off = np.abs(np.asarray(to_array(g), np.float32) - np.asarray(w, np.float32))
        assert (off > 1e-5 * np.abs(np.asarray(w, np.float32)).max()).mean() < 0.02


@pytest.mark.parametrize("greedy", [pytest.param(True, marks=pytest.mark.slow), False])
def test_generation_draws_the_same_tokens(greedy, tmp_path):
    _, params, config = families.build("qwen3", tmp_path)
    config = config.replace(eos=(2,))
    ids = np.random.default_rng(2).integers(3, 96, (2, 5)).astype(np.int32)
    key, draw = jax.random.split(jax.random.key(3), 2), (jnp.float32(0.8), jnp.float32(0.9))
    options = {"apply": apply, "config": config, "greedy": greedy}

    def text(prefill, decode, params, cache):
        token, cache = prefill(params, ids, cache, key, *draw, **options)
        out, token, cache, done = decode(params, token, cache, np.zeros(2, bool), np.int32(1), key, *draw, **options, steps=6)
        return out

    want = text(generate.prefill, generate.decode, params, init_cache(config, 2, 16))
    got = text(to_torch(generate.prefill, rules="reference"), to_torch(generate.decode, rules="reference"), as_tensors(params),
               init_cache(config, 2, 16))
    assert np.array_equal(to_array(got), want)
