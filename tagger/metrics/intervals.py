"""How sure an evaluation's scores are: 95 % intervals over which images happened to be held out.

Images are drawn anew with replacement (the bootstrap). Scores that are means over images follow from the per-image
counters, exactly and at any size: images of equal counters are drawn together. For mAP, images are drawn and ranked
anew where that is affordable; beyond that its standard error comes from each image's influence, the derivative of mAP
by the image's weight (infinitesimal jackknife; Efron 1981), in one pass, over all images or over those chosen by hash,
scaled. An mAP interval is the score plus and minus 1.96 standard errors, as drawing an image twice raises AP a little
and would shift percentiles. The order of the images changes nothing. Refuses an evaluation without images.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tagger.metrics.keys import KEY_OFFSET, MAX_KEY, NUM_KEYS, Keys
from tagger.metrics.ranking import RankedPositives, ScoredImages, image_f1, rank_positives
from tagger.metrics.store import KeySample

Z = 1.959963984540054
SEED = 20_231
# Work (images x tags x draws) that takes a second or two; beyond it mAP's interval follows from influences.
_DRAWS_AFFORDABLE = 500_000_000
# Images x draws of the table that says how often each draw has each image: 128 MiB.
_TABLE_AFFORDABLE = 1 << 25
# Images x tags whose influence is looked up one by one; beyond it a sample of images stands for all.
_INFLUENCES_AFFORDABLE = 1 << 31
_TAGS_AT_A_TIME = 32


@dataclass(frozen=True)
class Interval:
    """A score with its 95 % interval. method: "bootstrap", "influence" or "influence of a sample of images".

    num_images: those the standard error comes from. value and the rest are None over nothing.
    """

    value: float | None
    low: float | None
    high: float | None
    standard_error: float | None
    method: str
    num_images: int


def intervals(scored: ScoredImages, draws: int = 1000, map_draws: int = 200, seed: int = SEED) -> dict[str, Interval]:
    """Intervals of "mAP", "f1_micro", "f1_per_image", "tags_per_image" and "predicted_per_image"."""
    if scored.num_images == 0:
        raise ValueError("no image to draw; evaluate at least one")
    return {"mAP": map_interval(scored, map_draws, seed), **per_image_intervals(scored, draws, seed)}


def per_image_intervals(scored: ScoredImages, draws: int = 1000, seed: int = SEED) -> dict[str, Interval]:
    """Percentile intervals of what follows from the per-image counters, by an exact bootstrap."""
    counters = np.stack([scored.per_image(name) for name in ("hits", "predicted", "present")])
    distinct, times = np.unique(counters, axis=1, return_counts=True)
    hits, predicted, present = distinct
    terms = np.stack([image_f1(hits, predicted, present), present, predicted, hits]).astype(np.float64)
    num_images = scored.num_images
    generator = np.random.default_rng(seed)
    share = times / num_images
    drawn = [terms @ generator.multinomial(num_images, share).astype(np.float64) for _ in range(draws)]
    sums = np.stack([terms @ times.astype(np.float64), *drawn])
    decided = sums[:, 1] + sums[:, 2]
    scores = {
        "f1_per_image": sums[:, 0] / num_images,
        "f1_micro": np.where(decided > 0, 2 * sums[:, 3] / np.maximum(decided, 1), math.nan),
        "tags_per_image": sums[:, 1] / num_images,
        "predicted_per_image": sums[:, 2] / num_images,
    }
    return {name: _percentiles(float(values[0]), values[1:], num_images) for name, values in scores.items()}


def map_interval(scored: ScoredImages, draws: int = 200, seed: int = SEED) -> Interval:
    """mAP's interval by drawing images where their keys are kept and that is affordable, else by influence."""
    ranked, _ = rank_positives(scored.positives(), scored.store)
    known = ranked.average_precision[ranked.present > 0]
    if not len(known):
        return Interval(None, None, None, None, "bootstrap", scored.num_images)
    value = float(known.mean())
    if can_draw(scored, draws):
        drawn = bootstrap_map(scored, draws, seed)
        error, method, used = float(np.std(drawn, ddof=1)), "bootstrap", scored.num_images
    else:
        places, influence = image_influence(scored, ranked, influence_size(scored))
        used = len(places)
        method = "influence" if used == scored.num_images else "influence of a sample of images"
        error = math.sqrt(scored.num_images / used * math.fsum((influence**2).tolist()))
    return Interval(value, max(0.0, value - Z * error), min(1.0, value + Z * error), error, method, used)


def can_draw(scored: ScoredImages, draws: int) -> bool:
    """Whether drawing images and ranking them anew so often takes a few seconds at most."""
    work = scored.num_images * draws
    affordable = work <= _TABLE_AFFORDABLE and work * scored.num_tags <= _DRAWS_AFFORDABLE
    return scored.store.keys is not None and affordable


def influence_size(scored: ScoredImages) -> int:
    """Of how many images the influence is looked up."""
    return max(1, _INFLUENCES_AFFORDABLE // scored.num_tags)


def bootstrap_map(scored: ScoredImages, draws: int, seed: int = SEED) -> npt.NDArray[np.float64]:
    """mAP of sets of as many images drawn with replacement, float64 [draws]; needs stored keys.

    Each set's mean is over the tags that have a positive in it. Images are drawn in the order of their ids.
    """
    stored = scored.store.keys
    if stored is None:
        raise ValueError("the keys of each image are not kept; use image_influence")
    num_images = scored.num_images
    generator = np.random.default_rng(seed)
    times = np.empty((num_images, draws), np.float32)
    by_id = np.argsort(scored.per_image("image_ids"), kind="stable")
    for draw in range(draws):
        times[by_id, draw] = np.bincount(generator.integers(num_images, size=num_images), minlength=num_images)
    codes, images = scored.positives_by_image()
    tags_of, order = codes // NUM_KEYS, np.argsort(codes, kind="stable")
    bounds = np.searchsorted(tags_of[order], np.arange(scored.num_tags + 1))
    total, num_counted = np.zeros(draws), np.zeros(draws, np.int64)
    for start in range(0, scored.num_tags, _TAGS_AT_A_TIME):
        columns = stored.columns(np.arange(start, min(start + _TAGS_AT_A_TIME, scored.num_tags)))
        for tag, keys in enumerate(columns, start):
            own = order[bounds[tag] : bounds[tag + 1]]
            if len(own):
                value, present = _drawn_average_precision(
                    keys, (codes[own] % NUM_KEYS - KEY_OFFSET).astype(np.int16), images[own], times
                )
                total += value
                num_counted += present
    return np.asarray(total / np.maximum(num_counted, 1))


def image_influence(
    scored: ScoredImages, ranked: RankedPositives, size: int | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The derivative of mAP by each image's weight: places of at most `size` images chosen by hash, float64 [n].

    Over all images it sums to 0, and its squares to mAP's variance.
    """
    places, by_tag = tag_influences(scored, ranked, size)
    influence = np.zeros(len(places))
    for _, own in by_tag:
        influence += own
    return places, influence / np.count_nonzero(ranked.present)


def tag_influences(
    scored: ScoredImages, ranked: RankedPositives, size: int | None = None
) -> tuple[npt.NDArray[np.int64], Iterator[tuple[int, npt.NDArray[np.float64]]]]:
    """The same places, and for each tag with a positive, in order, the derivative of its AP by each one's weight."""
    sample = scored.store.sample(size)
    places = sample.places
    codes, images = scored.positives_by_image()
    position = np.full(scored.num_images, -1)
    position[places] = np.arange(len(places))
    codes, images = codes[position[images] >= 0], position[images[position[images] >= 0]]
    order = np.argsort(codes, kind="stable")
    return places, _tag_influences(ranked, sample, codes[order], images[order])


def _tag_influences(
    ranked: RankedPositives, sample: KeySample, codes: npt.NDArray[np.int64], images: npt.NDArray[np.int64]
) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
    """codes, images: the sample's positives in ascending order, and the column of each."""
    bounds_of = np.arange(len(ranked.present) + 1)
    own_bounds, bounds = np.searchsorted(codes // NUM_KEYS, bounds_of), np.searchsorted(ranked.tags, bounds_of)
    # What an image below a positive does not change, one at or above it does: sums over the positives up to a key.
    for_hits = ranked.times / ranked.counts_from
    precision = ranked.precision
    for_counts = for_hits * precision
    with_positives = np.flatnonzero(ranked.present)
    for start in range(0, len(with_positives), _TAGS_AT_A_TIME):
        tags = with_positives[start : start + _TAGS_AT_A_TIME]
        for tag, keys in zip(tags.tolist(), sample.columns(tags), strict=True):
            part, own = slice(bounds[tag], bounds[tag + 1]), slice(own_bounds[tag], own_bounds[tag + 1])
            cells = ranked.codes[part] % NUM_KEYS
            sums = np.concatenate([[0.0], np.cumsum(for_counts[part])])
            table = np.repeat(sums, np.diff(cells, prepend=0, append=NUM_KEYS))
            change = -table[keys.astype(np.int64) + KEY_OFFSET]
            gain = precision[part] - ranked.average_precision[tag] + np.cumsum(for_hits[part])
            change[images[own]] += gain[np.searchsorted(ranked.codes[part], codes[own])]
            yield tag, change / ranked.present[tag]


def _drawn_average_precision(
    keys: Keys, positive_keys: Keys, positive_images: npt.NDArray[np.int64], times: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """AP of one tag in each set, 0 where the set has none of its positives, and whether it has: [draws] each.

    keys int16 [N]; positive_keys ascending, with their images; times [N, draws], how often a set has each image.
    """
    firsts = np.flatnonzero(np.diff(positive_keys.astype(np.int32), prepend=-MAX_KEY - 1))
    levels = np.searchsorted(positive_keys[firsts], keys, side="right")
    order = np.argsort(levels.astype(np.uint16) if len(firsts) < NUM_KEYS else levels, kind="stable")
    order = order[np.searchsorted(levels[order], 1) :]
    starts = np.searchsorted(levels[order], np.arange(1, len(firsts) + 1))
    counts = np.add.reduceat(times[order], starts, axis=0, dtype=np.float64)
    gained = np.add.reduceat(times[positive_images], firsts, axis=0, dtype=np.float64)
    counts_from, hits_from = counts[::-1].cumsum(axis=0)[::-1], gained[::-1].cumsum(axis=0)[::-1]
    summed = (gained * hits_from / np.maximum(counts_from, 1)).sum(axis=0)
    return summed / np.maximum(hits_from[0], 1), hits_from[0] > 0


def _percentiles(value: float, drawn: npt.NDArray[np.float64], num_images: int) -> Interval:
    known = drawn[~np.isnan(drawn)]
    if math.isnan(value) or len(known) < 2:
        return Interval(None, None, None, None, "bootstrap", num_images)
    low, high = np.quantile(known, [0.025, 0.975]).tolist()
    return Interval(value, low, high, float(np.std(known, ddof=1)), "bootstrap", num_images)
