"""The tiny data set of `tests.tiny_dataset`, drawn once a test process."""

import shutil
from pathlib import Path

import pytest

from tests.tiny_dataset import write_dataset


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set itself, for tests that change nothing in it."""
    root = tmp_path_factory.mktemp("drawn") / "images"
    write_dataset(root)
    return root


@pytest.fixture(scope="session")
def images(drawn: Path) -> Path:
    """The set under the name that tests of whole runs use."""
    return drawn


@pytest.fixture
def root(drawn: Path, tmp_path: Path) -> Path:
    """A copy of the set, to be changed."""
    return shutil.copytree(drawn, tmp_path / "set")
