"""What leaves a run: weights, dimensions, vocabulary, preprocessing and a tags table in one folder."""

from tagger.artifact.store import Artifact, ArtifactMetadata, load_artifact, save_artifact
from tagger.artifact.tags import TagRow

__all__ = ["Artifact", "ArtifactMetadata", "TagRow", "load_artifact", "save_artifact"]
