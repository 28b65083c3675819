"""The six dialects of layer lists, and regular expressions that want to run for ever."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qfunc.interop._match import DIALECTS, find, find_fused
from qfunc.interop._regex import RegexError, _Matcher, _parser, matches

LAYER = "model.layers.3.self_attn.q_proj"


@pytest.mark.parametrize(("dialect", "entry", "name", "yes"), [
    ("contains", "lm_head", "lm_head", True), ("contains", "mlp.gate", "model.layers.0.mlp.gate", True),
    ("contains", "mlp.gate", "model.layers.0.mlp.gate_proj", False), ("contains", "model.layers.*.self_attn", LAYER, True),
    ("contains", "self_attn", LAYER, True), ("contains", "attn", LAYER, False), ("contains", "layers.3", LAYER, True),
    ("contains", "layers.3", "model.layers.30.mlp", False),
    ("star", "model.layers.3*", LAYER, True), ("star", "*q_proj", LAYER, True), ("star", "q_proj", LAYER, False),
    ("star", "model.layers.[0-9].*", LAYER, False), ("star", "layers.3.self_attn.q_proj", LAYER, True),
    ("target", LAYER, LAYER, True), ("target", "Linear", LAYER, True), ("target", "Embedding", LAYER, False),
    ("target", r"re:.*self_attn.*_proj$", LAYER, True), ("target", r"re:self_attn", LAYER, False), ("target", "re:.*mlp.*", LAYER, False),
    ("target", "language_model.layers.3.self_attn.q_proj", LAYER, False),
    ("glob", "*q_proj", LAYER, True), ("glob", "model.layers.[0-9].*", LAYER, True), ("glob", "lm_head", LAYER, False),
    ("signed", r"-:.*q_proj", LAYER, True), ("signed", r"+:model\.layers\.3\..*", LAYER, True), ("signed", r".*k_proj", LAYER, False),
    ("extra", LAYER, LAYER, True), ("extra", r".*layers\.3.*", LAYER, True), ("extra", "layers.3.self_attn", LAYER, False),
    ("extra", r"layers", LAYER, False),
])
def test_dialects(dialect, entry, name, yes):
    assert (find([entry], name, dialect) is not None) == yes


def test_prefixes_may_be_absent_on_either_side():
    assert find(["layers.0.mlp"], "model.layers.0.mlp", "glob") == "layers.0.mlp"
    assert find(["model.layers.0.mlp"], "language_model.model.layers.0.mlp", "star")
    assert find(["model.layers.0.mlp"], "model.language_model.layers.0.mlp", "target")


def test_a_fused_layer_is_named_by_all_of_its_parts():
    parts = [f"a.{p}_proj" for p in "qkv"]
    assert find_fused(parts, "a.qkv_proj", "glob") and not find_fused([], "a.qkv_proj", "glob")
    assert find_fused(["a.qkv_proj"], "a.qkv_proj", "glob")
    with pytest.raises(ValueError, match="only q_proj"):
        find_fused(parts[:1], "a.qkv_proj", "glob")


@pytest.mark.parametrize("pattern", ["(a+)+$", "((a*)*)*b", "(a|aa)+$", "(.*a){20}", ".*.*.*.*.*.*.*.*x", r"(\w+\.?)+!", "(a?){50}a{50}b"])
def test_no_pattern_takes_long(pattern):
    start = time.process_time()
    matches(pattern, "a" * 300 + "!?")
    assert time.process_time() - start < 2


@pytest.mark.parametrize("pattern", ["(", "a{2", "[z-a]", "(?P<x>a)(?P=x)(b+)+", "a" * 3000, "(?i:(a+)+)b(c*)*", "*"])
def test_bad_patterns_are_an_error_or_match_as_re(pattern):
    try:
        got = matches(pattern, "abc")
    except RegexError:
        return
    assert got == (re.match(pattern, "abc") is not None)


NODES = st.recursive(st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", "$", "^", r"\b", "(?!a)", "(?=b)"]),
                     lambda inner: st.one_of(
                         st.lists(inner, min_size=1, max_size=3).map("".join), st.tuples(inner, inner).map("(?:%s|%s)".__mod__),
                         inner.map("(?:%s)*".__mod__), inner.map("(?:%s)+?".__mod__), inner.map("(?:%s){1,3}".__mod__)), max_leaves=6)


@settings(max_examples=300)
@given(NODES, st.text("ab.1", max_size=8))
def test_the_matcher_agrees_with_re(pattern, name):
    tree = _parser.parse(pattern)
    assert _Matcher(name).accepts(tree, False) == (re.match(pattern, name) is not None)
    assert _Matcher(name).accepts(tree, True) == (re.fullmatch(pattern, name) is not None)


def test_every_dialect_is_tested():
    assert set(DIALECTS) == {"contains", "star", "target", "glob", "signed", "extra"}
