"""The rules of the code that a reader cannot check by eye: who may import whom, where CUDA is named, what no file may do.

Everything is read from the syntax trees; nothing of the package is imported, so a rule holds for lazy imports and for dead branches too.
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_skywork"

# From the ground up; a file may import from lower layers and, without going in a circle, from its own.
LAYERS = [
    {"errors", "gloo", "device", "lifeline", "weight_gradients", ""},
    {"config", "metrics", "plan"},
    {"moe", "convert"},
    {"parallel"},
    {"model"},
    {"data"},
    {"optim", "checkpoint"},
    {"train"},
    {"report"},
    {"cli"},
    {"launch", "tools", "benchmarks"},
]
WITHOUT_TORCH = {"config", "plan"}
MAX_LINES = 400
MAX_FUNCTION_LINES = 90
PICKLERS = {"pickle", "_pickle", "dill", "cloudpickle"}


@cache
def sources() -> dict[str, Path]:
    """Dotted name -> file, for the package and the scripts beside it (`tools.demo`, `launch.pretrain_moe`)."""
    found = {}
    for top in (PACKAGE, "launch", "tools", "benchmarks"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def shown(path: Path, node: ast.AST | None = None) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def component(module: str) -> str:
    """`megatron_skywork.moe.router` -> `moe`; `tools.demo` -> `tools`; the package itself -> ''."""
    parts = module.split(".")
    return parts[0] if parts[0] != PACKAGE else (parts[1] if len(parts) > 1 else "")


def level(name: str) -> int:
    return next((i for i, layer in enumerate(LAYERS) if name in layer), -1)


def imported_modules(module: str, path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Every module a file imports, wherever the import stands; `from a import b` gives `a.b` where that is a module of ours, else `a`."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, *([node.module] if node.module else [])])
            for alias in node.names:
                yield (f"{base}.{alias.name}" if f"{base}.{alias.name}" in sources() else base), node
        elif isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] == "import_module" and node.args and isinstance(node.args[0], ast.Constant):
            yield str(node.args[0].value), node


def dotted(node: ast.AST) -> str:
    """`a.b.c` for a chain of attributes on a name; '' for anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def ours(module: str) -> bool:
    return module.split(".")[0] in {PACKAGE, "launch", "tools", "benchmarks"} or f"tools.{module}" in sources()


def report(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(sorted(problems))


def test_the_tree_is_found():
    assert {f"{PACKAGE}.errors", f"{PACKAGE}.device", f"{PACKAGE}.config.schema"} <= set(sources())


def test_every_file_has_its_layer():
    report([f"{shown(path)}: '{component(module)}' stands in no layer of LAYERS" for module, path in sources().items() if level(component(module)) < 0])


def test_imports_go_down_only():
    problems = []
    for module, path in sources().items():
        for target, node in imported_modules(module, path):
            if ours(target) and level(component(target)) > level(component(module)):
                problems.append(f"{shown(path, node)}: {module} imports {target}, which lies above it")
    report(problems)


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a directed graph as the list of its nodes, or []."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph.get(name, ())):
            if found := visit(target, [*trail, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def test_no_circular_imports():
    modules = {module: {t for t, _ in imported_modules(module, path) if t in sources() and t != module} for module, path in sources().items()}
    assert not cycle_in(modules)
    parts: dict[str, set[str]] = {}
    for module, targets in modules.items():
        parts.setdefault(component(module), set()).update(component(t) for t in targets if component(t) != component(module))
    parts.pop("", None)
    assert not cycle_in(parts), "packages import each other in a circle"


def test_a_circle_is_noticed():
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_configuration_and_plan_need_no_torch():
    """A wrong setting is answered before torch is imported: neither these files nor anything of ours they reach may import it."""
    problems = []
    for module in sources():
        if component(module) not in WITHOUT_TORCH:
            continue
        seen, todo = set(), [(module, [module])]
        while todo:
            name, trail = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            for target, node in imported_modules(name, sources()[name]):
                if target.split(".")[0] in {"torch", "megatron", "transformers", "transformer_engine"}:
                    problems.append(f"{shown(sources()[name], node)}: {' -> '.join(trail)} imports {target}")
                elif target in sources():
                    todo.append((target, [*trail, target]))
    report(problems)


def test_cuda_is_named_in_device_only():
    problems = []
    for _, path in sources().items():
        if path == ROOT / PACKAGE / "device.py":
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and dotted(node).startswith("torch.cuda"):
                problems.append(f"{shown(path, node)}: {dotted(node)}")
            elif isinstance(node, ast.Attribute) and node.attr == "cuda" and not dotted(node):
                problems.append(f"{shown(path, node)}: .cuda")
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch") and any(alias.name == "cuda" for alias in node.names):
                problems.append(f"{shown(path, node)}: from torch import cuda")
            elif isinstance(node, (ast.Import, ast.ImportFrom)) and any(
                name.startswith("torch.cuda") for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            ):
                problems.append(f"{shown(path, node)}: import of torch.cuda")
    report(problems)


def test_megatron_training_appears_nowhere():
    problems = []
    for module, path in sources().items():
        problems += [f"{shown(path, node)}: {target}" for target, node in imported_modules(module, path) if target.startswith("megatron.training")]
        attributes = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)]
        problems += [f"{shown(path, node)}: {dotted(node)}" for node in attributes if dotted(node).startswith("megatron.training")]
    report(problems)


def test_no_drawer_for_everything():
    names = {"utils", "util", "helpers", "misc", "common"}
    report([f"{shown(path)}: name it for what it holds" for path in sources().values() if path.stem in names or names & set(path.relative_to(ROOT).parts[:-1])])


def test_every_module_says_why_it_exists():
    report([shown(path) for path in sources().values() if tree_of(path).body and not ast.get_docstring(tree_of(path))])


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree_of(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def test_files_and_functions_stay_readable():
    problems = []
    for path in sources().values():
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        if num_lines > MAX_LINES:
            problems.append(f"{shown(path)}: {num_lines} lines, at most {MAX_LINES}")
        for node in functions_of(path):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            if size > MAX_FUNCTION_LINES:
                problems.append(f"{shown(path, node)}: {node.name} has {size} lines, at most {MAX_FUNCTION_LINES}")
    report(problems)


def unpickles(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Places that would run a stranger's pickle. A subclass of pickle.Unpickler that overrides find_class (an allow list) is how one is read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in PICKLERS and {a.name for a in node.names} & {"load", "loads"}:
            yield node, f"from {node.module} import load"
        if (
            isinstance(node, ast.ClassDef)
            and any(dotted(base).endswith("Unpickler") for base in node.bases)
            and not any(isinstance(item, ast.FunctionDef) and item.name == "find_class" for item in node.body)
        ):
            yield node, "an Unpickler without its own find_class"
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        keywords = {k.arg: k.value for k in node.keywords}
        if name in {"pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "dill.load", "cloudpickle.load"}:
            yield node, name
        safe = keywords.get("weights_only")
        if name == "torch.load" and not (isinstance(safe, ast.Constant) and safe.value is True):
            yield node, "torch.load without weights_only=True"
        allow = keywords.get("allow_pickle")
        if name in {"np.load", "numpy.load"} and allow is not None and not (isinstance(allow, ast.Constant) and allow.value is False):
            yield node, "np.load(allow_pickle=True)"


def test_no_stranger_s_pickle_is_executed():
    report([f"{shown(path, node)}: {what}" for path in sources().values() for node, what in unpickles(tree_of(path))])


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(f)",
        "torch.load(f)",
        "torch.load(f, weights_only=flag)",
        "import pickle\nclass A(pickle.Unpickler):\n    x = 1",
        "from pickle import loads",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_a_pickle_is_noticed(source: str):
    assert list(unpickles(ast.parse(source)))


def test_errors_are_not_swallowed():
    problems = []
    for path in sources().values():
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            if node.type is None:
                problems.append(f"{shown(path, node)}: bare except")
            elif dotted(node.type) in {"Exception", "BaseException"} and all(isinstance(item, (ast.Pass, ast.Continue)) for item in node.body):
                problems.append(f"{shown(path, node)}: except {dotted(node.type)} with nothing done")
    report(problems)


def test_the_entry_script_has_no_logic():
    path = ROOT / "launch" / "pretrain_moe.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
    assert not any(isinstance(node, (ast.For, ast.While, ast.ClassDef)) for node in ast.walk(tree_of(path)))


def test_committed_files_name_no_private_places():
    """Paths of one machine and hosts of package registries have no place in what is published."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    forbidden = [f"/{folder}/" for folder in ("root", "work")] + ["py" + "pi.org", "python" + "hosted"]
    problems = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in {".png", ".model", ".safetensors"} or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        problems += [f"{name}: mentions {word}" for word in forbidden if word in text]
    report(problems)
