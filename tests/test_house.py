"""The house's rules that a program can check: short files, no import circles, docstrings that say what is done, and
one file for what is added.
"""

import ast
import gc
import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import i2am
from benchmarks import aot
from i2am.families import registry

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(p for room in ("i2am", "kernels", "benchmarks", "docs") for p in (ROOT / room).rglob("*.py"))
LONGEST = 400  # lines

QUESTIONS = {"what", "which", "how", "where", "whether", "why", "who", "whose", "when"}
NO_VERBS = {
    "the",
    "a",
    "an",
    "all",
    "every",
    "each",
    "this",
    "these",
    "that",
    "one",
    "no",
    "its",
    "their",
    "of",
    "in",
    "if",
}
VERBS_IN_S = {"address", "compress", "express", "focus", "pass", "process"}  # not "draws", not "names of the files"


def named(path):
    return path.relative_to(ROOT).as_posix()


def test_files_are_short():
    long = {named(p): n for p in SOURCES if (n := len(p.read_text(encoding="utf-8").splitlines())) > LONGEST}
    assert long == {}


# ------------------------------------------------------------------------------------------------------------ circles


def module_name(path):
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_when_loaded(tree):
    """Import statements that run with the module: not those of functions, nor those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imported_when_loaded(node)


def imports(tree, modules):
    """Modules among ``modules`` that loading this one loads by name."""
    found = set()
    for node in imported_when_loaded(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, "imports are absolute here"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in modules else node.module)
    return found & modules


def circles(graph):
    """Modules that reach themselves."""

    def reached(start):
        seen, waiting = set(), list(graph[start])
        while waiting:
            if (name := waiting.pop()) not in seen:
                seen.add(name)
                waiting += graph[name]
        return seen

    return sorted(name for name in graph if name in reached(name))


def test_no_import_circles():
    trees = {module_name(p): ast.parse(p.read_text(encoding="utf-8")) for p in SOURCES if p.parts[-2] != "docs"}
    graph = {name: imports(tree, trees.keys()) for name, tree in trees.items()}
    assert sum(map(len, graph.values())) > 100
    assert circles(graph) == []


def test_a_circle_is_found():
    sources = {"a": "import b", "b": "class B:\n    from c import x", "c": "import a", "d": "import a"}
    lazy = {"e": "def f():\n    import g", "g": "if TYPE_CHECKING:\n    import e\nelse:\n    import e"}
    trees = {name: ast.parse(text) for name, text in {**sources, **lazy}.items()}
    graph = {name: imports(tree, trees.keys()) for name, tree in trees.items()}
    assert circles(graph) == ["a", "b", "c"]


# --------------------------------------------------------------------------------------------------------- docstrings


def docstrings(path):
    """Yield (line, kind, first word) of every docstring of a function, method, property or class."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
            decorators = {ast.unparse(d).split(".")[-1] for d in node.decorator_list}
            shown = "property" if decorators & {"property", "cached_property"} else "function"
            kind = "class" if isinstance(node, ast.ClassDef) else shown
            yield node.lineno, kind, text.split()[0].rstrip("*,:;.")


def may_be_verb(word):
    """Tell whether a function's docstring may begin so: no formula, no abbreviation, no plural and no third person."""
    if not word.replace("-", "").isalpha() or word != word.capitalize() or word.lower() in NO_VERBS:
        return False
    return not word.endswith("s") or word.lower() in VERBS_IN_S


def riddles(path):
    """Return the docstrings that begin with a question word, and functions' that begin with no verb."""
    return [
        f"{named(path)}:{line}: {word}"
        for line, kind, word in docstrings(path)
        if word.lower() in QUESTIONS or (kind == "function" and not may_be_verb(word))
    ]


PACKAGE = [p for p in SOURCES if p.relative_to(ROOT).parts[0] in ("i2am", "kernels")]
ROOMS = sorted({p.parent for p in PACKAGE})


@pytest.mark.parametrize("room", ROOMS, ids=named)
def test_docstrings_start_with_a_verb(room):
    assert [line for path in PACKAGE if path.parent == room for line in riddles(path)] == []


def test_a_riddle_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "module.py"
    path.write_text(
        '''class A:
    """What it is."""
    @property
    def b(self):
        """The number."""
    def c(self):
        """The number."""
    def d(self):
        """Count."""
    def e(self):
        """``a + b``, summed."""
    def f(self):
        """Names of files."""
    def g(self):
        """SRAM of a region."""
'''
    )
    assert riddles(path) == [
        "module.py:1: What",
        "module.py:6: The",
        "module.py:10: ``a",
        "module.py:12: Names",
        "module.py:14: SRAM",
    ]


# -------------------------------------------------------------------------------------------- one file and its test

FAMILY = '''
from i2am.families import PipelineFacts
from i2am.families.joint import JointTransformer, Segment


class Pretend(JointTransformer):
    """``PretendTransformer``: 2×3 generated tokens, then 2×2 of the reference."""

    models = ("PretendTransformer",)
    attentions = ("PretendAttention",)
    pipelines = (PipelineFacts("PretendEdit*", "reference_image"),)

    def layout(self, given):
        return self.in_context(Segment(0, (2, 3)), [Segment(6, (2, 2))], 0, slice(0, 0), 10)
'''
KERNEL = """
import triton
import triton.language as tl

from i2am.kernels.tiles import Tiles, configuration


@triton.jit
def pretend_kernel(x, N, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + o, 0.0, mask=o < N)


def configurations(call):
    yield configuration("pretend", pretend_kernel, {"x": "*fp32", "N": "i32"}, {"BLOCK": 64}, Tiles(64, 64, 4, 2))
"""


@pytest.fixture
def one_more(tmp_path, monkeypatch):
    """A function that puts one more file into a room of the package, until the test ends."""
    added = []

    def add(room, name, text):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        package = importlib.import_module(room)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
        added.append((package, name))
        registry.families.cache_clear()

    yield add
    for package, name in added:
        if sys.modules.pop(f"{package.__name__}.{name}", None) is not None:
            delattr(package, name)
    monkeypatch.undo()
    registry.families.cache_clear()
    gc.collect()  # a family is found by its base class, which must no longer know it


class PretendAttention(torch.nn.Module):
    processor = None

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class PretendTransformer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = PretendAttention()

    def forward(self, hidden_states, timestep):
        return self.attn(hidden_states.unflatten(-1, (2, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)


def test_a_family_is_one_file(one_more):
    """Found, traced, and known to the command, by what stands in its file."""
    one_more("i2am.families", "pretend", FAMILY)
    model, x = PretendTransformer(), torch.randn(1, 10, 16, generator=torch.Generator().manual_seed(0))
    with i2am.patch_transformer(model, num_steps=1, time_groups=1) as tracer:
        model(x, torch.tensor([0.5]))
    heads = x.unflatten(-1, (2, -1)).transpose(1, 2).double()
    rows = (heads @ heads.mT / 8**0.5).softmax(-1)[:, :, :6, 6:]
    torch.testing.assert_close(tracer.maps().ulam("g2r"), rows.mean((1, 2)).reshape(1, 2, 2).float())
    pipeline = type("PretendEditPipeline", (), {"__call__": lambda self, prompt, reference_image: None})
    assert registry.reference_argument(pipeline) == "reference_image"


def test_a_family_is_forgotten():
    with pytest.raises(ValueError, match="does not know where PretendTransformer keeps its reference"):
        i2am.patch_transformer(PretendTransformer())


def test_a_kernel_is_one_file(one_more):
    """Found by what compiles every kernel for every target."""
    one_more("i2am.kernels", "pretend", KERNEL)
    found = aot.configurations(aot.TARGETS["sm_90"], ["fp16"], [64], ["plain"])
    assert "pretend fp16 d=64 plain" in {configuration.name for configuration in found}


def test_every_family_has_its_test():
    files = {kind.__module__.split(".")[-1] for kind in registry.families()}
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "families").glob("test_*.py")}
    assert len(files) >= 9
    assert files - tests == set(), "tests/families/test_<file>.py, from tests/helpers/families.py"
