"""NumPy's files and Flax's: names, byte orders, layouts, and that no header is believed and no pickle run."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pickle_gadgets as pg
from regraft.errors import ReaderError
from regraft.readers import read_checkpoint
from regraft.readers.arrays import read_arrays
from regraft.readers.flax_file import read_flax

FILES = Path(__file__).parent / "parity" / "files"
GADGETS = sorted(pg.gadgets(Path("/nowhere/canary"), Path(tempfile.mkdtemp()) / "unused.py"))


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("f4")


def saved(path, value):
    np.save(path, value, allow_pickle=True)
    return path


def same(found, wanted):
    return found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_is_read_by_the_names_of_its_arrays(tmp_path, save):
    arrays = {
        "block/conv/kernel": drawn(3, 3, 2, 4),
        "block/conv/bias": drawn(4),
        "step": np.int64(7),
        "e": drawn(0, 3),
    }
    save(tmp_path / "w.npz", **arrays)
    found = read_checkpoint(tmp_path / "w.npz")
    assert same(found.tensors, arrays)
    assert (found.format, found.layout) == ("NumPy .npz", "torch")


def test_the_layout_is_what_the_caller_says(tmp_path):
    np.savez(tmp_path / "w.npz", drawn(2))
    assert read_arrays(tmp_path / "w.npz", layout="flax").layout == "flax"


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "c8", "c16"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("ending", ["npz", "npy", "dict"])
def test_every_kind_of_number_in_either_byte_order_is_read(tmp_path, kind, order, ending):
    values = (drawn(2, 3) * 50).astype(kind).astype(np.dtype(kind).newbyteorder(order))
    if ending == "npz":
        np.savez(tmp_path / "w.npz", a=values)
    else:
        np.save(tmp_path / "w.npy", {"a": values} if ending == "dict" else values, allow_pickle=True)
    (found,) = read_arrays(next(tmp_path.glob("w.*"))).tensors.values()
    assert np.array_equal(found.numpy(), values)
    assert found.numpy().dtype == np.dtype(kind)


def test_columns_first_comes_out_as_the_same_array(tmp_path):
    values = np.asfortranarray(drawn(3, 4, 5))
    np.savez(tmp_path / "w.npz", a=values)
    saved(tmp_path / "w.npy", {"a": values})
    assert np.array_equal(read_arrays(tmp_path / "w.npz").tensors["a"], values)
    assert np.array_equal(read_arrays(tmp_path / "w.npy").tensors["a"], values)


def test_a_single_array_is_called_like_its_file(tmp_path):
    assert same(read_arrays(saved(tmp_path / "kernel.npy", drawn(2, 3))).tensors, {"kernel": drawn(2, 3)})


def test_text_is_passed_over(tmp_path):
    np.savez(tmp_path / "w.npz", a=drawn(2), labels=np.array(["cat", "dog"]), when=np.array("2020-01-01", "M8[D]"))
    found = read_arrays(tmp_path / "w.npz")
    assert (list(found.tensors), found.passed_over) == (["a"], ("labels", "when"))


def test_a_dict_of_dicts_and_lists_is_read_with_its_names_joined(tmp_path):
    value = {
        "conv1": {"weights": drawn(3, 3, 1, 2), "biases": drawn(2)},
        "fc": [drawn(2, 2), drawn(2, seed=1)],
        3: (drawn(1), np.float32(0.5)),
        "more": OrderedDict(a=drawn(2)),
        "name": "net",
        "rate": 0.1,
        "count": 3,
        "none": None,
    }
    found = read_arrays(saved(tmp_path / "w.npy", value))
    wanted = {"conv1/weights": drawn(3, 3, 1, 2), "conv1/biases": drawn(2), "fc/0": drawn(2, 2)}
    wanted |= {"fc/1": drawn(2, seed=1), "3/0": drawn(1), "more/a": drawn(2)}
    assert same(found.tensors, wanted)
    assert set(found.passed_over) == {"3/1", "name", "rate", "count", "none"}


def test_a_list_of_arrays_of_different_shapes_is_numbered(tmp_path):
    ragged = np.empty(2, object)
    ragged[0], ragged[1] = drawn(2, 3), drawn(4)
    assert same(read_arrays(saved(tmp_path / "w.npy", ragged)).tensors, {"0": drawn(2, 3), "1": drawn(4)})


def test_arrays_of_objects_within_a_dict_are_read_through_the_same_unpickler(tmp_path):
    inner = np.empty(1, object)
    inner[0] = drawn(2)
    assert same(read_arrays(saved(tmp_path / "w.npy", {"a": inner})).tensors, {"a/0": drawn(2)})


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_dict_in_any_protocol_is_read(tmp_path, protocol):
    value = np.empty((), object)
    value[()] = {"conv": [drawn(3, 2), drawn(3)]}
    (tmp_path / "w.npy").write_bytes(pg.npy(pickle.dumps(value, protocol)))
    assert same(read_arrays(tmp_path / "w.npy").tensors, {"conv/0": drawn(3, 2), "conv/1": drawn(3)})


def test_a_dict_that_python_2_wrote_is_read(tmp_path):
    values = drawn(2, 2)
    make = pg.Call(pg.Name("numpy.core.multiarray", "_reconstruct"), (pg.Name("numpy", "ndarray"), (0,), b"b"))
    kind = pg.Call(pg.Name("numpy", "dtype"), (b"f4", 0, 1))
    kind = pg._body(kind) + pg._body((3, b"<", None, None, None, -1, -1, 0)) + b"b"
    state = b"(" + pg._body(1) + pg._body((2, 2)) + kind + pg._body(False) + pg._body(values.tobytes()) + b"tb"
    array = pg._body(make) + state
    (tmp_path / "w.npy").write_bytes(pg.npy(b"\x80\x02}" + pg._body(b"conv1") + array + b"s."))
    assert same(read_arrays(tmp_path / "w.npy").tensors, {"conv1": values})


@pytest.mark.parametrize("gadget", GADGETS)
def test_no_gadget_runs_in_a_file_of_arrays(tmp_path, gadget):
    canary = tmp_path / "canary"
    call = pg.gadgets(canary, tmp_path / "script.py")[gadget]
    for hidden in (call, {"conv": (call,)}, [{"a": {"b": call}}]):
        (tmp_path / "w.npy").write_bytes(pg.npy(pg.pickled(hidden)))
        assert "code" in pg.refuses(read_arrays, tmp_path / "w.npy", ReaderError)
        (tmp_path / "w.npz").write_bytes(pg.npz(pg.pickled(hidden)))
        assert "pickled object" in pg.refuses(read_arrays, tmp_path / "w.npz", ReaderError)
    assert not canary.exists()


def test_a_name_put_together_on_the_stack_is_refused(tmp_path):
    canary = tmp_path / "canary"
    touch = f"touch {canary}".encode()
    stacked = b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c" + bytes([len(touch)]) + touch + b"\x85R."
    (tmp_path / "w.npy").write_bytes(pg.npy(stacked))
    assert "posix.system" in pg.refuses(read_arrays, tmp_path / "w.npy", ReaderError)
    assert not canary.exists()


def test_a_pickle_cannot_change_what_arrays_are_made_with(tmp_path):
    change = pg._body(pg.Name("numpy.core.multiarray", "_reconstruct")) + b"N" + pg._body({"_function": 1}) + b"\x86b."
    (tmp_path / "w.npy").write_bytes(pg.npy(b"\x80\x02" + change))
    pg.refuses(read_arrays, tmp_path / "w.npy", ReaderError)
    assert same(read_arrays(saved(tmp_path / "v.npy", {"a": drawn(2)})).tensors, {"a": drawn(2)})


def array_pickle(shape, kind, raw):
    """A pickled array that says of itself what it likes; raw: opcodes of its bytes."""
    make = pg.Call(pg.Name("numpy.core.multiarray", "_reconstruct"), (pg.Name("numpy", "ndarray"), (0,), "b"))
    dtype = pg._body(pg.Call(pg.Name("numpy", "dtype"), (kind, False, True)))
    dtype += pg._body((3, "<", None, None, None, -1, -1, 0)) + b"b"
    return b"\x80\x02" + pg._body(make) + b"(" + pg._body(1) + shape + dtype + pg._body(False) + raw + b"tb."


def long(n):
    return b"\x8a\x08" + n.to_bytes(8, "little", signed=True)


def header(shape, descr="<f4", version=(1, 0)):
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", len(text)) + text


def zipped(entries, **options):
    whole = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(whole, "w", **options) as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, data in entries:
            archive.writestr(name, data)
    return whole.getvalue()


BOMB = zipped([("a.npy", header((1 << 28,)) + bytes(1 << 24))], compression=zipfile.ZIP_DEFLATED)
HOSTILE = {
    "more than is there.npy": header((1 << 40, 1 << 20)) + bytes(16),
    "less than is there.npy": header((2,)) + bytes(16),
    "a negative shape.npy": header((-4, -1)) + bytes(16),
    "a shape of flags.npy": header((True, True)) + bytes(4),
    "records.npy": header((1,), [("a", "<f4"), ("b", "O")]) + bytes(12),
    "void.npy": header((2,), "|V2") + bytes(4),
    "huge numbers.npy": header((1,), "<f16") + bytes(16),
    "huge text.npy": header((1 << 40,), "<U1000000") + bytes(16),
    "an unknown version.npy": header((4,), version=(9, 0)) + bytes(16),
    "code for a header.npy": header("__import__('os').system('true')") + bytes(16),
    "a header nested without end.npy": header("(" * 5000 + ")" * 5000) + bytes(16),
    "an open bracket.npy": header("(4, 'a'") + bytes(16),
    "a header without end.npy": b"\x93NUMPY\x02\x00" + struct.pack("<I", 0xFFFFFFFF) + b"{",
    "nothing.npy": b"",
    "text.npy": b"hello",
    "a pickle alone.npy": pg.pickled({"a": 1}),
    "more than is pickled.npy": pg.npy(array_pickle(b"(" + long(1 << 40) + b"t", "f4", pg._body(b"1234"))),
    "numbers without bytes.npy": pg.npy(array_pickle(pg._body((2,)), "f4", b"N")),
    "a long kind.npy": pg.npy(array_pickle(pg._body((1,)), "f4," * 100000, pg._body(b"1234"))),
    "a kind of several.npy": pg.npy(array_pickle(pg._body((1,)), "f4,f4", pg._body(b"12345678"))),
    "objects without a list.npy": pg.npy(array_pickle(pg._body((1,)), "O8", pg._body(b"12345678"))),
    "a huge place in the memo.npy": pg.npy(b"\x80\x02]r\xff\xff\xff\x7f."),
    "huge bytes.npy": pg.npy(b"\x80\x05\x8e" + struct.pack("<Q", 1 << 50) + b"abc."),
    "a huge byte array.npy": pg.npy(b"\x80\x05\x96" + struct.pack("<Q", 1 << 33) + b"abc."),
    "bytes behind the pickle.npy": pg.npy(pg.pickled({"a": 1}) + b"PK\x03\x04"),
    "nested without end.npy": pg.npy(b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b"."),
    "more than is there.npz": zipped([("a.npy", header((1 << 40,)) + bytes(16))]),
    "a bomb.npz": BOMB,
    "the same name twice.npz": zipped([("a.npy", header((4,)) + bytes(16))] * 2),
    "another file.npz": zipped([("a.npy", header((4,)) + bytes(16)), ("setup.py", b"import os")]),
    "no archive.npz": header((4,)) + bytes(16),
    "nothing.npz": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_arrays_that_are_not_what_they_say_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(HOSTILE[name])
    pg.refuses(read_arrays, tmp_path / name, ReaderError)


def flax_array(shape, kind, raw):
    return msgpack.ExtType(1, msgpack.packb((shape, kind, raw)))


FLAX = {
    "more than is there": {"a": flax_array((1 << 40,), "float32", bytes(16))},
    "less than is there": {"a": flax_array((2,), "float32", bytes(16))},
    "a negative shape": {"a": flax_array((-2, -2), "float32", bytes(16))},
    "an unknown kind": {"a": flax_array((2,), "object", bytes(16))},
    "text for a shape": {"a": flax_array("12", "float32", bytes(16))},
    "no shape": {"a": msgpack.ExtType(1, b"\xc0")},
    "chunks that are missing": {"a": {"__msgpack_chunked_array__": True, "shape": {"0": 4}, "chunks": {}}},
    "chunks that are none": {"a": {"__msgpack_chunked_array__": True, "shape": {"0": 1}, "chunks": {"0": "x"}}},
    "a huge shape of chunks": {
        "a": {
            "__msgpack_chunked_array__": True,
            "shape": {"0": 1 << 40},
            "chunks": {"0": flax_array((4,), "float32", bytes(16))},
        }
    },
    "a list": [1, 2],
    "a name twice": {
        "params": {"a": flax_array((1,), "float32", bytes(4))},
        "batch_stats": {"a": flax_array((1,), "float32", bytes(4))},
    },
}


@pytest.mark.parametrize("kind", [*FLAX, "nothing", "nested without end", "a huge list", "text", "bytes behind it"])
def test_trees_of_flax_that_are_not_what_they_say_are_refused(tmp_path, kind):
    raw = {
        "nothing": b"",
        "nested without end": b"\x81\xa1a" * 100_000 + b"\x80",
        "a huge list": b"\xdd\xff\xff\xff\xff",
        "text": b"hello there",
        "bytes behind it": b"\x80\x80",
    }
    (tmp_path / "w.msgpack").write_bytes(raw[kind] if kind in raw else msgpack.packb(FLAX[kind]))
    pg.refuses(read_flax, tmp_path / "w.msgpack", ReaderError)


@pytest.mark.parametrize("name", ["arrays_flax.msgpack", "arrays_theano.npz", "w.npy"])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, name):
    whole = (saved(tmp_path / name, {"a": drawn(20)}) if name == "w.npy" else FILES / name).read_bytes()
    for kept in [*range(0, len(whole), 101), len(whole) - 1]:
        (tmp_path / name).write_bytes(whole[:kept])
        pg.refuses(read_checkpoint, tmp_path / name, ReaderError)


@pytest.mark.parametrize("name", ["arrays_flax_chunks.msgpack", "arrays_theano.npz", "dict.npy", "array.npy"])
def test_bytes_changed_at_random_are_read_or_refused_in_a_sentence(tmp_path, name):
    values = {"a": [drawn(2, 3), np.arange(3)], "b": {"c": np.float32(3), "d": "x"}}
    made = {"dict.npy": values, "array.npy": drawn(2, 3)}
    whole = (saved(tmp_path / name, made[name]) if name in made else FILES / name).read_bytes()
    draw, refused = random.Random(0), 0
    for _ in range(400):
        changed = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(changed))
            changed[place : place + draw.randrange(2)] = draw.randbytes(draw.randrange(2))
        (tmp_path / name).write_bytes(changed)
        try:
            read_checkpoint(tmp_path / name)
        except ReaderError:
            refused += 1
    assert refused > 100


def test_no_header_makes_a_reader_allocate_more_than_the_file_is_long(tmp_path):
    for name, data in HOSTILE.items():
        (tmp_path / name).write_bytes(data)
    for i, tree in enumerate(FLAX.values()):
        (tmp_path / f"{i}.msgpack").write_bytes(msgpack.packb(tree))
    head = json.dumps({"a": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(64))
    (tmp_path / "b.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + head)
    torch.save({"a.b": torch.ones(1).expand(1 << 18, 1 << 18)}, tmp_path / "a.pt")
    torch.save({"a.b": torch.ones(77)}, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    legacy = (tmp_path / "b.pt").read_bytes()
    assert legacy.count(b"K\x4d") == 2  # the length of the storage, and of the tensor
    (tmp_path / "b.pt").write_bytes(legacy.replace(b"K\x4d", b"J\xff\xff\xff\x7f"))
    program = (
        "import re, sys, pathlib, resource, torch, msgpack, numpy, regraft.readers as r\n"
        "from regraft.errors import ReaderError\n"
        "import regraft.readers.torch_file, regraft.readers.arrays, regraft.readers.safetensors_file\n"
        "held = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (held + (200 << 20),) * 2)\n"
        "status = pathlib.Path('/proc/self/status')\n"
        "peak = lambda: int(re.search('VmHWM:[^0-9]+([0-9]+)', status.read_text())[1])\n"  # ru_maxrss is inherited
        "before = peak()\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    try:\n"
        "        r.read_checkpoint(path)\n"
        "    except ReaderError:\n"
        "        continue\n"
        "    print('read', path)\n"
        "print('grew', peak() - before)\n"
    )
    folder = tmp_path / "hostile"
    folder.mkdir()
    for path in list(tmp_path.glob("*.*")):
        path.rename(folder / path.name)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(folder)], capture_output=True, text=True, timeout=120
    )
    assert done.stderr == ""
    said = done.stdout.split()
    assert said[0] == "grew", done.stdout
    assert int(said[1]) < 64 << 10  # KiB


def test_a_train_state_of_flax_gives_parameters_and_statistics_and_the_same_outputs():
    found = read_checkpoint(FILES / "arrays_flax.msgpack")
    assert (found.layout, set(found.passed_over)) == ("flax", {"step", "opt_state"})
    assert {"first/kernel", "norm/scale", "norm/mean", "logits/bias"} <= found.tensors.keys()
    assert_computes_as_flax_did(found.tensors, 1e-5)


def test_chunks_of_flax_are_joined():
    assert b"__msgpack_chunked_array__" in (FILES / "arrays_flax_chunks.msgpack").read_bytes()
    assert_computes_as_flax_did(read_flax(FILES / "arrays_flax_chunks.msgpack").tensors, 1e-5)


def test_bfloat16_of_flax_is_read():
    found = read_flax(FILES / "arrays_flax_bfloat16.msgpack").tensors
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert_computes_as_flax_did({name: tensor.float() for name, tensor in found.items()}, 0.1)


def assert_computes_as_flax_did(weights, tolerance):
    """The network of make_arrays.py in torch, from kernels (h, w, in, out) and dense weights (in, out)."""
    with np.load(FILES / "arrays_flax_io.npz") as stored:
        io_ = {name: torch.from_numpy(stored[name]) for name in stored.files}
    x = F.pad(io_["x"].permute(0, 3, 1, 2), (1, 2, 1, 2))  # SAME: 8 windows of 4 by 2 need 18 of 15
    x = F.conv2d(x, weights["first/kernel"].permute(3, 2, 0, 1), weights["first/bias"], stride=2)
    first = x
    norm = (weights[f"norm/{part}"] for part in ("mean", "var", "scale", "bias"))
    x = F.leaky_relu(F.batch_norm(x, *norm, eps=1e-5), 0.2)
    depthwise = F.conv2d(x, weights["depthwise/kernel"].permute(3, 2, 0, 1), padding=1, groups=6)
    pooled = F.max_pool2d(depthwise, 2)
    logits = pooled.permute(0, 2, 3, 1).flatten(1) @ weights["logits/kernel"] + weights["logits/bias"]
    found = {"first": first, "depthwise": depthwise, "pooled": pooled}
    for name, value in found.items():
        assert (value.permute(0, 2, 3, 1) - io_[name]).abs().max() < tolerance
    assert (logits - io_["logits"]).abs().max() < tolerance


@pytest.mark.parametrize("plain", [True, False])
def test_averaged_parameters_of_flax_are_taken_only_where_there_are_no_others(tmp_path, plain):
    one, two = flax_array((1,), "float32", b"\0\0\x80?"), flax_array((1,), "float32", b"\0\0\0@")
    tree = {"ema_params": {"a": {"kernel": two}}, **({"params": {"a": {"kernel": one}}} if plain else {})}
    (tmp_path / "w.msgpack").write_bytes(msgpack.packb(tree))
    found = read_flax(tmp_path / "w.msgpack")
    assert [tensor.item() for tensor in found.tensors.values()] == [1.0 if plain else 2.0]


def test_flax_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(ReaderError, match=r"pip install regraft\[flax\]"):
        read_flax(FILES / "arrays_flax.msgpack")


def test_kernels_that_theano_kept_flipped_give_what_a_true_convolution_gives():
    found = read_arrays(FILES / "arrays_theano.npz", layout="theano")
    kernel, bias, dense, last = (found.tensors[f"arr_{i}"] for i in range(4))
    with np.load(FILES / "arrays_theano_io.npz") as stored:
        x, grids, logits = (torch.from_numpy(stored[name]) for name in ("x", "grids", "logits"))
    computed = F.relu(F.conv2d(x, kernel.flip(-1, -2), bias))
    assert (computed - grids).abs().max() < 1e-4
    assert (computed.flatten(1) @ dense + last - logits).abs().max() < 1e-4
    assert (F.relu(F.conv2d(x, kernel, bias)) - grids).abs().max() > 1
