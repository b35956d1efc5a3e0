"""Who may import whom, read from the source; and what `import compress` brings along."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "compress"
FILES = {
    ".".join(("compress", *file.relative_to(PACKAGE).with_suffix("").parts)): file for file in PACKAGE.rglob("*.py")
}
HEAVY = (
    "hydra",
    "triton",
    "omegaconf",
    "torchao",
    "tensorly",
    "torch_pruning",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "sklearn",
)


def imports(file: Path, *, lazy: bool = True, typing: bool = False) -> set[str]:
    """The dotted names that a file imports; `lazy`: inside functions too; `typing`: under TYPE_CHECKING too."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports in full, so that this test can read them"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        if not typing and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if not lazy and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(ast.parse(file.read_text(encoding="utf-8")))
    return found


def of(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def importers(package: str, *, lazy: bool = True) -> list[str]:
    return sorted(m for m, file in FILES.items() if any(of(name, package) for name in imports(file, lazy=lazy)))


def home(name: str) -> str:
    """The module of ours that an imported name lives in: "compress.task.Task" -> "compress.task"."""
    while name not in FILES and f"{name}.__init__" not in FILES:
        name = name.rpartition(".")[0]
    return name if name in FILES else f"{name}.__init__"


def test_the_reader_sees_every_kind_of_import(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import e\ndef f():\n    import g\n")
    assert imports(file) == {"a.b", "c.d", "g"}
    assert imports(file, lazy=False) == {"a.b", "c.d"}
    assert imports(file, typing=True) == {"a.b", "c.d", "e", "g"}


def test_layers_import_torch_only() -> None:
    allowed = {"torch", "compress.nn", *sys.stdlib_module_names}
    wrong = [
        (module, name)
        for module, file in FILES.items()
        if of(module, "compress.nn")
        for name in imports(file)
        if not any(of(name, package) for package in allowed)
    ]
    assert sorted(wrong) == [("compress.nn.gpu.kernels", "triton"), ("compress.nn.gpu.kernels", "triton.language")]


def test_stages_do_not_import_each_other() -> None:
    wrong = [
        (module, name)
        for module, file in FILES.items()
        if of(module, "compress.stages") and not module.endswith("__init__")
        for name in imports(file, typing=True)
        if of(name, "compress.stages")
    ]
    assert wrong == []


def test_only_config_and_main_know_hydra() -> None:
    assert importers("hydra") == ["compress.__main__", "compress.config"]


def test_only_settings_know_omegaconf() -> None:
    assert importers("omegaconf") == ["compress.__main__", "compress.config", "compress.targets"]


@pytest.mark.parametrize("package", ["torchao", "tensorly", "torch_pruning", "onnx"])
def test_a_heavy_library_is_imported_in_one_place_and_lazily(package: str) -> None:
    # torchao's observers find ranges while compressing, its GPU kernels run what is finished: nothing is shared.
    most = {"torchao": ["compress.calibration", "compress.lower.torchao"]}
    assert len(importers(package)) <= 1 or importers(package) == most.get(package)
    assert importers(package, lazy=False) == []


def test_no_module_is_a_drawer_for_odds_and_ends() -> None:
    names = {part for module in FILES for part in module.split(".")}
    assert not names & {"utils", "util", "helpers", "helper", "misc", "common", "manager", "base"}


def test_no_two_modules_need_each_other() -> None:
    needs = {m: {home(n) for n in imports(f, lazy=False) if of(n, "compress")} - {m} for m, f in FILES.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in sorted(needs[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in needs:
        visit(module, ())


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    return done.stdout.strip()


def test_import_compress_costs_nothing() -> None:
    heavy = (*HEAVY, "torch", "numpy")
    assert run(f"import sys, compress; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_load_and_save_import_no_compression_library() -> None:
    code = f"import sys, compress; compress.load, compress.save; print([m for m in {HEAVY} if m in sys.modules])"
    assert run(code) == "[]"


def test_the_public_names() -> None:
    names = run("import compress; print(*(type(getattr(compress, n)).__name__ for n in sorted(compress.__all__)))")
    assert names == "type type str function function function"


@pytest.mark.parametrize("first", ["import compress.run", "from compress.run import run", "import compress.__main__"])
def test_run_is_the_function_whoever_imports_its_file_first(first: str) -> None:
    assert run(f"{first}\nimport compress; print(callable(compress.run), callable(compress.load))") == "True True"


def test_a_name_that_is_not_public() -> None:
    import compress

    with pytest.raises(AttributeError, match="module 'compress' has no attribute 'prune'"):
        _ = compress.prune  # type: ignore[attr-defined]  # that is the point
    assert {"load", "save", "run", "Task", "CheckpointError"} <= set(dir(compress))
