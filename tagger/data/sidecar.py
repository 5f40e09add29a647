"""One sidecar: the JSON object beside an image that says which tags, rating and extra fields it has.

Reads the forms found in the wild (a list of tags, or one string of them; ratings as words, letters or numbers).
Refuses, with a reason short enough to be counted: text that is not a JSON object, a key given twice, a missing `tags`
key, no tag at all, and tags that are not strings.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import orjson

RATINGS = ("general", "sensitive", "questionable", "explicit")
MAX_SIDECAR_BYTES = 16 * 1024 * 1024
_RATING_TAG = "rating:"
_RATING_WORDS = {
    **{word: word for word in RATINGS},
    **{word[0]: word for word in RATINGS},
    "safe": "general",
}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_RESERVED_FIELDS = ("tags", "rating", "filename")
# Control characters and all white space but the blank: none of them can be typed, seen or kept in a table of tags.
_CONTROL = re.compile(r"(?:[\x00-\x1f\x7f-\x9f]|[^\S ])+")
_JSON_TYPES = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}


class SidecarError(ValueError):
    """A sidecar that gives no row. `reason` reads "kind: detail"; the kind is the same for all faults of a sort."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class ExtraField:
    """A sidecar field whose values become tags `<prefix>:<value>`."""

    name: str
    prefix: str


@dataclass(frozen=True)
class ParsedSidecar:
    """What a sidecar says. `bad_rating` is the text of a rating that is not understood, for a warning."""

    tags: tuple[str, ...]
    rating: str | None = None
    filename: str | None = None
    bad_rating: str | None = None


def parse_extra_fields(names: Sequence[str]) -> tuple[ExtraField, ...]:
    """`categories` gives tags `category:<value>` (the name made singular), `field=prefix` an explicit prefix."""
    fields: list[ExtraField] = []
    for text in names:
        name, equals, prefix = (part.strip() for part in text.partition("="))
        prefix = prefix if equals else _singular(name)
        if not name or not prefix:
            raise ValueError(f"extra field '{text}' is not a name; write field or field=prefix, e.g. categories")
        if name in _RESERVED_FIELDS or prefix == _RATING_TAG[:-1]:
            raise ValueError(f"extra field '{text}' means what sidecars keep for tags and ratings; name another field")
        if any(field.name == name for field in fields):
            raise ValueError(f"extra field '{name}' is named twice; name it once")
        fields.append(ExtraField(name, prefix))
    return tuple(fields)


def parse_sidecar(content: bytes, extra_fields: Sequence[ExtraField] = ()) -> ParsedSidecar:
    """Read the bytes of a sidecar (UTF-8, a byte-order mark is allowed); raises SidecarError."""
    if len(content) > MAX_SIDECAR_BYTES:
        raise too_large()
    entry = parse_json(content)
    if not isinstance(entry, dict):
        raise SidecarError(f"not a JSON object: the file holds {describe_type(entry)}")
    return parse_entry(entry, extra_fields)


def too_large() -> SidecarError:
    """What a sidecar of more than MAX_SIDECAR_BYTES is refused with."""
    return SidecarError(f"too large: more than {MAX_SIDECAR_BYTES >> 20} MiB")


def parse_json(content: bytes) -> object:
    """Decode UTF-8 JSON, with or without a byte-order mark; raises SidecarError that says what is wrong with it.

    An object that names a key twice is wrong at any depth: which of the two its writer meant, nobody can say.
    """
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError:
        content, value = _parse_again(content)
    refuse_repeated_keys(content, value)
    return value


def refuse_repeated_keys(content: bytes, value: object) -> None:
    """Raise SidecarError when an object in `content` (JSON that decodes to `value`) has a key twice.

    The decoder keeps the last of equal keys and says nothing. Each key has a colon and each string two quotation
    marks, so counting them in the bytes settles nearly every file exactly; only the others are decoded again.
    """
    if type(value) is dict and content.count(b":") == len(value):
        return
    if b"\\" not in content and content.count(b'"') == 2 * _count_strings(value):
        return
    try:
        _STRICT_DECODER.decode(content.decode("utf-8"))
    except RecursionError as error:
        raise SidecarError("nested too deeply") from error


def parse_entry(entry: Mapping[str, object], extra_fields: Sequence[ExtraField] = ()) -> ParsedSidecar:
    """Read a decoded JSON object of a sidecar's form; raises SidecarError."""
    if "tags" not in entry:
        raise SidecarError("no 'tags' key")
    tags = _read_tags(entry["tags"], "tags")
    rating, bad_rating = read_rating(entry.get("rating"))
    rating, tags = _take_rating(tags, rating)
    if extra_fields:
        extra: list[str] = []
        for field in extra_fields:
            value = entry.get(field.name)
            if value is not None:
                values = _read_tags(value, field.name, by_space=False)
                extra += [f"{field.prefix}:{name}" for name in values]
        tags = tuple(dict.fromkeys((*tags, *extra)))
    if not tags:
        raise SidecarError("no tags")
    filename = entry.get("filename")
    return ParsedSidecar(tags, rating, filename if isinstance(filename, str) else None, bad_rating)


def describe_type(value: object) -> str:
    """The JSON type of a decoded value, for messages."""
    return _JSON_TYPES.get(type(value), "a number")


def clean_tag(text: str) -> str:
    """A tag as the index keeps it: control characters and odd white space are blanks, none at the ends."""
    return _CONTROL.sub(" ", text).strip()


def is_rating_tag(tag: str) -> bool:
    """Whether a clean tag may be a rating that stands among the tags."""
    return tag.startswith(_RATING_TAG)


def split_tags(text: str, *, by_space: bool = True) -> list[str]:
    """The names in one string: between commas, or, where there is none and `by_space`, between blanks."""
    return text.split(",") if "," in text or not by_space else text.split()


def read_rating(value: object) -> tuple[str | None, str | None]:
    """The normalised rating, and the text of one that is not understood."""
    if value is None:
        return None, None
    if isinstance(value, str):
        if value in _RATING_WORDS:
            return _RATING_WORDS[value], None
        text = clean_tag(value)
        rating = _RATING_WORDS.get(text.lower())
        return rating, None if rating or not text else text[:40]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (RATINGS[int(value)], None) if value in range(len(RATINGS)) else (None, str(value))
    return None, describe_type(value)


def _parse_again(content: bytes) -> tuple[bytes, object]:
    """The slow path of what did not parse at once: a byte-order mark is cut, and what is wrong gets its name."""
    content = content.removeprefix(_BYTE_ORDER_MARK)
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise SidecarError("not UTF-8 text: it starts with a UTF-16 mark")
    if b"\0" in content[:2]:
        raise SidecarError("not UTF-8 text: it looks like UTF-16")
    if not content.strip():
        raise SidecarError("empty file")
    try:
        return content, orjson.loads(content)
    except orjson.JSONDecodeError as error:
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as decode_error:
            raise SidecarError(f"not UTF-8 text: byte {decode_error.start} is not part of it") from error
        if "limit" in str(error):
            raise SidecarError("nested too deeply") from error
        if "NaN" in text or "Infinity" in text:
            _refuse_constants(text)
        raise SidecarError(f"invalid JSON: {' '.join(str(error).split())}") from error


def _refuse_constants(text: str) -> None:
    """Raise SidecarError by name when NaN or Infinity is all that is wrong with `text`."""
    try:
        json.JSONDecoder(parse_constant=_refuse_constant, parse_int=str, parse_float=str).decode(text)
    except (json.JSONDecodeError, RecursionError):
        return  # broken in another way, which the first decoder has named


def _refuse_constant(name: str) -> object:
    raise SidecarError(f"invalid JSON: {name} is not a JSON number")


def _distinct_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise SidecarError(f"a key given twice: '{clean_tag(key)[:40]}'")
    return found


# Numbers stay text: turning long ones into values can take minutes, and nobody asks for them.
_STRICT_DECODER = json.JSONDecoder(object_pairs_hook=_distinct_keys, parse_int=str, parse_float=str)


def _count_strings(value: object) -> int:
    """Strings in a decoded JSON value, keys included."""
    count = 0
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, str):
            count += 1
        elif isinstance(inner, dict):
            count += len(inner)
            waiting.extend(inner.values())
        elif isinstance(inner, list):
            waiting.extend(inner)
    return count


def _read_tags(value: object, field: str, *, by_space: bool = True) -> tuple[str, ...]:
    """Distinct names in order."""
    if isinstance(value, str):
        names: Iterable[str] = split_tags(value, by_space=by_space)
    elif isinstance(value, list):
        names = value
    else:
        raise SidecarError(f"'{field}' is not a list or a string: it is {describe_type(value)}")
    try:
        tags = dict.fromkeys(map(str.strip, names))
    except TypeError as error:
        assert isinstance(value, list)
        position = next(i for i, name in enumerate(value) if not isinstance(name, str))
        found = describe_type(value[position])
        raise SidecarError(f"a tag is not a string: {field}[{position}] is {found}") from error
    if not "".join(tags).isprintable():
        tags = dict.fromkeys(map(clean_tag, tags))
    tags.pop("", None)
    return tuple(tags)


def _take_rating(tags: tuple[str, ...], rating: str | None) -> tuple[str | None, tuple[str, ...]]:
    """Move `rating:<word>` out of the tags, so that a rating counts once; a rating field outranks it."""
    if _RATING_TAG not in "".join(tags):
        return rating, tags
    kept: list[str] = []
    for tag in tags:
        word = _RATING_WORDS.get(tag[len(_RATING_TAG) :].strip().lower()) if tag.startswith(_RATING_TAG) else None
        if word is None:
            kept.append(tag)
        else:
            rating = rating or word
    return rating, tuple(kept)


def _singular(name: str) -> str:
    if name.endswith("ies"):
        return f"{name[:-3]}y"
    return name[:-1] if name.endswith("s") and not name.endswith("ss") else name
