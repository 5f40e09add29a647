"""Registries: what a recipe may name, and what it is told when it names something else."""

from collections.abc import Callable

import pytest

from tagger.registry import Registry


def _fruit() -> Registry[Callable[[], str]]:
    fruit: Registry[Callable[[], str]] = Registry("fruit")

    @fruit.register("pear")
    def _pear() -> str:
        return "a pear"

    @fruit.register("apple")
    def _apple() -> str:
        return "an apple"

    return fruit


def test_a_registered_name_gives_the_very_thing() -> None:
    fruit: Registry[Callable[[], str]] = Registry("fruit")

    def plum() -> str:
        return "a plum"

    assert fruit.register("plum")(plum) is plum
    assert fruit.get("plum") is plum


def test_names_are_sorted_whatever_the_order_of_registration() -> None:
    assert _fruit().names() == ("apple", "pear")


def test_a_taken_name_is_refused_and_the_first_entry_stays() -> None:
    fruit = _fruit()
    with pytest.raises(ValueError, match="fruit 'pear' is registered already"):
        fruit.register("pear")(lambda: "another")
    assert fruit.get("pear")() == "a pear"


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown fruit 'aple'; did you mean 'apple'"):
        _fruit().get("aple")


def test_a_name_near_to_nothing_is_answered_with_all_names() -> None:
    with pytest.raises(ValueError, match="unknown fruit 'xyz'; choose one of: apple, pear"):
        _fruit().get("xyz")
