"""How large images are, without decoding them. Refuses nothing: a file that cannot be read has the size 0 x 0."""

import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tagger.data.index import MetadataIndex
from tagger.data.prefetch import default_num_threads

_ORIENTATION = 0x0112
_CHUNK = 256


def index_sizes(index: MetadataIndex) -> NDArray[np.uint32]:
    """uint32 [N, 2]: (width, height) of each row's image as it is seen, EXIF orientation applied; 0 where unknown."""
    sizes = np.zeros((len(index), 2), dtype=np.uint32)

    def read(start: int) -> None:
        for row in range(start, min(start + _CHUNK, len(index))):
            sizes[row] = _size_of(index.image_path(row))

    with ThreadPoolExecutor(default_num_threads(), thread_name_prefix="sizes") as pool:
        for _ in pool.map(read, range(0, len(index), _CHUNK)):
            pass
    return sizes


def _size_of(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            # Pillow turns TIFF by itself.
            turned = image.format != "TIFF" and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if turned else image.size
    except (OSError, SyntaxError, TypeError, ValueError, LookupError, ArithmeticError, struct.error):
        return 0, 0  # decoding will say what is wrong with it
    except Image.DecompressionBombError:
        return 0, 0
