"""Carry out suspected labels that somebody accepted: into a journal that can be undone, and into sidecars where asked.

The journal is named by `data.corrections_file`; the next start has the corrected tags. Nothing is written unless every
accepted line can be carried out, or `--skip-bad` leaves out the others.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from Configuration_System import FullConfig, load_config
from tagger.command import command
from tagger.data.correction_log import CorrectionLog, locked_log
from tagger.data.corrections import lay_over
from tagger.data.index import MetadataIndex, open_index
from tagger.errors import InputError
from tagger.mending import MendingPlan, carry_out, describe, plan_mending, read_accepted, require_roots, undo
from tagger.ontology import ONTOLOGY_FILE
from tagger.ontology_file import read_ontology
from tagger.options import Parser, input_file, number
from tagger.output import reader_may_leave
from vocabulary import TagVocabulary

_SHOWN = 20
EXAMPLE = """examples:
  python validation_loop.py --run runs/demo --suspects 500
  python -m scripts.apply_corrections runs/demo/suspects.jsonl --journal corrections.jsonl --dry-run
  python -m scripts.apply_corrections --journal corrections.jsonl --undo all
then train with data.corrections_file=corrections.jsonl"""


def list_journal(log: CorrectionLog) -> None:
    """Every correction, the undone ones marked."""
    for change in log.changes.values():
        undone = log.undone.get(change.id)
        print(describe(change) + (f"  (undone {undone})" if undone else ""))
    print(f"{len(log.changes):,} corrections in {log.path}, {len(log.undone):,} of them undone")


def undo_some(log: CorrectionLog, words: Sequence[str], dry_run: bool) -> None:
    """Take back the named corrections, or all of them."""
    if words == ["all"]:
        ids = [change.id for change in log.active]
    elif all(word.isdecimal() for word in words):
        ids = [int(word) for word in words]
    else:
        raise InputError(f"--undo {' '.join(words)}: give ids, as --list shows them, or all")
    lines = undo(log, ids, dry_run=dry_run)
    _show(lines, "would be " if dry_run else "")
    print(f"{len(lines):,} corrections {'would be ' if dry_run else ''}undone")


def apply(options: argparse.Namespace, config: FullConfig, run: Path, journal: Path) -> None:
    """Plan, show and carry out."""
    accepted = read_accepted(options.suspects, everything=options.accept_all, above=options.accept_all_above)
    if not accepted:
        raise InputError(
            f'no line of {options.suspects} is accepted: set "accept": true in lines, or pass --accept-all-above '
            "STRENGTH or, for a file of the lines to keep, --accept-all"
        )
    if options.write_sidecars and config.data.annotations is not None:
        raise InputError("--write-sidecars: the tags of this data set are in data.annotations; leave it out")
    with locked_log(journal) as log:
        index = _open(config)
        if options.roots is None:
            require_roots(options.suspects, index.roots)
        index.correct(lay_over(log, index))
        plan = plan_mending(
            index,
            log,
            accepted,
            vocabulary=TagVocabulary.load(run / "vocabulary.json").tags if (run / "vocabulary.json").exists() else (),
            ontology=read_ontology(run / ONTOLOGY_FILE) if (run / ONTOLOGY_FILE).exists() else None,
            new_tags=options.new_tags,
            even_if_changed=options.even_if_changed,
            write_sidecars=options.write_sidecars,
        )
        _show(plan.needless, "needless: ")
        _show(plan.notes, "note: ")
        _show(plan.refused, "refused: ", sys.stderr)
        if plan.refused and not options.skip_bad:
            count = f"{len(plan.refused):,} of {len(accepted):,} accepted lines cannot be carried out"
            raise InputError(f"{count}, so nothing was written; mend them, or leave them out with --skip-bad")
        if options.dry_run:
            _show([describe(change) for change in plan.changes], "would write: ")
        elif plan.changes:
            carry_out(plan, log)
    _conclude(plan, options, journal, config)


def _open(config: FullConfig) -> MetadataIndex:
    data = config.data
    return open_index(
        data.roots,
        Path(data.index_dir),
        extra_fields=data.extra_fields,
        annotations=Path(data.annotations) if data.annotations is not None else None,
    )


def _conclude(plan: MendingPlan, options: argparse.Namespace, journal: Path, config: FullConfig) -> None:
    images = len({change.key for change in plan.changes})
    written = "would be written" if options.dry_run else "written"
    ids = f" (ids {plan.changes[0].id} to {plan.changes[-1].id})" if plan.changes else ""
    print(
        f"{len(plan.changes):,} corrections of {images:,} images {written} to {journal}{ids}; {len(plan.needless):,} "
        f"needless, {len(plan.refused):,} refused"
    )
    if options.write_sidecars:
        print(f"{len(plan.sidecars):,} sidecars {written}; their first bytes are kept beside the journal")
    if config.data.corrections_file is None and plan.changes:
        print(f"to use them: data.corrections_file={journal}")


def _show(lines: Sequence[str], prefix: str, stream: TextIO | None = None) -> None:
    for line in lines[:_SHOWN]:
        print(f"{prefix}{line}", file=stream)
    if len(lines) > _SHOWN:
        print(f"{prefix}... and {len(lines) - _SHOWN:,} more", file=stream)


def _act(options: argparse.Namespace) -> None:
    """What the options ask for: apply, list or undo."""
    run: Path = options.run or (options.suspects or Path()).parent
    config = None
    if options.suspects is not None or options.run is not None:
        if not (run / "config.yaml").is_file():
            raise InputError(f"{run} is not a run folder: it has no config.yaml; name the run with --run")
        moved = [] if options.roots is None else [f"data.roots={json.dumps(options.roots)}"]
        config = load_config(run / "config.yaml", moved, environment={})
    journal: Path | None = options.journal
    if journal is None and config is not None and config.data.corrections_file is not None:
        journal = Path(config.data.corrections_file)
    if journal is None:
        raise InputError("no journal is named; pass --journal corrections.jsonl")
    if config is not None and options.suspects is not None:
        apply(options, config, run, journal)
        return
    if not journal.is_file():
        raise InputError(f"{journal} does not exist; name the journal with --journal")
    if options.list:
        list_journal(CorrectionLog(journal))
        return
    with locked_log(journal) as log:
        undo_some(log, options.undo, options.dry_run)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m scripts.apply_corrections",
        description="Carry out accepted lines of suspects.jsonl; reversible.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suspects", nargs="?", type=input_file, help='lines with "accept": true are carried out')
    parser.add_argument("--run", type=Path, metavar="DIR", help="run whose data set it is (default: the file's folder)")
    parser.add_argument("--roots", nargs="+", metavar="DIR", help="where its images are now (default: its data.roots)")
    parser.add_argument("--journal", type=Path, metavar="FILE", help="default: the run's data.corrections_file")
    parser.add_argument("--accept-all", action="store_true", help='every line but those with "accept": false')
    parser.add_argument(
        "--accept-all-above",
        type=number(least=-1e6, most=1e6),
        metavar="STRENGTH",
        help="every line of at least that strength",
    )
    parser.add_argument("--new-tags", action="store_true", help="add tags that no image of the data set has")
    parser.add_argument("--even-if-changed", action="store_true", help="also where a sidecar has changed since")
    parser.add_argument("--skip-bad", action="store_true", help="leave out lines that cannot be carried out")
    parser.add_argument("--write-sidecars", action="store_true", help="also change the sidecars (undone with the rest)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    parser.add_argument("--list", action="store_true", help="show the journal")
    parser.add_argument("--undo", nargs="+", metavar="ID|all", help="take corrections back")
    return parser


@command("what is in the journal stays, and can be undone")
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives the exit code: 0 done, 2 bad input."""
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if sum([options.suspects is not None, options.list, options.undo is not None]) != 1:
        parser.error("give a file of suspects, or --list, or --undo")
    with reader_may_leave():
        _act(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
