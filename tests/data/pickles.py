"""Pickles as Python 2 wrote them, in which CIFAR was published; Python 3 cannot write them."""

import struct


def py2_string(content):
    """A `str` of Python 2, as its cPickle writes it in protocol 2."""
    if len(content) < 256:
        return b"U" + bytes([len(content)]) + content
    return b"T" + struct.pack("<i", len(content)) + content


def py2_array(array):
    """A two-dimensional uint8 array as Python 2's cPickle writes it in protocol 2."""
    shape = b"".join(b"J" + struct.pack("<i", size) for size in array.shape) + b"\x86"
    dtype = b"cnumpy\ndtype\n" + py2_string(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + py2_string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + py2_string(b"b") + b"\x87R"
    return made + b"(K\x01" + shape + dtype + b"\x89" + py2_string(array.tobytes()) + b"tb"


def py2_batch(images, labels, key=b"labels"):
    """A batch of CIFAR as it was published."""
    entries = py2_string(key) + b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    entries += py2_string(b"batch_label") + py2_string(b"training batch 1 of 5")
    return b"\x80\x02}(" + py2_string(b"data") + py2_array(images) + entries + b"u."
