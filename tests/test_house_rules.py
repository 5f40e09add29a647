"""The limits of docs/architecture.md, held by the code's own syntax trees."""

import ast
import functools
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from Configuration_System import (
    FullConfig,
    LossSection,
    ModelSection,
    OptimizerSection,
    SchedulerSection,
    load_config,
)
from tagger.config_io import flat_values

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "goldens" / "default_config.txt"

CHAPTERS = {
    "vocabulary",
    "orientation_handler",
    "dataset_loader",
    "model_architecture",
    "loss_functions",
    "schedulers",
    "training_utils",
    "evaluation_metrics",
    "Monitor_log",
    "training_phases",
}
CHAPTER_EDGES = {
    ("dataset_loader", "vocabulary"),
    ("dataset_loader", "orientation_handler"),
    ("orientation_handler", "vocabulary"),
    ("training_utils", "schedulers"),
    ("training_phases", "dataset_loader"),
}
COMMANDS = {"train_direct", "validation_loop"}
START_UP = "start_up"
CLOSE_RUN = "close_run"
ROOT_MODULES = {"Configuration_System", START_UP, CLOSE_RUN} | CHAPTERS | COMMANDS

# Handlers that hand an error over to another thread, which raises it there; each names its function.
BROAD_EXCEPT_ALLOWED = {
    ("tagger.checkpoint.writer", "_run"),
    ("tagger.data.prefetch", "_plan"),
    ("tagger.data.prefetch", "_fill"),
    ("tagger.data.loader_process", "_report_next"),
    ("tagger.data.messages", "of"),
}


def python_files(*folders: str) -> list[Path]:
    files = sorted(ROOT.glob("*.py"))
    for folder in folders:
        files += sorted((ROOT / folder).rglob("*.py"))
    return files


def name_of(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    parts = relative.parts[:-1] if relative.name == "__init__" else relative.parts
    return ".".join(parts)


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_of(path: Path) -> set[str]:
    """Every module of this project that a file imports, wherever in the file the import stands."""
    found: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    tops = ROOT_MODULES | {"tagger", "scripts", "tests"}
    known = {name_of(p) for p in python_files("tagger", "scripts", "tests")}
    return {name for name in found if name.partition(".")[0] in tops and name in known}


def functions_of(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def length_of(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def nesting_of(node: ast.AST, depth: int = 0) -> int:
    blocks = (ast.If, ast.For, ast.While, ast.With, ast.Try)
    deepest = depth
    for child in ast.iter_child_nodes(node):
        deepest = max(deepest, nesting_of(child, depth + isinstance(child, blocks)))
    return deepest


def test_no_file_is_over_500_lines() -> None:
    files = python_files("tagger", "scripts", "tests")
    files += [*(ROOT / "scripts").glob("*.sh"), *(ROOT / "scripts").glob("*.ps1")]
    long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text(encoding="utf-8").splitlines())) > 500}
    assert not long


def test_no_function_is_over_120_lines() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{f.name} {length_of(f)}"
        for path in python_files("tagger", "scripts", "tests")
        for f in functions_of(tree_of(path))
        if length_of(f) > 120
    ]
    assert not long


def test_the_loop_fits_its_page() -> None:
    path = ROOT / "train_direct.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350
    functions = {f.name: f for f in functions_of(tree_of(path))}
    assert length_of(functions["train"]) <= 120
    assert length_of(functions["train_step"]) <= 40
    loops = [n for n in ast.walk(functions["train"]) if isinstance(n, ast.While)]
    assert len(loops) == 1
    assert length_of(loops[0]) <= 60
    for name, function in functions.items():
        assert nesting_of(function) <= 4, name
    saves = [
        n
        for n in ast.walk(tree_of(path))
        if isinstance(n, ast.Attribute) and n.attr == "save" and "manager" in ast.dump(n)
    ]
    assert len(saves) == 1


def floor_violation(importer: str, imported: str) -> bool:
    top, target = importer.partition(".")[0], imported.partition(".")[0]
    if top in {"scripts", "tests"}:
        return False
    if top == "tagger":
        return target != "tagger"
    if top == "Configuration_System":
        ground = {"config_io", "config_checks", "command", "options", "output"}
        return imported not in {"tagger", *(f"tagger.{name}" for name in ground)}
    if top in CHAPTERS:
        return target not in {"tagger", "Configuration_System"} and (top, target) not in CHAPTER_EDGES
    if top == "validation_loop":
        return target not in CHAPTERS | {"tagger", "Configuration_System"}
    if top == START_UP:
        return target not in CHAPTERS | {"tagger", "Configuration_System", "validation_loop"}
    if top == CLOSE_RUN:
        return target not in CHAPTERS | {"tagger", "Configuration_System", "validation_loop", START_UP}
    if top == "train_direct":
        return target not in CHAPTERS | {"tagger", "Configuration_System", "validation_loop", START_UP, CLOSE_RUN}
    return True


def test_imports_go_down_the_floors_only() -> None:
    wrong = [
        f"{name_of(path)} -> {imported}"
        for path in python_files("tagger", "scripts")
        for imported in imports_of(path)
        if floor_violation(name_of(path), imported)
    ]
    assert not wrong


def test_every_root_file_has_a_floor() -> None:
    assert {p.stem for p in ROOT.glob("*.py")} == ROOT_MODULES


def test_no_import_circle() -> None:
    graph = {name_of(p): imports_of(p) - {name_of(p)} for p in python_files("tagger", "scripts")}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name in done:
            return
        for imported in graph.get(name, ()):
            if not name.startswith(f"{imported}."):  # a package is initialised before its own modules by design
                visit(imported, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_importing_a_root_file_does_nothing() -> None:
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for path in ROOT.glob("*.py"):
        for node in tree_of(path).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            guard = isinstance(node, ast.If) and "__name__" in ast.dump(node.test)
            registration = isinstance(node, ast.Expr) and "register" in ast.dump(node.value)
            assert isinstance(node, allowed) or docstring or guard or registration, f"{path.name}:{node.lineno}"


def test_configuration_imports_no_torch() -> None:
    code = "import sys, Configuration_System; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_default_configuration_matches_its_golden() -> None:
    """Regenerate with `python -m tests.goldens.regenerate_default_config` after changing a setting on purpose."""
    from tests.goldens.regenerate_default_config import render

    assert GOLDEN.read_text(encoding="utf-8") == render()


def test_unified_config_states_every_default() -> None:
    written = flat_values(load_config(ROOT / "configs" / "unified_config.yaml", ("run.name=null",), environment={}))
    defaults = flat_values(FullConfig())
    written["run.name"] = defaults["run.name"]
    assert written == defaults


def test_unified_config_mentions_every_setting_by_itself() -> None:
    from tagger.config_io import read_recipe

    (layer,) = read_recipe(ROOT / "configs" / "unified_config.yaml")
    assert set(layer.values) == set(flat_values(FullConfig()))


def test_every_setting_is_read_somewhere() -> None:
    read: set[str] = set()
    for path in python_files("tagger", "scripts"):
        tree = tree_of(path)
        # Checking a setting is not using it.
        checks = [f for f in functions_of(tree) if f.name in {"__post_init__", "check_paths"}]
        inside = {id(n) for f in checks for n in ast.walk(f)} if path.name == "Configuration_System.py" else set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in inside:
                read.add(node.attr)
    unread = [key for key in flat_values(FullConfig()) if key.rpartition(".")[2] not in read]
    assert not unread


def literals(section: type, field: str) -> set[str]:
    return set(typing.get_args(typing.get_type_hints(section)[field]))


def test_configured_names_are_the_registered_names() -> None:
    import loss_functions
    import model_architecture
    import schedulers
    import training_utils

    assert literals(ModelSection, "name") == set(model_architecture.MODELS.names())
    assert literals(ModelSection, "preset") == set(model_architecture.PRESET_DIMENSIONS)
    assert literals(LossSection, "name") == set(loss_functions.LOSSES.names())
    assert literals(SchedulerSection, "name") == set(schedulers.SCHEDULES.names())
    assert literals(OptimizerSection, "name") == set(training_utils.OPTIMIZERS.names())


def test_preset_patch_size_is_the_presets_own() -> None:
    import model_architecture
    from Configuration_System import PRESET_PATCH_SIZE

    assert {preset.patch_size for preset in model_architecture.PRESET_DIMENSIONS.values()} == {PRESET_PATCH_SIZE}


def test_broad_excepts_reraise() -> None:
    wrong = []
    for path in python_files("tagger", "scripts"):
        for function in functions_of(tree_of(path)):
            for node in ast.walk(function):
                if not isinstance(node, ast.ExceptHandler):
                    continue
                names = ast.dump(node.type) if node.type else "BaseException"
                broad = "'Exception'" in names or "BaseException" in names
                reraises = any(isinstance(n, ast.Raise) for n in ast.walk(node))
                if broad and not reraises and (name_of(path), function.name) not in BROAD_EXCEPT_ALLOWED:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} in {function.name}")
    assert not wrong


def test_no_three_argument_getattr() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in python_files("tagger", "scripts")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr"
        if len(node.args) == 3 and ast.unparse(node.args[0]) != "os"  # O_BINARY exists on Windows alone
    ]
    assert not wrong


def test_print_stays_in_commands() -> None:
    wrong = []
    for path in python_files("tagger"):
        tree = tree_of(path)
        allowed = [f for f in functions_of(tree) if f.name == "main"] if path.parent == ROOT else []
        inside = {id(n) for f in allowed for n in ast.walk(f)}
        for node in ast.walk(tree):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            if called and id(node) not in inside:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong


def test_every_command_checks_its_options_and_ends_in_one_line() -> None:
    """Each `main` over arguments; the set-up runs before anything is installed."""
    wrong = []
    for path in python_files("scripts"):
        tree = tree_of(path)
        mains = [f for f in functions_of(tree) if f.name == "main" and f.args.args]
        if not mains or path.name == "setup_env.py":
            continue
        if not all("id='command'" in ast.dump(decorator) for f in mains for decorator in f.decorator_list or [f.args]):
            wrong.append(f"{path.name}: main is not a @command()")
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "type" and ast.unparse(node.value) in {"int", "float"}:
                wrong.append(f"{path.name}:{node.value.lineno}: an unchecked number")
            if isinstance(node, ast.Attribute) and node.attr == "ArgumentParser":
                wrong.append(f"{path.name}:{node.lineno}: use tagger.options.Parser")
    assert not wrong


@pytest.mark.parametrize("word", ["pickle", "torch.load", "torch.save", "weights_only"])
def test_nothing_is_pickled(word: str) -> None:
    """Except between a loader and the processes that it started: nothing that another hand could have written."""
    for path in python_files("tagger", "scripts"):
        if word == "pickle" and name_of(path) == "tagger.data.messages":
            continue
        code = ast.dump(tree_of(path))
        module, _, attribute = word.partition(".")
        if attribute:
            assert f"Attribute(value=Name(id='{module}', ctx=Load()), attr='{attribute}'" not in code, path
        else:
            assert f"name='{word}'" not in code and f"arg='{word}'" not in code, path
