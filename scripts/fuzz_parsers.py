"""Fuzzes the parsers that read other people's files: python -m scripts.fuzz_parsers [PARSER ...] --seconds 60

Coverage-guided, with atheris (Linux; the extra `fuzz`). Each parser runs in a process of its own and may answer any
bytes with its declared errors alone; another exception, a hang or too much memory is a finding: the input is kept under
--findings, its path is printed and the exit code is 1. Exit 2: atheris is missing, or there is no such parser. The fast
tests run the same parsers with Hypothesis.
"""

import argparse
import importlib.util
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import orjson
from PIL import Image

from orientation_handler import OrientationError, OrientationHandler
from tagger.command import command
from tagger.data.decode import DecodeError, DecodeOptions, decode
from tagger.data.headers import HeaderError, parse_header
from tagger.data.sidecar import SidecarError, parse_extra_fields, parse_sidecar
from tagger.files import FormatError
from tagger.ontology import OntologyError, relate
from tagger.ontology_file import read_ontology
from tagger.options import Parser, output_folder, whole
from vocabulary import TagVocabulary

ROOT = Path(__file__).resolve().parent.parent
_MAX_PIXELS = 1 << 18
_EXTRA_FIELDS = parse_extra_fields(("categories",))
_SLOWEST_INPUT_S = 10
# The fuzzing process: the readers' code is instrumented as it is imported (everything at once takes minutes), and
# libFuzzer ends the process.
_INSIDE = """
import sys
import atheris
with atheris.instrument_imports(include=["tagger", "vocabulary", "orientation_handler", "PIL"]):
    from scripts.fuzz_parsers import PARSERS
parser = PARSERS[sys.argv.pop(1)]
atheris.Setup(sys.argv, parser)
atheris.Fuzz()
"""
_scratch: list[tempfile.TemporaryDirectory[str]] = []


def fuzz_sidecar(content: bytes) -> None:
    """Any bytes are a sidecar or a SidecarError."""
    try:
        parse_sidecar(content, _EXTRA_FIELDS)
    except SidecarError:
        return


def fuzz_vocabulary(content: bytes) -> None:
    """Any bytes are a vocabulary file or a FormatError."""
    try:
        TagVocabulary.load(_as_file(content, "vocabulary.json"))
    except FormatError:
        return


def fuzz_orientation(content: bytes) -> None:
    """Any bytes are an orientation map or one of its two errors."""
    try:
        OrientationHandler(_as_file(content, "map.json"), "balanced")
    except (FormatError, OrientationError):
        return


def fuzz_ontology(content: bytes) -> None:
    """Any bytes are an ontology, which closes every one of its tags, or one of its two errors."""
    try:
        ontology = read_ontology(_as_file(content, "ontology.yaml"))
    except (FormatError, OntologyError):
        return
    relate(ontology, sorted(ontology.tags - ontology.aliases.keys()))


def fuzz_image(content: bytes) -> None:
    """Any bytes are an image, whose pixels have the size that its header says, or one of the declared errors."""
    try:
        header = parse_header(lambda offset, length: content[offset : offset + length], len(content))
    except HeaderError:
        header = None
    for partial in (False, True):
        try:
            found = decode(content, DecodeOptions(max_pixels=_MAX_PIXELS, partial=partial), lambda *_: (16, 16))
        except DecodeError:
            continue
        if header is not None and found.full_size != header[::-1]:
            raise AssertionError(f"the header says {header}, the pixels are {found.full_size}")


PARSERS: dict[str, Callable[[bytes], None]] = {
    "sidecar": fuzz_sidecar,
    "vocabulary": fuzz_vocabulary,
    "orientation": fuzz_orientation,
    "ontology": fuzz_ontology,
    "image": fuzz_image,
}


def seeds(parser: str) -> list[bytes]:
    """Well-formed inputs to start from."""
    if parser == "image":
        return _image_seeds()
    if parser == "sidecar":
        return [
            b'{"tags": ["red_ball", "rating:general"], "rating": "s", "categories": ["toy"], "filename": "a.png"}',
            b'{"tags": "red_ball, blue sky"}',
        ]
    if parser == "orientation":
        return [
            orjson.dumps(
                {
                    "format_version": 1,
                    "explicit_mappings": {"arrow left": "arrow right"},
                    "regex_patterns": [{"pattern": "^left_(.*)$", "replacement": "right_\\1", "description": "d"}],
                    "symmetric_tags": ["left and right"],
                    "skip_flip_tags": ["text"],
                    "complex_asymmetric_tags": ["sash"],
                }
            )
        ]
    if parser == "ontology":
        return [
            b"format_version: 1\naliases: {kitty: cat}\nimplications:\n  tabby: [cat, striped]\n  cat: animal\n"
            b"exclusive:\n- [day, night]\nflip_pairs: [[waving_left, waving_right]]\n",
            b'{"format_version": 1, "aliases": {"a": "b"}, "implications": {"b": ["c"]}}',
        ]
    path = _as_file(b"", "vocabulary.json")
    TagVocabulary(["rating:general", "ball"], [3, 2], ["rating", "general"]).save(path)
    return [
        path.read_bytes(),
        b'{"tag_to_index": {"<PAD>": 0, "<UNK>": 1, "ball": 2}}',
        b'{"index_to_tag": {"0": "a"}}',
    ]


def _image_seeds() -> list[bytes]:
    contents: list[bytes] = []
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode in ("RGB", "L", "P", "LA", "RGBA", "CMYK"):
        image = Image.linear_gradient("L").resize((12, 9)).convert("RGB").convert(mode)
        for kind in ("JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF"):
            stream = io.BytesIO()
            try:
                image.save(stream, kind, **({} if kind in ("GIF", "BMP") else {"exif": exif}))
            except (OSError, ValueError):
                continue  # a format that has no such mode
            contents.append(stream.getvalue())
    return contents


def _as_file(content: bytes, name: str) -> Path:
    """The bytes as a file, for readers that take a path; one folder a process."""
    if not _scratch:
        _scratch.append(tempfile.TemporaryDirectory(prefix="tagsmith-fuzz-"))
    path = Path(_scratch[0].name) / name
    path.write_bytes(content)
    return path


def _fuzz_apart(parser: str, arguments: argparse.Namespace) -> bool:
    """Whether a process of its own found nothing."""
    with tempfile.TemporaryDirectory(prefix="tagsmith-corpus-") as corpus:
        for number, content in enumerate(seeds(parser)):
            (Path(corpus) / f"seed{number}").write_bytes(content)
        findings = Path(arguments.findings).resolve() / parser
        findings.mkdir(parents=True, exist_ok=True)
        options = [
            corpus,
            f"-max_total_time={arguments.seconds}",
            f"-rss_limit_mb={arguments.rss_mb}",
            f"-timeout={_SLOWEST_INPUT_S}",
            f"-artifact_prefix={findings}/",
            "-print_final_stats=1",
        ]
        command = [sys.executable, "-c", _INSIDE, parser, *options]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    stats = dict(
        line.removeprefix("stat::").split(":", 1) for line in run.stderr.splitlines() if line.startswith("stat::")
    )
    if run.returncode == 0 and "number_of_executed_units" in stats:
        inputs, peak = stats["number_of_executed_units"].strip(), stats["peak_rss_mb"].strip()
        print(f"{parser}: {inputs} inputs, nothing found, peak {peak} MB", flush=True)
        return True
    print(run.stderr[-4000:], file=sys.stderr)
    print(f"{parser}: FOUND something; the input is in {findings}", flush=True)
    return False


@command()
def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit codes at the top of this file."""
    parser = Parser(description="Fuzz the parsers of other people's files.")
    parser.add_argument("parsers", nargs="*", metavar="PARSER", help=f"{', '.join(PARSERS)}; none: all of them")
    parser.add_argument("--seconds", type=whole(), default=60, help="time for each parser")
    parser.add_argument("--rss-mb", type=whole(), default=512, help="more memory than this is a finding")
    parser.add_argument(
        "--findings", type=output_folder, default="findings", help="folder for inputs that a parser stumbles over"
    )
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.parsers if name not in PARSERS]
    if unknown:
        print(f"no parser is called '{unknown[0]}'; there are {', '.join(PARSERS)}", file=sys.stderr)
        return 2
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed; on Linux: bash scripts/setup_env.sh --extras fuzz", file=sys.stderr)
        return 2
    outcomes = [_fuzz_apart(name, arguments) for name in arguments.parsers or PARSERS]
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
