"""Run cases: `python -m tests.fuzz.run --cases 10000 --seed 1`, or one of them again: `--only "adapters" --seed 17 --cases 1`.

Each case is made from its kind and its number alone. It may end in a right result or in one of our errors, in time and
within the memory; whatever else happens is listed at the end, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from tests.fuzz.cases import KINDS, SHARES, RefusedError, World, WrongResultError


ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(str(ROOT / part) for part in ("src", "conversion", "examples"))
# Of a case. The slowest takes about a second on an idle core; others may share it.
SECONDS = 20
# Beyond what the process has when the first case begins.
SPARE_BYTES = 4 * 2**30


class TooLongError(BaseException):
    """A case did not end in time."""


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Attributes:
        kind (`str`), seed (`int`): Which case it is.
        what (`str`): What was broken.
        end (`str`): `"result"`, `"error"`, or what is none of both.
        detail (`str`): The error.
        seconds (`float`): That it took.
    """

    kind: str
    seed: int
    what: str
    end: str
    detail: str = ""
    seconds: float = 0.0

    @property
    def is_accepted(self) -> bool:
        return self.end in ("result", "error")

    def __str__(self) -> str:
        return f'--only "{self.kind}" --seed {self.seed} --cases 1 [{self.what}]\n    {self.end}: {self.detail}'


def kind_of(seed: int) -> str:
    return random.Random(seed).choices(list(SHARES), list(SHARES.values()))[0]


def run_case(world: World, kind: str, seed: int) -> Outcome:
    rng = random.Random(f"{kind} {seed}")
    folder = Path(tempfile.mkdtemp())
    what = "nothing"
    start = time.perf_counter()
    try:
        torch.manual_seed(seed)
        with limited_seconds():
            what, run = KINDS[kind](world, folder, rng)
            run()
        end, detail = "result", ""
    except (TypeError, ValueError, OSError) as error:
        end, detail = judged(error)
    except TooLongError as error:
        end, detail = "too long", _where(error)
    except BaseException as error:
        end, detail = "foreign error", f"{type(error).__name__}: {str(error)[:300]} {_where(error)}"
        if isinstance(error, WrongResultError):
            end = "wrong result"
        if isinstance(error, KeyboardInterrupt):
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Outcome(kind, seed, what, end, detail, time.perf_counter() - start)


def judged(error: BaseException) -> tuple[str, str]:
    """An error is ours if our code raised it, in one short paragraph."""
    message = str(error)
    detail = f"{type(error).__name__}: {message[:300]} {_where(error)}"
    frames = traceback.extract_tb(error.__traceback__)
    if not (isinstance(error, RefusedError) or frames[-1].filename.startswith(OURS)):
        return "foreign error", detail
    if not message or len(message) > 1200:
        return "long error", detail
    return "error", detail


def _where(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"({Path(frame.filename).name}:{frame.lineno} {frame.name})"


@contextlib.contextmanager
def limited_seconds() -> Iterator[None]:
    def stop(number, frame):
        raise TooLongError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """What asks for more than the spare bytes gets a `MemoryError`."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + SPARE_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Libraries warn of much that is broken here."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        transformers.logging.set_verbosity(verbosity)


def run_cases(seeds: range, only: str | None = None) -> list[Outcome]:
    with tempfile.TemporaryDirectory() as folder, silence(), limited_memory():
        world = World(Path(folder))
        return [run_case(world, only or kind_of(seed), seed) for seed in seeds]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow")
    parser.add_argument("--only", choices=tuple(KINDS), help="kind of all cases")
    parser.add_argument("--show", action="store_true", help="list the accepted ends, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    outcomes = run_cases(range(args.seed, args.seed + args.cases), args.only)
    counts: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        counts.setdefault(outcome.kind, Counter())[outcome.end] += 1
    for kind, ends in sorted(counts.items()):
        slowest = max(outcome.seconds for outcome in outcomes if outcome.kind == kind)
        print(f"{kind}: {', '.join(f'{count} {end}' for end, count in ends.most_common())}; slowest {slowest:.1f} s")
    failures = [outcome for outcome in outcomes if not outcome.is_accepted]
    for outcome in outcomes if args.show else failures:
        print(outcome)
    print(f"{len(outcomes)} cases, {len(failures)} outside the accepted ends, {time.perf_counter() - start:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
