# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""Runs examples/bagel.ipynb and keeps what it printed and drew in it: `python scripts/notebook.py`."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode


NOTEBOOK = Path(__file__).parents[1] / "examples" / "bagel.ipynb"
# A cell that takes longer hangs.
TIMEOUT = 600


def run(notebook: NotebookNode) -> NotebookNode:
    """The same notebook with the outputs of a run where it lies, less what libraries say about the machine."""
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    done = NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", resources=where, record_timing=False
    ).execute()
    for cell in done.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                # Each picture is there as PNG, too.
                output.get("data", {}).pop("image/jpeg", None)
    return done


def main() -> None:
    done = run(nbformat.read(NOTEBOOK, as_version=4))
    # What is installed here is nobody's business.
    done.metadata.language_info = {"name": "python"}
    nbformat.write(done, NOTEBOOK)


if __name__ == "__main__":
    main()
