"""The host of torch_npu's operators: what it loads, what it refuses, and what it leaves behind."""

import importlib.util
import zipfile

import npu_host
import pytest

torch = pytest.importorskip("torch")


def test_every_schema_and_every_meta_function_is_registered():
    host = npu_host.host()
    assert (len(host.schemas), len(host.metas)) == (428, 248)
    assert importlib.util.find_spec("torch_npu") is None            # nothing that asks for torch_npu may believe it is here


def test_torchs_own_functions_stay_its_own():
    npu_host.host()
    x, w = torch.empty(1, 3, 8, 8, device="meta"), torch.empty(4, 3, 3, 3, device="meta")
    assert torch.nn.functional.conv2d(x, w).shape == (1, 4, 6, 6)


def test_a_meta_function_judges():
    npu_host.host()
    x, w = torch.empty(16, 512, dtype=torch.bfloat16, device="meta"), torch.empty(512, 256, dtype=torch.int8, device="meta")
    scale = torch.empty(256, dtype=torch.bfloat16, device="meta")
    codes, per_token = torch.ops.npu.npu_dynamic_quant(x)
    assert codes.dtype == torch.int8 and per_token.shape == (16,)
    y = torch.ops.npu.npu_quant_matmul(codes, w, scale, pertoken_scale=per_token, output_dtype=torch.bfloat16)
    assert y.shape == (16, 256) and y.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="scale"):
        torch.ops.npu.npu_quant_matmul(codes, w, scale[:, None], pertoken_scale=per_token, output_dtype=torch.bfloat16)


@pytest.mark.parametrize("held, reason", [({}, "holds no"), ({name: b"x" for name in npu_host.PINNED}, "differ")])
def test_another_wheel_is_refused(held, reason, tmp_path, monkeypatch):
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in held.items():
            archive.writestr(name, text)
    monkeypatch.setenv("QFUNC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("QFUNC_TORCH_NPU_WHEEL", str(wheel))
    with pytest.raises(npu_host.Unavailable, match=reason):
        npu_host.files()


def test_a_wheel_at_hand_is_used_and_kept(tmp_path, monkeypatch):
    npu_host.host()
    source = npu_host.files()
    wheel = tmp_path / "given.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in npu_host.PINNED:
            archive.write(source / name, name)
    monkeypatch.setenv("QFUNC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("QFUNC_TORCH_NPU_WHEEL", str(wheel))
    kept = npu_host.files()
    wheel.unlink()
    assert kept == npu_host.files() and kept.is_relative_to(tmp_path)
