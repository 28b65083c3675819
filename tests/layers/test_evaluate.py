"""Perplexity against a plain computation in numpy, and the two commands."""

import json

import jax
import numpy as np
import pytest
from checkpoints import checkpoint, one_layer
from typer.testing import CliRunner

import qfunc
from qfunc.cli import app
from qfunc.layers.evaluate import evaluate, token_stream, windows

CONFIG = {"model_type": "llama", "vocab_size": 48, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
          "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "eos_token_id": 0,
          "torch_dtype": "float32", "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = checkpoint(tmp_path_factory.mktemp("tiny") / "m", one_layer(rng), config=CONFIG)
    tokenizers = pytest.importorskip("tokenizers")
    letters = {chr(97 + i): i + 1 for i in range(26)} | {"<end>": 0, "?": 40}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    made.save(str(path / "tokenizer.json"))
    return path


def test_windows_count_every_target_once():
    ids = np.arange(23)
    for stride in (1, 3, 5):
        targets = np.concatenate([text[1:][-count:] for text, count in windows(ids, 5, stride)])
        assert len(set(targets)) == len(targets) and list(targets) == list(range(1, len(targets) + 1))
    assert [len(text) for text, _ in windows(ids, 5, 5)] == [6] * 4
    for stride in (0, 6):
        with pytest.raises(ValueError, match="stride"):
            list(windows(ids, 5, stride))


def test_perplexity_and_divergence(folder):
    model, other = qfunc.load_model(folder), qfunc.load_model(folder, quantize="w4a16")
    ids = np.random.default_rng(1).integers(0, 48, 60)
    found = evaluate(other, ids, length=9, stride=4, against=model, batch=3)
    sums = np.zeros(4)
    for text, count in windows(ids, 9, 4):
        logs = []
        for one in (other, model):
            z = np.asarray(one(text[:-1]), np.float64)[0, -count:]
            logs.append(z - np.log(np.exp(z).sum(-1, keepdims=True)))
        at = np.arange(count), text[1:][-count:]
        kl = (np.exp(logs[1]) * (logs[1] - logs[0])).sum()
        sums += [-logs[0][at].sum(), -logs[1][at].sum(), kl, (logs[0].argmax(-1) == logs[1].argmax(-1)).sum()]
    want = sums / found.tokens
    np.testing.assert_allclose([found.nll, found.other_nll, found.divergence, found.agreement], want, rtol=1e-5)
    assert found.perplexity == pytest.approx(np.exp(want[0]), rel=1e-5) and (found.length, found.stride) == (9, 4)
    alone = evaluate(model, ids, length=9, stride=4)
    assert alone.nll == pytest.approx(want[1], rel=1e-5) and alone.divergence is None
    with pytest.raises(ValueError, match="fewer than one window"):
        evaluate(model, ids[:9], length=9)


def test_windows_that_the_devices_do_not_divide(folder, rng):
    """The last batch is filled up for a mesh that splits texts, and what fills it does not count."""
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]).reshape(2, 1), ("data", "tp"))
    ids = rng.integers(0, 48, 64)
    want = evaluate(qfunc.load_model(folder), ids, length=9, stride=4)
    for batch in (3, 4, 64):
        found = evaluate(qfunc.load_model(folder, mesh=mesh), ids, length=9, stride=4, batch=batch, against=qfunc.load_model(folder))
        assert (found.tokens, found.agreement) == (want.tokens, 1) and found.nll == pytest.approx(want.nll, rel=1e-5)


def test_one_device_takes_every_layer(folder, rng):
    """No layer is cut, so none needs to divide: 32 inputs are a fourth of a block of packed codes."""
    ids = rng.integers(0, 48, (2, 9))
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("tp",))
    one, plain = (qfunc.load_model(folder, quantize="w4a16_g32", mesh=own)(ids) for own in (mesh, None))
    np.testing.assert_allclose(one, plain, atol=1e-4)


def test_a_batch_of_nothing_is_refused(folder):
    for sizes in ({"batch": 0}, {"length": 0}):
        with pytest.raises(ValueError, match="evaluate: expected length and batch of at least 1"):
            evaluate(qfunc.load_model(folder), [1, 2, 3], **sizes)


def test_documents_end_with_their_own_id(folder):
    tokenizer = qfunc.load_model(folder).tokenizer
    assert list(token_stream(tokenizer, "ab||c\n", "||", 0)) == [1, 2, 0, 3, 0]
    assert list(token_stream(tokenizer, "ab||c\n")) == [1, 2, 40, 40, 3, 40]


def test_the_commands(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(np.random.default_rng(0).choice(list("abcdefgh"), 120)) + "\n")
    run = CliRunner().invoke
    out = run(app, ["eval", str(folder), "--text", str(text), "--length", "16", "--against", str(folder)])
    assert out.exit_code == 0, out.output
    assert "length 16, stride 16" in out.output and "KL divergence 0.000000 nats, top-1 agreement 100.00 %" in out.output
    out = run(app, ["eval", str(folder), "--text", str(text), "--length", "16", "--schemes", "w8a16,w8a8_static",
                    "--calibration", str(text)])
    assert out.exit_code == 0 and [line.split()[0] for line in out.output.splitlines()] == ["scheme", "float32", "w8a16", "w8a8_static"]
    out = run(app, ["generate", str(folder), "abc", "--tokens", "5", "--quantize", "w8a8_dynamic"])
    assert out.exit_code == 0, out.output
    model = qfunc.load_model(folder, quantize="w8a8_dynamic")
    assert model.generate("abc", max_new_tokens=5) in out.output
    assert "".join(model.generate("abc", max_new_tokens=5, stream=True)) == model.generate("abc", max_new_tokens=5)
    bare = checkpoint(tmp_path / "bare", {}, config=json.loads((folder / "config.json").read_text()))
    (bare / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    out = run(app, ["eval", str(bare), "--text", str(text)])
    assert out.exit_code != 0 and "tokenizer.json" in str(out.exception)
