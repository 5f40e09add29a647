"""One rank of runs of several ranks, for the tests of those: `python -m tests.ranked_runs RANK WORLD JOBS CODES`.

JOBS is a JSON file with a list of jobs: `port` and `words` (arguments of train_direct), and perhaps `event`, what
happens to rank `of_rank` after `at_step` updates, at the start or in a validation. A job `alone` is one of rank 0 as a
run of one rank. CODES becomes the list of their exit codes.
"""

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import start_up
import train_direct
from tagger.data.windows import Window
from tagger.errors import InputError
from validation_loop import Evaluation

EVENTS = {
    "sigterm": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "sigkill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "memory": lambda: _raise(MemoryError("no room for activations")),
}


def _raise(error: Exception) -> None:
    raise error


def endless(feed: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from feed


def run_job(job: dict[str, Any], rank: int) -> int:
    """Train as a job says; returns the exit code."""
    event = job.get("event") if rank == job.get("of_rank") else None
    step, build, score = train_direct.train_step, train_direct.build, train_direct.evaluate_all

    def eventful(parts: start_up.Parts, window: Window) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if event in EVENTS and parts.state.step == job["at_step"]:
            EVENTS[event]()
        return step(parts, window)

    def refusing(*arguments: Any, **options: Any) -> start_up.Parts:
        if event == "refusal":
            raise InputError("this machine lacks the images")
        return build(*arguments, **options)

    def interrupted(subjects: Any, feed: Iterable[Any], *arguments: Any, **options: Any) -> list[Evaluation]:
        if "scor" in job.get("event", ""):  # a validation that ends by nothing but the signal
            feed = endless(feed) if event != "sigterm once scored" else ()
        if event == "sigterm while scoring":
            EVENTS["sigterm"]()
        elif event == "sigterm once scored":
            threading.Timer(0.5, EVENTS["sigterm"]).start()
        return score(subjects, feed, *arguments, **options)

    train_direct.train_step, train_direct.build, train_direct.evaluate_all = eventful, refusing, interrupted
    try:
        return train_direct.main(job["words"])
    finally:
        train_direct.train_step, train_direct.build, train_direct.evaluate_all = step, build, score


def main() -> None:
    rank = int(sys.argv[1])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    codes: list[int] = []
    for job in json.loads(Path(sys.argv[3]).read_text(encoding="utf-8")):
        world = "1" if "alone" in job else sys.argv[2]
        os.environ |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": str(job["port"])}
        codes.append(0 if "alone" in job and rank else run_job(job, rank))
        if dist.is_initialized():  # what failed does not tidy up, since its process ends
            dist.destroy_process_group()
        logging.getLogger().handlers.clear()
        Path(sys.argv[4]).write_text(json.dumps(codes), encoding="utf-8")


if __name__ == "__main__":
    main()
