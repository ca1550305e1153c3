"""The architecture as a test: imports go one way, and what must start fast imports nothing heavy."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "compress"

# What each part may import besides itself. A part is a module or package directly under `compress`, or `cli`.
BASE = {"types", "errors", "progress", "content", "recipe_problems"}
TENSORS = BASE | {"formats", "kernels", "models"}
METHODS = {"quantization", "pruning", "distillation"}
RECIPE = {"recipe_yaml", "recipe_sections", "stages", "recipe_checks", "recipe"}
ALLOWED: dict[str, set[str]] = {
    "numerics": set(),
    "types": {"numerics"},
    "errors": set(),
    "progress": set(),
    "recipe_problems": set(),
    "content": {"errors"},
    "schemes": BASE,
    "formats": BASE - {"content"},
    "kernels": BASE - {"content"},
    "models": BASE - {"content"} | {"formats", "kernels"},
    "calibration": TENSORS,
    **{method: TENSORS - {"content"} | {"calibration"} for method in METHODS},
    "recipe_yaml": BASE,
    "recipe_sections": BASE | {"schemes", "calibration"},
    "stages": BASE | METHODS | {"formats", "schemes", "recipe_sections"},
    "recipe_checks": BASE | {"recipe_sections"},
    "recipe": BASE | {"recipe_yaml", "recipe_sections", "stages", "recipe_checks", "calibration"},
    "recipe_search": BASE | RECIPE,
    "recipe_build": BASE | METHODS | RECIPE | {"schemes"},
    "recipe_distill": BASE | METHODS | RECIPE | {"schemes", "recipe_build"},
    "recipe_prune": BASE | METHODS | RECIPE | {"schemes", "recipe_build"},
    "artifact": BASE | {"formats", "schemes"},
    "runtime": TENSORS | {"artifact"},
    "exporters": TENSORS | {"artifact", "runtime"},
    "evaluation": TENSORS | {"artifact", "runtime"},
    "pipeline": TENSORS | METHODS | RECIPE | {"schemes", "recipe_build", "calibration", "artifact"},
}
ALLOWED["workflows"] = set(ALLOWED)
ALLOWED["__init__"] = {"content", "errors", "artifact", "runtime", "workflows"}  # the lazy verbs
ALLOWED["commands"] = set(ALLOWED)
ALLOWED["cli"] = set(ALLOWED)

# Packages of which these modules must not be imported while another module is being imported.
HEAVY = {"torch", "transformers", "scipy", "safetensors", "accelerate", "compressed_tensors"}


def modules() -> Iterator[tuple[str, Path]]:
    """(dotted name below `compress`, file) of every module."""
    yield "cli", ROOT / "cli.py"
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts), path


def imports(tree: ast.AST, module: str) -> Iterator[str]:
    """Dotted names that a module imports, at any depth, with the names taken from a package appended.

    The package itself shows as the verbs that are taken from it, since importing it runs nothing.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name != "compress")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "compress":
            yield f"compress.{node.attr}"
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively; write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(name: str) -> str | None:
    """The part of `compress` that a dotted import reaches; None if it is another package's."""
    names = name.split(".")
    if names[0] != "compress" or names[1] == "__version__":
        return None
    if not ((PACKAGE / names[1]).is_dir() or (PACKAGE / f"{names[1]}.py").is_file()):
        return "cli" if names[1] == "cli" else "__init__"
    return names[1]


def breaches(module: str, source: str) -> list[str]:
    """The imports of one module that go the wrong way."""
    own = module.split(".")[0]
    allowed = ALLOWED[own] | {own}
    reached = {name: part(name) for name in imports(ast.parse(source), module)}
    return [f"compress.{module} imports {name}" for name, to in reached.items() if to is not None and to not in allowed]


def test_every_part_has_a_rule() -> None:
    parts = {name.split(".")[0] for name, _ in modules()}
    assert len(parts) > 10
    assert parts <= set(ALLOWED), f"say in ALLOWED what {sorted(parts - set(ALLOWED))} may import"


def test_imports_go_one_way() -> None:
    wrong = [line for module, path in modules() for line in breaches(module, path.read_text(encoding="utf-8"))]
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("quantization.rtn", "from compress.artifact.reader import Artifact", True),
        ("formats.int_packed", "import compress.quantization.rtn", True),
        ("runtime.protocol", "def f():\n    from compress.quantization import rtn", True),
        ("kernels.dispatch", "from compress import pipeline", True),
        ("evaluation.gate", "from compress.recipe import Recipe", True),
        ("types", "from compress import errors", True),
        ("commands.plan", "from compress.cli import main", True),
        ("pipeline.run", "import compress\ncompress.quantize()", True),
        ("pipeline.run", "from compress import quantize", True),
        ("pipeline.run", "import compress\nprint(compress.__version__)", False),
        ("quantization.rtn", "from compress.types import IntScheme\nimport torch", False),
        ("pipeline.run", "from compress.artifact.staging import Staging", False),
    ],
)
def test_the_rule_can_fail(module: str, source: str, wrong: bool) -> None:
    assert bool(breaches(module, source)) is wrong


def test_no_two_parts_may_import_each_other() -> None:
    assert [(a, b) for a, allowed in ALLOWED.items() for b in allowed if a in ALLOWED.get(b, set())] == []


def loaded_after(*arguments: str) -> set[str]:
    """The top-level packages that `python arguments` imports, as the interpreter reports them one by one."""
    code = f"import sys, runpy\nsys.argv = {['-', *arguments[1:]]!r}\n{arguments[0]}\n"
    environment = {**os.environ, "PYTHONPATH": ""}
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    reported = (line.split("|")[-1] for line in result.stderr.splitlines() if line.startswith("import time:"))
    return {name.strip().split(".")[0] for name in reported}


@pytest.mark.parametrize(
    "statement",
    [
        "import compress",
        "import compress.cli",
        "import compress.recipe",
        "import compress.quantization.configs",
        "import compress.content",
        "import compress.errors, compress.types",
        "import pkgutil, importlib, compress.commands as c\n"
        "for m in pkgutil.iter_modules(c.__path__): importlib.import_module('compress.commands.' + m.name)",
    ],
)
def test_import_is_light(statement: str) -> None:
    assert loaded_after(statement) & HEAVY == set()


@pytest.mark.parametrize("arguments", [("--help",), ("quantize", "--help"), ("methods", "--json")])
def test_help_is_light(arguments: tuple[str, ...]) -> None:
    loaded = loaded_after("runpy.run_module('compress.cli', run_name='__main__')", *arguments)
    assert "compress" in loaded
    assert loaded & HEAVY == set()


def test_light_check_can_fail() -> None:
    assert "torch" in loaded_after("import compress.kernels.dispatch")


def test_every_public_name_resolves() -> None:
    import compress

    for name in compress.__all__:
        assert callable(getattr(compress, name))
        assert name in dir(compress)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        compress.quantise  # noqa: B018


def test_one_version() -> None:
    from importlib.metadata import version

    import compress

    assert version("compress") == compress.__version__
