"""The report against its own formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qfunc


@pytest.fixture(scope="module")
def trees():
    rng = np.random.default_rng(5)
    params = {"layer": {"up": {"kernel": jnp.asarray(rng.standard_normal((256, 192)), jnp.float32), "bias": jnp.zeros(192)},
                        "down": {"kernel": jnp.asarray(rng.standard_normal((192, 128)), jnp.bfloat16)}},
              "embed": {"weight": jnp.ones((10, 256))}, "steps": jnp.arange(3)}
    return params, qfunc.quantize(params, {"*/up/*": "w4a16_g64", "*": "w8a8_dynamic"})


def test_rows_follow_their_formulas(trees):
    params, q = trees
    report = qfunc.report(params, q)
    assert [row["path"] for row in report.rows] == ["layer/down/kernel", "layer/up/kernel"]
    for row in report.rows:
        part = row["path"].split("/")[1]
        w = np.asarray(params["layer"][part]["kernel"], np.float64)
        e = np.asarray(q["layer"][part]["kernel"].dequantize(jnp.float32), np.float64) - w
        relative = np.linalg.norm(e) / np.linalg.norm(w)
        assert row["shape"] == w.shape and row["scheme"] == q["layer"][part]["kernel"].scheme.name
        assert row["relative_error"] == pytest.approx(relative, rel=1e-4)
        assert row["sqnr_db"] == pytest.approx(-20 * np.log10(relative), abs=1e-3)
        assert row["max_abs_error"] == pytest.approx(np.abs(e).max(), rel=1e-4)
        assert row["bytes_after"] == q["layer"][part]["kernel"].nbytes
        assert row["bits_per_weight"] == pytest.approx(8 * row["bytes_after"] / w.size)
    assert [row["bytes_before"] for row in report.rows] == [2 * 192 * 128, 4 * 256 * 192]


def test_totals_and_what_was_kept(trees):
    params, q = trees
    report = qfunc.report(params, q)
    assert {row["path"]: row["notable"] for row in report.kept} == {"layer/up/bias": False, "embed/weight": True, "steps": False}
    assert all(row["reason"] for row in report.kept)
    before = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(params))
    t = report.totals
    saved = sum(r["bytes_before"] - r["bytes_after"] for r in report.rows)
    assert t["bytes_before"] == before and t["bytes_after"] == before - saved
    errors = [(r["relative_error"] * r["norm"], r["norm"]) for r in report.rows]
    assert t["relative_error"] == pytest.approx(np.linalg.norm([e for e, _ in errors]) / np.linalg.norm([n for _, n in errors]))


def test_output_error(trees):
    params, q = trees
    x = np.random.default_rng(6).standard_normal((2, 7, 256)).astype(np.float32)
    (row,) = [r for r in qfunc.report(params, q, batch={"layer/up/kernel": x}).rows if "output_error" in r]
    w = np.asarray(params["layer"]["up"]["kernel"], np.float64)
    want = x @ w
    got = x @ np.asarray(q["layer"]["up"]["kernel"].dequantize(jnp.float32), np.float64)
    assert row["output_error"] == pytest.approx(np.linalg.norm(got - want) / np.linalg.norm(want), rel=1e-3)
    with pytest.raises(ValueError, match="layer/up/kernel.*256.*255"):
        qfunc.report(params, q, batch={"layer/up/kernel": x[..., :255]})
    with pytest.raises(ValueError, match="layer/upp/kernel is no quantized weight.*layer/up/kernel"):
        qfunc.report(params, q, batch={"layer/upp/kernel": x})


def test_trees_must_match(trees):
    params, q = trees
    with pytest.raises(ValueError, match="steps: only in one"):
        qfunc.report({k: v for k, v in params.items() if k != "steps"}, q)
    other = {**params, "layer": {**params["layer"], "down": {"kernel": jnp.ones((128, 192))}}}
    with pytest.raises(ValueError, match=r"layer/down/kernel.*128, 192.*192, 128"):
        qfunc.report(other, q)


def test_extremes_do_not_break_the_numbers():
    w = {"a": {"kernel": jnp.zeros((128, 8))}, "b": {"kernel": jnp.full((128, 8), 1e-30)}, "c": {"kernel": jnp.full((128, 8), 1e30)}}
    rows = {r["path"]: r for r in qfunc.report(w, qfunc.quantize(w, "w8a16")).rows}
    assert rows["a/kernel"]["relative_error"] == 0 and rows["a/kernel"]["sqnr_db"] == np.inf
    assert rows["b/kernel"]["relative_error"] < 0.01 and rows["c/kernel"]["relative_error"] < 0.01


def test_a_weight_that_is_no_number_shows_in_every_error(rng):
    w = {"kernel": jnp.asarray(rng.standard_normal((512, 96)), jnp.float32)}
    q = qfunc.quantize(w, "w8a16")
    row = qfunc.report({"kernel": w["kernel"].at[300, 61].set(jnp.nan)}, q).rows[0]
    assert np.isnan(row["relative_error"]) and np.isnan(row["max_abs_error"])


def test_an_exact_format_has_no_error():
    w = {"kernel": jnp.asarray(np.random.default_rng(1).integers(-7, 8, (128, 64)), jnp.float32).at[0].set(7)}
    report = qfunc.report(w, qfunc.quantize(w, "w4a16"))
    assert report.rows[0]["relative_error"] == 0 and "inf" in str(report)


def test_text_and_html(trees):
    report = qfunc.report(*trees)
    text = str(report)
    assert text == repr(report)
    assert all(part in text for part in ("layer/up/kernel", "w4a16_g64", "256 x 192", "kept: embed/weight ('embed' is left", "smaller"))
    page = report._repr_html_()
    assert "w8a8_dynamic" in page and page.count("<tr>") == 3
    many = {f"l{i}": {"kernel": jnp.ones((32, 8))} for i in range(40)}
    report = qfunc.report(many, qfunc.quantize(many, "w8a16"))
    assert "16 more" in repr(report) and "more" not in str(report) and len(str(report).splitlines()) > 40
    assert "0 weights" in str(qfunc.report({"b": jnp.ones(3)}, {"b": jnp.ones(3)}))


def test_plot(trees):
    pytest.importorskip("matplotlib").use("Agg")
    figure = qfunc.report(*trees, batch={"layer/up/kernel": np.ones((3, 256), np.float32)}).plot()
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert labels == ["layer/down/kernel", "layer/up/kernel"]


def test_modules_of_other_libraries():
    equinox = pytest.importorskip("equinox")
    model = equinox.nn.MLP(64, 32, 128, 1, key=jax.random.key(0))
    report = qfunc.report(model, qfunc.quantize(model, "w4a16_g32"), batch={"layers/0/weight": jnp.ones((3, 64))})
    assert [row["shape"] for row in report.rows] == [(128, 64), (32, 128)] and 0 < report.rows[0]["output_error"] < 0.3
    assert [row["path"] for row in report.kept] == ["layers/0/bias", "layers/1/bias"] and report.totals["bytes_kept"] == 4 * 160
