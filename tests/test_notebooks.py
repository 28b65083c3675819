"""Every notebook runs as it stands, and its outputs are kept and small."""

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def _operators():
    import npu_host
    npu_host.host()


NEEDS = {"ascend": _operators}
"""What a notebook cannot run without; these skip where it is missing."""


@pytest.mark.filterwarnings("default")      # of Jupyter's own packages
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    NEEDS.get(path.stem, lambda: None)()
    notebook = nbformat.read(path, as_version=4)
    # From a folder of its own: the imports are those of a user, not of the checkout.
    nbclient.NotebookClient(notebook, timeout=600, startup_timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept_and_clean(path):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert path.stat().st_size < 300_000 and sum(bool(cell.outputs) for cell in cells) > len(cells) / 2
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type != "error" and output.get("name") != "stderr", output
    assert all(word not in path.read_text() for word in ("/tmp/", "/home/", "/root/"))


def test_there_are_notebooks():
    assert NOTEBOOKS
