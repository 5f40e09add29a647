"""The four parsers of other people's files answer any bytes with a value or with their declared errors."""

import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.fuzz_parsers import PARSERS, main, seeds

ROOT = Path(__file__).resolve().parents[2]
# Pillow warns of what it finds in damaged TIFF headers.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
FAST = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

KEYS = st.sampled_from(
    ["tags", "rating", "categories", "filename", "format_version", "sha256", "name", "category", "count", "_comment"]
) | st.sampled_from(
    ["tag_to_index", "index_to_tag", "explicit_mappings", "regex_patterns", "pattern", "replacement", "symmetric_tags"]
)
WORDS = st.sampled_from(["left", "right", "arrow left", "^left_(.*)$", "right_\\1", "\\9", "(", "a" * 300, "\0", ""])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | WORDS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | WORDS, inner, max_size=6),
    max_leaves=8,
)
JSON = st.dictionaries(KEYS, VALUES, max_size=6).map(
    lambda value: orjson.dumps({"format_version": 1, **value}, option=orjson.OPT_NON_STR_KEYS)
)


@pytest.mark.parametrize("parser", PARSERS)
def test_the_seeds_are_understood(parser: str) -> None:
    for content in seeds(parser):
        PARSERS[parser](content)


@pytest.mark.parametrize("parser", PARSERS)
@FAST
@given(content=st.binary(max_size=400))
def test_any_bytes_have_an_answer(parser: str, content: bytes) -> None:
    PARSERS[parser](content)


@pytest.mark.parametrize("parser", PARSERS)
@FAST
@given(data=st.data())
def test_damaged_files_have_an_answer(parser: str, data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(seeds(parser))))
    for _ in range(data.draw(st.integers(1, 5))):
        start = data.draw(st.integers(0, len(content)))
        what = data.draw(st.sampled_from(["set", "insert", "cut"]))
        piece = data.draw(st.binary(min_size=1, max_size=4))
        content[start : start + {"set": len(piece), "insert": 0, "cut": 9}[what]] = b"" if what == "cut" else piece
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    PARSERS[parser](bytes(content))


@pytest.mark.parametrize("parser", ["sidecar", "vocabulary", "orientation", "ontology"])
@FAST
@given(content=JSON)
def test_json_of_the_wrong_form_has_an_answer(parser: str, content: bytes) -> None:
    PARSERS[parser](content)


@pytest.mark.parametrize("parser", ["sidecar", "vocabulary", "orientation", "ontology"])
@pytest.mark.parametrize("opening", [b"[", b'{"tags":', b'{"format_version":1,"explicit_mappings":'])
def test_depth_has_an_answer(parser: str, opening: bytes) -> None:
    PARSERS[parser](opening * 100_000)


def test_an_unknown_parser_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sidecars"]) == 2
    assert (
        capsys.readouterr().err
        == "no parser is called 'sidecars'; there are sidecar, vocabulary, orientation, ontology, image\n"
    )


def test_a_missing_fuzzer_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert main([]) == 2
    assert capsys.readouterr().err == "atheris is not installed; on Linux: bash scripts/setup_env.sh --extras fuzz\n"


# What a finding looks like to the command, with a stand-in for the fuzzer where it is not installed.
STAND_IN = """
import sys
from contextlib import nullcontext
def instrument_imports(include): return nullcontext()
def Setup(argv, function):
    global given
    given = argv, function
def Fuzz():
    argv, function = given
    from pathlib import Path
    for path in sorted(Path(argv[1]).iterdir()):
        function(path.read_bytes())
    print("stat::number_of_executed_units: 7\\nstat::peak_rss_mb: 99", file=sys.stderr)
    sys.exit(%d)
"""


@pytest.mark.parametrize(("code", "message"), [(0, "7 inputs, nothing found, peak 99 MB"), (77, "FOUND something")])
def test_the_outcome_of_a_fuzzer_is_reported(code: int, message: str, tmp_path: Path) -> None:
    (tmp_path / "atheris.py").write_text(STAND_IN % code)
    command = [sys.executable, "-m", "scripts.fuzz_parsers", "sidecar", "--findings", str(tmp_path / "findings")]
    environment = {"PYTHONPATH": f"{tmp_path}", "PATH": ""}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode != 0) == (code != 0), run.stderr
    assert message in run.stdout, run.stderr
