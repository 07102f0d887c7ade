"""Runs the part of pickle's language that weights are written in, without Python's unpickler.

A pickle is a program, and Python's unpickler imports and calls whatever the program names. This machine knows only the
operations that weights need and a few functions that its caller gives it by name. It refuses everything else, and never
imports anything. The pickle's length limits the size of the objects that the pickle can make it build.
"""

import pickletools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple

from proscale_hf.files.text import printable


MAXIMUM_OPERATIONS = 1_000_000  # a large model with its optimizer needs about 150,000
KEY_TYPES = (str, int, float, bytes, type(None))  # the hash of nested tuples can take forever
LARGEST_KEY = 2**60  # Python gives larger whole numbers the hashes of smaller ones, and a dictionary of them is slow
NUMBERS = "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT"
TEXTS = "STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8"
BYTES = "BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8"
LITERALS = frozenset(f"{NUMBERS} {TEXTS} {BYTES}".split())
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}


class RefusedPickleError(ValueError):
    """A pickle asks for something that weights do not need; the message says what, as "it ..."."""


class Named(NamedTuple):
    """Something that a pickle names, and the meaning that the machine's caller gives it."""

    name: str
    meaning: Any


class Stateful:
    """The result of an allowed function, if the pickle sets its state afterwards."""

    __slots__ = ()

    def set_state(self, state: Any) -> None:
        raise NotImplementedError


class Settings(Stateful):
    """What stands for an `argparse.Namespace`, which is never built: its attributes are values in a dictionary."""

    def __init__(self):
        self.values: dict[str, Any] = {}

    def set_state(self, state: Any) -> None:
        self.values = _expect(dict, state)


def dict_of(pairs: Iterable[Any] = ()) -> dict[Any, Any]:
    """A dictionary of (key, value) pairs, whose keys must be plain values."""
    result = {}
    for key, value in pairs:
        if not isinstance(key, KEY_TYPES):
            raise RefusedPickleError(f"it has a dictionary key of type {type(key).__name__}")
        if isinstance(key, int) and abs(key) > LARGEST_KEY:
            raise RefusedPickleError("it has a dictionary key that is a very large number")
        result[key] = value
    return result


def read_pickle(
    file: BinaryIO, meanings: Mapping[str, Any], read_persistent: Callable[[Any], Any] | None = None
) -> Any:
    """
    Read one pickle, from the file's position to the pickle's end.

    Args:
        file: Needs `read`, `readline` and `tell`.
        meanings: What the pickle may name, by full name. It may call the functions among them.
        read_persistent: Takes a persistent id and returns the object that it stands for, outside of the pickle.

    Returns:
        The object, made of plain containers and values and of the functions' results.

    Raises:
        RefusedPickleError: the pickle names something else, uses an operation that weights do not need, or is
            too long.
        Exception: of any type, if the pickle is damaged.
    """
    stack: list[Any] = []
    outer_stacks: list[list[Any]] = []
    memo: dict[int, Any] = {}
    given = 0  # length of what functions and states get: they may copy it, and a pickle can give an object many times
    for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if count == MAXIMUM_OPERATIONS:
            raise RefusedPickleError(f"it has more than {count:,} pickle operations")
        marked: list[Any] = []
        if operation.stack_before and pickletools.markobject in operation.stack_before:
            marked, stack = stack, outer_stacks.pop()
        match operation.name:
            case name if name in LITERALS:
                stack.append(argument)
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name]())
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                outer_stacks.append(stack)
                stack = []
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                length = int(name[-1])
                stack[-length:] = [tuple(stack[-length:])]
            case "TUPLE":
                stack.append(tuple(marked))
            case "LIST":
                stack.append(marked)
            case "DICT":
                stack.append(dict_of(_pairs(marked)))
            case "APPEND":
                item = stack.pop()
                _expect(list, stack[-1]).append(item)
            case "APPENDS":
                _expect(list, stack[-1]).extend(marked)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _expect(dict, stack[-1]).update(dict_of([(key, value)]))
            case "SETITEMS":
                _expect(dict, stack[-1]).update(dict_of(_pairs(marked)))
            case "GLOBAL":
                stack.append(_look_up(meanings, *argument.split(" ", 1)))
            case "INST":
                called = _look_up(meanings, *argument.split(" ", 1))
                raise RefusedPickleError(f"it makes an instance of {called.name}, which weights do not need")
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_look_up(meanings, _expect(str, module), _expect(str, name)))
            case "REDUCE":
                arguments, function = _expect(tuple, stack.pop()), _expect(Named, stack.pop())
                given = _checked_sum(given, arguments, file.tell())
                stack.append(function.meaning(*arguments))
            case "BUILD":
                state = stack.pop()
                if not isinstance(stack[-1], dict):  # attributes of a state dict: the versions of its modules
                    parts = (state,) if isinstance(stack[-1], Settings) else _expect(tuple, state)
                    given = _checked_sum(given, parts, file.tell())
                    _expect(Stateful, stack[-1]).set_state(state)
            case "NEWOBJ" if isinstance(stack[-2], Named) and stack[-2].meaning is Settings:
                stack[-2:] = [Settings(*_expect(tuple, stack[-1]))]
            case "BINPERSID" if read_persistent is not None:
                stack.append(read_persistent(stack.pop()))
            case "STOP":
                return stack.pop()
            case name:
                raise RefusedPickleError(f"it uses pickle's operation {name}, which weights do not need")
    raise EOFError


def _pairs(items: list[Any]) -> Iterable[tuple[Any, Any]]:
    return zip(items[::2], items[1::2], strict=True)


def _checked_sum(length: int, values: tuple[Any, ...], bytes_read: int) -> int:
    """Add the lengths of the tuple and of its values. The bytes that were read may count twice, but not more often."""
    length += len(values)
    if length <= 2 * bytes_read:
        length += sum(len(value) for value in values if isinstance(value, (str, bytes, bytearray, list, tuple, dict)))
    if length > 2 * bytes_read:
        raise RefusedPickleError("it grows by using the same parts again and again")
    return length


def _expect(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{kind.__name__} expected, not {type(value).__name__}")
    return value


def _look_up(meanings: Mapping[str, Any], module: str, name: str) -> Named:
    full_name = f"{module}.{name}".replace("numpy._core.", "numpy.core.")  # numpy 2 moved them
    if full_name not in meanings:
        raise RefusedPickleError(f"reading it would call {printable(f'{module}.{name}')}, which weights do not need")
    return Named(full_name, meanings[full_name])
