"""Batches prepared by loader processes in a ring of shared memory, for rates at which threads would slow the trainer.

Batch k of a pass is prepared by process k mod P, so who prepares what shows in nothing. Images go straight into the
ring, where the consumer's tensors lie; all else of a batch is one small message. The processes live from the first
pass to `close`, and end with this process however it ends. One that dies or hangs is replaced and given its batches
again, within a RestartBudget: a batch is a function of (source, epoch, samples), so none is lost or
repeated.
"""

import json
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tagger.data.batch_job import BatchSource, PreparedBatch
from tagger.data.loader_process import Setup, board_bytes, board_of
from tagger.data.messages import Begin, Done, End, Ended, Failed, Grant, LogLine, Ready, Sender, received, share
from tagger.data.patience import HANG_S, MAX_RESTARTS, RESTART_WINDOW_S, RestartBudget, Stillness
from tagger.data.prefetch import default_num_threads, num_cores
from tagger.data.quarantine_log import KnownBad
from tagger.data.slots import SlotRing
from tagger.data.watch import rows_in_hand

logger = logging.getLogger(__name__)

Span = tuple[int, int]

# Importing torch from a cold network disk takes minutes.
START_S = 300.0
# A thread of a process is waited for by the process itself, for less.
_END_S = 30.0
_EXIT_S = 5.0
# On Windows a wait without a timeout does not let Ctrl-C through.
_WAKE_S = 0.5
_KEPT_STDERR_LINES = 20


class LoaderProcessError(RuntimeError):
    """Loader processes died or hung more often than is put up with; the message says how, and what was in hand."""


class LoaderTraceback(Exception):
    """The traceback, as text, of an error that was raised in a loader process; it is that error's cause."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def default_num_processes(num_cores: int, *, on_cuda: bool) -> tuple[int, str]:
    """(loader processes for a machine, why). Threads of the trainer cost it nothing that shows below about 1,000
    images a second, a rate that only a GPU and several cores to feed it go beyond."""
    if not on_cuda:
        return 0, "no CUDA device is in use"
    if num_cores < 4:
        return 0, f"{num_cores} cores decode too little to slow the trainer"
    return (1 if num_cores < 16 else 2), f"CUDA and {num_cores} cores"


def plan_workers(
    num_processes: int | None, num_threads: int | None, prefetch_batches: int, *, on_cuda: bool
) -> tuple[int, int]:
    """(loader processes, 0 for threads of this one; decoding threads in all); None is chosen by the machine. Logged."""
    reason = "as configured"
    if num_processes is None:
        num_processes, reason = default_num_processes(num_cores(), on_cuda=on_cuda)
    num_threads = num_threads or default_num_threads(num_processes)
    if (useful := min(num_threads, prefetch_batches)) < num_processes:
        num_processes, reason = useful, f"{reason} {num_processes}; more than threads or batches would stand idle"
    place = f"loader processes: {num_processes}" if num_processes else "threads of this process"
    logger.info("images are loaded in %s (%s), %d threads in all", place, reason, num_threads)
    return num_processes, num_threads


@dataclass
class _Child:
    """A loader process that runs or ran."""

    process: subprocess.Popen[bytes]
    sender: Sender
    stderr_lines: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_STDERR_LINES))
    ready: bool = False
    stillness: Stillness = field(default_factory=Stillness)


@dataclass
class _Seat:
    """The place of one loader process, whichever holds it. `owed`: batches granted and not yet answered, in order."""

    number: int
    child: _Child | None = None
    owed: deque[Grant] = field(default_factory=deque)
    ending: bool = False
    threads: list[threading.Thread] = field(default_factory=list)


class _State:
    """What consumer and listening threads share. Threads hold no reference to the ring, so that it can be collected."""

    def __init__(self, source: BatchSource, num_processes: int, num_threads: int, slots: SlotRing) -> None:
        self.lock = threading.RLock()  # re-entrant: a garbage collection inside may shut down
        self.changed = threading.Condition(self.lock)
        self.source = source
        self.num_threads = num_threads
        self.slots = slots
        self.source_block, self.source_sizes = share(source)
        self.board = board_of(slots.block, num_processes)
        self.seats = [_Seat(number) for number in range(num_processes)]
        self.epoch: int | None = None
        self.known_bad = KnownBad()
        self.answers: dict[int, Done | Failed] = {}
        # Slots of the pass before, free when no process writes to one any more.
        self.abandoned: list[int] = []
        self.restarts = RestartBudget()
        self.failure: LoaderProcessError | None = None
        self.closed = False

    def start(self, seat: _Seat) -> None:
        """Start a process in a seat and give it what the seat owes."""
        number, total = seat.number, len(self.seats)
        setup = Setup(
            number=number,
            num_processes=total,
            num_threads=self.num_threads // total + (number < self.num_threads % total),
            slot_bytes=self.slots.slot_bytes,
            ring_handle=self.slots.block.handle,
            ring_bytes=self.slots.block.num_bytes,
            source_handle=self.source_block.handle,
            source_bytes=self.source_block.num_bytes,
            source_sizes=self.source_sizes,
            log_level=logging.getLogger().getEffectiveLevel(),
            dump_after_s=0.8 * HANG_S,
        )
        self.board[number] = 0
        process = _started(setup, (*self.slots.block.descriptors, *self.source_block.descriptors))
        assert process.stdin is not None
        child = seat.child = _Child(process, Sender(process.stdin))
        listening = threading.Thread(target=_listen, args=(self, seat, child), name="loader-listen", daemon=True)
        reading = threading.Thread(target=_read_stderr, args=(number, child), name="loader-stderr", daemon=True)
        seat.threads = [listening, reading]
        reading.start()
        listening.start()
        if self.epoch is not None:
            self.tell(seat, Begin(self.epoch, self.known_bad))
            for grant in seat.owed:
                self.tell(seat, grant)

    def tell(self, seat: _Seat, message: object) -> None:
        """Send a message; one to a process that is gone is not missed, for its successor is told everything."""
        assert seat.child is not None
        try:
            seat.child.sender.send(message)
        except OSError as error:
            logger.debug("loader process %d does not hear: %s", seat.number, error)

    def take(self, seat: _Seat, message: object) -> None:
        """Note what a process says."""
        assert seat.child is not None
        if isinstance(message, Ready):
            seat.child.ready = True
        elif isinstance(message, Ended):
            seat.ending = False
        elif isinstance(message, Done | Failed) and not seat.ending:
            seat.owed.popleft()
            if isinstance(message, Failed):
                seat.owed.clear()  # the pass ends with it
            self.answers[message.number] = message
        self.changed.notify_all()

    def lose(self, seat: _Seat, child: _Child, how: str) -> None:
        """Replace a process that is no more, or give up."""
        if self.closed or seat.child is not child:
            return
        seat.child = None
        seat.ending = False  # it writes to no slot any more
        hands = self._in_hands(seat)
        if not self.restarts.take():
            self.failure = LoaderProcessError(
                f"a loader process {how}, and {MAX_RESTARTS} were started again in the {RESTART_WINDOW_S / 60:.0f} "
                f"minutes before{hands}; look for its last words in the log, or load in threads of the trainer with "
                "data.num_processes=0"
            )
        else:
            logger.warning("loader process %d %s%s; starting it again (%s)", seat.number, how, hands, self.restarts)
            self.start(seat)
        self.changed.notify_all()

    def finish_ending(self) -> None:
        """Wait until every process has dropped what it had of the pass before, and take its slots back."""
        ending = Stillness()
        while any(seat.ending for seat in self.seats) and not self.closed:
            overdue = ending.seconds(self) > _END_S
            self.changed.wait(_WAKE_S)
            for seat in self.seats:
                if overdue and seat.ending and seat.child is not None:
                    seat.child.process.kill()
                    self.lose(seat, seat.child, f"did not end a pass within {_END_S:.0f} s")
        self.answers.clear()
        while self.abandoned:
            self.slots.free(self.abandoned.pop())

    def _in_hands(self, seat: _Seat) -> str:
        rows = rows_in_hand(self.board[seat.number])
        if not rows or not seat.owed:
            return ""
        index = self.source.table.index
        return f", loading {', '.join(str(index.image_path(row)) for row in rows[:8])}"

    def replace_hung(self) -> None:
        """Kill each process that owes a batch and has begun no image for HANG_S; ask while a batch is waited for."""
        for seat in self.seats:
            child = seat.child
            if child is None:
                continue
            place = (child.ready, int(self.board[seat.number, 0])) if seat.owed else object()
            limit_s = HANG_S if child.ready else START_S
            if child.stillness.seconds(place) > limit_s:
                child.process.kill()
                words = "its stack is above, unless it was stopped from outside"
                self.lose(seat, child, f"hung: no image begun for {limit_s:.0f} s ({words})")


class LoaderRing:
    """Loader processes over one source. Close it (or use it as a context manager).

    Leaving it to the garbage collector or the interpreter's exit ends the processes too.
    """

    def __init__(
        self,
        source: BatchSource,
        *,
        num_processes: int,
        num_threads: int,
        max_in_flight: int,
        batch_bytes: int,
        pin: bool = False,
    ) -> None:
        """`num_threads` of all processes together. At most `max_in_flight` batches, each at most `batch_bytes` of
        images, are prepared ahead; two more lie in the ring while the consumer holds them, and what it holds beyond is
        copied. `pin` page-locks the ring for CUDA. OSError or MemoryError when the system has no room for it.
        """
        if num_processes < 1 or num_threads < 1 or max_in_flight < 1:
            raise ValueError(f"{num_processes} processes, {num_threads} threads, {max_in_flight} batches: at least 1")
        num_processes = min(num_processes, num_threads, max_in_flight)
        self._max_in_flight = max_in_flight
        slots = SlotRing(board_bytes(num_processes), batch_bytes, max_in_flight, pin=pin)
        self._state = _State(source, num_processes, num_threads, slots)
        self._finalizer = weakref.finalize(self, _shut_down, self._state)
        with self._state.lock:
            for seat in self._state.seats:
                self._state.start(seat)

    @property
    def busy(self) -> bool:
        """Whether a pass is open; there is one at a time."""
        return self._state.epoch is not None

    @property
    def process_ids(self) -> tuple[int, ...]:
        """The system's ids of the processes that run."""
        return tuple(seat.child.process.pid for seat in self._state.seats if seat.child is not None)

    def begin(self, epoch: int, spans: Iterator[Span], known_bad: KnownBad) -> "RingPass":
        """A pass over the batches of an epoch given by their samples (start, stop); `known_bad` files are not read."""
        assert not self.busy, "a pass is open"
        state = self._state
        with state.lock:
            state.finish_ending()
            if state.failure is not None:
                raise state.failure
            state.epoch, state.known_bad = epoch, known_bad
            for seat in state.seats:
                state.tell(seat, Begin(epoch, known_bad))
        return RingPass(self._state, spans, self._max_in_flight)

    def close(self) -> None:
        """End the processes, at once. Calling it again does nothing; tensors on the ring stay valid."""
        self._finalizer()

    def __enter__(self) -> "LoaderRing":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RingPass:
    """Iterator over the batches of one pass, in order. Close it, or the ring."""

    def __init__(self, state: _State, spans: Iterator[Span], max_in_flight: int) -> None:
        """Use `LoaderRing.begin`."""
        self.wait_seconds = 0.0
        self._state = state
        self._spans = spans
        self._max_in_flight = max_in_flight
        self._num_granted = 0
        self._num_taken = 0
        # Slots by batch, from its grant until it is handed out.
        self._slot_of: dict[int, int] = {}
        self._open = True
        with state.lock:
            self._grant()

    def __iter__(self) -> "RingPass":
        return self

    def __next__(self) -> PreparedBatch:
        """The next batch. Raises what was raised for it in its process, with that traceback as cause, and closes.

        `wait_seconds` adds up the time blocked. LoaderProcessError when too many processes were lost.
        """
        state = self._state
        with state.lock:
            if not self._open or self._num_taken == self._num_granted:
                self.close()
                raise StopIteration
            answer = self._answer()
            if isinstance(answer, Done):
                slot = self._slot_of.pop(answer.number)
                self._num_taken += 1
                images = state.slots.lend(slot, answer.shape) if answer.shape else None
                if images is None:
                    state.slots.free(slot)
                self._grant()
                return answer.prepared(images)
        self.close()
        if isinstance(answer, Failed):
            raise answer.error from LoaderTraceback(answer.trace)
        raise answer

    def _answer(self) -> Done | Failed | LoaderProcessError:
        state = self._state
        if self._num_taken not in state.answers:
            started = time.perf_counter()
            try:
                while self._num_taken not in state.answers:
                    if state.failure is not None:
                        return state.failure
                    if state.closed:
                        return LoaderProcessError("the loader was closed while a batch was waited for")
                    state.changed.wait(_WAKE_S)
                    state.replace_hung()
            finally:
                self.wait_seconds += time.perf_counter() - started
        return state.answers.pop(self._num_taken)

    def _grant(self) -> None:
        """Give out as many batches as may be in flight."""
        state = self._state
        while len(self._slot_of) < self._max_in_flight and (span := next(self._spans, None)) is not None:
            number = self._num_granted
            seat = state.seats[number % len(state.seats)]
            grant = Grant(number, *span, state.slots.take())
            self._slot_of[number] = grant.slot
            self._num_granted += 1
            seat.owed.append(grant)
            if seat.child is not None:
                state.tell(seat, grant)

    def close(self) -> None:
        """Have the processes drop what they are at; they stay. Calling it again does nothing.

        Waits for nothing, for a collector may call it in any thread; the next pass waits until this one is over.
        """
        state = self._state
        with state.lock:
            if not self._open:
                return
            self._open = False
            state.epoch = None
            state.abandoned += self._slot_of.values()
            self._slot_of.clear()
            for seat in state.seats:
                seat.owed.clear()
                seat.ending = seat.child is not None
                if seat.ending and not state.closed:
                    state.tell(seat, End())


def _listen(state: _State, seat: _Seat, child: _Child) -> None:
    assert child.process.stdout is not None
    for message in received(child.process.stdout):
        if isinstance(message, LogLine):
            _log(message)
            continue
        with state.lock:
            if state.closed or seat.child is not child:
                break
            state.take(seat, message)
    code = child.process.wait()
    with state.lock:
        # Its last words come by another pipe.
        threads = seat.threads if seat.child is child else []
    for thread in threads[1:]:
        thread.join(1.0)
    _end(child)
    child.process.stdout.close()
    words = f" ({child.stderr_lines[-1]})" if child.stderr_lines else ""
    with state.lock:
        state.lose(seat, child, _ending(code) + words)


def _ending(code: int) -> str:
    if code < 0:
        return f"was ended by signal {-code}"
    # Windows tells a crash by a code such as 0xC0000005.
    return f"ended with code {code if code < 256 else hex(code)}"


def _read_stderr(number: int, child: _Child) -> None:
    assert child.process.stderr is not None
    for raw in child.process.stderr:
        line = raw.decode("utf-8", "replace").rstrip()
        if line:
            child.stderr_lines.append(line)
            logger.warning("loader process %d: %s", number, line)
    child.process.stderr.close()


def _log(line: LogLine) -> None:
    target = logging.getLogger(line.name)
    if target.isEnabledFor(line.level):
        facts = {"name": line.name, "levelno": line.level, "levelname": logging.getLevelName(line.level)}
        target.handle(logging.makeLogRecord({**facts, "msg": "%s", "args": (line.text,)}))


def _started(setup: Setup, descriptors: tuple[int, ...]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "tagger.data.loader_process", json.dumps(asdict(setup))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=descriptors,
        env=_environment(),
        **_own_group(),
    )


def _environment() -> dict[str, str]:
    """No CUDA, and one thread for each library: the loader has threads of its own."""
    alone = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    paths = [str(Path(path).resolve()) for path in sys.path]
    return {**os.environ, **alone, "PYTHONPATH": os.pathsep.join(paths)}


def _own_group() -> dict[str, Any]:
    """A terminal's Ctrl-C goes to the processes of a group; it must not reach one before it has set its handlers."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"process_group": 0}


def _shut_down(state: _State) -> None:
    with state.lock:
        state.closed = True
        children = [seat.child for seat in state.seats if seat.child is not None]
        threads = [thread for seat in state.seats for thread in seat.threads]
        for child in children:
            _end(child)
        state.changed.notify_all()
    for child in children:
        try:
            child.process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait(_EXIT_S)
    for thread in threads:
        # A collector that runs in one of them must not wait for it.
        if thread is not threading.current_thread():
            thread.join(_EXIT_S)
    state.slots.close()
    state.source_block.close()


def _end(child: _Child) -> None:
    """Close the pipe of commands, which ends the process."""
    assert child.process.stdin is not None
    try:
        child.process.stdin.close()
    except OSError as error:  # it was gone before
        logger.debug("loader process %d: %s", child.process.pid, error)
