"""A checkpoint folder is what was written, byte for byte, or it is refused."""

import hashlib
import os
import random
from pathlib import Path

import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tagger.checkpoint import format as checkpoint_format
from tagger.checkpoint.format import (
    CheckpointError,
    FileEntry,
    Manifest,
    checkpoint_name,
    encode_state,
    list_checkpoints,
    read_checkpoint,
    read_manifest,
    read_part,
    verify_checkpoint,
    write_tensors,
)
from tagger.checkpoint.writer import CheckpointContent, write_checkpoint
from tagger.files import FormatError

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def content(step: int = 7, sequence: int = 1, value: float = 1.0) -> CheckpointContent:
    tensors = {
        "model": {"head.weight": torch.full((5, 3), value), "head.bias": torch.arange(5.0)},
        "optimizer": {"head.weight/exp_avg": torch.randn(5, 3), "head.weight/step": torch.tensor(4.0)},
        "rng": {"torch": torch.arange(64, dtype=torch.uint8)},
    }
    return CheckpointContent(step, sequence, tensors, encode_state({"step": step}), "v" * 64, "c" * 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (4, 1, 3)])
def test_safetensors_reads_what_is_written(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    with (tmp_path / "x").open("wb") as stream:
        write_tensors(stream, {"a": tensor})
    back = load_file(tmp_path / "x")["a"]
    assert back.dtype == dtype and back.shape == tensor.shape and torch.equal(back, tensor)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=12), st.sampled_from(DTYPES), max_size=8))
def test_any_names_and_mixed_types_round_trip(tmp_path_factory: pytest.TempPathFactory, types: dict) -> None:
    tensors = {name: torch.randint(0, 2, (3, 2)).to(dtype) for name, dtype in types.items() if name != "__metadata__"}
    path = tmp_path_factory.mktemp("mixed") / "x"
    with path.open("wb") as stream:
        entry = write_tensors(stream, tensors)
    assert entry == FileEntry(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    back = load_file(path)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_views_and_parameters_are_written_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    with (tmp_path / "x").open("wb") as stream:
        write_tensors(stream, {"turned": base.T, "row": base[1], "weight": torch.nn.Parameter(base[:, :2])})
    back = load_file(tmp_path / "x")
    assert torch.equal(back["turned"], base.T) and torch.equal(back["row"], base[1])
    assert torch.equal(back["weight"], base[:, :2])


def test_a_checkpoint_reads_back_equal(tmp_path: Path) -> None:
    written = content()
    path = write_checkpoint(tmp_path, written)
    loaded = read_checkpoint(path)
    assert path.name == "step-000000007" and loaded.step == 7
    assert loaded.manifest.vocabulary_sha256 == "v" * 64 and loaded.manifest.config_sha256 == "c" * 64
    assert loaded.tensors.keys() == written.tensors.keys()
    for part, tensors in written.tensors.items():
        assert loaded.tensors[part].keys() == tensors.keys()
        assert all(torch.equal(loaded.tensors[part][name], tensor) for name, tensor in tensors.items())


def test_one_part_reads_alone(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, content())
    (path / "optimizer.safetensors").write_bytes(b"broken")
    _, tensors = read_part(path, "model")
    assert set(tensors) == {"head.weight", "head.bias"}
    with pytest.raises(CheckpointError, match="holds no ema"):
        read_part(path, "ema")


def mutate(data: bytes, kind: str, rng: random.Random) -> bytes:
    if kind == "truncate":
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    if kind == "flip":
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "zero":
        start = rng.randrange(len(data))
        page = slice(start, min(start + 64, len(data)))
        changed[page] = bytes(len(changed[page]))
    else:
        changed += b"\n"
    return bytes(changed)


@pytest.mark.parametrize("kind", ["truncate", "flip", "zero", "extend"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json"]
)
def test_every_mutation_of_every_file_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    path = write_checkpoint(tmp_path, content())
    good = (path / name).read_bytes()
    rng = random.Random(f"{kind}{name}")
    for _ in range(25):
        bad = mutate(good, kind, rng)
        if bad == good:
            continue
        (path / name).write_bytes(bad)
        with pytest.raises(CheckpointError, match=path.name):
            read_checkpoint(path)
    (path / name).write_bytes(good)
    read_checkpoint(path)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    path = write_checkpoint(tmp_path, content())
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        verify_checkpoint(path)


@pytest.mark.skipif(os.name == "nt", reason="links and pipes need POSIX")
@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_links_and_pipes_are_refused_without_being_opened(tmp_path: Path, name: str) -> None:
    path = write_checkpoint(tmp_path, content())
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="not a regular file"):
        verify_checkpoint(path)
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(CheckpointError, match="not a regular file"):
        verify_checkpoint(path)


def forge(path: Path, **changes: object) -> None:
    """A manifest with changed content and a matching hash, as someone with bad intent would write it."""
    values = orjson.loads((path / "manifest.json").read_bytes())
    values.pop("manifest_sha256")
    values.update(changes)
    values["manifest_sha256"] = checkpoint_format._digest(values)
    (path / "manifest.json").write_bytes(checkpoint_format._encode(values))


def test_a_manifest_cannot_name_other_files(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, content())
    files = orjson.loads((path / "manifest.json").read_bytes())["files"]
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes((path / "model.safetensors").read_bytes())
    for name in ("../secret.safetensors", str(secret), "model.pt", "model.safetensors\0"):
        forge(path, files={**files, name: files["model.safetensors"]})
        with pytest.raises(CheckpointError, match="not a checkpoint's file"):
            read_checkpoint(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {}},
        {"files": []},
        {"files": {"model.safetensors": {"size": -1, "sha256": "0" * 64}}},
        {"files": {"model.safetensors": {"size": 5, "sha256": "../../x"}}},
        {"step": 8},
        {"step": "seven"},
        {"sequence": None},
        {"format_version": "one"},
        {"vocabulary_sha256": 5},
    ],
)
def test_a_forged_manifest_is_refused(tmp_path: Path, changes: dict) -> None:
    path = write_checkpoint(tmp_path, content())
    forge(path, **changes)
    with pytest.raises(CheckpointError, match="is broken"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"null", b"{}", b"\x80\x04\x95", b"[" * 5000, b"\xff\xfe{}", b'{"step": 1' + b"0" * 999 + b"}"],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, data: bytes) -> None:
    path = write_checkpoint(tmp_path, content())
    (path / "manifest.json").write_bytes(data)
    with pytest.raises(CheckpointError, match="is broken"):
        read_manifest(path)


def test_a_huge_manifest_is_not_read(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, content())
    with (path / "manifest.json").open("r+b") as stream:
        stream.truncate(1 << 40)  # sparse
    with pytest.raises(CheckpointError, match="has 1099511627776 bytes"):
        read_manifest(path)


def test_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, content())
    forge(path, format_version=2)
    with pytest.raises(FormatError, match="format_version 2, this program reads up to 1"):
        read_checkpoint(path)


def test_tensors_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, content())
    files = orjson.loads((path / "manifest.json").read_bytes())["files"]
    for bad in (b"", b"\x80\x04\x95pickle", (2**62).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"{}x"):
        (path / "model.safetensors").write_bytes(bad)
        forge(path, files={**files, "model.safetensors": {"size": len(bad), "sha256": hashlib.sha256(bad).hexdigest()}})
        with pytest.raises(CheckpointError, match=r"model\.safetensors is not safetensors"):
            read_checkpoint(path)


@pytest.mark.parametrize("value", [object(), 2**70, b"bytes", {1: "a"}])
def test_state_that_json_does_not_hold_is_refused(value: object) -> None:
    with pytest.raises(CheckpointError, match="not JSON"):
        encode_state({"extra": value})  # type: ignore[dict-item]


def test_a_score_that_is_nan_stops_no_save() -> None:
    state = encode_state({"extra": {"final": [float("nan"), float("inf"), 0.5]}})
    assert orjson.loads(state)["extra"] == {"final": [None, None, 0.5]}


@settings(max_examples=100, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_state_keeps_floats_exactly(value: float) -> None:
    assert orjson.loads(encode_state({"x": value}))["x"] == value


def test_manifest_encodes_to_one_byte_string() -> None:
    entry = FileEntry(3, "0" * 64)
    manifest = Manifest(5, 2, {"model.safetensors": entry, "state.json": entry}, "a", None)
    again = Manifest(5, 2, {"state.json": entry, "model.safetensors": entry}, "a", None)
    assert manifest.encode() == again.encode()


def test_listing_is_by_step_and_ignores_other_names(tmp_path: Path) -> None:
    names = [checkpoint_name(5), checkpoint_name(40), checkpoint_name(40, 2), checkpoint_name(10**10)]
    for name in [*reversed(names), ".tmp-step-000000009-ab", "step-5", "step-000000005.old", "notes"]:
        (tmp_path / name).mkdir()
    (tmp_path / checkpoint_name(6)).write_text("a file")
    assert [path.name for path in list_checkpoints(tmp_path)] == names
    assert list_checkpoints(tmp_path / "absent") == []
