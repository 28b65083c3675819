"""The demonstration on a few schemes and sentences: its numbers, its page, its choice of schemes."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

import qfunc
from qfunc import _demo, _demo_page

NAMES = ["w8a16", "w4a16_g32", "w2a16", "w8a8_static", "w8a16+table", "w4a16_g256"]


@pytest.fixture(scope="module")
def demo():
    from qfunc.interop.encoder import load_encoder
    return _demo.measure(load_encoder(), NAMES, _demo.read_sentences()[:16], batches=(1, 7), rounds=1)


def test_numbers_make_sense(demo):
    rows = {row.name: row for row in demo.rows}
    assert list(rows) == NAMES[:-1]
    assert demo.sentences == 14 and all(row.cosines.shape == (14,) for row in rows.values())
    assert rows["w8a16"].error < 1e-3 < rows["w2a16"].error and rows["w8a16"].error < rows["w4a16_g32"].error < rows["w2a16"].error
    assert rows["w8a16"].bits == pytest.approx(8.06, abs=0.03) and rows["w4a16_g32"].bits == pytest.approx(5, abs=0.01)
    assert rows["w8a16+table"].nbytes < 24e6 < rows["w8a16"].nbytes < 60e6 < demo.float_row.nbytes
    assert rows["w8a16"].agreement >= 0.9 and demo.float_row.agreement == 1
    for row in [demo.float_row, *demo.rows]:
        assert row.milliseconds.keys() == {1, 7} and all(ms > 0 for ms in row.milliseconds.values())
    assert all(len(row.layers) == 36 and max(row.layers.values()) < 1.5 for row in demo.rows)
    assert np.mean(list(rows["w8a16"].layers.values())) < 0.02


def test_a_scheme_that_refuses_is_told_not_hidden(demo):
    assert list(demo.refused) == ["w4a16_g256"]
    assert "384" in demo.refused["w4a16_g256"] and "more)" in demo.refused["w4a16_g256"]
    assert "w4a16_g256" in _demo_page.page(demo)


def test_the_page_is_one_file_that_needs_nothing(demo):
    page = _demo_page.page(demo)
    assert all(row.name in page for row in demo.rows)
    assert not re.search(r"https?://|<link|src=|@import|url\(", page)
    assert "$" not in page and "nan" not in page.lower().replace("finance", "")
    drawings = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(drawings) == 2 + len(demo.rows)
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert page.count("<rect") == 36 * sum(not row.name.endswith("+table") for row in demo.rows)


def test_default_schemes_cover_the_families_and_fit():
    names = _demo.default_schemes([384, 1536])
    schemes = [qfunc.scheme(name.removesuffix(_demo.TABLE)) for name in names]
    assert {_demo.family(s) for s in schemes} == set(_demo.FAMILIES)
    assert 40 <= len(names) <= 70 and len(set(names)) == len(names)
    for wanted in ("w2a16", "w4a16_g128", "w4a16_g32", "w8a8_dynamic", "w8a8_static", "w8a8_block", "w4a8_dynamic", "w4a4_dynamic", "fp8",
                   "fp8_block", "mxfp8", "mxfp6", "mxfp4", "nvfp4", "nf4", "fp4_bnb", "w4afp8_g128", "llm_int8"):
        assert wanted in names
    assert not any("g256" in name or "actorder" in name for name in names)
    assert set(names) < set(_demo.default_schemes([384, 1536], everything=True))
    assert "w8a8_block" not in _demo.default_schemes([96])


def test_every_pattern_of_near_doubles_names_a_row():
    from fnmatch import fnmatchcase
    for pattern in _demo.NEAR_DOUBLES:
        assert any(fnmatchcase(name, pattern) for name in qfunc.schemes), pattern


@pytest.mark.slow
def test_capture_gives_the_inputs_of_the_matmuls():
    from qfunc.interop.encoder import load_encoder
    encoder = load_encoder()
    sentences = ["A short one.", "A sentence that is a good deal longer than that."]
    inputs = _demo.capture(encoder, sentences)
    ids, mask = encoder.tokenize(sentences)
    assert len(inputs) == 36 and {x.shape[0] for x in inputs.values()} == {int(mask.sum())}
    own = "encoder/layer/0/attention/self/"
    np.testing.assert_array_equal(inputs[own + "query/kernel"], inputs[own + "value/kernel"])
    statistics = qfunc.calibrate(encoder, encoder.params, [encoder.tokenize(sentences[1:])])
    longer = _demo.capture(encoder, sentences[1:])
    for path, x in longer.items():
        np.testing.assert_allclose(statistics[path].max, np.max(x, 0), rtol=1e-4, atol=1e-5)


def test_nearest_neighbour():
    rows = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]])
    assert _demo.nearest_neighbour(rows).tolist() == [1, 0, 3, 2]


def test_unknown_schemes_and_too_few_sentences(tmp_path):
    with pytest.raises(ValueError, match="w8a16"):
        _demo.measure(type("E", (), {"params": {}})(), ["w8a61"], ["a"] * 4)
    (tmp_path / "few.txt").write_text("# none\n\nonly one\n")
    with pytest.raises(ValueError, match="at least 4 sentences, found 1"):
        _demo.read_sentences(tmp_path / "few.txt")


def test_labels_never_overlap():
    rng = np.random.default_rng(0)
    points = [(f"scheme_{i}", float(x), float(y), i < 5) for i, (x, y) in enumerate(rng.uniform((64, 16), (976, 512), (60, 2)))]
    found = _demo_page.labels(points, (64, 976, 16, 512))
    areas = []
    for name, x, y, anchor, strong in found:
        width = _demo_page.LETTER * len(name) * (1.06 if strong else 1)
        start = x - {"start": 0, "middle": width / 2, "end": width}[anchor]
        areas.append((start, y - 10, start + width, y + 3))
    assert len(found) > 20
    assert not any(_demo_page._meet(a, b) for i, a in enumerate(areas) for b in areas[:i])
