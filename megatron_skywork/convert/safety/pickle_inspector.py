"""Reads a pickle to see that reading it is harmless, before a faster reader does: nothing it names is called, and it is no bomb.

A pickle can be a bomb without calling anything: a memo entry numbered 2^32 makes the fast unpickler clear 64 GiB, a key made of tuples within tuples takes
forever to hash. `Inspector` is Python's slow unpickler with a short list of opcodes and a look at every key. Who uses it says which names stand for what.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, NoReturn


class RefusedPickle(pickle.UnpicklingError):
    """A pickle named something outside the list."""


def ordered(*pairs: Any) -> OrderedDict[Any, Any]:
    """An empty OrderedDict, to be filled by opcodes whose keys are looked at."""
    if pairs:
        raise RefusedPickle("an OrderedDict with content")
    return OrderedDict()


_SLOW: Any = pickle._Unpickler  # type: ignore[attr-defined]
_OPCODES = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.DICT,
    pickle.LIST, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.NONE,
    pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG, pickle.LONG1, pickle.LONG4, pickle.FLOAT,
    pickle.BINFLOAT, pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8, pickle.STRING, pickle.BINSTRING,
    pickle.SHORT_BINSTRING, pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.MEMOIZE, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.GET, pickle.BINGET,
    pickle.LONG_BINGET, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD,
)  # fmt: skip


class _Opcodes(dict):
    def __missing__(self, code: int) -> NoReturn:
        raise RefusedPickle(f"opcode {code:#04x}")


class Inspector(_SLOW):
    """Reads a pickle to see that reading it is harmless: known opcodes, memo numbers within reason, keys that hash at once, state given to records only."""

    dispatch = _Opcodes({opcode[0]: _SLOW.dispatch[opcode[0]] for opcode in _OPCODES})

    # Classes that may be given a state, and what may be a dictionary's key; the kinds of keys are such that hash at once.
    made: Iterable[type] = (OrderedDict,)
    keys: tuple[type, ...] = (str, int, type(None))

    def __init__(self, content: bytes):
        self._stream = io.BytesIO(content)
        super().__init__(self._stream)
        self._size = len(content)

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for; a subclass knows some."""
        raise RefusedPickle(f"{module}.{name}")

    def plain_key(self, key: Any) -> Any:
        """What a key consists of, where a record may be one."""
        return key

    def _check_keys(self, keys: list[Any]) -> None:
        for key in keys:
            if not isinstance(self.plain_key(key), self.keys):
                raise RefusedPickle(f"a key that is a {type(key).__name__}")

    def _check_memo(self) -> None:
        # The numbers count objects, and an object takes a byte at least.
        if next(reversed(self.memo)) > self._size:
            raise RefusedPickle("a memo number beyond the file's length")

    def _put(self) -> None:
        _SLOW.load_put(self)
        self._check_memo()

    def _long_put(self) -> None:
        _SLOW.load_long_binput(self)
        self._check_memo()

    def _set_one(self) -> None:
        self._check_keys(self.stack[-2:-1])
        _SLOW.load_setitem(self)

    def _set_many(self) -> None:
        self._check_keys(self.stack[::2])
        _SLOW.load_setitems(self)

    def _dict(self) -> None:
        self._check_keys(self.stack[::2])
        _SLOW.load_dict(self)

    def _build(self) -> None:
        state, made = self.stack[-1], self.stack[-2]
        if type(made) not in self.made:
            raise RefusedPickle(f"state for a {type(made).__name__}")
        if not hasattr(made, "__setstate__") and not (isinstance(state, dict) and all(isinstance(key, str) for key in state)):
            raise RefusedPickle(f"a state that is no record's: {type(state).__name__}")
        _SLOW.load_build(self)

    dispatch |= {pickle.PUT[0]: _put, pickle.LONG_BINPUT[0]: _long_put, pickle.SETITEM[0]: _set_one, pickle.SETITEMS[0]: _set_many,
                 pickle.DICT[0]: _dict, pickle.BUILD[0]: _build}  # fmt: skip
