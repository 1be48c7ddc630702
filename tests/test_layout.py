"""The house rules that a machine can read: floors, forbidden calls, sizes, and the heart's line count."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

FLOORS = {"data": 1, "model": 2, "training": 3, "lora": 3, "eval": 4, "stages": 5, "train": 6, "bench": 7, "tests": 8}
HEART = [
    "train.py", "model/family.py", "model/attention.py", "model/head.py", "model/checkpointing.py", "model/shards.py",
    "model/quantize.py", "data/labels.py", "data/batches.py", "lora/merge.py", "training/precision.py",
    "training/checkpoint.py",
]  # fmt: skip
HEART_LINES = 1665  # that are not blank
FILE_LINES, FUNCTION_LINES, NESTING = 400, 65, 4

SOURCES = sorted(p for p in ROOT.rglob("*.py") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts))
OURS = [p for p in SOURCES if p.relative_to(ROOT).parts[0] != "tests"]
named = pytest.mark.parametrize("path", OURS, ids=lambda p: str(p.relative_to(ROOT)))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def package_of(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def floor_of(path: Path) -> int:
    return 6 if path.name == "__main__.py" else FLOORS[package_of(path)]


def imports(tree: ast.Module) -> set[str]:
    """First parts of every module that a file imports, lazily or not, for type checking or not."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor"
            found.add(node.module.split(".")[0])
    return found


def edges(path: Path, tree: ast.Module) -> list[str]:
    """The imports of a file that its floor does not allow."""
    here, floor = package_of(path), floor_of(path)
    return [name for name in imports(tree) if name in FLOORS and name != here and FLOORS[name] >= floor]


@named
def test_imports_go_down(path):
    assert package_of(path) in FLOORS, f"{path}: on no floor; a new folder needs one in DESIGN"
    assert edges(path, parse(path)) == []


def test_the_rule_finds_what_goes_up():
    tree = ast.parse("def f():\n    from lora.merge import merge\n    import stages.sft\n    import torch, data.errors")
    assert sorted(edges(ROOT / "training" / "x.py", tree)) == ["lora", "stages"]
    assert edges(ROOT / "training" / "__main__.py", tree) == []
    assert edges(ROOT / "eval" / "x.py", tree) == ["stages"]


# ---- forbidden calls ------------------------------------------------------------------------------------------------

FORBIDDEN_NAMES = {"eval", "exec"}
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system"}
FORBIDDEN_KEYWORDS = {"trust_remote_code": True, "shell": True, "weights_only": False, "allow_pickle": True}


def dotted(node: ast.expr) -> str:
    """a.b.c of an attribute, a of a name, else an empty string."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def forbidden(tree: ast.Module) -> list[str]:
    """What style and safety forbid in a file, with its lines."""
    found = [f"import of {name}" for name in imports(tree) & FORBIDDEN_MODULES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in FORBIDDEN_NAMES | FORBIDDEN_CALLS:
                found.append(f"{node.lineno}: {name}(")
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if keyword.arg in FORBIDDEN_KEYWORDS and value is FORBIDDEN_KEYWORDS[keyword.arg]:
                    found.append(f"{node.lineno}: {keyword.arg}={value}")
        elif isinstance(node, ast.ExceptHandler):
            is_silent = all(isinstance(s, ast.Pass) for s in node.body)
            if node.type is None or is_silent and dotted(node.type) in ("Exception", "BaseException"):
                found.append(f"{node.lineno}: an except that hides everything")
        elif isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [f"{node.lineno}: MAX_IMAGE_PIXELS" for t in targets if dotted(t).endswith("MAX_IMAGE_PIXELS")]
    return found


@named
def test_no_forbidden_call(path):
    assert forbidden(parse(path)) == []


@pytest.mark.parametrize(
    "line",
    ["torch.load(p)", "import pickle", "eval('1')", "exec(code)", "f(trust_remote_code=True)", "yaml.load(s)",
     "run(c, shell=True)", "Image.MAX_IMAGE_PIXELS = None", "try:\n    f()\nexcept:\n    pass",
     "try:\n    f()\nexcept Exception:\n    pass"],
)  # fmt: skip
def test_the_rule_finds_each_forbidden_call(line):
    assert len(forbidden(ast.parse(line))) == 1
    allowed = "model.eval()\nload_tokenizer(f, trust_remote_code=flag)\ntry:\n    f()\nexcept OSError:\n    pass"
    assert forbidden(ast.parse(allowed)) == []


@named
def test_sources_are_ascii_and_name_no_machine(path):
    text = path.read_text(encoding="utf-8")
    assert text.isascii(), [line for line in text.splitlines() if not line.isascii()][:3]
    assert not re.search(r"(?<![\w.])/(work|farm|tmp)/", text)


# ---- sizes ----------------------------------------------------------------------------------------------------------


def depth(node: ast.AST, outer: int = 0) -> int:
    """The deepest nesting of blocks below a node; an elif is no level of its own."""
    deepest = outer
    for child in ast.iter_child_nodes(node):
        is_block = isinstance(child, (ast.If, ast.For, ast.While, ast.With, ast.Try))
        is_elif = isinstance(node, ast.If) and node.orelse == [child]
        deepest = max(deepest, depth(child, outer + (is_block and not is_elif)))
    return deepest


@named
def test_sizes(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= FILE_LINES
    for node in ast.walk(parse(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= FUNCTION_LINES, node.name
            assert depth(node) <= NESTING, node.name


@named
def test_every_file_says_what_it_is(path):
    text = path.read_text(encoding="utf-8")
    assert not text.strip() or ast.get_docstring(parse(path)), "a module docstring: what, why this way, what it costs"


def test_the_heart_is_read_in_one_sitting(capsys):
    lines = {name: sum(map(bool, map(str.strip, (ROOT / name).read_text().splitlines()))) for name in HEART}
    with capsys.disabled():
        print(f"\nthe heart: {sum(lines.values())} lines (" + ", ".join(f"{n} {k}" for k, n in lines.items()) + ")")
    assert sum(lines.values()) <= HEART_LINES
