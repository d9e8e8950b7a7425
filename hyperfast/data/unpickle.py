"""Pickled numpy arrays without pickle's power to run code.

CIFAR's Python files are pickles, and a pickle is a program: it may call any function that it can name. This unpickler
lets it name what arrays are made of and nothing else, and even that is not numpy's. A pickle may also set the state of
`numpy.dtype` itself, which does not expect an enemy; so stand-ins take down dtype, shape and bytes, and the array is
made of them afterwards, when they have been checked.
"""

from __future__ import annotations

import io
import pickle
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RefusedPickle", "load_arrays"]


class RefusedPickle(pickle.UnpicklingError):
    """The pickle asks for something other than arrays, lists, dicts, strings, bytes and numbers."""


def load_arrays(data: bytes) -> Any:
    """The content of a pickle of numeric numpy arrays, lists, tuples, dicts, strings, bytes and numbers.

    Reads the pickles of Python 2 (as `encoding="bytes"` does: its strings arrive as bytes) and of Python 3, protocols 0
    to 5, of any numpy. Arrays are read-only.

    Args:
        data: the whole file.

    Returns:
        What was pickled.

    Raises:
        RefusedPickle: names the first thing asked for that is not admitted; it was not run.
        ValueError: `data` is cut short, or no pickle at all.
    """
    try:
        return _finished(_ArrayUnpickler(io.BytesIO(data), encoding="bytes").load(), {})
    except RefusedPickle:
        raise
    except Exception as error:  # A damaged pickle can make the machine raise anything.
        raise ValueError(f"it is cut short or not a pickle ({type(error).__name__}: {error})") from error


class _Dtype:
    """Stands in for `numpy.dtype`."""

    __slots__ = ("code",)

    def __init__(self, code: str | bytes, align: object = False, copy: object = False) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        self.code = order + self.code.lstrip("<>|=")

    def numeric(self) -> np.dtype[Any]:
        """The numpy dtype; admits booleans, integers and floats."""
        if not re.fullmatch(r"[<>|=]?(b1|[iu][1248]|f[248])", self.code):
            raise RefusedPickle(f"it holds an array of dtype {self.code!r}; only arrays of numbers are admitted")
        return np.dtype(self.code)


class _Array:
    """Stands in for `numpy.ndarray`."""

    __slots__ = ("array",)

    def __init__(self, array: npt.NDArray[Any] | None = None) -> None:
        self.array = array

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        self.array = _array(raw, dtype, shape, "F" if fortran else "C")


def _array(raw: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> npt.NDArray[Any]:
    flat = np.frombuffer(raw, dtype.numeric())
    flat.flags.writeable = False
    return flat.reshape(shape, order="F" if order in ("F", b"F") else "C")


def _ndarray(*args: object) -> None:
    raise RefusedPickle("it calls numpy.ndarray, which is admitted as the name of a type only")


def _reconstruct(kind: object, shape: object, code: object) -> _Array:
    return _Array()


def _frombuffer(raw: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    return _Array(_array(raw, dtype, shape, order))


def _encode(text: str, encoding: str | bytes) -> bytes:
    # Python 3 writes bytes so in protocols 0 to 2; the real function would look codecs up by any name.
    return text.encode("latin1")


class _Admitted:
    """A function that a pickle may call but whose attributes it cannot set."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: object) -> None:
        raise RefusedPickle("it sets the state of a function")


_ADMITTED = {
    ("numpy", "dtype"): _Admitted(_Dtype),
    ("numpy", "ndarray"): _Admitted(_ndarray),
    ("numpy.core.multiarray", "_reconstruct"): _Admitted(_reconstruct),
    ("numpy._core.multiarray", "_reconstruct"): _Admitted(_reconstruct),
    ("numpy.core.numeric", "_frombuffer"): _Admitted(_frombuffer),
    ("numpy._core.numeric", "_frombuffer"): _Admitted(_frombuffer),
    ("_codecs", "encode"): _Admitted(_encode),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise RefusedPickle(
                f"it asks for {module}.{name}; only arrays, lists, dicts, strings, bytes and numbers are admitted, "
                "and nothing of it was run"
            )
        return _ADMITTED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedPickle("it refers to objects outside the file")


def _finished(value: Any, done: dict[int, Any]) -> Any:
    """`value` with the arrays in place of their stand-ins; `done` keeps a list held in a thousand places one list."""
    if value is None or isinstance(value, str | bytes | bytearray | int | float):
        return value
    if id(value) not in done:
        done[id(value)] = _finished_container(value, done)
    return done[id(value)]


def _finished_container(value: Any, done: dict[int, Any]) -> Any:
    if isinstance(value, _Array) and value.array is not None:
        return value.array
    if isinstance(value, dict):
        return {key: _finished(entry, done) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finished(entry, done) for entry in value]
    if isinstance(value, tuple):
        return tuple(_finished(entry, done) for entry in value)
    raise RefusedPickle(f"it holds a {type(value).__name__.lstrip('_')} that is not admitted")
