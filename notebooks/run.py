"""``python -m notebooks.run [NAME …]``: executes the notebooks and stores what they show.

Outputs are kept as they are, but for what differs from run to run without meaning: counts, times, progress bars.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

FOLDER = Path(__file__).parent


def execute(path: Path, folder: str | Path):
    """Run a notebook in a kernel of its own, with ``folder`` as its working directory, and return it."""
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute()
    return notebook


def store(path: Path) -> Path:
    """Execute a notebook and write it back with its outputs."""
    import nbformat

    with TemporaryDirectory() as folder:
        notebook = execute(path, folder)
    for number, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
        cell.execution_count = number
        cell.metadata = {}
        cell.outputs = [x for x in cell.outputs if x.get("name") != "stderr"]
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = number
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, path)
    return path


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(p.stem for p in FOLDER.glob("*.ipynb")):
        print(f"stored: {store(FOLDER / f'{name}.ipynb')}", flush=True)
