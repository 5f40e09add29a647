"""How the text of a tag changes when its image is mirrored: patterns, and the left/right ones that are built in.

All patterns act on the tag as given, at once: none sees what another one wrote, so one pass can swap `left` and
`right`. Refuses patterns that are not valid, templates that name a group the pattern lacks, patterns that match
without any text, and patterns whose order would decide the outcome.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SEPARATORS = "_-: "
_OTHER_SIDE = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}
_OTHER_SIDE |= {right: left for left, right in _OTHER_SIDE.items()}
_WITHIN_A_PART = f"[^{re.escape(SEPARATORS)}]"
_SIDE = re.compile(f"(?<!{_WITHIN_A_PART})(?:{'|'.join(_OTHER_SIDE)})(?!{_WITHIN_A_PART})")
_TEMPLATE_ESCAPE = re.compile(r"\\(?:g<(?P<name>\w+)>|(?P<number>[1-9]\d?)|(?P<other>.?))", re.DOTALL)


@dataclass(frozen=True)
class Rule:
    """One pattern and what replaces its matches: literal text and group numbers, in order. `name` is for messages."""

    name: str
    pattern: re.Pattern[str]
    template: tuple[str | int, ...]


@dataclass(frozen=True)
class _Edit:
    """`tag[start:end]` becomes `text`."""

    start: int
    end: int
    text: str

    def overlaps(self, other: "_Edit") -> bool:
        same = (self.start, self.end) == (other.start, other.end)
        return same or (self.start < other.end and other.start < self.end)


def make_rule(name: str, pattern: str, replacement: str) -> Rule:
    r"""A rule from a regular expression and a replacement that may name its groups (`\1`, `\g<side>`).

    Text that the replacement copies from a group stays open to other rules: `^left_(.*)$` -> `right_\1` says nothing
    about a second `left` within the group. ValueError says what is wrong with either.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression ({error})") from error
    return Rule(name, compiled, _parse_template(compiled, replacement))


def rewrite(tag: str, rules: Sequence[Rule]) -> str:
    """The tag after `rules`, earlier ones first where they meet, and then the built-in sides on what is left.

    ValueError when two of `rules` disagree about the tag, that is when the other order gives another result.
    """
    active = [rule for rule in rules if rule.pattern.search(tag)]
    text = _apply(tag, active)
    if len(active) > 1 and _apply(tag, active[::-1]) != text:
        raise ValueError(f"{' and '.join(rule.name for rule in active)} disagree about the tag '{tag}'")
    return text


def _parse_template(pattern: re.Pattern[str], replacement: str) -> tuple[str | int, ...]:
    template: list[str | int] = []
    position = 0
    for escape in _TEMPLATE_ESCAPE.finditer(replacement):
        template.append(replacement[position : escape.start()])
        position = escape.end()
        name, number, other = escape["name"], escape["number"], escape["other"]
        if other == "\\":
            template.append("\\")
            continue
        if other is not None:
            raise ValueError(f"replacement {replacement!r} has '{escape[0]}'; groups are written \\1 or \\g<name>")
        word = number or name
        group = int(word) if word.isdecimal() else pattern.groupindex.get(word)
        if group is None or group > pattern.groups:
            raise ValueError(f"replacement {replacement!r} names group {word}, which {pattern.pattern!r} lacks")
        template.append(group)
    template.append(replacement[position:])
    return tuple(piece for piece in template if piece != "")


def _apply(tag: str, rules: Sequence[Rule]) -> str:
    taken: list[_Edit] = []
    for rule in rules:
        for match in _matches(rule, tag):
            edits = _edits(rule, match)
            if not any(edit.overlaps(other) for edit in edits for other in taken):
                taken += edits
    for side in _SIDE.finditer(tag):
        edit = _Edit(*side.span(), _OTHER_SIDE[side[0]])
        if not any(edit.overlaps(other) for other in taken):
            taken.append(edit)
    for edit in sorted(taken, key=lambda edit: (edit.start, edit.end), reverse=True):
        tag = tag[: edit.start] + edit.text + tag[edit.end :]
    return tag


def _matches(rule: Rule, tag: str) -> Iterator[re.Match[str]]:
    """Every match, overlapping ones included: the text of a group may hold the next directional part."""
    start = 0
    while match := rule.pattern.search(tag, start):
        if match.start() == match.end():
            raise ValueError(f"{rule.name} matches without any text in the tag '{tag}'; make it match a word")
        yield match
        start = match.start() + 1


def _edits(rule: Rule, match: re.Match[str]) -> list[_Edit]:
    spans = [match.span(piece) for piece in rule.template if isinstance(piece, int)]
    bounds = [match.start(), *(bound for span in spans for bound in span), match.end()]
    if bounds != sorted(bounds):  # groups change places or took no part: the match changes as one piece
        text = "".join(piece if isinstance(piece, str) else match[piece] or "" for piece in rule.template)
        return [_Edit(match.start(), match.end(), text)]
    edits: list[_Edit] = []
    position, text = match.start(), ""
    for piece in rule.template:
        if isinstance(piece, str):
            text += piece
            continue
        start, end = match.span(piece)
        edits.append(_Edit(position, start, text))
        position, text = end, ""
    edits.append(_Edit(position, match.end(), text))
    return [_without_separators(edit, match.string) for edit in edits if edit.text or edit.start < edit.end]


def _without_separators(edit: _Edit, tag: str) -> _Edit:
    """The edit less the separators it keeps at its ends, so that `_left_` and `_right_` can share the one between."""
    old, new = tag[edit.start : edit.end], edit.text
    if old == new:
        return edit
    head = _shared_separators(old, new)
    tail = _shared_separators(old[head:][::-1], new[head:][::-1])
    return _Edit(edit.start + head, edit.end - tail, new[head : len(new) - tail])


def _shared_separators(first: str, second: str) -> int:
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1] and pair[0] in SEPARATORS, pairs))
