"""Changing the tags of a sidecar and nothing else: every byte outside the tags and the rating stays as it is.

What comes out is read back before it is given out. Refuses what is no sidecar, and a tag that comes from another field.
"""

import json
import re
from collections.abc import Sequence

from tagger.data.correction_log import Action, change_tags
from tagger.data.sidecar import SidecarError, clean_tag, parse_sidecar, read_rating, split_tags

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")
# Layouts of a list on one line: the separator, and whether letters beyond ASCII are escaped.
_LAYOUTS = ((", ", False), (",", False), (", ", True), (",", True))


def edit_sidecar(content: bytes, changes: Sequence[tuple[Action, str]]) -> bytes:
    """The bytes with (action, tag) carried out in order; the very bytes where all is so already.

    Raises SidecarError, or LastTagError where no tag would be left.
    """
    before = parse_sidecar(content)
    tags, rating = before.tags, before.rating
    for action, tag in changes:
        tags, rating = change_tags(tags, rating, action, tag) or (tags, rating)
    if set(tags) == set(before.tags) and rating == before.rating:
        return content
    mark = _BYTE_ORDER_MARK if content.startswith(_BYTE_ORDER_MARK) else b""
    text = content.removeprefix(mark).decode("utf-8")
    for as_list in (False, True):
        edited = mark + _edit(text, set(tags), rating, rating != before.rating, tags, as_list).encode("utf-8")
        after = parse_sidecar(edited)
        if set(after.tags) == set(tags) and after.rating == rating:
            return edited
    raise SidecarError("its tags cannot be written in the form that it has; edit it by hand")


def _edit(
    text: str, wanted: set[str], rating: str | None, new_rating: bool, order: Sequence[str], as_list: bool
) -> str:
    spans = _spans_of_values(text)
    start, end, value = spans["tags"]
    edits = [(start, end, _tags_text(text[start:end], value, wanted, order, new_rating, as_list))]
    if new_rating and "rating" in spans:
        start, end, _ = spans["rating"]
        edits.append((start, end, json.dumps(rating)))
    elif new_rating and rating is not None:
        last = max(end for _, end, _ in spans.values())
        found = _SPACE.match(text, text.index("{") + 1)
        lead = (found.group() if found else "") or " "
        edits.append((last, last, f',{lead}"rating": {json.dumps(rating)}'))
    for start, end, replacement in sorted(edits, reverse=True):
        text = text[:start] + replacement + text[end:]
    return text


def _tags_text(raw: str, value: object, wanted: set[str], order: Sequence[str], new_rating: bool, as_list: bool) -> str:
    """The JSON of the tags, in the layout of `raw`; a rating among them goes where another one is set."""
    names = split_tags(value) if isinstance(value, str) else value
    assert isinstance(names, list)
    present = {clean_tag(name) for name in names}
    kept = [name for name in names if clean_tag(name) in wanted or (_is_rating(name) and not new_rating)]
    kept += [tag for tag in order if tag not in present]
    if isinstance(value, str) and not as_list:
        separator = ("," if ", " not in value else ", ") if "," in value else " "
        return json.dumps(separator.join(name.strip() for name in kept), ensure_ascii=not _has_letters(raw))
    if "\n" in raw and isinstance(value, list) and value:
        lead, tail = re.match(r"\[(\s*)", raw), re.search(r"(\s*)\]$", raw)
        assert lead is not None and tail is not None
        items = [json.dumps(name, ensure_ascii=not _has_letters(raw)) for name in kept]
        return f"[{lead.group(1)}{f',{lead.group(1)}'.join(items)}{tail.group(1)}]"
    for separator, escaped in _LAYOUTS:
        if json.dumps(value, separators=(separator, ": "), ensure_ascii=escaped) == raw:
            return json.dumps(kept, separators=(separator, ": "), ensure_ascii=escaped)
    return json.dumps(kept, ensure_ascii=False)


def _is_rating(name: str) -> bool:
    prefix, colon, word = clean_tag(name).partition(":")
    return bool(colon) and prefix == "rating" and read_rating(word)[0] is not None


def _has_letters(raw: str) -> bool:
    """Whether a JSON text is written with letters beyond ASCII as they are."""
    return not raw.isascii() or "\\u" not in raw


def _spans_of_values(text: str) -> dict[str, tuple[int, int, object]]:
    """Where the value of each key of the outermost object begins and ends, and what it is."""
    decoder = json.JSONDecoder(parse_int=str, parse_float=str)
    spans: dict[str, tuple[int, int, object]] = {}
    place = _after_space(text, text.index("{") + 1)
    while text[place] != "}":
        key, place = decoder.raw_decode(text, place)
        start = _after_space(text, _after_space(text, place) + 1)
        value, end = decoder.raw_decode(text, start)
        spans[key] = start, end, value
        place = _after_space(text, end)
        if text[place] == ",":
            place = _after_space(text, place + 1)
    return spans


def _after_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    assert found is not None
    return found.end()
