"""Imports run one way: cli -> study -> {features, sae, lm, corpus}; and asking for help loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from study_fixture import SOURCE, environment

PACKAGE = SOURCE / "glottoscope"
MODULES = sorted(PACKAGE.rglob("*.py"))
# Free to all: the one exception for bad input, writing files whole, and what several rooms ask of folders and machine.
COMMON = {"glottoscope", "glottoscope.errors", "glottoscope.atomic", "glottoscope.whereabouts", "glottoscope.walking"}
# Room -> what it may import of this package besides itself and COMMON. `intervention` is a later room.
ALLOWED = {
    "corpus": (),
    "lm": (),
    "sae": (),
    "features": (),
    "intervention": ("sae", "lm"),
    "report": ("study.store", "study.config"),
    "study": ("intervention", "features", "sae", "lm", "corpus", "report"),
    "cli": ("study",),
    "errors": (),
    "atomic": (),
    "whereabouts": (),
    "walking": (),
}
FORBIDDEN_LIBRARIES = {
    "sae": ("transformers", "tokenizers", "datasets"),
    "features": ("transformers", "tokenizers"),
    "corpus": ("torch",),
    "report": ("torch", "transformers"),
}
LIGHT = (
    "cli",
    "errors",
    "atomic",
    "whereabouts",
    "walking",
    "study.config",
    "study.load",
)  # what `--help` and a bad study file need
HEAVY = ("torch", "transformers", "pyarrow", "scipy", "safetensors", "matplotlib", "tokenizers", "numpy")


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_of(path: Path) -> set[tuple[str, bool]]:
    """(imported module, whether importing this module imports it at once)."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()

    def visit(node: ast.AST, at_once: bool) -> None:
        if isinstance(node, ast.Import):
            found.update((alias.name, at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            # `from glottoscope.study.stages import training` imports a module, not a name.
            below = SOURCE / Path(*module.split("."))
            found.update(
                (f"{module}.{a.name}" if (below / f"{a.name}.py").exists() or (below / a.name).is_dir() else module, at_once)
                for a in node.names
            )
        for child in ast.iter_child_nodes(node):
            lazy = is_type_checking(node) or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            visit(child, at_once and not lazy)

    visit(tree, True)
    return found


def room_of(module: str) -> str:
    return ([*module.split("."), "", ""])[1]


def within(module: str, names: tuple[str, ...]) -> bool:
    inner = module.removeprefix("glottoscope.")
    return any(inner == n or inner.startswith(n + ".") for n in names)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    module = name_of(path)
    room = room_of(module)
    if module == "glottoscope":
        assert all(not m.startswith("glottoscope") for m, at_once in imports_of(path) if at_once)
        return
    own = [m for m, _ in imports_of(path) if m.split(".")[0] == "glottoscope" and m not in COMMON]
    wrong = [m for m in own if room_of(m) != room and not within(m, ALLOWED[room])]
    assert not wrong, f"{module} may not import {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("path", [p for p in MODULES if room_of(name_of(p)) in FORBIDDEN_LIBRARIES], ids=name_of)
def test_rooms_stay_free_of_libraries(path: Path) -> None:
    forbidden = FORBIDDEN_LIBRARIES[room_of(name_of(path))]
    wrong = sorted(m for m, _ in imports_of(path) if m.split(".")[0] in forbidden)
    assert not wrong, f"{name_of(path)} imports {', '.join(wrong)}"


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy_at_once(name: str) -> None:
    path = PACKAGE / Path(*name.split(".")).with_suffix(".py")
    wrong = sorted(m for m, at_once in imports_of(path) if at_once and m.split(".")[0] in HEAVY)
    assert not wrong, f"{name} imports {', '.join(wrong)}"


def test_only_stages_join_the_rooms() -> None:
    """lm, sae and features meet in study.stages and nowhere else."""
    for path in MODULES:
        rooms = {room_of(m) for m, at_once in imports_of(path) if at_once and m.startswith("glottoscope.")}
        if {"lm", "sae"} <= rooms:
            assert name_of(path).startswith(("glottoscope.study.stages", "glottoscope.intervention")), name_of(path)


@pytest.mark.parametrize(
    "code",
    [
        "import glottoscope; glottoscope.InputError; glottoscope.__version__; dir(glottoscope)",
        "import sys; sys.argv = ['glottoscope', '--help']\ntry:\n    import glottoscope.cli; glottoscope.cli.main()\n"
        "except SystemExit as end:\n    assert end.code == 0",
        "import sys; sys.argv = ['glottoscope', 'run', '--help']\ntry:\n    import glottoscope.cli; glottoscope.cli.main()\n"
        "except SystemExit as end:\n    assert end.code == 0",
    ],
    ids=["import", "help", "run-help"],
)
def test_help_and_import_load_nothing_heavy(code: str) -> None:
    check = f"{code}\nimport sys\nprint('LOADED', *(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "LOADED"


def test_a_driver_loads_no_language_model_classes() -> None:
    """They and scipy.stats take longer to import than all the rest: workers load them, and commands that only look do not."""
    slow = ("transformers.modeling_utils", "transformers.models.llama.modeling_llama", "scipy.stats")
    check = f"import sys\nimport glottoscope.study.runner\nprint([m for m in {slow!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, env=environment(), timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_every_public_name_resolves() -> None:
    import glottoscope

    for name in glottoscope.__all__:
        assert getattr(glottoscope, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = glottoscope.nothing
