"""Every notebook runs in an empty folder from its first cell to its last, and draws something."""

import subprocess
import sys
from pathlib import Path
from tempfile import gettempdir

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SCRIPT = [sys.executable, str(ROOT / "scripts" / "execute_notebooks.py")]


def cells_of(path):
    nbformat = pytest.importorskip("nbformat")
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def said(cells):
    return "".join(output.get("text", "") for cell in cells for output in cell.outputs)


def pictures(cells):
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)


def test_there_are_five():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_is_kept_with_its_outputs_and_without_what_a_machine_is_called(path):
    cells = cells_of(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)) and pictures(cells)
    assert not any(word in path.read_text() for word in ("Traceback", str(Path.home()), gettempdir(), "\\u001b"))
    assert path.stat().st_size < 5e5


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_runs_through(path, tmp_path, monkeypatch):
    pytest.importorskip("nbclient")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    subprocess.run([*SCRIPT, str(path), "--output", str(tmp_path)], check=True)
    cells = cells_of(tmp_path / path.name)
    # Without the compilers for accelerators the last one has nothing to draw.
    assert pictures(cells) or "the package" in said(cells)
    assert "Traceback" not in said(cells) and "error: could not" not in said(cells)


def test_a_cell_that_fails_leaves_the_notebook_as_it_was(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    path = tmp_path / "a.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    done = subprocess.run([*SCRIPT, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and path.read_bytes() == before
