"""What leaves a run: weights, dimensions, vocabulary, preprocessing and a tags table in one folder."""

from tagger.artifact.store import (
    Artifact,
    ArtifactMetadata,
    attach_thresholds,
    load_artifact,
    read_thresholds,
    save_artifact,
)
from tagger.artifact.tags import TagRow

__all__ = [
    "Artifact",
    "ArtifactMetadata",
    "TagRow",
    "attach_thresholds",
    "load_artifact",
    "read_thresholds",
    "save_artifact",
]
