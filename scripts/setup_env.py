"""Make `.venv` and install what pyproject.toml asks for; the mechanism behind setup_env.sh and setup_env.ps1.

The suite is run from its folder and is not itself installed. Imports the standard library only: it runs before anything
is installed. Refuses a Python outside 3.11 to 3.13, an extra that pyproject.toml does not have, and a Python without
the means to make an environment. A failed or interrupted installation leaves no stamp, so the next start does it again.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import venv
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

ROOT = Path(__file__).resolve().parent.parent
VENV = ".venv"
STAMP = "tagsmith-setup.json"
CPU_CONSTRAINTS = Path("scripts") / "constraints-cpu.txt"
FORMAT_VERSION = 1
OLDEST, NEWEST = (3, 11), (3, 13)
LOCK_PATIENCE_S = 1800.0


class SetupError(ValueError):
    """Something that the user can mend; one line."""


class InstallError(RuntimeError):
    """A tool that failed; its own message stands above."""


@dataclass(frozen=True)
class Stamp:
    """What the last complete installation left behind."""

    key: str = ""
    torch_index: str = ""
    extras: tuple[str, ...] = ()


@dataclass(frozen=True)
class Project:
    """What pyproject.toml asks for: `torch` is its one requirement, `dependencies` are the others."""

    torch: str
    dependencies: tuple[str, ...]
    extras: dict[str, tuple[str, ...]]


def read_project(root: Path) -> Project:
    """Requirements of `root`/pyproject.toml."""
    with (root / "pyproject.toml").open("rb") as stream:
        table = tomllib.load(stream)["project"]
    torch = [requirement for requirement in table["dependencies"] if _name_of(requirement) == "torch"]
    others = tuple(requirement for requirement in table["dependencies"] if requirement not in torch)
    extras = {name: tuple(requirements) for name, requirements in table.get("optional-dependencies", {}).items()}
    return Project(torch[0] if torch else "", others, extras)


def _name_of(requirement: str) -> str:
    for position, letter in enumerate(requirement):
        if not (letter.isalnum() or letter in "-_."):
            return requirement[:position].lower()
    return requirement.lower()


def setup_key(root: Path, project: Project, python_version: str, torch_index: str) -> str:
    """Changes when an installation made before is no longer the right one."""
    asked = [project.torch, project.dependencies, project.extras, python_version, torch_index]
    asked.append((root / CPU_CONSTRAINTS).read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def venv_python(root: Path) -> Path:
    """The interpreter of the project's environment, whether or not it is there."""
    return root / VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def venv_version(root: Path) -> str | None:
    """Version of the environment, as in 3.11.7; None where there is none or its interpreter is gone."""
    if not venv_python(root).exists():
        return None
    with contextlib.suppress(OSError):
        for line in (root / VENV / "pyvenv.cfg").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition("=")
            if name.strip() in {"version", "version_info"}:
                return ".".join(value.strip().split(".")[:3])
    return None


def set_up(root: Path, extras: Sequence[str], *, insist: bool, torch_index: str) -> bool:
    """Bring `.venv` of `root` up to date; False where nothing had to be done. Raises SetupError or InstallError.

    `insist`: an environment of another Python version is made anew for the Python that runs this. `torch_index` is the
    package index that torch comes from; "" keeps to the one used before, or leaves the choice to pip.
    """
    if not _is_supported(_version_here()):
        raise SetupError(f"Python {_version_here()} cannot be used; set PYTHON to a Python 3.11, 3.12 or 3.13")
    project = read_project(root)
    unknown = sorted(set(extras) - set(project.extras))
    if unknown:
        known = ", ".join(sorted(project.extras)) or "none"
        raise SetupError(f"no extra is called '{unknown[0]}'; pyproject.toml has {known}")
    if _is_done(root, project, extras, torch_index, insist=insist):
        return False
    with _alone(root):
        if _is_done(root, project, extras, torch_index, insist=insist):
            return False
        if not _keeps_venv(venv_version(root), insist=insist):
            _make_venv(root)
        before = _read_stamp(root)
        torch_index = torch_index or before.torch_index
        key = setup_key(root, project, venv_version(root) or _version_here(), torch_index)
        (root / VENV / STAMP).unlink(missing_ok=True)
        _install(root, project, extras, torch_index, torch_index != before.torch_index)
        kept = before.extras if before.key == key else ()
        _write_stamp(root, Stamp(key, torch_index, tuple(sorted({*extras, *kept}))))
    return True


def _version_here() -> str:
    return ".".join(str(part) for part in sys.version_info[:3])


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _is_supported(version: str) -> bool:
    return OLDEST <= _minor(version) <= NEWEST


def _keeps_venv(version: str | None, *, insist: bool) -> bool:
    if version is None or not _is_supported(version):
        return False
    return not insist or _minor(version) == _minor(_version_here())


def _is_done(root: Path, project: Project, extras: Sequence[str], torch_index: str, *, insist: bool) -> bool:
    version = venv_version(root)
    stamp = _read_stamp(root)
    return (
        version is not None
        and _keeps_venv(version, insist=insist)
        and stamp.key == setup_key(root, project, version, torch_index or stamp.torch_index)
        and set(extras) <= set(stamp.extras)
    )


def _read_stamp(root: Path) -> Stamp:
    """The stamp of the last complete installation; an empty one where there is none or another program wrote it."""
    try:
        content = json.loads((root / VENV / STAMP).read_text(encoding="utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            return Stamp()
        return Stamp(content["key"], content["torch_index"], tuple(content["extras"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Stamp()


def _write_stamp(root: Path, stamp: Stamp) -> None:
    temporary = root / VENV / f"{STAMP}.tmp"
    temporary.write_text(json.dumps({"format_version": FORMAT_VERSION, **asdict(stamp)}, indent=2), encoding="utf-8")
    temporary.replace(root / VENV / STAMP)


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold the lock of the set-up; another start in the same folder waits for its turn."""
    path = root / ".tagsmith" / "setup.lock"
    path.parent.mkdir(exist_ok=True)
    with path.open("ab") as stream:
        waited_since = None
        while not _try_lock(stream):
            now = time.monotonic()
            if waited_since is None:
                waited_since = now
                print("another set-up is at work in this folder; waiting for it", flush=True)
            if now - waited_since > LOCK_PATIENCE_S:
                raise SetupError(f"another set-up has held {path} for {LOCK_PATIENCE_S / 60:g} minutes; end it first")
            time.sleep(0.5)
        yield  # closing the file, or the end of the process, gives the lock back


def _try_lock(stream: BinaryIO) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            stream.seek(0)
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _make_venv(root: Path) -> None:
    folder = root / VENV
    if importlib.util.find_spec("ensurepip") is None:
        name = f"python{'.'.join(str(part) for part in sys.version_info[:2])}-venv"
        raise SetupError(
            f"Python {_version_here()} lacks ensurepip; on Debian or Ubuntu: sudo apt install {name}, then start again"
        )
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
        raise SetupError(f"{folder} is not a Python environment; move it away, then start again")
    print(f"making {VENV} with Python {_version_here()}", flush=True)
    try:
        venv.create(folder, clear=True, symlinks=os.name != "nt", with_pip=True)
    except subprocess.CalledProcessError as error:
        raise InstallError(f"{folder} could not be made: pip could not be put into it ({error})") from error


def _install(root: Path, project: Project, extras: Sequence[str], torch_index: str, index_changed: bool) -> None:
    python = venv_python(root)
    if subprocess.run([python, "-c", "import pip"], capture_output=True, check=False).returncode:
        # An environment made by a tool that leaves pip out, or one whose making was interrupted.
        _call([python, "-m", "ensurepip", "--default-pip"], "pip could not be put into the environment")
    pip: list[str | Path] = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    if not sys.stdout.isatty():
        pip.append("--quiet")
    failed = "pip could not install the packages (its message stands above); mend that and start again"
    torch = [project.torch] if project.torch else []
    installed = _installed_torch(python, project.torch) if torch else None
    if torch and torch_index and (installed is None or index_changed):
        print(f"installing {project.torch} from the package index of TORCH_INDEX", flush=True)
        again = ["--force-reinstall"] if installed else []
        _call([*pip, *again, "--index-url", torch_index, project.torch], failed)
        installed = _installed_torch(python, project.torch)
    constraints: list[str | Path] = []
    if installed:
        torch = [f"torch=={installed}"]
    elif torch and _has_nvidia_driver():
        print("NVIDIA driver found: taking the ordinary build of torch", flush=True)
    elif torch:
        constraints = ["--constraint", root / CPU_CONSTRAINTS]
        print("no NVIDIA driver found: taking the CPU build of torch (TORCH_INDEX names another index)", flush=True)
    wanted = [*torch, *project.dependencies, *(r for name in extras for r in project.extras[name])]
    if wanted:
        print(f"installing {len(wanted)} packages and what they need (minutes the first time)", flush=True)
        _call([*pip, *constraints, *wanted], failed)


def _call(command: Sequence[str | Path], failed: str) -> None:
    code = subprocess.run(command, check=False).returncode
    if code:
        raise InstallError(failed)


def _installed_torch(python: Path, requirement: str) -> str | None:
    """Version of the environment's torch where it satisfies the requirement."""
    code = (
        "import sys, importlib.metadata, pip._vendor.packaging.requirements as requirements; "
        "found = importlib.metadata.version('torch'); wanted = requirements.Requirement(sys.argv[1]); "
        "print(found if wanted.specifier.contains(found, True) else '')"
    )
    answer = subprocess.run([python, "-I", "-c", code, requirement], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None


def _has_nvidia_driver() -> bool:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        return subprocess.run([tool, "-L"], capture_output=True, timeout=30, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _stop(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="setup_env",
        description="Make .venv and install what the suite needs; does nothing where that is done.",
        epilog="example: bash scripts/setup_env.sh --dev. Environment: PYTHON names the interpreter to use, "
        "TORCH_INDEX the package index for torch.",
    )
    parser.add_argument("--dev", action="store_true", help="also what the tests and checks need")
    parser.add_argument("--extras", default="", metavar="A,B", help="other extras of pyproject.toml, e.g. wandb")
    options = parser.parse_args(arguments)
    extras = [name.strip() for name in options.extras.split(",") if name.strip()] + ["dev"] * options.dev
    signal.signal(signal.SIGTERM, _stop)
    started = time.monotonic()
    try:
        torch_index = os.environ.get("TORCH_INDEX", "")
        worked = set_up(ROOT, extras, insist=bool(os.environ.get("PYTHON")), torch_index=torch_index)
    except (SetupError, InstallError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, SetupError) else 1
    except KeyboardInterrupt:
        return 130
    if worked:
        print(f"{VENV} is ready (Python {venv_version(ROOT)}, {time.monotonic() - started:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
