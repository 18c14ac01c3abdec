"""The notebooks run from top to bottom, in a kernel of their own, and say what they promise."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")
pytest.importorskip("torch")

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
LINES = {
    "colab": ("Answer: London", "passed: True against the checkpoint's own code", "compared: fixed 2."),
    "quickstart": ("certified: True", " London", "NumPy and the engine agree: True", "layer 0 is the tiled code: True"),
    "studies": ("V = 4,096, K = 12", "random A and b", "affine bits of ids"),
}


def test_every_notebook_is_run() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == LINES.keys()


@pytest.mark.external
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LINES)
def test_notebook(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIXMIN_CACHE", str(tmp_path / "cache"))
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOKS)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    for line in LINES[name]:
        assert line in text
    assert any("image/png" in output.get("data", {}) for output in outputs)
