"""Arrays out of pickles, and nothing else out of them."""

import io
import os
import pickle
import re

import numpy as np
import pytest

from hyperfast.data.unpickle import RefusedPickle, load_arrays

from .pickles import py2_array, py2_batch


def same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            same(ours, theirs)
    else:
        assert found == expected


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("package", [b"numpy.core", b"numpy._core"])
def test_what_is_admitted_arrives_as_it_was(protocol, package):
    rows = np.arange(12, dtype=np.uint8).reshape(3, 4)
    content = {
        "data": rows,
        b"keys": [1, -2, 2**70, 0.5, True, None],
        "arrays": [rows.T.copy(order="F"), rows.astype(">i4"), rows.astype(np.float32), np.ones((2, 2), np.int64)],
        "text": ("ä", b"\xff\x00"),
    }
    pickled = pickle.dumps(content, protocol)
    if protocol < 4:  # from 4 on, names have their length in front of them
        pickled = re.sub(rb"numpy\._?core", package, pickled)
    same(load_arrays(pickled), content)


def test_a_batch_of_python_2():
    images, labels = np.random.RandomState(0).randint(0, 256, (3, 300)).astype(np.uint8), [3, 0, 9]
    pickled = py2_batch(images, labels)
    assert np.array_equal(pickle.loads(pickled, encoding="bytes")[b"data"], images)  # the helper writes what it says
    same(load_arrays(pickled), {b"data": images, b"labels": labels, b"batch_label": b"training batch 1 of 5"})


class Call:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("inside", [False, True])
def test_a_call_of_the_shell_is_named_and_not_made(tmp_path, protocol, inside):
    call = Call(os.system, f"touch {tmp_path / 'hacked'}")
    pickled = pickle.dumps({"data": np.zeros(3), "labels": [call]} if inside else call, protocol)
    with pytest.raises(RefusedPickle, match=rf"it asks for {os.system.__module__}\.system; only arrays"):
        load_arrays(pickled)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("function", [eval, getattr, bytearray, np.load, np.frombuffer, pickle.loads, io.open])
def test_other_functions_are_refused(function):
    with pytest.raises(RefusedPickle, match="it asks for "):
        load_arrays(pickle.dumps(Call(function, b"1"), 4))


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"cnumpy\nndarray\n(I4\ntR.", "it calls numpy.ndarray"),
        (b"cnumpy\nndarray\n}S'x'\nI1\nsb.", "it sets the state of a function"),
        (b"cnumpy.core.multiarray\n_reconstruct\n}S'__defaults__'\nNsb.", "it sets the state of a function"),
        (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n(I0\ntS'b'\ntR.", "not a pickle"),
        (b"cnumpy\ndtype\n.", "it holds a Admitted that is not admitted"),
        (b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR.", "it holds a Dtype that is not admitted"),
        (b"\x80\x04\x8f.", "it holds a set that is not admitted"),
        (b"Pelsewhere\n.", "it refers to objects outside the file"),
    ],
)
def test_what_only_a_handmade_pickle_does(pickled, message):
    with pytest.raises((RefusedPickle, ValueError), match=message):
        load_arrays(pickled)


@pytest.mark.parametrize("array", [np.array([{}, None]), np.array(["text"]), np.zeros(2, [("a", "u1")])])
def test_arrays_of_anything_but_numbers_are_refused(array):
    with pytest.raises(RefusedPickle, match="only arrays of numbers are admitted"):
        load_arrays(pickle.dumps(array, 4))


def test_a_file_cut_short_or_of_something_else():
    whole = pickle.dumps({"data": np.arange(1000)}, 4)
    for part in (b"", whole[:1], whole[:50], whole[:-1], b"no pickle", bytes(100)):
        with pytest.raises(ValueError, match="it is cut short or not a pickle"):
            load_arrays(part)


def test_an_array_whose_bytes_do_not_fill_its_shape():
    pickled = py2_array(np.zeros((2, 3), np.uint8)).replace(b"J\x02\0\0\0J\x03\0\0\0", b"J\x02\0\0\0J\x04\0\0\0")
    with pytest.raises(ValueError, match="cannot reshape array of size 6"):
        load_arrays(b"\x80\x02" + pickled + b".")


def test_lists_within_lists_are_not_multiplied():
    nested = []
    for _ in range(60):  # 2**60 lists, if each were copied where it is held
        nested = [nested, nested]
    found = load_arrays(pickle.dumps(nested, 4))
    assert found[0] is found[1]
