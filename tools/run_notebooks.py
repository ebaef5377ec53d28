"""Run notebooks top to bottom and keep their outputs: python tools/run_notebooks.py [FILE ...].

Without a file it runs all of notebooks/ and notebooks/deeper/.
Progress bars redraw one line many times; only what remains of a line is kept. A notebook that
fails is left as it was.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbconvert.preprocessors import CoalesceStreamsPreprocessor, ExecutePreprocessor

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("notebooks", "notebooks/deeper")


def run(path):
    """Execute one notebook and write it back."""
    start = time.monotonic()
    notebook = nbformat.read(path, as_version=4)
    ExecutePreprocessor(timeout=900, record_timing=False).preprocess(
        notebook, {"metadata": {"path": str(path.parent)}}
    )
    CoalesceStreamsPreprocessor().preprocess(notebook, {})
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    beside = path.with_suffix(".running")
    nbformat.write(notebook, beside)
    os.replace(beside, path)
    print(f"{path.name}: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    every = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.ipynb"))]
    for name in sys.argv[1:] or every:
        run(Path(name).resolve())
