"""safetensors: what the format's own library writes is read, whatever it refuses is refused, shards stay at home."""

from __future__ import annotations

import json
import os
import random

import pytest
import safetensors
import safetensors.torch
import torch

import pickle_gadgets as pg
from regraft.errors import ReaderError
from regraft.readers import read_checkpoint
from regraft.readers.safetensors_file import KINDS, read_safetensors


def file_of(header, data=b"", length=None):
    """A file with this header, a JSON value or text, and these bytes behind it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin, end, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def tensors():
    torch.manual_seed(0)
    return {
        "stem.weight": torch.randn(4, 3, 3, 3),
        "stem.bias": torch.randn(4).bfloat16(),
        "odd": torch.arange(3, dtype=torch.uint8),
        "index": torch.arange(5),
        "mask": torch.tensor([True, False, True]),
        "scale": torch.tensor(2.5),
        "none": torch.empty(0, 4),
    }


def same(found, wanted):
    return found.keys() == wanted.keys() and all(
        found[n].dtype == wanted[n].dtype and torch.equal(found[n], wanted[n]) for n in wanted
    )


def test_what_the_library_writes_is_read_as_it_reads_it(tmp_path):
    safetensors.torch.save_file(tensors(), tmp_path / "w.safetensors", {"format": "pt"})
    found = read_checkpoint(tmp_path / "w.safetensors")
    assert same(found.tensors, tensors())
    assert (found.format, found.layout, found.passed_over) == ("safetensors", "torch", ())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_number_is_read_as_the_library_reads_it(tmp_path, kind):
    raw = torch.randint(0, 2, (6 * 16,), dtype=torch.uint8)[: 6 * KINDS[kind].itemsize]
    wanted = {"a": raw.view(KINDS[kind]).reshape(2, 3)}
    safetensors.torch.save_file(wanted, tmp_path / "w.safetensors")
    found = read_safetensors(tmp_path / "w.safetensors").tensors["a"]
    assert (found.dtype, found.shape) == (KINDS[kind], (2, 3))
    assert torch.equal(found.flatten().view(torch.uint8), raw)


def test_tensors_at_odd_places_in_the_file_are_read(tmp_path):
    data = b"\1" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    (tmp_path / "w.safetensors").write_bytes(file_of({"a": entry(0, 1), "b": entry(1, 9, "F32", [2])}, data))
    assert read_safetensors(tmp_path / "w.safetensors").tensors["b"].tolist() == [1.5, -2.0]


def test_counters_and_averaged_twins_are_passed_over(tmp_path):
    state = {"a.weight": torch.ones(2), "model_ema.a.weight": torch.ones(2), "b.num_batches_tracked": torch.ones(1)}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    found = read_safetensors(tmp_path / "w.safetensors")
    assert list(found.tensors) == ["a.weight"]
    assert set(found.passed_over) == {"model_ema.a.weight", "b.num_batches_tracked"}


HUGE = 1 << 62
HOSTILE = {
    "nothing": b"",
    "no header": bytes(8),
    "a header beyond the file": file_of({"a": entry(0, 4)}, bytes(4), length=1 << 40),
    "a header above 100 MB": file_of({}, bytes(64), length=100_000_001),
    "a header that is no JSON": file_of(b"{'a': 1}", b""),
    "a header that is a list": file_of([1, 2]),
    "a header with NaN": file_of(b'{"a": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, 1]}}', b"x"),
    "a header in other letters": file_of('{"a": {}}'.encode("utf-16")),
    "a header nested without end": file_of(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a name twice": file_of(
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},'
        b' "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}',
        b"x",
    ),
    "a key twice": file_of(b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}', b"x"),
    "an overlap": file_of({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)),
    "the same bytes twice": file_of({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)),
    "a gap": file_of({"a": entry(0, 4), "b": entry(6, 8)}, bytes(8)),
    "a gap before the first": file_of({"a": entry(2, 4)}, bytes(4)),
    "bytes behind the last": file_of({"a": entry(0, 4)}, bytes(5)),
    "another archive behind the last": file_of({"a": entry(0, 4)}, bytes(4) + pg.npz(b"N.")),
    "bytes that are missing": file_of({"a": entry(0, 4)}, bytes(3)),
    "a huge shape": file_of({"a": entry(0, 4, "F32", [HUGE, 4])}, bytes(4)),
    "a shape that overflows to what is there": file_of({"a": entry(0, 4, "F32", [1 << 32, 1 << 32])}, bytes(4)),
    "huge offsets": file_of({"a": entry(0, HUGE)}, bytes(4)),
    "offsets back to front": file_of({"a": {"dtype": "U8", "shape": [1], "data_offsets": [4, 3]}}, bytes(4)),
    "a negative shape": file_of({"a": entry(0, 4, "U8", [-2, -2])}, bytes(4)),
    "a flag for a shape": file_of({"a": entry(0, 1, "U8", [True])}, bytes(1)),
    "a fraction for a shape": file_of({"a": entry(0, 4, "U8", [4.0])}, bytes(4)),
    "an unknown kind": file_of({"a": entry(0, 4, "F7")}, bytes(4)),
    "a kind that is no word": file_of({"a": {"dtype": ["U8"], "shape": [4], "data_offsets": [0, 4]}}, bytes(4)),
    "an unknown key": file_of({"a": {**entry(0, 4), "code": "os.system"}}, bytes(4)),
    "metadata that are no words": file_of({"__metadata__": {"a": 1}, "a": entry(0, 4)}, bytes(4)),
    "a tensor that is a number": file_of({"a": 5}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_header_that_is_not_as_the_format_wants_it_is_refused(tmp_path, kind):
    (tmp_path / "w.safetensors").write_bytes(HOSTILE[kind])
    pg.refuses(read_safetensors, tmp_path / "w.safetensors", ReaderError)


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    whole = safetensors.torch.save(tensors())
    for kept in range(0, len(whole), 7):
        (tmp_path / "w.safetensors").write_bytes(whole[:kept])
        pg.refuses(read_safetensors, tmp_path / "w.safetensors", ReaderError)


def mutated(draw, whole):
    """The file with a few bytes of its header changed, put in or left out."""
    end = 8 + int.from_bytes(whole[:8], "little")
    text = bytearray(whole[8:end])
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(text))
        match draw.randrange(4):
            case 0:
                text[place] = draw.choice(b'0123456789[]{}",:- eE.UFIBOL')
            case 1:
                text.insert(place, draw.choice(b'0123456789[]{}",: '))
            case 2:
                del text[place]
            case _:
                text[place] ^= 1 << draw.randrange(8)
    shift = draw.choice((0, 0, 0, 0, 1, -1))
    return (len(text) + shift).to_bytes(8, "little") + bytes(text) + whole[end:]


def test_nothing_that_the_library_refuses_is_read_and_what_both_read_is_the_same(tmp_path):
    draw, path, both = random.Random(0), tmp_path / "w.safetensors", 0
    whole = safetensors.torch.save(tensors())
    for _ in range(2000):
        data = mutated(draw, whole)
        path.write_bytes(data)
        try:
            found = read_safetensors(path).tensors
        except ReaderError:
            continue
        wanted = safetensors.torch.load(data)
        assert found.keys() == wanted.keys()
        assert all(
            torch.equal(found[n].flatten().view(torch.uint8), wanted[n].flatten().view(torch.uint8)) for n in found
        )
        assert all((found[n].shape, found[n].dtype) == (wanted[n].shape, wanted[n].dtype) for n in found)
        both += 1
    assert both > 10


def shards(folder, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")):
    """A model in two shards; returns the index and what the model holds."""
    whole = tensors()
    parts = dict.fromkeys(names), list(whole)
    first, second = parts[1][:3], parts[1][3:]
    for name, keys in zip(names, (first, second), strict=True):
        part = {key: whole[key] for key in keys}
        save = safetensors.torch.save_file if name.endswith(".safetensors") else torch.save
        save(part, folder / name)
    listed = {**dict.fromkeys(first, names[0]), **dict.fromkeys(second, names[1])}
    index = folder / ("model.safetensors.index.json" if names[0].endswith("s") else "pytorch_model.bin.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listed}))
    return index, whole


@pytest.mark.parametrize("names", [("a.safetensors", "b.safetensors"), ("a.bin", "b.bin")], ids=["safetensors", "bin"])
def test_shards_are_joined(tmp_path, names):
    index, whole = shards(tmp_path, names)
    found = read_checkpoint(index)
    assert same(found.tensors, whole)
    assert "shards" in found.format


@pytest.mark.parametrize(
    "name",
    ["../{}", "{folder}/{}", "sub/{}", "./{}", "..", ".", "", "{}\0", "C:\\{}", "\\\\host\\{}", "{}.py", "/dev/zero"],
)
def test_a_shard_with_a_name_that_leads_elsewhere_is_refused(tmp_path, name):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "sub").mkdir()
    index, _ = shards(tmp_path / "home")
    real = "model-00001-of-00002.safetensors"
    for folder in (tmp_path, tmp_path / "home" / "sub"):
        (folder / real).write_bytes((tmp_path / "home" / real).read_bytes())
    text = index.read_text()
    index.write_text(text.replace(json.dumps(real), json.dumps(name.format(real, folder=tmp_path))))
    assert index.read_text() != text
    pg.refuses(read_safetensors, index, ReaderError)


@pytest.mark.parametrize("kind", ["symbolic link", "link to a folder above", "hard link", "pipe", "folder", "missing"])
def test_a_shard_that_is_no_plain_file_is_refused(tmp_path, kind):
    (tmp_path / "home").mkdir()
    index, _ = shards(tmp_path / "home")
    shard, outside = tmp_path / "home" / "model-00002-of-00002.safetensors", tmp_path / "outside.safetensors"
    shard.rename(outside)
    match kind:
        case "symbolic link":
            shard.symlink_to(outside)
        case "link to a folder above":
            shard.symlink_to("..")
        case "hard link":
            os.link(outside, shard)
        case "pipe":
            os.mkfifo(shard)
        case "folder":
            shard.mkdir()
    pg.refuses(read_safetensors, index, ReaderError)


@pytest.mark.parametrize("kind", ["missing from its shard", "in no list", "in both shards"])
def test_shards_that_do_not_hold_what_the_index_says_are_refused(tmp_path, kind):
    index, _ = shards(tmp_path)
    listed = json.loads(index.read_text())
    if kind == "missing from its shard":
        listed["weight_map"]["more"] = "model-00001-of-00002.safetensors"
    elif kind == "in no list":
        del listed["weight_map"]["odd"]
    else:
        safetensors.torch.save_file(tensors(), tmp_path / "model-00002-of-00002.safetensors")
    index.write_text(json.dumps(listed))
    with pytest.raises(ReaderError, match=r"must hold the tensors that .* lists"):
        read_safetensors(index)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": 1}']
)
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    pg.refuses(read_safetensors, tmp_path / "model.safetensors.index.json", ReaderError)


def test_a_pickled_shard_runs_nothing(tmp_path):
    canary = tmp_path / "canary"
    index, _ = shards(tmp_path, ("a.bin", "b.bin"))
    (tmp_path / "b.bin").write_bytes(pg.torch_zip(pg.pickled(pg.Call(pg.Name("os", "system"), (f"touch {canary}",)))))
    with pytest.raises(ReaderError, match="code"):
        read_safetensors(index)
    assert not canary.exists()
