"""Setting up: what is asked for, when nothing is to be done, and that a failure is never taken for done."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from scripts import setup_env
from scripts.setup_env import (
    InstallError,
    SetupError,
    Stamp,
    read_project,
    set_up,
    setup_key,
    venv_python,
    venv_version,
)

ROOT = Path(__file__).resolve().parents[2]
NOTHING = 'name = "tiny"\ndependencies = []\noptional-dependencies = {dev = [], extra = []}\n'


def make_project(folder: Path, project_table: str = NOTHING) -> Path:
    (folder / "scripts").mkdir(parents=True)
    (folder / "scripts" / "constraints-cpu.txt").write_text("torch==2.13.0\n")
    (folder / "pyproject.toml").write_text(f"[project]\n{project_table}")
    return folder


def make_ready(root: Path, *extras: str, torch_index: str = "") -> None:
    """What a complete set-up leaves, without the minutes: an interpreter, its version and the stamp."""
    python = venv_python(root)
    python.parent.mkdir(parents=True)
    python.touch()
    version = ".".join(map(str, sys.version_info[:3]))
    (root / ".venv" / "pyvenv.cfg").write_text(f"home = /somewhere\nversion = {version}\n")
    key = setup_key(root, read_project(root), version, torch_index)
    setup_env._write_stamp(root, Stamp(key, torch_index, extras))


@pytest.fixture
def no_installs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Records what would be installed instead of installing it."""
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(setup_env, "_install", lambda *arguments: calls.append(arguments))
    return calls


def test_the_projects_own_requirements_are_read() -> None:
    project = read_project(ROOT)
    assert project.torch.startswith("torch>=")
    assert not any(requirement.startswith("torch>") for requirement in project.dependencies)
    assert any(requirement.startswith("numpy") for requirement in project.dependencies)
    assert any(requirement.startswith("pytest>") for requirement in project.extras["dev"])
    pinned = (ROOT / setup_env.CPU_CONSTRAINTS).read_text(encoding="utf-8").splitlines()
    assert "torch==2.13.0" in pinned


def test_nothing_is_done_twice(tmp_path: Path, no_installs: list[tuple[object, ...]]) -> None:
    root = make_project(tmp_path / "p")
    make_ready(root, "dev")
    assert not set_up(root, ["dev"], insist=False, torch_index="")
    assert not set_up(root, [], insist=True, torch_index="")
    assert no_installs == []


@pytest.mark.parametrize("change", ["dependency", "constraint", "extra", "index", "stamp", "python"])
def test_each_change_installs_again(tmp_path: Path, no_installs: list[tuple[object, ...]], change: str) -> None:
    root = make_project(tmp_path / "p")
    make_ready(root)
    if change == "dependency":
        (root / "pyproject.toml").write_text('[project]\nname = "tiny"\ndependencies = ["rich"]\n')
    elif change == "constraint":
        (root / "scripts" / "constraints-cpu.txt").write_text("torch==2.12.0\n")
    elif change == "stamp":
        (root / ".venv" / setup_env.STAMP).write_text("{torn")
    elif change == "python":
        path = root / ".venv" / "pyvenv.cfg"
        path.write_text(path.read_text().replace(f"{sys.version_info[1]}.", f"{sys.version_info[1]}.9"))
    extras = ["extra"] if change == "extra" else []
    assert set_up(root, extras, insist=False, torch_index="an-index" if change == "index" else "")
    assert len(no_installs) == 1
    assert not set_up(root, extras, insist=False, torch_index="")


def test_extras_add_up_and_an_unset_index_is_no_change(tmp_path: Path, no_installs: list[tuple[object, ...]]) -> None:
    root = make_project(tmp_path / "p")
    make_ready(root, "extra", torch_index="an-index")
    assert set_up(root, ["dev"], insist=False, torch_index="")
    assert not set_up(root, ["dev", "extra"], insist=False, torch_index="an-index")
    assert len(no_installs) == 1


def test_other_settings_in_pyproject_change_nothing(tmp_path: Path, no_installs: list[tuple[object, ...]]) -> None:
    root = make_project(tmp_path / "p")
    make_ready(root)
    with (root / "pyproject.toml").open("a") as stream:
        stream.write("[tool.ruff]\nline-length = 100\n")
    assert not set_up(root, [], insist=False, torch_index="")
    assert no_installs == []


def test_a_failed_installation_leaves_no_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_project(tmp_path / "p")
    make_ready(root)

    def fail(*_: object) -> None:
        raise InstallError("pip said no")

    monkeypatch.setattr(setup_env, "_install", fail)
    for _ in range(2):
        with pytest.raises(InstallError):
            set_up(root, ["dev"], insist=False, torch_index="")
        assert not (root / ".venv" / setup_env.STAMP).exists()


def test_an_unknown_extra_is_refused_by_name(tmp_path: Path) -> None:
    root = make_project(tmp_path / "p")
    with pytest.raises(SetupError, match=r"no extra is called 'dve'; pyproject\.toml has dev, extra"):
        set_up(root, ["dve"], insist=False, torch_index="")


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    root = make_project(tmp_path / "p")
    (root / ".venv").mkdir()
    (root / ".venv" / "mine.txt").write_text("keep")
    with pytest.raises(SetupError, match="not a Python environment"):
        set_up(root, [], insist=False, torch_index="")
    assert (root / ".venv" / "mine.txt").read_text() == "keep"


def test_missing_ensurepip_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_project(tmp_path / "p")
    monkeypatch.setattr(setup_env.importlib.util, "find_spec", lambda _: None)
    version = ".".join(map(str, sys.version_info[:2]))
    with pytest.raises(SetupError, match=f"sudo apt install python{version}-venv"):
        set_up(root, [], insist=False, torch_index="")


def test_two_starts_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_project(tmp_path / "p")
    make_ready(root)
    entered = threading.Event()
    installs = []

    def slow_install(*_: object) -> None:
        entered.set()
        time.sleep(0.3)
        installs.append(1)

    monkeypatch.setattr(setup_env, "_install", slow_install)
    outcomes: list[bool] = []
    threads = [
        threading.Thread(target=lambda: outcomes.append(set_up(root, ["dev"], insist=False, torch_index="")))
        for _ in range(2)
    ]
    threads[0].start()
    assert entered.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join(20)
    assert installs == [1]
    assert sorted(outcomes) == [False, True]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="runs the bash launcher")
def test_a_real_environment_from_nothing(tmp_path: Path) -> None:
    """No package is downloaded: the project needs none, then one that is not there."""
    root = make_project(tmp_path / "a project")
    for name in ("setup_env.sh", "setup_env.py"):
        (root / "scripts" / name).write_bytes((ROOT / "scripts" / name).read_bytes())
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHON", "TORCH_INDEX"}}

    def start(*words: str) -> tuple[int, float]:
        started = time.monotonic()
        command = ["bash", str(root / "scripts" / "setup_env.sh"), *words]
        return subprocess.run(command, env=environment, cwd="/", check=False).returncode, time.monotonic() - started

    assert start("--dev")[0] == 0
    assert venv_version(root) == ".".join(map(str, sys.version_info[:3]))
    assert subprocess.run([venv_python(root), "-m", "pip", "--version"], check=False).returncode == 0
    code, seconds = start("--dev")
    assert code == 0
    assert seconds < 1
    (root / "pyproject.toml").write_text(
        f'[project]\nname = "tiny"\ndependencies = ["nothing @ {(tmp_path / "nothing.whl").as_uri()}"]\n'
    )
    assert start()[0] == 1
    assert not (root / ".venv" / setup_env.STAMP).exists()
    assert start()[0] == 1
    (root / "pyproject.toml").write_text(f"[project]\n{NOTHING}")
    venv_python(root).unlink()
    assert start()[0] == 0
    assert subprocess.run([venv_python(root), "-c", ""], check=False).returncode == 0
