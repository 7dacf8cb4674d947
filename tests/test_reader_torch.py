"""PyTorch's own files: where weights lie in them, what is passed over, and that none of them runs anything."""

from __future__ import annotations

import argparse
import io
import pickle
import random
import subprocess
import sys
import tempfile
import types
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pickle_gadgets as pg
from regraft.errors import ReaderError
from regraft.readers import read_checkpoint
from regraft.readers.torch_file import read_torch

GADGETS = sorted(pg.gadgets(Path("/nowhere/canary"), Path(tempfile.mkdtemp()) / "unused.py"))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))


@pytest.fixture
def state():
    return network().state_dict()


def saved(path, value, **options):
    torch.save(value, path, **options)
    return path


def same(found, wanted):
    assert list(found) == list(wanted)
    return all(torch.equal(found[name], wanted[name]) for name in wanted)


def without_counters(state):
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def test_the_state_of_an_optimizer_is_no_weights_and_is_passed_over_beside_some(tmp_path, state):
    trained = network()
    optimizer = torch.optim.SGD(trained.parameters(), 0.1, momentum=0.9)
    trained(torch.rand(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    with pytest.raises(ReaderError, match="found the state of an optimizer"):
        read_torch(saved(tmp_path / "o.pt", optimizer.state_dict()))
    found = read_torch(saved(tmp_path / "both.pt", {"weights": state, "sgd": optimizer.state_dict()}))
    assert same(found.tensors, without_counters(state))
    with pytest.raises(ReaderError, match="found one tensor without a name"):
        read_torch(saved(tmp_path / "t.pt", torch.zeros(3)))


def test_a_state_dict_is_read_as_it_is_and_its_counters_are_passed_over(tmp_path, state):
    found = read_torch(saved(tmp_path / "w.pt", state))
    assert same(found.tensors, without_counters(state))
    assert (found.layout, found.passed_over, found.operations) == ("torch", ("1.num_batches_tracked",), None)


def test_parameters_come_out_as_plain_tensors(tmp_path):
    found = read_torch(saved(tmp_path / "w.pt", dict(network().named_parameters())))
    assert not any(tensor.requires_grad for tensor in found.tensors.values())
    assert {type(tensor) for tensor in found.tensors.values()} == {torch.Tensor}


def test_whole_numbers_and_flags_are_kept_where_they_are_buffers(tmp_path):
    state = {"bias.weight": torch.ones(2), "bias.index": torch.arange(4), "bias.mask": torch.tensor([True, False])}
    assert same(read_torch(saved(tmp_path / "w.pt", state)).tensors, state)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16, torch.float64])
def test_kinds_of_number_are_kept(tmp_path, half):
    state = {"a.weight": torch.randn(3, 2).to(half)}
    assert same(read_torch(saved(tmp_path / "w.pt", state)).tensors, state)


@pytest.mark.parametrize(
    "key", ["state_dict", "model", "model_state_dict", "net", "module", "params", "network", "my_encoder"]
)
def test_weights_are_found_under_the_name_that_training_scripts_give_them(tmp_path, state, key):
    checkpoint = {"epoch": 3, key: state, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "rng_state": state}
    found = read_torch(saved(tmp_path / "w.pth", checkpoint))
    assert same(found.tensors, without_counters(state))
    assert set(found.passed_over) >= {"epoch", "optimizer", "rng_state"}


def test_weights_are_found_under_several_names_at_once(tmp_path, state):
    found = read_torch(saved(tmp_path / "w.pth", {"model": {"state_dict": state, "step": torch.tensor(4)}}))
    assert same(found.tensors, without_counters(state))


def test_several_networks_in_one_file_stay_apart(tmp_path, state):
    other = {name: tensor + 1 for name, tensor in state.items()}
    found = read_torch(saved(tmp_path / "w.pth", {"generator": state, "critic": other, "epoch": 1}))
    assert torch.equal(found.tensors["generator.0.weight"], state["0.weight"])
    assert torch.equal(found.tensors["critic.0.weight"], other["0.weight"])


def test_a_list_of_one_state_dict_is_that_and_of_several_is_numbered(tmp_path, state):
    assert same(read_torch(saved(tmp_path / "1.pt", [state])).tensors, without_counters(state))
    two = read_torch(saved(tmp_path / "2.pt", [state, OrderedDict(state)])).tensors
    assert {"0.0.weight", "1.0.weight"} <= two.keys()


def test_modules_of_names_without_paths_keep_the_names_above_them(tmp_path):
    found = read_torch(saved(tmp_path / "w.pt", {"dense": {"weight": torch.ones(2), "bias": torch.ones(1)}}))
    assert list(found.tensors) == ["dense.weight", "dense.bias"]


@pytest.mark.parametrize(("plain", "average"), [("params", "params_ema"), ("model", "ema"), ("net", "model_ema")])
def test_averaged_weights_are_passed_over_beside_plain_ones(tmp_path, state, plain, average):
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    found = read_torch(saved(tmp_path / "w.pth", {average: averaged, plain: state}))
    assert same(found.tensors, without_counters(state))
    assert average in found.passed_over


def test_averaged_weights_are_taken_where_there_are_no_others(tmp_path, state):
    found = read_torch(saved(tmp_path / "w.pth", {"params_ema": state, "epoch": 9}))
    assert same(found.tensors, without_counters(state))


@pytest.mark.parametrize("name", ["model_ema.{}", "ema.{}", "ema_model.module.{}", "{}_ema", "shadow.{}"])
def test_averaged_twins_within_a_state_dict_are_passed_over(tmp_path, state, name):
    plain = {f"model.{key}": tensor for key, tensor in without_counters(state).items()}
    if "module" in name:
        plain = {key.replace("model.", "model.module."): tensor for key, tensor in plain.items()}
    twins = {name.format(key): tensor + 1 for key, tensor in without_counters(state).items()}
    found = read_torch(saved(tmp_path / "w.ckpt", {"state_dict": {**plain, **twins}}))
    assert same(found.tensors, plain)
    assert set(found.passed_over) == set(twins)


def test_a_layer_that_is_only_called_like_an_average_is_kept(tmp_path):
    state = {"stage.ema.gn.weight": torch.ones(3), "stage.conv.weight": torch.ones(3), "ema.proj.weight": torch.ones(2)}
    assert same(read_torch(saved(tmp_path / "w.pt", state)).tensors, state)


def test_a_lightning_checkpoint_gives_its_weights(tmp_path, state, monkeypatch):
    module = types.ModuleType("pytorch_lightning.utilities.parsing")
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": module.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.utilities", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    checkpoint = {
        "epoch": 1,
        "pytorch-lightning_version": "2.2",
        "state_dict": {f"model.{name}": tensor for name, tensor in state.items()},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": module.AttributeDict(lr=0.1, out=Path("runs")),
    }
    path = saved(tmp_path / "last.ckpt", checkpoint)
    monkeypatch.undo()
    found = read_torch(path)
    assert same(found.tensors, {f"model.{name}": t for name, t in without_counters(state).items()})
    assert {"optimizer_states", "callbacks", "hyper_parameters", "epoch"} <= set(found.passed_over)


def test_options_and_numbers_of_numpy_beside_the_weights_do_no_harm(tmp_path, state):
    beside = {"args": argparse.Namespace(lr=0.1), "best": np.float64(0.9), "data": Path("x"), "curve": np.ones(3)}
    found = read_torch(saved(tmp_path / "w.pth", {"state_dict": state, **beside}))
    assert same(found.tensors, without_counters(state))
    assert set(beside) <= set(found.passed_over)


def test_files_from_before_zip_archives_are_read(tmp_path, state):
    path = saved(tmp_path / "old.pth", {"state_dict": state}, _use_new_zipfile_serialization=False)
    assert same(read_torch(path).tensors, without_counters(state))


def test_a_program_of_torch_export_under_another_ending_is_read_as_what_it_is(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(network().eval(), (torch.ones(2, 3, 8, 8),)), tmp_path / "w.pt2")
    (tmp_path / "w.pt2").rename(tmp_path / "w.pt")
    assert read_checkpoint(tmp_path / "w.pt").operations is not None


def test_every_gadget_runs_when_python_loads_it(tmp_path):
    for i, gadget in enumerate(GADGETS):
        call = pg.gadgets(tmp_path / f"canary{i}", tmp_path / f"script{i}.py")[gadget]
        (tmp_path / f"{i}.pkl").write_bytes(pg.pickled(call))
    load = (
        "import contextlib, pathlib, pickle, sys\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).glob('*.pkl')):\n"
        "    with contextlib.suppress(Exception):\n"
        "        pickle.loads(path.read_bytes(), encoding='latin1')\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", load, str(tmp_path)], check=True, timeout=120)
    assert [g for i, g in enumerate(GADGETS) if not (tmp_path / f"canary{i}").exists()] == []


@pytest.mark.parametrize("container", [pg.torch_zip, pg.torch_legacy], ids=["zip", "legacy"])
@pytest.mark.parametrize("gadget", GADGETS)
def test_no_gadget_runs_in_a_file_of_torch(tmp_path, gadget, container):
    canary = tmp_path / "canary"
    call = pg.gadgets(canary, tmp_path / "script.py")[gadget]
    path = tmp_path / "w.pt"
    for hidden in (call, {"state_dict": {}, "extra": call}, {"state_dict": (call,)}):
        path.write_bytes(container(pg.pickled(hidden)))
        said = pg.refuses(read_torch, path, ReaderError)
        assert "code" in said
        assert not canary.exists()


@pytest.mark.parametrize("gadget", GADGETS)
def test_no_gadget_runs_in_a_torchscript_archive(tmp_path, gadget):
    canary = tmp_path / "canary"
    call = pg.pickled(pg.gadgets(canary, tmp_path / "script.py")[gadget])
    path = tmp_path / "w.pt"
    path.write_bytes(pg.torch_zip(call, **{"constants.pkl": call, "code/__torch__.py": b"import os"}))
    assert "TorchScript" in pg.refuses(read_torch, path, ReaderError)
    assert not canary.exists()


def test_a_name_put_together_on_the_stack_is_refused(tmp_path):
    canary = tmp_path / "canary"
    touch = f"touch {canary}".encode()
    stacked = b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c" + bytes([len(touch)]) + touch + b"\x85R."
    (tmp_path / "w.pt").write_bytes(pg.torch_zip(stacked))
    pg.refuses(read_torch, tmp_path / "w.pt", ReaderError)
    assert not canary.exists()


def test_a_pickled_module_is_refused_with_the_way_to_a_state_dict(tmp_path):
    said = pg.refuses(read_torch, saved(tmp_path / "w.pt", network()), ReaderError)
    assert "torch.nn.modules" in said
    assert "model.state_dict()" in said


def test_a_torchscript_archive_is_refused_with_the_way_to_a_state_dict(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(network().eval(), torch.ones(1, 3, 8, 8)), tmp_path / "w.pt")
    said = pg.refuses(read_torch, tmp_path / "w.pt", ReaderError)
    assert "TorchScript" in said
    assert "state_dict()" in said


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, state, legacy):
    whole = saved(tmp_path / "whole.pt", state, _use_new_zipfile_serialization=not legacy).read_bytes()
    for kept in [0, 1, 7, 20, *range(40, len(whole), len(whole) // 40), len(whole) - 1]:
        (tmp_path / "w.pt").write_bytes(whole[:kept])
        pg.refuses(read_torch, tmp_path / "w.pt", ReaderError)


def test_a_byte_that_flipped_in_an_archive_is_noticed_or_changes_no_weight(tmp_path, state):
    whole = saved(tmp_path / "whole.pt", state).read_bytes()
    draw, refused = random.Random(0), 0
    for _ in range(300):
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        (tmp_path / "w.pt").write_bytes(flipped)
        try:
            assert same(read_torch(tmp_path / "w.pt").tensors, without_counters(state))
        except ReaderError:
            refused += 1
    assert refused > 150


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"\x89HDF\r\n\x1a\n" + bytes(100), ".h5"),
        (pickle.dumps({"a": 1}, 4), "plain pickle"),
        (random.Random(0).randbytes(1000), "torch.save"),
    ],
)
def test_what_is_no_file_of_torch_is_called_what_it_is(tmp_path, content, word):
    (tmp_path / "w.pt").write_bytes(content)
    assert word in pg.refuses(read_torch, tmp_path / "w.pt", ReaderError)


def test_a_folder_and_a_missing_file_are_refused(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    pg.refuses(read_torch, tmp_path / "folder.pt", ReaderError)
    pg.refuses(read_torch, tmp_path / "missing.pt", ReaderError)


@pytest.mark.parametrize(
    "value", [{}, {"epoch": 3}, [], 7, {"args": {"lr": 0.1}}], ids=["nothing", "epoch", "list", "number", "options"]
)
def test_a_file_without_tensors_is_refused_with_what_it_holds(tmp_path, value):
    assert "state dict" in pg.refuses(read_torch, saved(tmp_path / "w.pt", value), ReaderError)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(1).expand(1 << 20, 1 << 20),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        lambda: torch.empty(1 << 30, device="meta"),
    ],
    ids=["repeated beyond the file", "sparse", "quantised", "without values"],
)
def test_tensors_that_are_not_plainly_in_the_file_are_refused(tmp_path, make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = saved(tmp_path / "w.pt", {"a.weight": make()})
    pg.refuses(read_torch, path, ReaderError)


def test_containers_within_themselves_and_shared_a_billion_times_are_walked_once(tmp_path, state):
    inside: dict[str, object] = {"state_dict": state}
    inside["again"] = inside
    shared: list[object] = ["laughs"]
    for _ in range(12):
        shared = [shared] * 10
    found = read_torch(saved(tmp_path / "w.pt", {**inside, "shared": shared}))
    assert same(found.tensors, without_counters(state))


def test_bytes_that_would_be_encoded_again_and_again_are_refused(tmp_path):
    encode = pg.Name("_codecs", "encode")
    bomb: object = "00"
    for _ in range(60):
        bomb = pg.Call(encode, (bomb, "HEX"))
    (tmp_path / "w.pt").write_bytes(pg.torch_zip(pg.pickled({"a": bomb})))
    assert "encoded" in pg.refuses(read_torch, tmp_path / "w.pt", ReaderError)


def test_nesting_without_end_is_refused(tmp_path):
    deep: object = torch.ones(1)
    for _ in range(200):
        deep = {"a": deep}
    pg.refuses(read_torch, saved(tmp_path / "w.pt", deep), ReaderError)
    (tmp_path / "w.pt").write_bytes(pg.torch_zip(b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."))
    pg.refuses(read_torch, tmp_path / "w.pt", ReaderError)


def rewritten(path, change):
    """The archive with its entries as `change` (a list of (name, bytes)) makes them."""
    with zipfile.ZipFile(path) as archive:
        entries = change([(name, archive.read(name)) for name in archive.namelist()])
    whole = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, data, *how in entries:
            archive.writestr(name, data, *how)
    path.write_bytes(whole.getvalue())


def test_compressed_and_doubled_entries_are_refused(tmp_path, state):
    path = saved(tmp_path / "w.pt", state)
    rewritten(path, lambda entries: entries)
    assert "compressed" in pg.refuses(read_torch, path, ReaderError)
    path = saved(tmp_path / "w.pt", state)
    rewritten(path, lambda entries: [(*e, zipfile.ZIP_STORED) for e in [*entries, entries[0]]])
    assert "name of its own" in pg.refuses(read_torch, path, ReaderError)


def test_an_archive_that_would_grow_without_measure_is_refused(tmp_path, state):
    path = saved(tmp_path / "w.pt", state)
    rewritten(path, lambda entries: [*entries, ("archive/data/99", bytes(50_000_000))])
    assert "grow" in pg.refuses(read_torch, path, ReaderError)
