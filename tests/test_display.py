"""The repr of a packed weight: facts, never bytes, on anything that JAX may put into its leaves."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import qfunc
from qfunc._display import bits_per_weight, describe, describe_html, facts, size_text


def test_describe_says_scheme_shape_bits_and_size():
    scheme = SimpleNamespace(name="w4a16_g128")
    q = SimpleNamespace(scheme=scheme, shape=(4096, 14336), dtype="bfloat16", nbytes=31195136, layout="canonical")
    assert describe(q) == "QTensor(w4a16_g128, (4096, 14336), bfloat16, 4.25 bits, 31.2 MB)"
    assert bits_per_weight(q) == 4.25
    page = describe_html(q)
    assert all(part in page for part in ("w4a16_g128", "4096 &times; 14336", "4.25 of 16", "31.2 MB"))
    q.layout = "cpu<4>"
    assert describe(q).endswith("layout=cpu<4>)") and "cpu&lt;4&gt;" in describe_html(q)


def test_describe_never_raises():
    class Broken:
        shape = property(lambda self: 1 / 0)
    assert describe(Broken()) == "QTensor()" and "QTensor" in describe_html(Broken()) and facts(Broken()) == {}


@pytest.mark.parametrize("nbytes, text", [
    (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (29700, "29.7 kB"), (90868376, "90.9 MB"), (1.05e9, "1.05 GB")])
def test_size_text(nbytes, text):
    assert size_text(nbytes) == text


def test_the_real_thing():
    q = qfunc.quantize({"kernel": jnp.ones((256, 128))}, "w4a16_g128")["kernel"]
    line = repr(q)
    assert line.startswith("QTensor(w4a16_g128, (256, 128), float32, 4.25 bits") and "\n" not in line
    assert "w4a16_g128" in q._repr_html_()
    seen = []
    jax.jit(lambda q: seen.append(repr(q)) or q.dequantize())(q)
    jax.eval_shape(lambda q: seen.append(repr(q)) or q.dequantize(), q)
    assert all(s.startswith("QTensor(w4a16_g128, (256, 128)") for s in seen) and len(seen) == 2
    repr(jax.tree.map(lambda leaf: None, q))
    repr(jax.tree.map(lambda leaf: object(), q))


def test_treescope_shows_facts_only():
    treescope = pytest.importorskip("treescope")
    q = qfunc.quantize({"kernel": jnp.ones((256, 128))}, "w8a16")["kernel"]
    text = treescope.render_to_text(q)
    assert "w8a16" in text and "256" in text and "uint8" not in text and "codes" not in text
