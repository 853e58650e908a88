"""The notebook of docs runs from its first cell to its last, as a new user runs it."""

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.long
def test_the_tour_runs_from_prepare_to_pytorch(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="runs notebooks: pip install '.[test]'")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("transformers", reason="the tour ends in it")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    printed = [
        "".join(str(part.get("text", part.get("data", ""))) for part in cell.get("outputs", []))
        for cell in notebook.cells
    ]
    assert not [text for text in printed if "error: " in text]
    losses = [float(loss) for text in printed for loss in re.findall(r"step \d+: held-out loss ([\d.]+)", text)]
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)
    assert "The aim of this study was" in printed[-2]
