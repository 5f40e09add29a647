"""One evaluation's report, from its first batch to the files, and what of it a run in progress shows.

Refuses, before any work, to begin where what draws pages is not installed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tagger.batch import Batch
from tagger.metrics.curves import TagCurve
from tagger.metrics.hierarchy import HierarchyResult
from tagger.metrics.keys import NUM_KEYS, logit_of
from tagger.metrics.levels import tags_by_frequency
from tagger.metrics.summary import Summary, TagScores
from tagger.report import require_libraries
from tagger.report.content import DescribeImage, Report, ScoredCurves, gather_report
from tagger.report.mistakes import ConfidentMistakes

SHOWN_MISTAKES = 15


class ReportCollector:
    """Collects what a report shows beyond counts, and writes it: `page` is an HTML file, `plots` a folder of SVG files.

    names, categories: of the tags, in the order of the outputs. training_counts: int64 [C], images of the training part
    with each tag, of `num_training_images`. logit_thresholds: one, or float [C]. Raises InputError without the extra.
    """

    def __init__(
        self,
        page: Path | None,
        plots: Path | None,
        *,
        names: Sequence[str],
        categories: Sequence[str],
        training_counts: npt.NDArray[np.integer],
        num_training_images: int,
        logit_thresholds: npt.ArrayLike,
    ) -> None:
        require_libraries("--create-plots" if page is None else "--report")
        self._page, self._plots = page, plots
        self._names, self._categories, self._counts = names, categories, training_counts
        shares = training_counts / max(1, num_training_images)
        self.mistakes = ConfidentMistakes(SHOWN_MISTAKES, shares, logit_thresholds)

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Look at a batch on the host with its logits, float32 [B, C] on the CPU."""
        if self._page is not None:
            self.mistakes.add(batch, logits)

    def write(
        self,
        scored: ScoredCurves,
        *,
        title: str,
        facts: Mapping[str, str],
        describe_image: DescribeImage,
        everything_in: str,
        summary: Summary | None = None,
        scores: TagScores | None = None,
        hierarchy: HierarchyResult | None = None,
        chosen: Sequence[int] = (),
    ) -> Report:
        """Write what was asked for; the rest as for `gather_report`. Raises OSError where that is not possible."""
        from tagger.report.page import write_report
        from tagger.report.plots import draw_plots, write_plots

        report = gather_report(
            scored,
            self._names,
            self._categories,
            self._counts,
            title=title,
            facts=facts,
            summary=summary,
            scores=scores,
            extra=self.mistakes.strongest("extra"),
            missed=self.mistakes.strongest("missed"),
            describe_image=describe_image,
            hierarchy=hierarchy,
            chosen=chosen,
            everything_in=everything_in,
        )
        plots = draw_plots(report)
        if self._plots is not None:
            write_plots(plots, self._plots)
        if self._page is not None:
            write_report(report, self._page, plots)
        return report


def telling_curves(scored: ScoredCurves, names: Sequence[str], counts: npt.NDArray[np.integer]) -> dict[str, TagCurve]:
    """The curve of all decisions, and those of tags from the most frequent to the rarest that have a positive, by name.

    counts: int64 [C], how frequent each tag is. The same curves at every evaluation of the same images.
    """
    known = np.bincount(scored.positives() // NUM_KEYS, minlength=scored.num_tags) > 0
    curves = {names[curve.tag]: curve for curve in scored.curves(tags_by_frequency(counts, known))}
    return {"all decisions": scored.micro_curve(), **curves}


def create_mistakes(
    limit: int, counts: npt.NDArray[np.integer], num_images: int, threshold: float
) -> ConfidentMistakes | None:
    """A collector for a data set of `num_images` images of which `counts`, int64 [C], have each tag; None for none.

    threshold: the probability at or above which a tag is predicted. Counts of another data set say what is common too.
    """
    if limit == 0:
        return None
    shares = counts / max(1, num_images, int(counts.max()))
    return ConfidentMistakes(limit, shares, logit_of(threshold))
