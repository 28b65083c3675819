"""Tuning tables and the tuner: what is looked up, what is searched, what is written. No GPU: the timer is made up."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import lowered
import pytest

import qfunc
from qfunc.kernels.triton import _image, _launch, _lowering, _model, _tables, tune
from qfunc.kernels.triton._launch import Config, Target
from qfunc.kernels.triton._tables import Row, Table

H200 = _model.DEVICES["NVIDIA H200"]
FORMAT = "dense/int4/g128/bfloat16"


@pytest.fixture(autouse=True)
def user(tmp_path, monkeypatch):
    monkeypatch.setenv("QFUNC_TRITON_TABLES", str(tmp_path / "tables"))
    monkeypatch.setenv("QFUNC_TRITON_CACHE", str(tmp_path / "cache"))
    _tables.reload()
    yield tmp_path / "tables"
    _tables.reload()


def table(rows, **fields):
    given = {"device": "NVIDIA H200", "target": "sm_90", "triton": "3.6.0", "sources": None, "provenance": "a test", "xla_from": {}}
    return Table(**{**given, **fields}, formats={FORMAT: tuple(rows)})


def row(m, n, k, us=None, **config):
    return Row(m, n, k, Config(**config), us)


@pytest.mark.parametrize("file", sorted(_tables.PACKAGE.glob("*.json")), ids=lambda f: f.stem)
def test_shipped_tables_are_whole_and_legal(file):
    found = _tables.read(file)
    assert found.dumps() == file.read_text() and found.provenance
    device, target = _model.DEVICES[found.device], Target.parse(found.target)
    assert device.target == found.target and file == tune.file_of(file.parent, found.device)
    # What was not measured says so.
    assert all(r.us is None for rows in found.formats.values() for r in rows) == ("nothing in it was measured" in found.provenance)
    calls = {}
    for scheme in tune.SCHEMES:
        for shape in (*tune.SHAPES, *tune.EXPERTS):
            for tokens in tune.TOKENS:
                call = tune.call_of(scheme, shape, tokens * (8 if shape in tune.EXPERTS else 1), found.target)
                calls[_tables.format_of(call), _tables.shape_of(call)] = call
    for name, rows in found.formats.items():
        assert len({(r.m, r.n, r.k) for r in rows}) == len(rows)
        for r in rows[::5]:
            call = calls[name, (r.m, r.n, r.k)]
            assert _launch.adapt(call, target, r.config) == r.config, (name, r)
            assert _lowering.planned(call).num_warps == r.config.num_warps


def test_nearest_tokens_then_nearest_shape():
    rows = [row(m, n, k, block_m=m) for m in (16, 64, 256) for n, k in ((4096, 4096), (24576, 4096), (4096, 12288))]
    asked = [table(rows)]
    for shape, m in (((1, 4096, 4096), 16), ((20, 4096, 4096), 16), ((32, 4096, 4096), 64), ((63, 4096, 4096), 64), ((5000, 1, 1), 256)):
        assert _tables.lookup(asked, FORMAT, shape).block_m == m, shape
    for (n, k), near in {(24576, 4096): (24576, 4096), (20000, 5000): (24576, 4096), (5120, 4096): (4096, 4096),
                         (5120, 25600): (4096, 12288)}.items():
        marked = [dataclasses.replace(r, config=Config(num_stages=2 if (r.n, r.k) == near else 5)) for r in rows]
        assert _tables.lookup([table(marked)], FORMAT, (16, n, k)).num_stages == 2
    assert _tables.lookup(asked, "dense/int3/g128/bfloat16", (1, 1, 1)) is None


@pytest.mark.parametrize(("n", "k", "split"), [(4096, 4096, 8), (4096, 8192, 8), (8192, 4096, 4), (16384, 4096, 2), (65536, 4096, 1),
                                               (2048, 4096, 16), (2048, 1024, 4), (4096, 256, 1)])
def test_splits_follow_the_number_of_programs(n, k, split):
    assert _tables.lookup([table([row(16, 4096, 4096, split_k=8)])], FORMAT, (16, n, k)).split_k == split


def test_no_split_stays_no_split():
    assert _tables.lookup([table([row(16, 65536, 4096)])], FORMAT, (16, 512, 4096)).split_k == 1


def test_the_users_table_and_the_devices_own_come_first(user):
    user.mkdir()
    own = table([row(16, 4096, 4096, num_stages=5)])
    (user / "mine.json").write_text(own.dumps())
    other = dataclasses.replace(own, device="NVIDIA H100 80GB HBM3")
    (user / "a_before_mine.json").write_text(other.dumps())
    found = _tables.tables("sm_90", "NVIDIA H200", user)
    assert found[0] == own and {t.target for t in found} == {"sm_90"}
    assert _tables.tables("sm_90", "NVIDIA H100 80GB HBM3", user)[0] == other
    call = tune.call_of("w4a16_g128", "4096x4096", 16, "sm_90")
    assert _tables.config(call, "sm_90").num_stages == 5


def test_other_devices_of_a_generation_share_a_table_whose_tiles_fit():
    assert {t.target for t in _tables.tables("sm_86", None, None)} == {"sm_89"}
    assert [t.target for t in _tables.tables("sm_80", None, None)] == ["sm_80", "sm_89"]
    assert [t.target for t in _tables.tables("sm_89", None, None)] == ["sm_89"] and not _tables.tables("sm_120", None, None)
    assert {t.target for t in _tables.tables("gfx950", None, None)} == {"gfx942"}


def test_a_format_that_no_table_knows_gets_the_formula():
    call = tune.call_of("w3a16_g128", "4096x4096", 16, "sm_90")
    assert _tables.config(call, "sm_90") == _launch.adapt(call, Target.parse("sm_90"), _launch.default_config(call, Target.parse("sm_90")))


@pytest.mark.parametrize(("change", "message"), [
    (lambda d: d.pop("provenance"), "expected the fields"), (lambda d: d.update(extra=1), "expected the fields"),
    (lambda d: d["columns"].reverse(), "expected the columns"), (lambda d: d["formats"][FORMAT][0].pop(), "expected 11 values"),
    (lambda d: d["formats"][FORMAT][0].__setitem__(3, 48), "row 0: expected a power of two as block_m, found 48"),
    (lambda d: d["formats"][FORMAT][0].__setitem__(6, 0), "row 0: expected a positive integer split_k, found 0")])
def test_a_faulty_table_is_refused_by_name(user, change, message):
    data = table([row(16, 4096, 4096)]).to_json()
    data = json.loads(json.dumps(data))
    change(data)
    user.mkdir()
    (user / "bad.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"bad.json.*{message}"):
        _tables.tables("sm_90", None, user)
    (user / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="bad.json: not JSON"):
        _tables.read(user / "bad.json")


@pytest.mark.parametrize(("scheme", "shape", "tokens"), [("w4a16_g128", "24576x4096", 1), ("w8a8_dynamic", "4096x4096", 4096),
                                                         ("fp8_block", "4096x12288", 64), ("mxfp4_a16", "128x1536x2048", 512)])
def test_candidates_are_legal_and_hold_the_formula(scheme, shape, tokens):
    call, target = tune.call_of(scheme, shape, tokens, "sm_90"), Target.parse("sm_90")
    found = tune.candidates(call, H200)
    own = _launch.adapt(call, target, _launch.default_config(call, target))
    assert own in found and len(found) == len(set(found)) <= 48
    times = [_model.predict(call, c, _launch.describe(call, target, c), H200) for c in found if c != own]
    assert times == sorted(times) and times[-1] <= tune.HOPELESS * times[0]
    assert all(_launch.adapt(call, target, c) == c for c in found)
    assert all(t >= _model.floor(call, H200) for t in times)


def test_the_search_finds_the_fastest_and_survives_faults():
    call = tune.call_of("w4a16_g128", "24576x4096", 16, "sm_90")
    configs, asked, said = tune.candidates(call, H200), [], []
    best = configs[17]

    def timer(call, config, repeats):
        asked.append((config, repeats))
        if config == configs[3]:
            raise RuntimeError("out of shared memory\nmore")
        return 1e-6 if config == best else 5e-6

    assert tune.search(call, configs, timer, report=said.append) == (best, 1e-6)
    assert [c for c, repeats in asked if repeats == 5] == configs and 3 <= sum(repeats == 50 for _, repeats in asked) <= 12
    assert len(said) == 1 and "out of shared memory" in said[0] and "more" not in said[0]


def test_a_tie_goes_to_the_models_favourite():
    call = tune.call_of("w4a16_g128", "24576x4096", 16, "sm_90")
    configs = tune.candidates(call, H200)
    found, _ = tune.search(call, configs, lambda call, config, repeats: 1.0 if config != configs[5] else 0.99)
    assert found == configs[0]


def test_a_deadline_ends_the_search():
    call, clock = tune.call_of("w4a16_g128", "24576x4096", 16, "sm_90"), iter(range(1000))
    asked = []
    found = tune.search(call, tune.candidates(call, H200), lambda call, c, r: asked.append(c) or float(len(asked)), 4, lambda: next(clock))
    assert len(asked) == 5 and found == (asked[0], 1.0)
    assert tune.search(call, [], lambda *a: 1.0) is None


def test_a_dry_run_writes_a_table_that_is_used(user, capsys):
    given = ["--dry-run", "--schemes", "w4a16_g128", "--shapes", "4096x4096,128x1536x2048", "--tokens", "1,64", "--out", str(user)]
    assert tune.main(given) == 0
    written = _tables.read(user / "nvidia_h200.json")
    assert written.sources == _image.fingerprint("qfunc.kernels.triton._dense") and "measured by" in written.provenance
    assert {(r.m, r.n, r.k) for r in written.formats[FORMAT] if r.us} == {(1, 4096, 4096), (64, 4096, 4096)}
    assert all(r.us > 0 for r in written.formats["grouped/int4/g128/bfloat16"] if (r.n, r.k) == (1536, 2048) and r.m == 1)
    # Rows that were not measured stay as they were.
    before = _tables.read(_tables.PACKAGE / "nvidia_h200.json")
    assert [r for r in written.formats["dense/nf4/g64/bfloat16"]] == list(before.formats["dense/nf4/g64/bfloat16"])
    call = tune.call_of("w4a16_g128", "4096x4096", 64, "sm_90")
    measured = next(r for r in written.formats[FORMAT] if (r.m, r.n) == (64, 4096) and r.us)
    assert _tables.config(call, "sm_90") == measured.config
    assert tune.main(given) == 0 and _tables.read(user / "nvidia_h200.json").provenance == written.provenance
    assert "of the bound" in capsys.readouterr().out


def test_a_table_that_is_written_is_used_for_calls_that_were_lowered_before(user, monkeypatch):
    q = jax.eval_shape(lambda: qfunc.quantize({"kernel": jnp.ones((512, 64))}, "w4a16_g128")["kernel"])

    def lower():
        return lowered.lower(lambda x, q: qfunc.matmul(x, q), jax.ShapeDtypeStruct((4, 512), jnp.bfloat16), q)

    written = _image.write                                      # what lowers without compiling keeps nothing on disk
    with lowered.without_compiling(monkeypatch):
        before = lower()
        assert lower() == before
        monkeypatch.setattr(_image, "write", written)
        tune.write(table([row(4, 64, 512, 1.0, block_n=32, num_warps=8)]), user)
        assert lower() != before


def test_without_a_gpu_the_tuner_says_so(capsys, monkeypatch):
    monkeypatch.delenv("QFUNC_CUDA_CAPABILITY", raising=False)
    assert tune.main([]) == 1 and "no GPU is here" in capsys.readouterr().err


def test_a_spent_budget_keeps_what_there_is():
    said, before = [], table([row(16, 4096, 4096)])
    after = tune.tune(before, H200, tune.fake_timer(H200), ["w4a16_g128"], ["4096x4096"], [1, 16], 0.0, said.append)
    assert after.formats == before.formats and "2 of 2" in said[0]


def test_seeds_are_those_that_ship():
    device = _model.DEVICES["NVIDIA H200"]
    made = tune.seeded(device, "3.6.0", ("w4a16_g128",), ("4096x4096",), (1, 64))
    shipped = _tables.read(_tables.PACKAGE / "nvidia_h200.json")
    assert set(made.formats[FORMAT]) <= set(shipped.formats[FORMAT]) and made.xla_from.items() <= shipped.xla_from.items()


def test_the_model_knows_what_cannot_be_beaten():
    one = tune.call_of("w4a16_g128", "24576x4096", 1, "sm_90")
    assert _model.floor(one, H200) * 1e6 == pytest.approx(12.3, abs=0.4)           # 4.25 bits at 4.3 TB/s
    many = tune.call_of("w8a8_dynamic", "24576x4096", 2048, "sm_90")
    assert _model.floor(many, H200) * 1e6 == pytest.approx(261, abs=2)             # arithmetic at 1580 T/s
