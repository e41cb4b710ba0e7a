"""Run notebooks from their first cell to their last, each in an empty folder, and write them back with their outputs.

Usage: python scripts/execute_notebooks.py NOTEBOOK... [--output FOLDER]

With `--output` they are written there instead. Paths of this machine in what cells print become `.` (the folder a
notebook ran in) and `~`. A cell that fails ends it all with status 1, and its notebook stays as it was.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

CELL_SECONDS = 900
"""A cell may take so long, on a machine that has other work too."""


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs.

    Raises:
        CellExecutionError: of the cell that failed.
    """
    notebook = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as folder:
        place = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=CELL_SECONDS, resources=place, coalesce_streams=True).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if "text" in output:
                output["text"] = output["text"].replace(folder, ".").replace(str(Path.home()), "~")
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description="Run notebooks, each in an empty folder, and keep their outputs.")
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, help="the folder for the notebooks with outputs")
    asked = parser.parse_args()
    # Cells that call `efficient-lm` find the one of this Python.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for path in asked.notebooks:
        began = time.monotonic()
        try:
            notebook = executed(path)
        except CellExecutionError as error:
            sys.exit(f"error: {path}: {error}")
        written = (asked.output or path.parent) / path.name
        nbformat.write(notebook, written)
        print(f"{written}: {time.monotonic() - began:.0f} s, {written.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
