"""One sidecar: the JSON object beside an image that says which tags, rating and extra fields it has.

Reads the forms found in the wild (a list of tags, or one string of them; ratings as words, letters or numbers).
Refuses, with a reason short enough to be counted: text that is not a JSON object, a missing `tags` key, no tag at all,
and tags that are not strings.
"""

import re
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
# What ASCII JSON can still hide from a plain look at its bytes: escapes, DELETE, and ratings among the tags.
_NOT_PLAIN = (b"\\", b"\x7f", b"rating:")
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
        raise SidecarError(f"too large: more than {MAX_SIDECAR_BYTES >> 20} MiB")
    entry = parse_json(content)
    if not isinstance(entry, dict):
        raise SidecarError(f"not a JSON object: the file holds {describe_type(entry)}")
    plain = content.isascii() and not any(mark in content for mark in _NOT_PLAIN)
    return parse_entry(entry, extra_fields, plain=plain)


def parse_json(content: bytes) -> object:
    """Decode UTF-8 JSON, with or without a byte-order mark; raises SidecarError that says what is wrong with it."""
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        return _parse_again(content)


def parse_entry(
    entry: Mapping[str, object], extra_fields: Sequence[ExtraField] = (), *, plain: bool = False
) -> ParsedSidecar:
    """Read a decoded JSON object of a sidecar's form; raises SidecarError.

    `plain` says that no text in it has control characters, white space other than blanks, or `rating:`; looking for
    them in the bytes of a sidecar costs a tenth of looking in each tag.
    """
    if "tags" not in entry:
        raise SidecarError("no 'tags' key")
    tags = _read_tags(entry["tags"], "tags", plain=plain)
    rating, bad_rating = _read_rating(entry.get("rating"))
    if not plain:
        rating, tags = _take_rating(tags, rating)
    if extra_fields:
        extra: list[str] = []
        for field in extra_fields:
            value = entry.get(field.name)
            if value is not None:
                values = _read_tags(value, field.name, plain=plain, by_space=False)
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


def _parse_again(content: bytes) -> object:
    """The slow path of what did not parse at once: a byte-order mark is cut, and what is wrong gets its name."""
    if content.startswith(b"\xef\xbb\xbf"):
        content = content[3:]
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise SidecarError("not UTF-8 text: it starts with a UTF-16 mark")
    if not content.strip():
        raise SidecarError("empty file")
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as error:
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as decode_error:
            raise SidecarError(f"not UTF-8 text: byte {decode_error.start} is not part of it") from error
        raise SidecarError(f"invalid JSON: {' '.join(str(error).split())}") from error


def _read_tags(value: object, field: str, *, plain: bool, by_space: bool = True) -> tuple[str, ...]:
    """Distinct names in order."""
    if isinstance(value, str):
        names: Iterable[str] = value.split(",") if "," in value or not by_space else value.split()
    elif isinstance(value, list):
        names = value
    else:
        raise SidecarError(f"'{field}' is not a list or a string: it is {describe_type(value)}")
    try:
        # Chained C calls: a sidecar has dozens of tags, and an index millions of sidecars.
        tags = dict.fromkeys(map(str.strip, names))
    except TypeError as error:
        assert isinstance(value, list)
        position = next(i for i, name in enumerate(value) if not isinstance(name, str))
        found = describe_type(value[position])
        raise SidecarError(f"a tag is not a string: {field}[{position}] is {found}") from error
    if not plain and not "".join(tags).isprintable():
        tags = dict.fromkeys(map(clean_tag, tags))
    tags.pop("", None)
    return tuple(tags)


def _read_rating(value: object) -> tuple[str | None, str | None]:
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
