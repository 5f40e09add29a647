"""When something is due: a function of the step alone, so that a resumed run acts at the steps of a straight one."""


def due(step: int, every: int) -> bool:
    """Whether what happens after every `every` steps happens once `step` steps are complete (never at step 0)."""
    return step > 0 and step % every == 0
