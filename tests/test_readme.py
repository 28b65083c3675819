"""The README's Python runs as it stands, and its table of schemes is what the command prints."""

import importlib.util
import re
from pathlib import Path

import pytest

import qfunc

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_ten_lines_run(capsys):
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "params = {" in block)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert float(printed.split()[0]) < 0.2
    assert "w4a16_g128" in printed and "quantized_matmul" in printed


def test_the_table_of_schemes_is_current():
    spec = importlib.util.spec_from_file_location("scheme_table", ROOT / "docs" / "scheme_table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    told = dict(re.findall(r"^\| `(\w+)` \|.*\| ([\d.]+) \| [\d.]+% \|$", README, re.M))
    assert list(told) == list(table.ROWS)
    for name in told:
        assert qfunc.schemes[name].name == name


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([\w/.]+)\)", README))))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()
