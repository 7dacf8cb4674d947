"""`regraft doctor`: the layers that a run reuses are examined on its pictures, and its report shows it from then on."""

from __future__ import annotations

import errno
import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import regraft
import tiny
from conftest import regraft as command
from regraft import recipe
from regraft.errors import BackboneError, DataError, RunError
from regraft.recipe import doctor
from regraft.store import open_store


def test_a_run_is_examined_and_its_report_shows_it(real_run, tmp_path):
    run, data, _ = real_run
    copied = shutil.copytree(run, tmp_path / "run")
    before = command("predict", copied, data / "test", "--json", cache=tmp_path / "store").stdout
    done = command("doctor", copied, "--json", cache=tmp_path / "store")
    assert done.returncode == 0, done.stderr
    health = json.loads(done.stdout)
    weighted = [layer for layer in health["layers"] if layer["gradient"] is not None]
    assert weighted[0]["path"] == "conv_stem"
    assert all(layer["gradient"] > 0 for layer in weighted)
    assert all(layer["update"] is None for layer in health["layers"])
    assert "Health of the layers" in (copied / "report.html").read_text()
    assert "Health of the layers" not in (run / "report.html").read_text()
    assert command("predict", copied, data / "test", "--json", cache=tmp_path / "store").stdout == before
    others = tiny.write_pictures(tmp_path / "others", each=4, seed=3)
    shown = command("doctor", copied, "--data", others, cache=tmp_path / "store")
    assert "conv_stem" in shown.stdout


def fitted(tmp_path, module, draw=tiny.stripes):
    data = tiny.write_pictures(tmp_path / "pictures", draw=draw)
    store = open_store(tmp_path / "store")
    return regraft.fit(data, module, example=tiny.EXAMPLE, out=tmp_path / "run", store=store)


def test_a_run_on_a_module_given_in_python_is_examined_and_the_module_stays_as_it_is(tmp_path):
    module = tiny.TinyNet()
    run = fitted(tmp_path, module)
    assert run.model.frozen is not None
    before = {name: t.clone() for name, t in module.state_dict().items()}
    health = doctor(run.folder, backbone=module)
    assert health.batches >= 1
    assert all((t == before[name]).all() for name, t in module.state_dict().items())
    assert json.loads((run.folder / "record.json").read_text())["health"]["batches"] == health.batches


def test_layers_that_keep_what_they_derived_from_their_weights_are_examined(tmp_path):
    module = tiny.TinyNet()
    module.stem.insert(0, tiny.Keeping(3))
    run = fitted(tmp_path, module)
    assert doctor(run.folder, backbone=module).batches == 2
    assert not module.stem[0].kept


def test_health_is_told_though_the_report_cannot_be_written(tmp_path, monkeypatch):
    module = tiny.TinyNet()
    run = fitted(tmp_path, module)

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system", str(run.folder))

    monkeypatch.setattr(recipe, "write_report", refuse)
    with pytest.warns(UserWarning, match="cannot be written again: .*Read-only file system"):
        assert doctor(run.folder, backbone=module).batches == 2


class Overwriting(nn.Module):
    """Changes a tensor that the way back needs: torch runs it forward, and refuses to go back through it."""

    def __init__(self):
        super().__init__()
        self.register_forward_hook(lambda *_: None)  # is kept in one piece, and so writes in place

    def forward(self, x):
        y = torch.exp(0.1 * x)
        y *= 2
        return y


def test_a_network_without_a_way_back_gets_one_sentence(tmp_path):
    module = tiny.TinyNet()
    module.stem.append(Overwriting())
    run = fitted(tmp_path, module)
    with pytest.raises(BackboneError, match="must find their way back through the network"):
        doctor(run.folder, backbone=module)


def test_what_cannot_be_examined_gets_one_sentence(tmp_path):
    run = fitted(tmp_path, tiny.TinyNet(), draw=tiny.colours)
    with pytest.raises(RunError, match="must reuse layers to be examined"):
        doctor(run.folder)
    for nothing in (tmp_path / "nothing", tmp_path / "pictures", tmp_path / "pictures" / "ant" / "0.png"):
        with pytest.raises(RunError, match="must hold a finished run: give a folder that `regraft fit` made"):
            doctor(nothing)
    shutil.rmtree(tmp_path / "pictures")
    with pytest.raises((DataError, RunError)):
        doctor(run.folder, tmp_path / "pictures")
    (tmp_path / "run" / "record.json").write_bytes(b"")
    with pytest.raises(RunError, match="give a folder that `regraft fit` made") as refused:
        doctor(tmp_path / "run")
    assert "--out" not in str(refused.value)


def test_the_report_goes_on_showing_the_pictures_of_the_run(tmp_path, monkeypatch):
    module = tiny.TinyNet()
    run = fitted(tmp_path, module)
    shown = []
    monkeypatch.setattr(recipe, "write_report", lambda path, record, pixels: shown.append(pixels))
    others = tiny.write_pictures(tmp_path / "others", each=4, seed=3)
    doctor(run.folder, others, backbone=module)
    (pixels,) = shown
    inside = next(p for p in (tmp_path / "pictures").rglob("*.png")).relative_to(tmp_path / "pictures")
    assert pixels(str(inside)) is not None
    assert pixels("no/such.png") is None


def test_the_report_stays_as_it_is_where_the_pictures_of_the_run_are_gone(tmp_path):
    module = tiny.TinyNet()
    run = fitted(tmp_path, module)
    before = {name: (run.folder / name).read_bytes() for name in ("report.html", "record.json")}
    moved = (tmp_path / "pictures").rename(tmp_path / "moved")
    others = tiny.write_pictures(tmp_path / "others", each=4, seed=3)
    with pytest.warns(UserWarning, match="stays as it is: pictures of the run are no longer where they were") as said:
        assert doctor(run.folder, others, backbone=module).batches == 1
    assert len(said) == 1
    assert {name: (run.folder / name).read_bytes() for name in before} == before
    doctor(run.folder, moved, backbone=module)
    assert "Health of the layers" in (run.folder / "report.html").read_text()


def test_pictures_given_in_python_are_known_again(tmp_path):
    module, rng = tiny.TinyNet(), np.random.default_rng(0)
    data = [tiny.stripes(i % 3, rng) for i in range(24)], [tiny.CLASSES[i % 3] for i in range(24)]
    run = regraft.fit(data, module, example=tiny.EXAMPLE, out=tmp_path / "run")
    doctor(run.folder, data, backbone=module)
    assert "Health of the layers" in (run.folder / "report.html").read_text()
