"""The note of every field of every configuration: that it is complete, that it is current, and that what it does not list is told."""

import ast
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from checkpoints import DATA

import qfunc
from qfunc.interop import _fields
from qfunc.interop._detect import METHODS, family

ROOT = Path(__file__).parent.parent.parent
MODULES = sorted(set(METHODS.values()))
READERS = {"get": 1, "choice": 1, "boolean": 1, "section": 1, "sections": 1, "integer": 9, "group_size": 9, "strings": 9, "first": 9}
"""Methods of `Config`, and how many of their first arguments name fields."""


def documented(name):
    """Every field that the note has for a family, at the top and in sections."""
    found = family(name)
    return {**found.fields, **{field: text for fields in _fields.SECTIONS.get(found.name, {}).values() for field, text in fields.items()}}


def source(name):
    return (ROOT / "interop" / f"{name}.py").read_text()


def fields_read(name):
    """The field names that a reader's code asks its configurations for."""
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in READERS:
            owner = ast.unparse(node.func.value)
            if any(word in owner for word in ("tensors", "types", "TABLES", "ELEMENTS", "RULES", "dict", "readers")):
                continue
            for argument in node.args[: READERS[node.func.attr]]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield argument.value


@pytest.mark.parametrize("name", MODULES)
def test_whatever_a_reader_asks_for_is_in_the_note(name):
    assert set(fields_read(name)) <= set(documented(name))


@pytest.mark.parametrize("name", MODULES)
def test_whatever_the_note_calls_read_is_read(name):
    text = source(name) + "".join(source(other) for other in ("_detect", "_common", "_fields"))
    for field, what in documented(name).items():
        if what.startswith("read") and "<" not in field:
            assert f'"{field}"' in text, field


def test_the_note_is_current():
    spec = importlib.util.spec_from_file_location("format_fields", ROOT / "docs" / "format_fields.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.text() in (ROOT / "docs" / "formats.md").read_text(), "run python docs/format_fields.py"


@pytest.mark.parametrize("name", sorted(p.name for p in DATA.iterdir() if p.is_dir() and not p.name.startswith("gguf")))
def test_no_recorded_configuration_has_a_field_that_the_note_lacks(name):
    assert not [note for note in qfunc.interop.inspect(DATA / name).notes if "not known" in note]


@pytest.mark.parametrize(("name", "path"), [
    ("ct-w4a16-sym-g128", "config_groups/group_0/weights/novelty"), ("ct-w4a16-sym-g128", "config_groups/group_0/novelty"),
    ("ct-w4a16-sym-g128", "novelty"), ("quark-fp8", "global_quant_config/weight/novelty"), ("quark-fp8", "export/novelty"),
    ("autoround-mixed-4-8-16", "extra_config/model.layers.1.mlp.down_proj/novelty"),
    ("modelslim-quarot-online-w4a4", "metadata/quarot/novelty"),
    ("bnb-nf4", "novelty"),
])
def test_a_new_field_is_a_note_wherever_it_stands(tmp_path, name, path):
    folder = tmp_path / "a"
    shutil.copytree(DATA / name, folder)
    file = next(folder.glob("quant_model_description*.json"), folder / "config.json")
    data = json.loads(file.read_text())
    node = data if file.name != "config.json" else data["quantization_config"]
    *parents, last = path.split("/")
    for key in parents:
        node = node[key] if key in node else node.setdefault(next(iter(node)), {})
        node = node[0] if isinstance(node, list) else node
    node[last] = 3
    file.write_text(json.dumps(data))
    notes = " ".join(qfunc.interop.inspect(folder).notes)
    assert "not known" in notes and "novelty" in notes


def test_what_is_off_or_empty_needs_no_note():
    assert not list(_fields.unknown("gptq", {}, {"a": None, "b": [], "c": {}, "d": False}))
    assert list(_fields.unknown("gptq", {"dynamic": "read"}, {"dynamic": {"+:x": {"bits": 4, "novelty": 1}}})) == ["dynamic/+:x/novelty"]
