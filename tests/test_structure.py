"""The shape of the code: imports run downwards, modules stay small, nothing heavy is imported early."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted([*(ROOT / "peftkit").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")])

# A module may import from its own row and from the rows below it; the longest name that fits decides.
LAYERS = (
    ("recipes",),
    (
        "peftkit",
        "peftkit.cli",
        "peftkit.arguments",
        "peftkit.artifact_verbs",
        "peftkit.launch",
        "peftkit.job",
        "peftkit.launch_options",
        "peftkit.experiment",
        "peftkit.report",
        "peftkit.api",
        "peftkit.typed",
    ),
    ("peftkit.serving",),
    ("peftkit.artifacts", "peftkit.bench", "peftkit.continual"),
    (
        "peftkit.training",
        "peftkit.evaluation",
        "peftkit.prepare",
        "peftkit.session",
        "peftkit.processes",
        "peftkit.planning",
        "peftkit.audit",
    ),
    ("peftkit.demonstrations", "peftkit.token_cache"),
    ("peftkit.config", "peftkit.config_problems"),
    ("peftkit.methods", "peftkit.tasks"),
    (
        "peftkit.backbones",
        "peftkit.data",
        "peftkit.metrics",
        "peftkit.engine",
        "peftkit.audit.catalogue",
        "peftkit.audit.settings",
    ),
    ("peftkit.config_file", "peftkit.config_limits", "peftkit.shipped", "peftkit.changes"),
    (
        "peftkit.errors",
        "peftkit.schema",
        "peftkit.quiet",
        "peftkit.console",
        "peftkit.disk",
        "peftkit.environment",
        "peftkit.memory",
        "peftkit.pages",
        "peftkit.tables",
        "peftkit.tensor_files",
    ),
)
STRANGERS = {("peftkit.methods", "peftkit.tasks"), ("peftkit.tasks", "peftkit.methods")}
HEAVY = {"torch", "peft", "transformers", "datasets", "evaluate", "accelerate", "bitsandbytes", "matplotlib"}
# Modules that need a heavy package at the top, each with the reason.
EARLY = {
    "peftkit.backbones.attention": "registers an attention function; imported when something is added to attention",
    "peftkit.backbones.attention_inputs": "subclasses nn.Module; imported when something is added to attention",
    "peftkit.backbones.attention_by_hand": "subclasses transformers' modules; imported for DeBERTa and MPNet",
    "peftkit.backbones.fused": "subclasses nn.Module; imported when a role of a fused projection is adapted",
    "peftkit.backbones.quantized_layers": "subclasses bitsandbytes' modules; imported when something is quantised",
    "peftkit.backbones.new_tokens": "subclasses nn.Module; imported when weights load or a task adds tokens",
    "peftkit.engine.compiled_dropout": "registers operations; imported when a training begins",
    "peftkit.engine.dora": "computes without gradients; imported when a training of LoRA begins",
    "peftkit.engine.dropout": "subclasses autograd.Function; imported when a training begins",
    "peftkit.engine.lora": "subclasses autograd.Function; imported when a training begins",
    "peftkit.engine.lora_groups": "asks for peft's class of layers; imported when a training of LoRA begins",
    "peftkit.engine.plain_attention": "subclasses autograd.Function; imported when a training or evaluation begins",
    "peftkit.engine.row_attention": "subclasses autograd.Function; imported when a training or evaluation begins",
    "peftkit.engine.summed_losses": "subclasses autograd.Function; imported when a language model's loss is computed",
    "peftkit.engine.unpadded": "subclasses autograd.Function; imported when a batch without padding is computed",
    "peftkit.methods.bottleneck_layers": "subclasses nn.Module; imported when adapters are attached",
    "peftkit.methods.prefix_layers": "subclasses nn.Module; imported when a prefix is attached",
    "peftkit.planning.ledger": "subclasses TorchDispatchMode; imported when a run is traced",
    "peftkit.planning.shapes": "subclasses TorchDispatchMode; imported when a run is traced",
    "peftkit.metrics.classes": "subclasses evaluate.Metric; imported when scores are computed",
    "peftkit.metrics.regression": "subclasses evaluate.Metric; imported when scores are computed",
    "peftkit.metrics.spans": "subclasses evaluate.Metric; imported when scores are computed",
}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(file): file for file in MODULES}


def is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(body: list[ast.stmt], inside_functions: bool) -> Iterator[str]:
    """Full names of what a module imports when it runs: `a.b` and `a.b.c` for `from a.b import c`."""
    for node in body:
        if is_for_types(node):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield str(node.module)
        elif inside_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            blocks = (getattr(node, name, []) for name in ("body", "orelse", "finalbody"))
            handlers = [inner for handler in getattr(node, "handlers", []) for inner in handler.body]
            for block in (*blocks, handlers):
                yield from imports(block, inside_functions)


@cache
def imported_by(file: Path, inside_functions: bool = True) -> set[str]:
    return set(imports(ast.parse(file.read_text(encoding="utf-8")).body, inside_functions))


def modules_imported_by(name: str) -> set[str]:
    return (imported_by(NAMES[name]) & NAMES.keys()) - {name, "peftkit"}


def layer_of(name: str) -> int:
    fitting = [
        (len(prefix), row)
        for row, prefixes in enumerate(LAYERS)
        for prefix in prefixes
        if name == prefix or (name.startswith(f"{prefix}.") and prefix != "peftkit")
    ]
    assert fitting, f"{name} has no place: add it to LAYERS"
    return max(fitting)[1]


def package_of(name: str) -> str:
    return ".".join(name.split(".")[:2])


def test_the_reader_of_imports_sees_those_inside_functions_and_not_those_for_types() -> None:
    code = (
        "import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import e\n"
        "def f():\n    import g\n    try:\n        import h\n    except OSError:\n        import i\n"
        "class J:\n    import k\n    def l(self):\n        with m:\n            import n\n"
    )
    body = ast.parse(code).body
    assert set(imports(body, True)) == {"a.b", "c", "c.d", "g", "h", "i", "k", "n"}
    assert set(imports(body, False)) == {"a.b", "c", "c.d", "k"}


@pytest.mark.parametrize("name", NAMES)
def test_imports_run_downwards_only(name: str) -> None:
    upward = {other for other in modules_imported_by(name) if layer_of(other) < layer_of(name)}
    assert not upward, f"{name} imports from above: {sorted(upward)}"


def test_no_import_is_circular() -> None:
    graph = {name: modules_imported_by(name) for name in NAMES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"circular imports: {' → '.join(error.args[1])}") from None


@pytest.mark.parametrize("name", NAMES)
def test_methods_and_tasks_do_not_know_each_other(name: str) -> None:
    known = {other for other in modules_imported_by(name) if (package_of(name), package_of(other)) in STRANGERS}
    assert not known


@pytest.mark.parametrize("name", NAMES)
def test_recipes_are_imported_by_nobody(name: str) -> None:
    assert not {other for other in imported_by(NAMES[name]) if other.startswith("recipes")}


@pytest.mark.parametrize("name", NAMES)
def test_heavy_packages_are_imported_where_they_are_used(name: str) -> None:
    early = {other.partition(".")[0] for other in imported_by(NAMES[name], inside_functions=False)} & HEAVY
    assert bool(early) == (name in EARLY), f"{name} imports {sorted(early)} at the top"


@pytest.mark.parametrize("name", NAMES)
def test_a_module_stays_under_three_hundred_lines(name: str) -> None:
    assert len(NAMES[name].read_text(encoding="utf-8").splitlines()) <= 300


@pytest.mark.parametrize("name", NAMES)
def test_a_module_says_what_it_is_about(name: str) -> None:
    assert ast.get_docstring(ast.parse(NAMES[name].read_text(encoding="utf-8")))
    assert not name.endswith((".utils", ".helpers", ".misc", ".common"))


def test_nothing_is_left_to_do() -> None:
    kinds = ("*.py", "*.yaml", "*.yml", "*.md", "*.toml", "*.cfg", "*.sh")
    folders = ("peftkit", "recipes", "tests", "benchmarks", "docs")
    files = [file for folder in folders for kind in kinds for file in (ROOT / folder).rglob(kind)]
    files += [file for kind in kinds for file in ROOT.glob(kind)]
    marks = [mark + rest for mark, rest in (("TO", "DO"), ("FIX", "ME"), ("XX", "X"))]
    found = [file for file in files if any(mark in file.read_text(encoding="utf-8") for mark in marks)]
    assert len(files) > 40
    assert not found
