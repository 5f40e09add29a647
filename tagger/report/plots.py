"""The plots of a report, each as an SVG drawing with its content in words. Needs the extra `report`.

A plot that would show nothing (no tag with a positive, no decision) is left out.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from tagger.files import write_atomic
from tagger.metrics.calibration import Bin
from tagger.metrics.summary import ENOUGH_POSITIVES
from tagger.report.content import Report
from tagger.report.drawing import BAR, COLOURS, FAINT, INK, Plot, draw_svg, label_axis, round_steps, short_number

# More dots than this are drawn as pixels: as shapes they would be megabytes.
_SHAPES_UP_TO = 1500
# Bins of fewer decisions say little and jump.
_DECISIONS_IN_A_BIN = 20
_MAX_BUCKETS = 6
_SIZE = (4.8, 3.2)
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))


def draw_plots(report: Report) -> list[Plot]:
    """Every plot that has something to show, in the order of the page."""
    makers: tuple[Callable[[Report], Plot | None], ...] = (
        _by_frequency,
        _precision_recall,
        _calibration,
        _thresholds,
        _tags_per_image,
        _distribution,
    )
    return [plot for make in makers if (plot := make(report)) is not None]


def write_plots(plots: Sequence[Plot], folder: Path) -> list[Path]:
    """Write plots as SVG files into `folder`, over older ones; raises OSError where that is not possible."""
    paths = []
    for plot in plots:
        paths.append(folder / f"{plot.name}.svg")
        write_atomic(paths[-1], plot.svg)
    return paths


def _by_frequency(report: Report) -> Plot | None:
    known = [tag for tag in report.tags if tag.average_precision is not None]
    if not known:
        return None
    counts = np.array([max(tag.training_images, 0.5) for tag in known])
    precision = np.array([tag.average_precision for tag in known], dtype=np.float64)
    few = np.array([tag.positives < ENOUGH_POSITIVES for tag in known])
    buckets = [(each, each.mAP.value) for each in report.summary.by_frequency if each.mAP.value is not None]

    def draw(axes: Axes) -> None:
        pixels = len(known) > _SHAPES_UP_TO
        size = 12 if len(known) < 300 else 6 if not pixels else 3
        for which, face, edge, label in (
            (few, "none", FAINT, f"fewer than {ENOUGH_POSITIVES} positives"),
            (~few, COLOURS[0], "none", "a tag"),
        ):
            if which.any():
                axes.scatter(
                    counts[which],
                    precision[which],
                    s=size,
                    alpha=0.55,
                    linewidths=0.7,
                    rasterized=pixels,
                    label=label,
                    facecolors=face,
                    edgecolors=edge,
                )
        most = float(counts.max())
        for number, (bucket, value) in enumerate(buckets):
            high = most if bucket.high is None else bucket.high + 0.9
            low = 0.4 if bucket.low == 0 else bucket.low
            axes.plot(
                [low, max(low * 1.2, min(high, most * 1.1))],
                [value, value],
                color=COLOURS[1],
                linewidth=2.4,
                solid_capstyle="butt",
                label="mean of a bucket" if number == 0 else None,
            )
        axes.set_xscale("log")
        least = float(counts.min())
        label_axis(
            axes.xaxis,
            ([0.5] if least == 0.5 else []) + (round_steps(max(least, 1), most) or [most]),
            lambda value: "0" if value == 0.5 else short_number(value),
        )
        axes.set_xlim(least / 1.3, most * 1.3)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("training images with the tag")
        axes.set_ylabel("average precision")
        axes.grid(alpha=0.25)
        _legend_above(axes, 3)

    means = "; ".join(f"{each.name} images: {value:.3f} over {each.mAP.over} tags" for each, value in buckets)
    alt = f"Average precision of {len(known)} tags against their training images. Means: {means}"
    return Plot("ap-by-frequency", "Average precision by frequency", alt, draw_svg(draw, _SIZE))


def _precision_recall(report: Report) -> Plot | None:
    if not report.curves:
        return None

    def draw(axes: Axes) -> None:
        for number, line in enumerate(report.curves):
            style = {"color": INK, "linewidth": 2.0} if number == 0 else {"color": COLOURS[(number - 1) % len(COLOURS)]}
            axes.plot(
                np.concatenate([[0.0], line.recall]),
                np.concatenate([line.precision[:1], line.precision]),
                drawstyle="steps-pre",
                linestyle=_DASHES[number % len(_DASHES)],
                label=f"AP {line.average_precision:.3f}  {_drawable(line.name)}",
                **style,
            )
        _unit_square(axes)
        axes.set_xlabel("recall")
        axes.set_ylabel("precision")
        _legend_above(axes, 2)

    told = "; ".join(
        f"{line.name}: AP {line.average_precision:.3f}, {line.num_positives} positives" for line in report.curves
    )
    return Plot("precision-recall", "Precision and recall", f"Precision against recall. {told}", draw_svg(draw, _SIZE))


def _calibration(report: Report) -> Plot | None:
    summary = report.summary
    buckets = [bucket for bucket in summary.by_frequency if _points(bucket.calibration.bins)]
    if not _points(summary.all_tags.calibration.bins):
        return None
    # Of many buckets, those between the ends at even steps.
    chosen = np.unique(np.linspace(0, len(buckets) - 1, min(len(buckets), _MAX_BUCKETS)).round().astype(int)).tolist()
    shown = [buckets[i] for i in chosen] if len(buckets) > 1 else []

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle=":")
        colours = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.85, max(len(shown), 1)))
        for number, bucket in enumerate(shown):
            x, y = zip(*_points(bucket.calibration.bins), strict=True)
            axes.plot(
                x,
                y,
                color=colours[number],
                marker="os^Dvp"[number],
                markersize=3.5,
                linewidth=1,
                label=f"{bucket.name} images",
            )
        x, y = zip(*_points(summary.all_tags.calibration.bins), strict=True)
        axes.plot(x, y, color=INK, marker="o", markersize=4, linewidth=1.8, label="all tags")
        _unit_square(axes)
        axes.set_xlabel("predicted probability")
        axes.set_ylabel("share that is true")
        _legend_above(axes, 3)

    told = ", ".join(f"{x:.2f}: {y:.2f}" for x, y in _points(summary.all_tags.calibration.bins))
    alt = f"Share of decisions that are true against the predicted probability, all tags. {told}"
    return Plot("calibration", "Calibration", alt, draw_svg(draw, _SIZE))


def _thresholds(report: Report) -> Plot | None:
    sweep = report.sweep
    if np.isnan(sweep.recall).all():
        return None
    best = int(np.nanargmax(sweep.f1))

    def draw(axes: Axes) -> None:
        lines = {"precision": sweep.precision, "recall": sweep.recall, "F1": sweep.f1}
        for number, (name, values) in enumerate(lines.items()):
            axes.plot(sweep.probability, values, color=COLOURS[number], linestyle=_DASHES[number], label=name)
        if report.threshold is not None:
            axes.axvline(report.threshold, color=FAINT, linewidth=0.8, linestyle=":")
        _unit_square(axes)
        axes.set_xlabel("one threshold for all tags" + ("" if report.threshold is None else " (dotted: the one used)"))
        axes.set_ylabel("all decisions")
        _legend_above(axes, 3)

    alt = (
        f"Precision, recall and F1 of all decisions against one threshold for all tags; F1 is highest, "
        f"{sweep.f1[best]:.3f}, at {sweep.probability[best]:.2f}"
    )
    return Plot("thresholds", "Thresholds", alt, draw_svg(draw, _SIZE))


def _tags_per_image(report: Report) -> Plot | None:
    if not len(report.present):
        return None
    most = int(max(report.present.max(), report.predicted.max()))
    width = max(1, -(-(most + 1) // 40))
    edges = np.arange(0, most + 1 + width, width)

    def draw(axes: Axes) -> None:
        for number, (values, label) in enumerate(((report.present, "true"), (report.predicted, "predicted"))):
            heights, _ = np.histogram(values, edges)
            axes.stairs(
                heights,
                edges - 0.5,
                color=BAR if number == 0 else COLOURS[1],
                fill=number == 0,
                alpha=0.45 if number == 0 else 1.0,
                linewidth=1.6,
                label=f"{label}, mean {values.mean():.2f}",
            )
        # Whole numbers alone: half a tag is none.
        label_axis(axes.xaxis, [float(tick) for tick in range(0, most + 1, max(1, -(-most // 10)))])
        axes.set_xlabel("tags of an image")
        axes.set_ylabel("images")
        _legend_above(axes, 2)

    alt = (
        f"Images by their number of tags: {report.present.mean():.2f} tags an image are true and "
        f"{report.predicted.mean():.2f} predicted, at most {report.present.max()} and {report.predicted.max()}"
    )
    return Plot("tags-per-image", "Tags per image", alt, draw_svg(draw, _SIZE))


def _distribution(report: Report) -> Plot | None:
    known = [tag.average_precision for tag in report.tags if tag.average_precision is not None]
    if not known:
        return None

    def draw(axes: Axes) -> None:
        axes.hist(known, bins=np.linspace(0, 1, 21).tolist(), color=BAR, edgecolor="white", linewidth=0.4)
        axes.axvline(float(np.mean(known)), color=COLOURS[1], linewidth=1.6, label=f"mean {np.mean(known):.3f}")
        axes.axvline(
            float(np.median(known)), color=INK, linewidth=1.2, linestyle="--", label=f"median {np.median(known):.3f}"
        )
        axes.set_xlim(0, 1)
        axes.set_xlabel("average precision")
        axes.set_ylabel("tags")
        _legend_above(axes, 2)

    low, median, high = np.quantile(known, [0.1, 0.5, 0.9])
    alt = f"Average precision of {len(known)} tags: median {median:.3f}, four fifths from {low:.3f} to {high:.3f}"
    return Plot("ap-distribution", "Average precision of the tags", alt, draw_svg(draw, _SIZE))


def _points(bins: tuple[Bin, ...]) -> list[tuple[float, float]]:
    """(mean probability, share true) of the bins with enough decisions."""
    return [
        (each.mean_probability, each.share_true)
        for each in bins
        if each.num_decisions >= _DECISIONS_IN_A_BIN
        and each.mean_probability is not None
        and each.share_true is not None
    ]


def _unit_square(axes: Axes) -> None:
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.02, 1.04)
    axes.grid(alpha=0.25)


def _legend_above(axes: Axes, ncols: int) -> None:
    """Where curves may run anywhere, a legend inside would cover one."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.legend(loc="outside upper center", ncols=ncols)


def _drawable(name: str, most: int = 24) -> str:
    """The beginning of a name, without what is no letter: control characters may not stand in an SVG document."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in name)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"
