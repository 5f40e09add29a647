"""The launchers hold for the oldest shells they are for: Windows PowerShell 5.1 and bash 3.2.

Neither is at hand where these tests run. PowerShell is parsed by tree-sitter, with rules for what that grammar lets
pass; bash by shellcheck, with rules for what came after 3.2. Every rule is shown to fire on a bad sample.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import tree_sitter_powershell
from tree_sitter import Language, Node, Parser

from scripts import setup_env

ROOT = Path(__file__).resolve().parents[2]
POWERSHELL = sorted((ROOT / "scripts").glob("*.ps1"))
BASH = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]

# Variables that PowerShell itself sets, and the drive-qualified ones that are not variables of the script.
AUTOMATIC = {
    "_", "?", "^", "$", "args", "input", "true", "false", "null", "error", "host", "home", "matches", "myinvocation",
    "lastexitcode", "psscriptroot", "pscommandpath", "psboundparameters", "psversiontable", "pwd", "pid", "this",
    "erroractionpreference", "progresspreference", "verbosepreference", "warningpreference",
}  # fmt: skip
CMDLETS = {
    "Split-Path", "Join-Path", "Test-Path", "Get-Location", "Push-Location", "Pop-Location", "Get-Command", "Out-Null",
    "Select-Object", "Write-Host", "Write-Output", "Read-Host", "Where-Object", "ForEach-Object", "Get-Content",
}  # fmt: skip
NEWER_THAN_5_1 = {"-parallel", "-asplaintext", "-ashashtable"}


def walk(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from walk(child)


def text_of(node: Node) -> str:
    assert node.text is not None
    return node.text.decode("utf-8")


def variable_name(node: Node) -> str:
    return text_of(node).lstrip("$@").strip("{}").rpartition(":")[2].lower()


def is_drive(node: Node) -> bool:
    return bool(re.match(r"[$@]\{?(env|function|variable|alias):", text_of(node), re.IGNORECASE))


def assigned_names(tree: Node) -> set[str]:
    names = set()
    for node in walk(tree):
        if node.type == "left_assignment_expression":
            names |= {variable_name(child) for child in walk(node) if child.type == "variable"}
        elif node.type in {"script_parameter", "foreach_statement"}:
            names |= {variable_name(child) for child in node.children if child.type == "variable"}
    return names


def powershell_faults(source: bytes) -> list[str]:
    """What Windows PowerShell 5.1 would refuse or misread, with line numbers."""
    faults = []
    if not source.isascii() and not source.startswith(b"\xef\xbb\xbf"):
        faults.append("not ASCII: 5.1 reads a file without a byte-order mark in the system's own code page")
    tree = Parser(Language(tree_sitter_powershell.language())).parse(source).root_node
    known = assigned_names(tree) | AUTOMATIC
    functions = {text_of(node).lower() for node in walk(tree) if node.type == "function_name"}
    commands = {name.lower() for name in CMDLETS} | functions
    for node in walk(tree):
        found = None
        if node.type == "ERROR" or node.is_missing:
            found = f"syntax: {text_of(node)[:40]!r}"
        elif node.type == "in" and not source[node.end_byte : node.end_byte + 1].isspace():
            found = "foreach: no space after 'in'"
        elif node.type == "pipeline_chain_tail":
            found = "'&&' and '||' came with PowerShell 7"
        elif node.type == "command_parameter" and text_of(node).lower() in NEWER_THAN_5_1:
            found = f"{text_of(node)} came after 5.1"
        elif node.type == "variable" and not is_drive(node) and variable_name(node) not in known:
            found = f"{text_of(node)} is never assigned"
        elif node.type == "command_name" and text_of(node).lower() not in commands:
            found = f"{text_of(node)} is no command that the launchers use"
        if found:
            faults.append(f"line {node.start_point.row + 1}: {found}")
    return faults


def native_calls_without_check(source: str) -> list[str]:
    """`& something` must be followed by a look at $LASTEXITCODE: 'Stop' does not stop at a native exit code."""
    lines = source.splitlines()
    calls = [number for number, line in enumerate(lines) if re.match(r"\s*& ", line)]
    return [lines[number] for number in calls if "$LASTEXITCODE" not in "".join(lines[number + 1 : number + 2])]


@pytest.mark.parametrize("script", POWERSHELL, ids=lambda path: path.name)
def test_powershell_launchers_are_good_for_5_1(script: Path) -> None:
    source = script.read_bytes()
    assert powershell_faults(source) == []
    assert native_calls_without_check(source.decode()) == []
    assert b"$ErrorActionPreference = 'Stop'" in source
    assert b"<#\n.SYNOPSIS" in source and b".EXAMPLE" in source


def test_every_powershell_launcher_is_there() -> None:
    names = {"setup_env.ps1", "Start_AI_Training.ps1", "Start_TensorBoard.ps1", "run_tests.ps1"}
    assert names <= {path.name for path in POWERSHELL}


@pytest.mark.parametrize(
    ("sample", "fault"),
    [
        ("if ($true) { Write-Host 'x'", "syntax"),
        ("Write-Host 'unclosed", "syntax"),
        ("if [[ 1 ]] { Write-Host 'x' }", "syntax"),
        ("$y = @(1); foreach ($x inn $y) { Write-Host $x }", "no space after 'in'"),
        ("$folder = 'a'; Write-Host $foldr", "$foldr is never assigned"),
        ("$folder = 'a'; Write-Host \"to $foldr\"", "$foldr is never assigned"),
        ("$words = @(1); Write-Host @wrods", "@wrods is never assigned"),
        ("function Get-It { param([string]$Name) Write-Host $Nmae }", "$Nmae is never assigned"),
        ("Write-Host 'a' && Write-Host 'b'", "'&&'"),
        ("Write-Host 'a' || Write-Host 'b'", "'||'"),
        ("$q = $true; $z = $q ? 1 : 2", "syntax"),
        ("$q = $true; Write-Host ($q ? 1 : 2)", "syntax"),
        ("$q = $null; $z = $q ?? 2", "syntax"),
        ("$q = $null; $q ??= 2", "syntax"),
        ("@(1, 2) | ForEach-Object -Parallel { Write-Host $_ }", "-Parallel"),
        ("Write-Hots 'a'", "Write-Hots is no command"),
        ("Write-Host 'caf\u00e9'", "not ASCII"),
    ],
)
def test_each_powershell_rule_fires(sample: str, fault: str) -> None:
    found = powershell_faults(sample.encode("utf-8"))
    assert any(fault in line for line in found), found


def test_the_powershell_rules_let_good_code_pass() -> None:
    good = """
param([string]$Name = 'a', [Parameter(ValueFromRemainingArguments = $true)][string[]]$Rest = @())
$ErrorActionPreference = 'Stop'
function Get-It([int]$Number) { $twice = 2 * $Number; return $twice }
foreach ($item in @($Name)) { Write-Host "$item ${Name} $($Rest.Count) $env:PATH" }
$first, $second = 1, 2
[string]$typed = Get-It $first
$splat = @($second, $typed)
try { & $env:PYTHON @splat } catch { Write-Host $_.Exception.Message }
if (($LASTEXITCODE -ne 0) -or -not $?) { exit $LASTEXITCODE }
"""
    assert powershell_faults(good.encode()) == []
    assert powershell_faults(b"\xef\xbb\xbf" + "Write-Host 'caf\u00e9'".encode()) == []


def test_an_unchecked_native_call_is_found() -> None:
    assert native_calls_without_check("& $python -m pip\nWrite-Host 'done'\n")
    assert not native_calls_without_check("& $python -m pip\nexit $LASTEXITCODE\n")


# What bash 3.2, the one that macOS ships, does not have.
NEWER_THAN_BASH_3_2 = {
    "mapfile or readarray": r"\b(mapfile|readarray)\b",
    "associative array": r"\b(declare|local|typeset)\s+-[a-z]*A",
    "name reference": r"\b(declare|local|typeset)\s+-[a-z]*n",
    "change of case": r"\$\{\w+(\[[^]]*\])?(,,?|\^\^?)",
    "both streams in one": r"&>>|\|&",
    "negative index": r"\$\{\w+\[-\d",
    "printf of time": r"printf\s.*%\(",
    "wait for any": r"\bwait\s+-n\b",
    "@ transformation": r"\$\{\w+@[A-Za-z]\}",
}


def bash_faults(source: str) -> list[str]:
    code = "\n".join(line.partition(" #")[0] for line in source.splitlines() if not line.startswith("#"))
    return [name for name, pattern in NEWER_THAN_BASH_3_2.items() if re.search(pattern, code)]


@pytest.mark.parametrize("script", BASH, ids=lambda path: path.name)
def test_bash_launchers_are_good_for_3_2(script: Path) -> None:
    source = script.read_text(encoding="utf-8")
    assert bash_faults(source) == []
    assert source.startswith("#!/usr/bin/env bash\n")
    assert "\r" not in source
    assert re.search(r"^set -e?uo pipefail$", source, re.MULTILINE)


@pytest.mark.parametrize(
    "sample",
    [
        "mapfile -t lines < file",
        "declare -A table",
        "local -n other=$1",
        'echo "${name,,}"',
        "make &>> log",
        'echo "${words[-1]}"',
        "wait -n",
        'echo "${words@Q}"',
    ],
)
def test_each_bash_rule_fires(sample: str) -> None:
    assert bash_faults(sample)


def test_shellcheck_is_content_with_every_shell_script() -> None:
    tool = Path(sys.executable).with_name("shellcheck.exe" if sys.platform == "win32" else "shellcheck")
    done = subprocess.run([tool, *BASH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_launchers_agree_with_pyproject_on_python_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (low, high) = setup_env.OLDEST, setup_env.NEWEST
    assert project["requires-python"] == f">={low[0]}.{low[1]},<{high[0]}.{high[1] + 1}"
    for name in ("setup_env.sh", "setup_env.ps1"):
        assert f"not {low} <= sys.version_info[:2] <= {high}" in (ROOT / "scripts" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["start_training.sh", "run_tests.sh", "Start_AI_Training.ps1", "run_tests.ps1"])
def test_what_starts_torch_keeps_waiting_threads_from_spinning(name: str) -> None:
    lines = (ROOT / "scripts" / name).read_text(encoding="utf-8").splitlines()
    starts = max(number for number, line in enumerate(lines) if " -m " in line or "'-m'" in line or "@words" in line)
    default = {
        "sh": 'export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"',
        "ps1": "if (-not $env:OMP_WAIT_POLICY) { $env:OMP_WAIT_POLICY = 'PASSIVE' }",
    }[name.rpartition(".")[2]]
    assert default in lines[:starts]


@pytest.mark.skipif(sys.platform == "win32", reason="bash launchers are for Linux and macOS")
@pytest.mark.parametrize("name", ["start_training.sh", "start_tensorboard.sh", "run_tests.sh"])
def test_help_comes_at_once_and_installs_nothing(tmp_path: Path, name: str) -> None:
    # Without setup_env.sh beside it, whatever would install first fails.
    script = shutil.copy(ROOT / "scripts" / name, tmp_path)
    done = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"bash scripts/{name}" in done.stdout


def test_no_launcher_names_a_package_index() -> None:
    for path in [*POWERSHELL, *BASH, ROOT / "scripts" / "setup_env.py", ROOT / setup_env.CPU_CONSTRAINTS]:
        assert not re.search(r"https?://|\.org\b|\.com\b", path.read_text(encoding="utf-8")), path


@pytest.mark.skipif(sys.platform == "win32", reason="bash launchers are for Linux and macOS")
class TestFindingPython:
    """`setup_env.sh` with a PATH that holds only what the test puts there."""

    @pytest.fixture
    def tools(self, tmp_path: Path) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in ("bash", "dirname", "env"):
            found = shutil.which(name)
            assert found is not None
            (folder / name).symlink_to(found)
        return folder

    @pytest.fixture
    def project(self, tmp_path: Path) -> Path:
        folder = tmp_path / "a project"
        (folder / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "scripts" / "setup_env.sh", folder / "scripts")
        (folder / "scripts" / "setup_env.py").write_text("import sys\nprint('ran', *sys.argv[1:])\nsys.exit(7)\n")
        return folder

    def add(self, tools: Path, name: str, version: str) -> None:
        """A command that passes the version check of the launcher for Python 3.11 only, then is the real Python."""
        answer = "exit 0" if version == "3.11" else "exit 1"
        tool = tools / name
        tool.write_text(f'#!{tools}/bash\nif [ "$1" = -c ]; then {answer}; fi\nexec "{sys.executable}" "$@"\n')
        tool.chmod(0o755)

    def run(self, project: Path, tools: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [str(tools / "bash"), str(project / "scripts" / "setup_env.sh"), *words]
        return subprocess.run(
            command, env={"PATH": str(tools), **environment}, cwd="/", capture_output=True, text=True, check=False
        )

    def test_no_python_is_one_clear_line(self, project: Path, tools: Path) -> None:
        done = self.run(project, tools)
        assert done.returncode == 2
        assert done.stderr.startswith("error: no Python 3.11, 3.12 or 3.13 found")
        assert done.stderr.count("\n") == 1

    def test_an_old_python_is_passed_over(self, project: Path, tools: Path) -> None:
        self.add(tools, "python3", "3.8")
        assert self.run(project, tools).returncode == 2
        self.add(tools, "python3.12", "3.11")
        done = self.run(project, tools, "--dev")
        assert (done.returncode, done.stdout) == (7, "ran --dev\n")

    def test_the_variable_wins(self, project: Path, tools: Path) -> None:
        self.add(tools, "python3", "3.11")
        done = self.run(project, tools, PYTHON="/nowhere/python")
        assert done.returncode == 2
        assert "PYTHON=/nowhere/python is not a Python" in done.stderr
        self.add(tools, "mine", "3.11")
        assert self.run(project, tools, PYTHON="mine").returncode == 7
