"""The documentation: its code runs, its commands parse, its pages build. Notebooks: test_notebooks.py."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from i2am import zoo
from i2am.cli import build_parser
from i2am.evaluate import read_manifest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
NOT_RUN = "<!-- not run:"
BLOCK = re.compile(rf"({NOT_RUN}[^\n]*\n)?```(\w+)\n(.*?)```", re.S)


def blocks(page, language):
    """(text, whether to run it) of the code blocks of a page."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [(text, not mark) for mark, name, text in found if name == language]


def named(path):
    return str(path.relative_to(ROOT / "docs"))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=named)
def test_code_runs(page, tmp_path, monkeypatch, one_thread):
    """Block after block in one namespace, as a reader would type them."""
    code = [text for text, run in blocks(page, "python") if run]
    for name in re.findall(r'zoo\.load\("(\w+)"\)', "".join(code)):
        if not (zoo.WEIGHTS / f"{name}.safetensors").exists():
            pytest.skip(f"the zoo has no weights of {name} yet")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for number, text in enumerate(code, 1):
        exec(compile(text, f"{page.name}, block {number}", "exec"), namespace)


def test_a_fresh_process_has_every_name():
    """What other tests have imported doesn't help: after `import i2am`, each `i2am.…` of the pages is there."""
    code = "".join(text for page in [*PAGES, ROOT / "README.md"] for text, _ in blocks(page, "python"))
    code = re.sub(r"(import|from) i2am[^\n]*", "", code)  # a from-import finds modules by itself
    names = sorted(set(re.findall(r"\bi2am(?:\.\w+)+", code)))
    assert "i2am.plot.summary" in names
    names = [name for name in names if "zoo" not in name]  # slow to import; the pages' code runs it
    code = f"import i2am; i2am.__dir__().index('zoo'); [eval(name) for name in {names!r}]"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_code_that_is_not_run_compiles(page):
    for text, _ in blocks(page, "python"):
        compile(text, page.name, "exec")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_code_fits_the_page(page):
    """Beside both columns of navigation there is room for 88 characters; what is longer hides behind a scroll bar."""
    for text, _ in [*blocks(page, "python"), *blocks(page, "bash")]:
        assert [line for line in text.splitlines() if len(line) > 88] == []


def test_manifests_are_manifests(tmp_path):
    found = [text for page in PAGES for text, _ in blocks(page, "csv")]
    assert found
    for text in found:
        (tmp_path / "manifest.csv").write_text(text)
        read_manifest(tmp_path / "manifest.csv")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda p: p.name)
def test_commands_parse(page):
    """Every `i2am …` line has options that exist, and values that they take."""
    for text, _ in blocks(page, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "i2am" not in words or words[0] not in ("i2am", "accelerate", "python"):
                continue
            build_parser().parse_args(words[words.index("i2am") + 1 :])


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    missing = [named(p) for p in PAGES if f": {named(p)}\n" not in navigation]
    assert missing == []


def test_site_builds(tmp_path):
    """Strictly: a broken link, an unknown page or a name that the API does not have fails."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: pip install i2am[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    concepts = (tmp_path / "concepts" / "index.html").read_text(encoding="utf-8")
    assert "<math" in concepts
    assert "$" not in re.sub(r"<(script|style|code|pre).*?</\1>", "", concepts, flags=re.S)
    api = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert "i2am.AttributionMaps.sram" in api
    assert not re.search(r"(:class|:func|:meth|<p>::)", api)  # marks of reStructuredText
    assert not re.search(r'(src|href)="https?://[^"]*\.(js|css|woff2?)"', concepts)  # nothing is loaded from elsewhere
