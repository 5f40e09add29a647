"""The coin of mirroring: a real hash, the same everywhere, that lists override and vetoes outrank."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orientation_handler import MirrorCoin, OrientationError, OrientationHandler
from tagger.rng import stable_id
from vocabulary import TagVocabulary

REPOSITORY = Path(__file__).resolve().parents[2]
STEMS = [f"image-{number}" for number in range(4000)]
IDS = np.array([stable_id(stem) for stem in STEMS], dtype=np.uint64)


def test_one_image_at_a_time_and_a_whole_array_agree() -> None:
    coin = MirrorCoin(0.3, seed=7, never=frozenset(STEMS[:50]), force=frozenset(STEMS[50:100]))
    for epoch in (0, 1, 12345):
        assert coin.toss(IDS, epoch).tolist() == [coin.toss_one(stem, epoch) for stem in STEMS]


def test_images_of_one_name_turn_each_by_itself_and_lists_still_name_them_all() -> None:
    rows, ids = np.arange(4000), np.full(4000, stable_id("image"), dtype=np.uint64)
    heads = MirrorCoin(0.5, 1).toss(ids, 3, rows)
    assert abs(heads.mean() - 0.5) < 5 * 0.5 / len(rows) ** 0.5
    assert heads.tolist() == [MirrorCoin(0.5, 1).toss_one("image", 3, row) for row in rows.tolist()]
    assert not (heads == MirrorCoin(0.5, 1).toss(ids, 4, rows)).all()
    assert not MirrorCoin(0.5, 1, never=frozenset({"image"})).toss(ids, 3, rows).any()
    assert MirrorCoin(0.5, 1, force=frozenset({"image"})).toss(ids, 3, rows).all()


def test_the_coin_is_fair_and_independent_between_adjacent_epochs_and_seeds() -> None:
    def toss(epoch: int, seed: int) -> Any:
        return MirrorCoin(0.5, seed).toss(IDS, epoch)

    five_sigma = 5 * 0.5 / len(IDS) ** 0.5
    for epoch in range(8):
        assert abs(toss(epoch, 1).mean() - 0.5) < five_sigma
        assert abs((toss(epoch, 1) == toss(epoch + 1, 1)).mean() - 0.5) < five_sigma
        assert abs((toss(epoch, 1) == toss(epoch, 2)).mean() - 0.5) < five_sigma


def test_the_coin_is_the_same_in_a_fresh_process() -> None:
    program = (
        "from orientation_handler import MirrorCoin\n"
        "print(''.join(str(int(MirrorCoin(0.5, 3).toss_one(f'image-{n}', 2))) for n in range(64)))"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert fresh == "".join(str(int(flip)) for flip in MirrorCoin(0.5, 3).toss(IDS[:64], 2))


def test_probability_zero_and_one_leave_nothing_to_chance() -> None:
    assert not MirrorCoin(0.0, 1).toss(IDS, 0).any()
    assert MirrorCoin(1.0, 1).toss(IDS, 0).all()
    with pytest.raises(OrientationError, match=r"1\.5 is not between 0 and 1"):
        MirrorCoin(1.5, 1)


def test_a_coin_travels_to_other_processes() -> None:
    coin = MirrorCoin(0.5, 1, never=frozenset(STEMS[:9]), force=frozenset(STEMS[9:18]))
    heads = coin.toss(IDS, 0)
    copy = pickle.loads(pickle.dumps(coin))
    assert copy == coin
    assert np.array_equal(copy.toss(IDS, 0), heads)


def test_lists_override_the_coin_and_no_veto(tmp_path: Path) -> None:
    map_path = tmp_path / "map.json"
    map_path.write_text('{"skip_flip_tags": ["text"], "explicit_mappings": {"left_paw": "right_paw"}}')
    handler = OrientationHandler(map_path)
    vocabulary = TagVocabulary.from_counts({"dog": 3, "left_paw": 2, "right_paw": 2}, {})
    never_flips = MirrorCoin(0.0, 1, force=frozenset({"a"}))
    always_flips = MirrorCoin(1.0, 1, never=frozenset({"a"}))
    assert handler.decide("a", ["left_paw"], 0, never_flips, vocabulary)
    assert not handler.decide("b", ["left_paw"], 0, never_flips, vocabulary)
    assert not handler.decide("a", ["left_paw", "text"], 0, never_flips, vocabulary)
    assert not handler.decide("a", ["left_paw"], 0, never_flips, TagVocabulary.from_counts({"left_paw": 2}, {}))
    assert not handler.decide("a", ["dog"], 0, always_flips, vocabulary)
    assert handler.decide("b", ["dog"], 0, always_flips)


def test_list_files_hold_one_stem_a_line(tmp_path: Path) -> None:
    never, force = tmp_path / "never.txt", tmp_path / "force.txt"
    never.write_text("\ufeff# portraits\nimage-1\n\n  #2 cat  \n#\n", encoding="utf-8")
    force.write_text("image-3.jpg\r\nimage-3\r\n", encoding="utf-8")
    coin = MirrorCoin.from_files(0.5, 1, never, force)
    assert coin.never == {"image-1", "#2 cat"}
    assert coin.unknown_stems(IDS) == ("#2 cat", "image-3.jpg")
    assert MirrorCoin.from_files(0.5, 1, None, None) == MirrorCoin(0.5, 1)
    assert MirrorCoin(0.5, 1).unknown_stems(IDS) == ()
    force.write_text("image-1\n", encoding="utf-8")
    with pytest.raises(OrientationError, match="'image-1' is in the never-flip and the force-flip list"):
        MirrorCoin.from_files(0.5, 1, never, force)
    with pytest.raises(OrientationError, match=r"list of images .*absent\.txt cannot be read"):
        MirrorCoin.from_files(0.5, 1, tmp_path / "absent.txt", None)
