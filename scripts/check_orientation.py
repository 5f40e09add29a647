"""Say what mirroring does to the tags of a vocabulary: which swap, which need an entry in the map, which forbid it.

Reads a vocabulary file, or a run's folder with the map and mode of that run. Refuses what training would refuse: a map
that does not give every tag back after mirroring twice.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from Configuration_System import FullConfig, OrientationSection
from orientation_handler import MODES, OrientationHandler, Veto
from tagger.command import command
from tagger.config_io import compose, read_recipe
from tagger.ontology import ONTOLOGY_FILE, Ontology
from tagger.ontology_file import read_ontology
from tagger.options import Parser
from tagger.output import reader_may_leave
from vocabulary import TagVocabulary

NO_MAP = "none"
EXAMPLE = (
    "example (after `bash scripts/start_training.sh`):\n  python -m scripts.check_orientation runs/demo --mode balanced"
)
REASONS: Mapping[Veto, str] = {
    Veto.SKIP: "in skip_flip_tags",
    Veto.UNMAPPED: "directional without a known mirror",
    Veto.OUT_OF_VOCABULARY: "its mirror is not in the vocabulary",
}


@dataclass(frozen=True)
class MappedTag:
    """A tag that changes; `source` is `explicit` or `pattern`."""

    tag: str
    count: int
    mirrored: str
    source: str
    in_vocabulary: bool


@dataclass(frozen=True)
class SensitiveTag:
    """A directional tag without an explicit mirror; `blocks` in the mode that was asked about."""

    tag: str
    count: int
    blocks: bool
    suggestion: str


@dataclass(frozen=True)
class BlockingTag:
    """A tag that forbids mirroring the `count` images that carry it; no suggestion for one that is listed to skip."""

    tag: str
    count: int
    reason: str
    suggestion: str


@dataclass(frozen=True)
class OrientationReport:
    """Every list by falling count, then by name. `suggested_mappings` can be pasted into `explicit_mappings`."""

    map: str
    mode: str
    num_tags: int
    map_tags_in_vocabulary: int
    map_tags: int
    mapped: tuple[MappedTag, ...]
    unmapped_sensitive: tuple[SensitiveTag, ...]
    blocking: tuple[BlockingTag, ...]
    suggested_mappings: dict[str, str]


def report(handler: OrientationHandler, vocabulary: TagVocabulary) -> OrientationReport:
    """What the handler does to each tag of the vocabulary. Raises OrientationError as `OrientationHandler.compile`."""
    mapped: list[MappedTag] = []
    sensitive: list[SensitiveTag] = []
    blocking: list[BlockingTag] = []
    suggested: dict[str, str] = {}
    counts = [int(count) for count in vocabulary.counts]
    for tag, count in sorted(zip(vocabulary.tags, counts, strict=True), key=lambda pair: (-pair[1], pair[0])):
        swap, veto = handler.swap(tag), handler.veto(tag, vocabulary)
        if swap.mirrored != tag:
            mapped.append(MappedTag(tag, count, swap.mirrored, swap.source, swap.mirrored in vocabulary))
        if handler.is_directional(tag) and swap.source != "explicit":
            suggestion = _suggestion(handler, tag, vocabulary)
            sensitive.append(SensitiveTag(tag, count, veto is not Veto.NONE, suggestion))
            if swap.mirrored != tag and swap.mirrored in vocabulary and swap.mirrored not in suggested:
                suggested[tag] = swap.mirrored
        if veto is not Veto.NONE:
            blocking.append(BlockingTag(tag, count, REASONS[veto], _suggestion(handler, tag, vocabulary)))
    return OrientationReport(
        map=handler.map.name,
        mode=handler.mode,
        num_tags=len(vocabulary),
        map_tags_in_vocabulary=sum(tag in vocabulary for tag in handler.map.tags),
        map_tags=len(handler.map.tags),
        mapped=tuple(mapped),
        unmapped_sensitive=tuple(sensitive),
        blocking=tuple(blocking),
        suggested_mappings=suggested,
    )


def _suggestion(handler: OrientationHandler, tag: str, vocabulary: TagVocabulary) -> str:
    if tag in handler.map.skip:
        return ""
    mirrored = handler.mirror_tag(tag)
    if mirrored == tag and tag in handler.map.complex:
        return "move from complex_asymmetric_tags to symmetric_tags if the mirrored image deserves the same tag"
    if mirrored == tag:
        return "add to symmetric_tags if the mirrored image deserves the same tag, else to skip_flip_tags"
    if mirrored in vocabulary:
        return f'add to explicit_mappings: "{tag}": "{mirrored}"'
    return f"'{mirrored}' is too rare for the vocabulary: add images of it, or ignore '{tag}' too"


def _lines(found: OrientationReport) -> list[str]:
    images = sum(entry.count for entry in found.blocking)
    lines = [
        f"{found.map}, mode {found.mode}",
        f"{found.num_tags} tags; {found.map_tags_in_vocabulary} of the map's {found.map_tags} tags are among them",
        "",
        f"mapped: {len(found.mapped)} tags change when the image is mirrored",
    ]
    for swap in found.mapped:
        absent = "" if swap.in_vocabulary else ", not in the vocabulary"
        lines.append(f"  {swap.count:>9,}  {swap.tag} -> {swap.mirrored}  ({swap.source}{absent})")
    lines += ["", f"unmapped sensitive: {len(found.unmapped_sensitive)} directional tags without an explicit mirror"]
    for entry in found.unmapped_sensitive:
        verdict = "blocks" if entry.blocks else "does not block"
        lines.append(f"  {entry.count:>9,}  {entry.tag}  ({verdict} in this mode; {entry.suggestion})")
    lines += ["", f"blocking: {len(found.blocking)} tags forbid the mirror, on at most {images:,} images"]
    for block in found.blocking:
        remedy = f"; {block.suggestion}" if block.suggestion else ""
        lines.append(f"  {block.count:>9,}  {block.tag}  ({block.reason}{remedy})")
    if found.suggested_mappings:
        pasted = orjson.dumps(found.suggested_mappings, option=orjson.OPT_INDENT_2).decode()
        lines += ["", "suggested for explicit_mappings, where each pair is each other's mirror image:", pasted]
    return lines


def _settings_of(source: Path) -> tuple[Path, OrientationSection, Ontology | None]:
    """The vocabulary file of `source`, and the settings and the ontology of the run if it is one."""
    if not source.is_dir():
        return source, OrientationSection(), None
    recipe = source / "config.yaml"
    # Not load_config: a run's file is resolved, and this shell's environment has no say in what that run did.
    section = compose(FullConfig, read_recipe(recipe)).tree.orientation if recipe.is_file() else OrientationSection()
    ontology = source / ONTOLOGY_FILE
    return source / "vocabulary.json", section, read_ontology(ontology) if ontology.exists() else None


@command()
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="python -m scripts.check_orientation",
        description="List which tags mirroring swaps, which directional tags the map lacks and which forbid mirroring.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="VOCABULARY_OR_RUN", help="a vocabulary.json, or a run's folder")
    parser.add_argument(
        "--map", metavar="FILE", help=f"orientation map (default: the run's or the shipped one; '{NO_MAP}' for none)"
    )
    parser.add_argument("--mode", choices=MODES, help="default: the run's, else conservative")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    vocabulary_path, section, ontology = _settings_of(arguments.source)
    map_path = section.map_path if arguments.map is None else arguments.map
    handler = OrientationHandler(None if map_path == NO_MAP else map_path, arguments.mode or section.mode, ontology)
    found = report(handler, TagVocabulary.load(vocabulary_path))
    with reader_may_leave():
        as_json = orjson.dumps(asdict(found), option=orjson.OPT_INDENT_2).decode()
        print(as_json if arguments.json else "\n".join(_lines(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
