"""What a contact sheet shows: judged from the cards, and from the pixels where it matters."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tagger.contact_sheet import Card, SheetTag, Verdict, draw_sheet, make_card

NAMES = ("cat", "dog", "tree", "sky", "sun")
PICTURE = np.full((20, 30, 3), (10, 200, 90), dtype=np.uint8)
GREEN, RED, GREY = (22, 122, 62), (196, 38, 46), (140, 147, 158)


def colours_of(sheet: Image.Image) -> set[tuple[int, int, int]]:
    return {tuple(colour) for colour in np.asarray(sheet).reshape(-1, 3).tolist()}


def test_tags_are_judged_and_ranked() -> None:
    scores = np.array([0.9, 0.2, 0.6, 0.4, 0.1])
    card = make_card(PICTURE, "a.png", NAMES, scores, threshold=0.5, truth={0, 1})
    assert [(tag.name, tag.verdict) for tag in card.tags] == [("cat", "right"), ("tree", "wrong"), ("dog", "missed")]
    assert [tag.score for tag in card.tags] == [0.9, 0.6, 0.2]


def test_without_a_truth_nothing_is_judged() -> None:
    card = make_card(PICTURE, "a.png", NAMES, np.array([0.9, 0.2, 0.6, 0.5, 0.1]), threshold=0.5)
    assert [(tag.name, tag.verdict) for tag in card.tags] == [
        ("cat", "unjudged"),
        ("tree", "unjudged"),
        ("sky", "unjudged"),
    ]


def test_what_does_not_fit_is_counted() -> None:
    card = make_card(PICTURE, "a.png", NAMES, np.full(5, 0.7), threshold=0.5, max_tags=2)
    assert [tag.name for tag in card.tags] == ["cat", "dog"] and card.num_more == 3


def test_each_verdict_has_its_colour() -> None:
    def number_of(colour: tuple[int, int, int], verdict: Verdict) -> int:
        sheet = draw_sheet([Card(PICTURE, "a.png", (SheetTag("cat", 0.5, verdict),))])
        return int((np.asarray(sheet) == colour).all(axis=-1).sum())

    # The legend shows every icon once, the card one of them again.
    assert number_of(GREEN, "right") == 2 * number_of(GREEN, "wrong") > 0
    assert number_of(RED, "wrong") == 2 * number_of(RED, "missed") > 0
    assert number_of(GREY, "missed") == 2 * number_of(GREY, "right") > 0
    plain = colours_of(draw_sheet([Card(PICTURE, "a.png", (SheetTag("cat", 0.5),))]))
    assert not plain & {GREEN, RED, GREY}


def test_the_image_is_shown_whole_with_its_shape() -> None:
    sheet = np.asarray(draw_sheet([Card(PICTURE, "", ())], scale=1.0)).astype(int)
    rows, columns = np.nonzero((abs(sheet - PICTURE[0, 0]) <= 2).all(axis=-1))
    assert np.ptp(columns) + 1 == pytest.approx(1.5 * (np.ptp(rows) + 1), rel=0.02)


def test_a_bar_is_as_long_as_its_score() -> None:
    def bar_length(score: float) -> int:
        sheet = np.asarray(draw_sheet([Card(PICTURE, "", (SheetTag("", score),))], scale=1.0))
        return int((sheet == (222, 233, 251)).all(axis=-1).sum(axis=1).max())

    assert bar_length(1.0) - bar_length(0.5) == pytest.approx(bar_length(0.5), abs=2)
    assert 0 < bar_length(0.0) < bar_length(0.5)


def test_the_same_cards_give_the_same_picture() -> None:
    cards = [make_card(PICTURE, f"{i}.png", NAMES, np.full(5, 0.7), threshold=0.5, truth={i}) for i in range(3)]
    assert draw_sheet(cards, "Title").tobytes() == draw_sheet(cards, "Title").tobytes()


@settings(max_examples=25, deadline=None)
@given(
    names=st.lists(st.text(max_size=60), min_size=0, max_size=4),
    score=st.floats(-1, 2),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    number=st.integers(1, 5),
    scale=st.sampled_from([0.5, 1.0]),
)
def test_any_tag_and_any_image_can_be_drawn(names, score, size, number, scale) -> None:
    tags = tuple(SheetTag(name, score, "wrong") for name in names)
    sheet = draw_sheet([Card(np.zeros((*size, 3), np.uint8), "name", tags)] * number, "t" * 200, "s", scale=scale)
    assert sheet.mode == "RGB"


def test_no_card_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        draw_sheet([])
