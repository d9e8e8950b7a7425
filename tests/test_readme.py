"""The Python of README.md and of the guides runs as it stands, with small networks in place of large ones."""

import re
from pathlib import Path

import pytest
import torch

from hyperfast import models

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def _no_network(url, dst):
    """What the zoo would send, of the small network that stands for the one it has."""
    assert url.endswith(f"/resnet/{dst}")
    torch.save(models.create("resnet8", num_classes=100, shortcut="B").state_dict(), dst)


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    if "digits" in page.read_text() and page.stem == "distillation":
        pytest.importorskip("sklearn")
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "download_url_to_file", _no_network)
    torch.manual_seed(0)
    code = "\n".join(BLOCK.findall(page.read_text())).replace('"resnet20"', '"resnet8"')
    exec(compile(code, str(page), "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert pages and not [page for page in pages if f": {page}" not in navigation]
