"""The problems of an index as the content of a file, and back."""

from collections import Counter
from pathlib import Path
from typing import Any

from tagger.data.scan import Problems, Rejected
from tagger.files import read_json


def problems_content(problems: Problems) -> dict[str, Any]:
    return {
        "rejected": [[item.path, item.reason, *(item.mark or ())] for item in problems.rejected],
        "images_without_sidecar": problems.images_without_sidecar,
        "sidecars_without_image": problems.sidecars_without_image,
        "unknown_ratings": [
            [item.path, item.reason, row]
            for item, row in zip(problems.unknown_ratings, problems.unknown_rating_rows, strict=True)
        ],
        "skipped": dict(problems.skipped),
        "unreadable": problems.unreadable,
    }


def read_problems(path: Path, format_version: int) -> Problems:
    content = read_json(path, "index problems", format_version)
    return Problems(
        [Rejected(path, reason, tuple(mark) or None) for path, reason, *mark in content["rejected"]],
        content["images_without_sidecar"],
        content["sidecars_without_image"],
        [Rejected(path, reason) for path, reason, _ in content["unknown_ratings"]],
        [row for *_, row in content["unknown_ratings"]],
        Counter(content["skipped"]),
        content["unreadable"],
    )
