"""Checkpoints made with bad intent, manifest and hashes in order: none is executed, none hangs, each says why."""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
import torch

from scripts.faults.toy_run import METRIC, set_step, toy_state
from tagger.checkpoint import format as checkpoint_format
from tagger.checkpoint.format import CheckpointError
from tagger.checkpoint.retention import SavePolicy
from tagger.checkpoint.store import CheckpointStore, load_checkpoint, read_best
from tagger.files import FormatError
from training_utils import CheckpointManager, load_weights

posix = pytest.mark.skipif(os.name == "nt", reason="links and pipes need POSIX")


class Trap:
    """Leaves a file where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    state = toy_state(16)
    with CheckpointManager(tmp_path / "run", 2, METRIC) as manager:
        set_step(state, 7)
        manager.save(state, {METRIC: 0.5})
    return tmp_path / "run" / "step-000000007"


def canary_of(checkpoint: Path) -> Path:
    """What is there when something was executed."""
    return checkpoint.parent.parent / "canary"


def forge(checkpoint: Path, name: str, data: bytes) -> None:
    """Put `data` in the place of a file, with the size and hash that the manifest then needs."""
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).write_bytes(data)
    forge_manifest(checkpoint, {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}})


def forge_manifest(checkpoint: Path, files: dict[str, object]) -> None:
    path = checkpoint / "manifest.json"
    values = orjson.loads(path.read_bytes())
    values.pop("manifest_sha256")
    values["files"] = {**values["files"], **files}
    values["manifest_sha256"] = checkpoint_format._digest(values)
    path.write_bytes(checkpoint_format._encode(values))


def safetensors(header: object, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def a_pickle(checkpoint: Path) -> None:
    stream = io.BytesIO()
    torch.save({"weight": Trap(canary_of(checkpoint))}, stream, _use_new_zipfile_serialization=False)
    forge(checkpoint, "model.safetensors", stream.getvalue())


def a_torch_zip(checkpoint: Path) -> None:
    stream = io.BytesIO()
    torch.save({"weight": Trap(canary_of(checkpoint))}, stream)
    assert zipfile.is_zipfile(stream)
    forge(checkpoint, "model.safetensors", stream.getvalue())


def a_pickled_state(checkpoint: Path) -> None:
    stream = io.BytesIO()
    torch.save(Trap(canary_of(checkpoint)), stream, _use_new_zipfile_serialization=False)
    forge(checkpoint, "state.json", stream.getvalue())


def a_path_upwards(checkpoint: Path) -> None:
    forge_manifest(checkpoint, {"../../secret.safetensors": {"size": 1, "sha256": "0" * 64}})


def an_absolute_path(checkpoint: Path) -> None:
    forge_manifest(checkpoint, {str(canary_of(checkpoint)): {"size": 1, "sha256": "0" * 64}})


def a_link(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.rename(checkpoint.parent / "elsewhere")
    path.symlink_to(checkpoint.parent / "elsewhere")


def a_pipe(checkpoint: Path) -> None:
    (checkpoint / "state.json").unlink()
    os.mkfifo(checkpoint / "state.json")


def a_pipe_as_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    os.mkfifo(checkpoint / "manifest.json")


def a_device(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").symlink_to("/dev/zero")


def a_folder(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").mkdir()


def a_huge_header(checkpoint: Path) -> None:
    forge(checkpoint, "model.safetensors", (2**62).to_bytes(8, "little") + b"{}")


def a_huge_shape(checkpoint: Path) -> None:
    header = {"weight": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}
    forge(checkpoint, "model.safetensors", safetensors(header, bytes(8)))


def overlapping_tensors(checkpoint: Path) -> None:
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    forge(checkpoint, "model.safetensors", safetensors({"weight": one, "bias": one}, bytes(8)))


def tensors_outside_the_file(checkpoint: Path) -> None:
    header = {"weight": {"dtype": "F32", "shape": [2], "data_offsets": [1 << 20, (1 << 20) + 8]}}
    forge(checkpoint, "model.safetensors", safetensors(header, bytes(8)))


def an_unknown_type(checkpoint: Path) -> None:
    header = {"weight": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 8]}}
    forge(checkpoint, "model.safetensors", safetensors(header, bytes(8)))


def weights_that_are_nan(checkpoint: Path) -> None:
    header = {"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    forge(checkpoint, "model.safetensors", safetensors(header, torch.full((2,), torch.nan).numpy().tobytes()))


def json_with_nan(checkpoint: Path) -> None:
    forge(checkpoint, "state.json", b'{"format_version": 1, "step": NaN}')


def deep_json(checkpoint: Path) -> None:
    forge(checkpoint, "state.json", b'{"format_version": 1, "extra": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")


def deep_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_bytes(b"[" * 500_000)


def json_that_is_no_object(checkpoint: Path) -> None:
    forge(checkpoint, "state.json", b"[1, 2]")


CASES: dict[Callable[[Path], None], str] = {
    a_pickle: "model.safetensors is not safetensors",
    a_torch_zip: "model.safetensors is not safetensors",
    a_pickled_state: "not valid JSON",
    a_path_upwards: "not a checkpoint's file",
    an_absolute_path: "not a checkpoint's file",
    a_link: "model.safetensors is not a regular file",
    a_pipe: "state.json is not a regular file",
    a_pipe_as_manifest: "manifest.json is not a regular file",
    a_device: "model.safetensors is not a regular file",
    a_folder: "model.safetensors is not a regular file",
    a_huge_header: "model.safetensors is not safetensors",
    a_huge_shape: "model.safetensors is not safetensors",
    overlapping_tensors: "model.safetensors is not safetensors",
    tensors_outside_the_file: "model.safetensors is not safetensors",
    an_unknown_type: "model.safetensors is not safetensors",
    weights_that_are_nan: "weight in model.safetensors is not finite",
    json_with_nan: "not valid JSON",
    deep_json: "not valid JSON",
    deep_manifest: "manifest.json cannot be read",
    json_that_is_no_object: "expected a JSON object",
}
NEEDS_POSIX = {a_link, a_pipe, a_pipe_as_manifest, a_device}


@pytest.mark.parametrize(
    "make", [pytest.param(make, marks=posix if make in NEEDS_POSIX else ()) for make in CASES], ids=lambda m: m.__name__
)
def test_it_is_refused_by_one_clear_line(checkpoint: Path, make: Callable[[Path], None]) -> None:
    make(checkpoint)
    with pytest.raises(CheckpointError, match="is broken") as caught:
        load_checkpoint(checkpoint.parent, str(checkpoint))
    message = str(caught.value)
    assert CASES[make] in message and checkpoint.name in message and len(message) < 600 and "\n" not in message
    # Asked for by "latest" it is never a fresh start.
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        load_checkpoint(checkpoint.parent, "latest")
    if "model.safetensors" in CASES[make]:
        with pytest.raises(CheckpointError, match="is broken"):
            load_weights(checkpoint, prefer_ema=False)
    assert not canary_of(checkpoint).exists()


@pytest.mark.parametrize("name", ["../../outside", "/etc", "step-000000007/..", "", "step-٠٠٠٠٠٠٠٠٧"])
def test_a_record_leads_nowhere_else(checkpoint: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    content = {"format_version": 1, "checkpoint": name, "metric": METRIC, "value": 0.9, "step": 7}
    for record in ("best.json", "last.json"):
        (checkpoint.parent / record).write_bytes(orjson.dumps(content))
    with pytest.raises(FormatError, match="which is none"):
        read_best(checkpoint.parent)
    for which in ("best", "latest"):
        loaded = load_checkpoint(checkpoint.parent, which)
        assert loaded is not None and loaded.path == checkpoint
    assert f"by its score {checkpoint.name} is the best" in caplog.text


@posix
def test_records_that_are_pipes_do_not_hang(checkpoint: Path) -> None:
    for record in ("best.json", "last.json"):
        (checkpoint.parent / record).unlink()
        os.mkfifo(checkpoint.parent / record)
    for which in ("best", "latest"):
        loaded = load_checkpoint(checkpoint.parent, which)
        assert loaded is not None and loaded.step == 7


@posix
def test_deleting_a_checkpoint_that_is_a_link_deletes_the_link_alone(checkpoint: Path, tmp_path: Path) -> None:
    elsewhere = checkpoint.rename(tmp_path / "archive")
    checkpoint.symlink_to(elsewhere)
    store = CheckpointStore(checkpoint.parent, SavePolicy(1), METRIC)
    state = toy_state(16)
    set_step(state, 8)
    tensors, values = state.snapshot_parts()
    store.commit(8, tensors, checkpoint_format.encode_state(values), value=0.9)
    assert not checkpoint.is_symlink() and (elsewhere / "manifest.json").is_file()
