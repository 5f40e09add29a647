"""Typed configuration trees: dataclass <-> YAML, recipes on top of recipes, overrides, and where each value came from.

Knows nothing of any particular setting. Refuses unknown keys (naming the nearest one), values of the wrong type,
files that do not exist, recipes that include each other, and ``${...}`` interpolation (a recipe is data, not code).
"""

import dataclasses
import difflib
import hashlib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tagger.errors import InputError
from tagger.files import write_atomic

T = TypeVar("T")

# For people: what values of a type are called, and one of them.
_PLAIN = {int: ("a whole number", "3"), float: ("a number", "0.1"), bool: ("true or false", "true"), str: ("text", "a")}


class ConfigError(InputError):
    """A configuration that its author can mend; the message is one line that says what was found and what to do."""


@dataclass(frozen=True)
class Layer:
    """One source of settings: ``source`` names it for people, ``values`` maps dotted keys to values."""

    source: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """A validated tree and, for each dotted key, the source that had the last word."""

    tree: T
    origin: dict[str, str]


def read_recipe(path: Path) -> list[Layer]:
    """Layers of a recipe, its ``defaults`` first. A default is named without ``.yaml``, beside the recipe."""
    return _read_recipe(path, ())


def _read_recipe(path: Path, parents: tuple[Path, ...]) -> list[Layer]:
    resolved = path.resolve()
    if resolved in parents:
        chain = " -> ".join(p.name for p in (*parents, resolved))
        raise ConfigError(f"{path}: recipes include each other ({chain}); remove one of the 'defaults'")
    if resolved.is_dir():
        raise ConfigError(f"configuration {path} is a folder; name the file, for example configs/demo.yaml")
    if not resolved.is_file():
        folder = resolved.parent
        names = sorted(p.name for p in folder.glob("*.yaml")) if folder.is_dir() else []
        found = f"{path.parent} holds {', '.join(names)}" if names else f"{path.parent} holds no .yaml file"
        raise ConfigError(f"configuration file {path} does not exist; {found}")
    try:
        content = yaml.safe_load(resolved.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}; expected 'section:' blocks of settings")
    defaults = content.pop("defaults", [])
    if isinstance(defaults, str):
        defaults = [defaults]
    if not isinstance(defaults, list) or not all(isinstance(name, str) for name in defaults):
        raise ConfigError(f"{path}: 'defaults' must be a list of recipe names, for example [unified_config]")
    layers: list[Layer] = []
    for name in defaults:
        layers += _read_recipe(path.parent / f"{name.removesuffix('.yaml')}.yaml", (*parents, resolved))
    return [*layers, Layer(f"file {path}", _flatten(content))]


def environment_layer(prefix: str, environment: Mapping[str, str]) -> Layer:
    """``PREFIX_SECTION__KEY=value`` as ``section.key``; the value is read as YAML-like text."""
    values = {
        name[len(prefix) :].lower().replace("__", "."): text
        for name, text in sorted(environment.items())
        if name.startswith(prefix) and "__" in name[len(prefix) :]
    }
    return Layer("environment", _flatten({key: _parse_value(f"{prefix}{key}", text) for key, text in values.items()}))


def override_layer(overrides: Iterable[str], source: str = "command line") -> Layer:
    """``section.key=value`` words as a layer."""
    values: dict[str, Any] = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key or key.startswith("-"):
            raise ConfigError(f"'{word}' is not a setting; write section.key=value, for example training.num_epochs=3")
        values[key] = _parse_value(key, text)
    return Layer(source, _flatten(values))


def compose(schema: type[T], layers: Iterable[Layer]) -> Loaded[T]:
    """Merge layers over the schema's defaults, later ones winning; the typed tree validates itself as it is built."""
    hints = _schema_hints(schema)
    tree = OmegaConf.structured(schema)
    origin = dict.fromkeys(_flatten(_to_plain(schema())), "default")
    for layer in layers:
        for key, value in layer.values.items():
            if key not in hints:
                raise ConfigError(f"{layer.source}: unknown setting '{key}'{_nearest(key, set(hints))}")
            if _has_interpolation(value):
                raise ConfigError(f"{layer.source}: {key} uses '${{...}}', which recipes may not; write the value")
            if isinstance(value, list):
                _check_items(layer.source, key, value, hints[key])
            for stale in [k for k in origin if k.startswith(f"{key}.")]:
                del origin[stale]
            origin[key] = layer.source
        meant = {key: _meant(value, hints[key]) for key, value in layer.values.items()}
        tree = _merge(tree, Layer(layer.source, meant), hints)
    try:
        built = typing.cast(T, OmegaConf.to_object(tree))
    except OmegaConfBaseException as error:
        if missing := sorted(OmegaConf.missing_keys(tree)):
            group = missing[0].rpartition(".")[0]
            message = f"{' and '.join(missing)} must be set too: {group} has no default for it; or set {group}=null"
            raise ConfigError(message) from error
        raise ConfigError(str(error).splitlines()[0]) from error
    plain = _flatten(_to_plain(built))
    return Loaded(built, {key: _origin_of(key, origin) for key in plain})


def _check_items(source: str, key: str, items: list[Any], hint: Any) -> None:
    """Raise ConfigError for a list that is not what the type means: OmegaConf would make text of lists inside it."""
    group = _group_of(hint)
    if group is None:
        if any(isinstance(item, list | dict) for item in items):
            raise ConfigError(f"{source}: {_mismatch(key, items, hint)}")
        return
    hints = _schema_hints(group)
    needed = [field.name for field in dataclasses.fields(group) if field.default is field.default_factory]
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise ConfigError(f"{source}: {_mismatch(key, items, hint)}")
        place = f"{key}, item {number}"
        for name in _flatten(item):
            if name not in hints:
                raise ConfigError(f"{source}: {place}: unknown setting '{name}'{_nearest(name, set(hints))}")
        for name in needed:
            if name not in item:
                raise ConfigError(f"{source}: {place} has no {name}; write it as in {name}: ...")
        merged = _merge(OmegaConf.structured(group), Layer(f"{source}: {place}", _flatten(item)), hints)
        if OmegaConf.missing_keys(merged):
            continue  # which the whole tree tells
        try:
            OmegaConf.to_object(merged)
        except ConfigError as error:
            raise ConfigError(f"{source}: {place}: {error}") from error


def _group_of(hint: Any) -> type | None:
    """The dataclass X of `list[X]`."""
    (item,) = typing.get_args(hint) if typing.get_origin(hint) is list else (None,)
    return item if dataclasses.is_dataclass(item) and isinstance(item, type) else None


def _merge(tree: DictConfig, layer: Layer, hints: Mapping[str, Any]) -> DictConfig:
    """The tree with a layer's values; one merge, since each costs milliseconds."""
    try:
        return typing.cast(DictConfig, OmegaConf.merge(tree, _nest(layer.values)))
    except OmegaConfBaseException:
        # Once more, one by one: only so does the message name the setting.
        for key, value in layer.values.items():
            try:
                tree = typing.cast(DictConfig, OmegaConf.merge(tree, _nest({key: value})))
            except OmegaConfBaseException as error:
                raise ConfigError(f"{layer.source}: {_mismatch(key, value, hints[key])}") from error
        return tree


def save_yaml(tree: object, path: Path) -> None:
    """Write the whole tree as YAML that ``compose`` reads back to an equal tree."""
    text = yaml.safe_dump(_to_plain(tree), sort_keys=False, allow_unicode=True, width=120)
    write_atomic(path, text.encode())


def digest(tree: object) -> str:
    """sha256 over every setting, as hexadecimal text."""
    return hashlib.sha256(repr(sorted(flat_values(tree).items())).encode()).hexdigest()


def flat_values(tree: object) -> dict[str, Any]:
    """Every setting of a tree as ``{"section.key": value}``."""
    return _flatten(_to_plain(tree))


def _to_plain(tree: object) -> dict[str, Any]:
    assert dataclasses.is_dataclass(tree) and not isinstance(tree, type)
    return dataclasses.asdict(tree)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as a tree; a later key replaces what an earlier one says above or below it."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *path, leaf = key.split(".")
        branch = tree
        for part in path:
            if not isinstance(branch.get(part), dict):
                branch[part] = {}
            branch = branch[part]
        branch[leaf] = value
    return tree


def _parse_value(key: str, text: str) -> Any:
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{key}={text}: {' '.join(str(error).split())}") from error
    return typing.cast(dict[str, Any], parsed)["value"]


def _has_interpolation(value: Any) -> bool:
    if isinstance(value, str):
        return "${" in value
    if isinstance(value, Mapping):
        return any(_has_interpolation(item) for item in value.values())
    return isinstance(value, list) and any(_has_interpolation(item) for item in value)


def _schema_hints(schema: Any, prefix: str = "") -> dict[str, Any]:
    """Every dotted key that the schema knows, with its type; groups included, so that one can be set to null."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        found[name] = hint
        if dataclasses.is_dataclass(_without_none(hint)):
            found |= _schema_hints(_without_none(hint), f"{name}.")
    return found


def _without_none(hint: Any) -> Any:
    """X of `X | None`, else the type itself."""
    if not isinstance(hint, types.UnionType):
        return hint
    (only,) = (option for option in typing.get_args(hint) if option is not types.NoneType)
    return only


def _meant(value: Any, hint: Any) -> Any:
    """The value as its type lets it be read: YAML makes false of a bare off, and one folder needs no brackets."""
    kind = _without_none(hint)
    if value is None and _group_of(hint) is not None:
        return []
    if isinstance(value, bool) and "off" in typing.get_args(kind):
        return "on" if value else "off"
    return [value] if isinstance(value, str) and value and kind == list[str] else value


def _mismatch(key: str, value: Any, hint: Any) -> str:
    """What a value of the wrong type is and what to write in its place."""
    found, kind = f"{key}={_yaml_scalar(value)}", _without_none(hint)
    if dataclasses.is_dataclass(kind):
        first = dataclasses.fields(kind)[0].name
        return f"{found}: {key} is a group of settings; set them one by one, e.g. {key}.{first}=..."
    if (group := _group_of(kind)) is not None:
        names = ", ".join(f"{each.name}: ..." for each in dataclasses.fields(group))
        return f"{found} is not a list of groups of settings; write it as {key}=[{{{names}}}]"
    if typing.get_origin(kind) is list:
        texts = typing.get_args(kind) == (str,)
        what, sample = ("texts", "[one,two]") if texts else ("numbers", "[1,2,3]")
        return f"{found} is not a list of {what}; write it as {key}={sample}"
    if typing.get_origin(kind) is typing.Literal:
        return f"{found} is not known; use {', '.join(str(word) for word in typing.get_args(kind))}"
    name, sample = _PLAIN[kind]
    none = "" if kind is hint else " or null"
    return f"{found} is not {name}{none}; write it as in {key}={sample}"


def _nearest(key: str, known: set[str]) -> str:
    before, colon, _ = key.partition(":")
    if colon:  # YAML reads "a:1" as a name
        return f"; a space must follow the colon, as in {before.rpartition('.')[2]}: ..."
    leaves = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    close = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.6) or sorted(leaves)[:1]
    return f"; did you mean '{close[0]}'?" if close else "; 'python Configuration_System.py show FILE' lists them all"


def _origin_of(key: str, origin: Mapping[str, str]) -> str:
    while key not in origin and "." in key:
        key = key.rpartition(".")[0]
    return origin.get(key, "default")


def describe(loaded: Loaded[T]) -> str:
    """Every setting, its value and its source, one a line."""
    lines = ["# precedence: defaults < file < environment (TAGGER_SECTION__KEY) < command line"]
    values = flat_values(loaded.tree)
    width = max(len(f"{key}: {value}") for key, value in values.items() if len(f"{key}: {value}") <= 60)
    lines += [f"{f'{key}: {_yaml_scalar(value)}':<{width}}  # {loaded.origin[key]}" for key, value in values.items()]
    return "\n".join(lines)


def _yaml_scalar(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
