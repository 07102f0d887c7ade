"""What the fuzz tests share: seeded changes of small valid files, and the bounds that every reading must keep.

Other inputs than those of the suite: `PROSCALE_FUZZ_SEED=7 PROSCALE_FUZZ_TIMES=10 pytest tests/fuzz -m slow`.
"""

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from random import Random
from typing import Any


SEED = int(os.environ.get("PROSCALE_FUZZ_SEED", "0"))
TIMES = int(os.environ.get("PROSCALE_FUZZ_TIMES", "1"))
SECONDS = 60  # after which an input counts as one that never ends; on a busy machine, most take milliseconds
MEGABYTES = 300  # that a small file may take, beyond what an earlier one took
UNIT = 2**20 if sys.platform == "darwin" else 2**10  # of `ru_maxrss` in a megabyte
EXTREMES = (0, 1, -1, 2, 255, 256, 2**15, 2**31 - 1, 2**31, -(2**31), 2**32, 2**61 - 1, 2**63 - 1, 2**63, 10**30)


class NeverEndsError(BaseException):
    """Not an `Exception`: no boundary must turn it into its own error."""


@contextlib.contextmanager
def bounded(what: str) -> Iterator[None]:
    """Fails if a part of a test never ends, or takes far more memory than a small file may.

    Args:
        what: tells which input it was.
    """

    def stop(number: int, frame: Any) -> None:
        raise NeverEndsError(what)

    earlier = signal.signal(signal.SIGALRM, stop)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // UNIT
    assert grown < MEGABYTES, f"{what} took {grown} MB"


def fuzz(number: int, make: Callable[[Random], Any], read: Callable[[Any], Any], allowed: type | tuple = ()) -> None:
    """
    Reads many changed inputs: each is read, or refused with one line, within the bounds.

    Args:
        number: of inputs, for one run of the suite.
        make: an input, from random numbers alone, so that it can be made again.
        read: reads it.
        allowed: types of the errors with which it may be refused.
    """
    for index in range(number * TIMES):
        what = f"seed {SEED}, input {index}"
        changed = make(Random(f"{SEED} {index}"))
        with bounded(what):
            try:
                read(changed)
            except allowed as error:
                assert str(error).isprintable() and len(str(error)) < 2000, f"{what}: {str(error)[:2000]!r}"
            except Exception as error:
                raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def changed_bytes(random: Random, content: bytes) -> bytes:
    """A few bytes are changed, taken out, doubled or moved."""
    changed = bytearray(content)
    for _ in range(random.randint(1, 4)):
        start = random.randrange(len(changed) + 1)
        end = min(len(changed), start + random.choice((1, 1, 2, 4, 8, 30)))
        part = bytes(changed[start:end])
        match random.randrange(5):
            case 0:
                changed[start:end] = random.randbytes(len(part))
            case 1:
                changed[start:end] = b""
            case 2:
                changed[start:end] = part * random.choice((2, 3, 100))
            case 3:
                changed[start:end] = random.choice(EXTREMES).to_bytes(16, "little", signed=True)[: len(part)]
            case 4:
                place = random.randrange(len(changed) + 1)
                changed[place:place] = part
    return bytes(changed)


def changed_value(random: Random, value: Any) -> Any:
    """A plain value, as of JSON or YAML, with one of its parts replaced, taken out or doubled."""
    if isinstance(value, dict) and value and random.random() < 0.8:
        name = random.choice(list(value))
        changed = {**value, name: changed_value(random, value[name])}
        if random.random() < 0.1:
            del changed[name]
        return changed
    if isinstance(value, list) and value and random.random() < 0.7:
        index = random.randrange(len(value))
        changed = [*value[:index], changed_value(random, value[index]), *value[index + 1 :]]
        return random.choice((changed, changed, changed * 2, changed[:index], changed * 1000))
    return other_value(random)


def other_value(random: Random) -> Any:
    """A value of any kind, often an extreme one."""
    nested: Any = []
    for _ in range(random.choice((1, 5, 50))):
        nested = random.choice(([nested], {"a": nested}, [nested, nested]))
    choices = (
        *EXTREMES,
        *(1.5, -0.0, 1e-320, 1e300, float("inf"), float("nan")),
        *(None, True, False, "", "x", "\0", "\ud800", "ä" * 300, "1", "None", "(1, 2)", "../../x", "a\nb\x1b[31m"),
        *([], {}, [None], {"": None}, {"a": [1]}, nested),
    )
    return random.choice(choices)
