"""Which process of a run this is, as its launcher says in the environment: known before a group is joined, or without.

Refuses nothing: an environment that names a group only in part is for `tagger.distributed` to refuse.
"""

import os


def launched_as() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) for one process by itself, where RANK may still be set from something else."""
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world_size.isdecimal()) or int(world_size) < 2:
        return 0, 1
    return int(rank), int(world_size)
