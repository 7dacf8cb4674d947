"""Pretraining: every method on small pictures, exact resume, what is saved, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import regraft
import tiny
from conftest import SOURCES
from conftest import regraft as run_regraft
from regraft import pretrain_steps, pretraining
from regraft.backbone import load_backbone
from regraft.data import load_data, load_unlabelled
from regraft.errors import ArtifactError, BackboneError, DataError, RunError, TrainingError
from regraft.methods import METHODS, Encoder
from regraft.methods.boltzmann import Machine, pseudo_likelihood
from regraft.methods.encoder import encode, features
from regraft.methods.views import VIEWS, varied
from regraft.prepared import prepare
from regraft.preprocess import plain_spec
from regraft.pretrain_steps import Work, rows_of_epoch, set_norms
from regraft.pretraining import begin, pretrain

EPOCHS = 2


@pytest.fixture
def pictures(tmp_path):
    """12 pictures of 16 x 16 in three classes."""
    return tiny.write_pictures(
        tmp_path / "pictures", each=4, draw=lambda kind, rng: tiny.stripes(kind, rng, size=(16, 16))
    )


def arch_for(method):
    return "dense-12-6" if method == "rbm" else "small"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_backbone_that_other_commands_take(method, pictures, tmp_path):
    run = pretrain(pictures, method=method, out=tmp_path / "out", arch=arch_for(method), epochs=EPOCHS, device="cpu")

    assert len(run.record["losses"]) == EPOCHS
    assert all(np.isfinite(run.record["losses"]))
    spec = run.backbone.preprocess
    begun = begin(arch_for(method), spec, sigmoid=method == "rbm").module.state_dict()
    now = load_backbone(tmp_path / "out")
    trained = {name for name, p in now.module.named_parameters() if not torch.equal(p, begun[name])}
    assert trained == {name for name, _ in now.module.named_parameters()}
    assert not now.module.training
    assert now.source.weights == run.record["weights"] == run.backbone.source.weights
    assert now.source.pretrained
    others = tiny.write_pictures(tmp_path / "others", each=4, seed=1)
    assert regraft.curve(others, tmp_path / "out").table.forward_passes == 12
    assert regraft.curve(others, tmp_path / "out").table.forward_passes == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image") >= 8
    assert "http" not in page.replace("http-equiv", "")
    assert not (tmp_path / "out" / "checkpoints").exists()


def stopped_after(writes, monkeypatch, **given):
    """Pretrain until the record was written so many times, then interrupt; the 4th is after the first epoch."""
    written = pretraining.write_record

    def stopping(folder, record):
        nonlocal writes
        writes -= 1
        written(folder, record)
        if writes == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pretraining, "write_record", stopping)
        with pytest.raises(KeyboardInterrupt):
            pretrain(**given)


@pytest.mark.parametrize("method", ["gan", "rbm", "pairs"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(method, pictures, tmp_path, monkeypatch):
    given = {"method": method, "arch": arch_for(method), "epochs": 4, "device": "cpu"}
    whole = pretrain(pictures, out=tmp_path / "whole", **given)
    stopped_after(4, monkeypatch, data=pictures, out=tmp_path / "parts", **given)
    assert json.loads((tmp_path / "parts" / "record.json").read_text())["status"] == "running"
    assert list((tmp_path / "parts").rglob("epoch-*.safetensors"))
    again = pretrain(pictures, out=tmp_path / "parts", **given)

    assert again.record["losses"] == whole.record["losses"]
    assert again.record["weights"] == whole.record["weights"]


def test_a_finished_run_is_shown_and_another_refused(pictures, tmp_path):
    given = {"method": "rotation", "out": tmp_path / "out", "epochs": 1}
    first = pretrain(pictures, **given)
    assert pretrain(pictures, **given).record == first.record
    with pytest.raises(RunError, match="method was 'rotation' and is 'masked'"):
        pretrain(pictures, **{**given, "method": "masked"})


def test_the_same_seed_gives_the_same_network_and_another_seed_another(pictures, tmp_path):
    weights = [
        pretrain(pictures, method="contrastive", out=tmp_path / str(i), epochs=1, seed=seed).record["weights"]
        for i, seed in enumerate((0, 0, 1))
    ]
    assert weights[0] == weights[1] != weights[2]


def test_a_run_begins_from_a_backbone(pictures, tmp_path):
    pretrain(pictures, method="masked", out=tmp_path / "one", epochs=1)
    before = load_backbone(tmp_path / "one").module.state_dict()
    pretrain(pictures, method="rotation", out=tmp_path / "two", start=str(tmp_path / "one"), epochs=1)
    after = load_backbone(tmp_path / "two").module.state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(t, after[name]) for name, t in before.items())
    assert torch.equal(load_backbone(tmp_path / "one").module.state_dict()["conv11.weight"], before["conv11.weight"])


def test_norms_of_a_network_that_is_gone_on_from_keep_their_statistics(pictures, tmp_path):
    pretrain(pictures, method="masked", out=tmp_path / "one", epochs=1)
    before = load_backbone(tmp_path / "one").module.state_dict()
    run = pretrain(pictures, method="rotation", out=tmp_path / "two", start=str(tmp_path / "one"), epochs=2)
    now = run.backbone.module.state_dict()
    assert not torch.equal(now["norm11.weight"], before["norm11.weight"])
    for name, value in before.items():
        if "running" in name or "tracked" in name:
            assert torch.equal(now[name], value), name


@pytest.mark.parametrize(("method", "light"), [("pairs", False), ("labels", False), ("contrastive", True)])
def test_colours_are_left_alone_where_they_may_say_what_a_picture_shows(method, light, pictures, tmp_path):
    run = pretrain(pictures, method=method, out=tmp_path / "out", epochs=1)
    assert ("light" in run.record["options"]["augment"]) is light


def test_a_step_keeps_no_more_than_there_is_room_for(pictures, tmp_path, monkeypatch):
    given = {"data": pictures, "method": "rotation", "epochs": 1, "device": "cpu"}
    assert pretrain(**given, out=tmp_path / "roomy").record["batch"] == 64
    assert pretrain(**given, out=tmp_path / "asked", batch=6).record["batch"] == 6
    # Four turned views through conv11 and norm11 alone: 2 x 4 x 32 channels x 8 x 8 x 4 bytes.
    monkeypatch.setattr(pretrain_steps, "ROOM", 32 * 65_536)
    assert pretrain(**given, out=tmp_path / "narrow").record["batch"] < 32


def test_measuring_the_batch_leaves_no_trace(pictures, tmp_path):
    given = {"data": pictures, "method": "gan", "epochs": 1, "device": "cpu"}
    measured = pretrain(**given, out=tmp_path / "measured").record
    asked = pretrain(**given, out=tmp_path / "asked", batch=measured["batch"]).record
    assert measured["weights"] == asked["weights"]


def test_a_model_on_a_pretrained_network_needs_the_folder_no_more(pictures, tmp_path):
    pretrain(pictures, method="rotation", out=tmp_path / "network", epochs=1)
    run = regraft.fit(pictures, tmp_path / "network", out=tmp_path / "run", budget="0trials")
    asked = sorted(pictures.rglob("*.png"))[:3]
    before = [p.ranked for p in run.model.predict(asked)]
    shutil.rmtree(tmp_path / "network")
    assert [p.ranked for p in regraft.load_model(tmp_path / "run").predict(asked)] == before


def test_cuts_above_what_was_trained_are_not_offered(pictures, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("from tiny import TinyNet\n\ndef net():\n    return TinyNet()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    run = pretrain(pictures, method="masked", out=tmp_path / "out", arch="mine:net", epochs=1)
    whole = load_backbone("mine:net", pretrained=False)
    assert run.record["cut"].startswith("stage3")
    names = [cut.name for cut in run.backbone.cuts]
    assert run.record["cut"] in names
    assert names == [cut.name for cut in whole.cuts][: len(names)]
    above = [cut for cut in whole.cuts if cut.name not in names]
    assert all(cut.depth > run.backbone.cuts[-1].depth for cut in above)
    assert torch.equal(run.backbone.module.head.weight, whole.module.head.weight)


def test_a_damaged_backbone_is_refused(pictures, tmp_path):
    pretrain(pictures, method="rotation", out=tmp_path / "out", epochs=1)
    for name in ("backbone.safetensors", "backbone.json"):
        path = tmp_path / "out" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
        with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
            load_backbone(tmp_path / "out")
        path.write_bytes(whole)
    load_backbone(tmp_path / "out")


def test_pictures_are_found_without_labels(pictures, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(pictures.rglob("*.png"))):
        shutil.copyfile(path, flat / f"{i}.png")
    (flat / "notes.txt").write_text("no picture")
    assert len(load_unlabelled(flat).examples) == 12
    assert [item.where for item in load_unlabelled(flat).ignored] == ["notes.txt"]
    assert len(load_unlabelled(pictures).examples) == 12
    images = np.zeros((5, 8, 8), np.uint8)
    np.savez(tmp_path / "some.npz", images=images)
    assert len(load_unlabelled(tmp_path / "some.npz").examples) == 5
    assert len(load_unlabelled(images).examples) == 5
    assert len(load_unlabelled((images, [1, 2, 1, 2, 1])).examples) == 5
    assert len(load_unlabelled(load_data(pictures)).examples) == 12
    run = pretrain(flat, method="contrastive", out=tmp_path / "out", epochs=1)
    assert run.record["pictures"] == 12


def test_test_pictures_are_left_alone(pictures, tmp_path):
    for split in ("train", "test"):
        shutil.copytree(pictures, tmp_path / "split" / split)
    assert {e.where.split("/")[0] for e in load_unlabelled(tmp_path / "split").examples} == {"train"}
    shutil.copytree(pictures / tiny.CLASSES[0], tmp_path / "split" / "unlabelled")
    assert {e.where.split("/")[0] for e in load_unlabelled(tmp_path / "split").examples} == {"train", "unlabelled"}
    shutil.rmtree(tmp_path / "split" / "unlabelled")
    run = pretrain(tmp_path / "split", method="labels", out=tmp_path / "out", epochs=1)
    assert run.record["pictures"] == 12


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"method": "dreaming"}, TrainingError, "one of autoencoder.*found 'dreaming'"),
        ({"method": "rbm"}, TrainingError, "rbm must have dense layers.*--arch dense-500-250"),
        ({"method": "contrastive", "augment": []}, TrainingError, "must vary pictures by something"),
        ({"method": "masked", "augment": ["swirl"]}, TrainingError, "found 'swirl'"),
        ({"method": "masked", "arch": "nothing-like-it"}, BackboneError, "nothing-like-it"),
        ({"method": "masked", "arch": "small", "start": "default"}, BackboneError, "not both"),
        (
            {"method": "rbm", "arch": "dense-5-4-3", "epochs": 2},
            TrainingError,
            "an epoch for each of 3 layers; found 2",
        ),
        ({"method": "masked", "group": "(x)"}, DataError, "masked does not ask"),
        ({"method": "masked", "start": "default", "size": 32}, BackboneError, "has a size of its own"),
        ({"method": "pairs", "group": r"(.*)"}, DataError, "two pictures of a thing"),
        ({"method": "masked", "budget": "soon"}, RunError, "found 'soon'"),
        ({"method": "masked", "budget": "20trials"}, RunError, "must be a time"),
    ],
)
def test_what_cannot_be_done_is_said(given, error, words, pictures, tmp_path):
    with pytest.raises(error, match=words):
        pretrain(pictures, out=tmp_path / "out", **{"epochs": 1, **given})


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there are none in"):
        pretrain(tmp_path / "empty", method="masked", out=tmp_path / "out")
    with pytest.raises(RunError, match="must not lie inside the data"):
        pretrain(tiny.write_pictures(tmp_path / "p"), method="masked", out=tmp_path / "p" / "out")


def test_unreadable_pictures_are_left_out_by_name(pictures, tmp_path):
    (pictures / tiny.CLASSES[0] / "broken.png").write_bytes(b"no picture")
    run = pretrain(pictures, method="masked", out=tmp_path / "out", epochs=1)
    assert [item["where"] for item in run.record["left_out"]] == [f"{tiny.CLASSES[0]}/broken.png"]
    assert run.record["pictures"] == 12


def test_a_loss_that_is_not_finite_is_tried_slower_then_said(pictures, tmp_path, monkeypatch):
    rates = []

    def diverging(stages, plan, *args, **options):
        rates.append(plan.lr)
        raise pretrain_steps.Diverged(0, 1)

    monkeypatch.setattr(pretrain_steps, "train", diverging)
    with pytest.raises(TrainingError, match="tenth of the learning rate"):
        pretrain(pictures, method="masked", out=tmp_path / "out", epochs=1)
    assert rates[1] == pytest.approx(rates[0] / 10)


def test_a_budget_fixes_the_epochs_before_training(pictures, tmp_path):
    run = pretrain(pictures, method="masked", out=tmp_path / "out", budget="12s")
    assert 1 <= run.record["plan"]["epochs"] <= 300
    assert run.record["seconds"]["total"] < 20
    assert run.record["plan"]["steps"] == 1  # 12 pictures fit into one batch


def test_pairs_show_the_same_thing(pictures):
    prepared = prepare(load_data(pictures))
    method = METHODS["pairs"](encoder_of(prepared.preprocess)[1], regraft.methods.Task(3, frozenset()))
    work = Work("pairs", method, encoder_of(prepared.preprocess)[1], prepared, 0, "cpu", begun_from=False)
    rows = np.concatenate(list(rows_of_epoch(work, 0)))
    assert sorted(rows[0::2].tolist()) == list(range(12))
    assert (prepared.labels[rows[0::2]] == prepared.labels[rows[1::2]]).all()
    assert (rows[0::2] != rows[1::2]).all()


def test_groups_say_what_is_the_same_thing(pictures):
    dataset = load_data(pictures, group=r"(\d)\.png")
    by_group, by_class = prepare(dataset, by_group=True), prepare(dataset)
    assert by_class.labels.max() == 2
    assert len(set(by_group.labels.tolist())) > 3


def encoder_of(spec, arch="small"):
    from regraft.cut import split

    backbone = begin(arch, spec)
    cut = backbone.shown[-1]
    return backbone, Encoder(split(backbone.trace, cut.name)[0], cut, spec)


def test_batch_norms_end_with_the_statistics_of_pictures_as_they_are(pictures):
    prepared = prepare(load_data(pictures))
    backbone, encoder = encoder_of(prepared.preprocess)
    method = METHODS["masked"](encoder, regraft.methods.Task(0, frozenset()))
    first = backbone.module.get_submodule("norm11")
    first.running_mean.fill_(7.0)
    set_norms(Work("masked", method, encoder, prepared, 0, "cpu", begun_from=False))
    x = prepared.values.float() / 255
    with torch.no_grad():
        seen = backbone.module.get_submodule("conv11")(x)
    assert torch.allclose(first.running_mean, seen.mean((0, 2, 3)), atol=1e-5)
    assert not any(m.training for m in encoder.module.modules() if isinstance(m, nn.BatchNorm2d))


def test_the_encoder_normalises_as_the_network_expects():
    spec = plain_spec(16, 16, 3)
    shifted = type(spec)(**{**spec.__dict__, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1)})
    _, encoder = encoder_of(shifted)
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (shifted.mean, shifted.std))
    encoder.module.eval()
    assert torch.allclose(encode(encoder, x), encoder.module((x - mean) / std), atol=1e-5)
    assert features(encoder, x).shape == (2, 128)


@pytest.mark.parametrize("name", VIEWS)
def test_views_keep_the_shape_and_the_range_and_change_the_picture(name):
    torch.manual_seed(0)
    x = torch.rand(6, 3, 20, 24)
    seen = varied(x, frozenset([name]))
    assert seen.shape == x.shape
    assert 0 <= float(seen.min()) <= float(seen.max()) <= 1
    assert not torch.equal(seen, x)
    assert torch.equal(varied(x, frozenset()), x)


def test_flipped_pictures_are_mirrored_or_as_they_were():
    torch.manual_seed(0)
    x = torch.rand(32, 1, 8, 8)
    seen = varied(x, frozenset(["flip"]))
    mirrored = [torch.allclose(a, b.flip(2), atol=1e-5) for a, b in zip(seen, x, strict=True)]
    kept = [torch.allclose(a, b, atol=1e-5) for a, b in zip(seen, x, strict=True)]
    assert all(m != k for m, k in zip(mirrored, kept, strict=True))
    assert 4 < sum(mirrored) < 28


def test_the_gradient_of_the_contrast_is_the_update_of_contrastive_divergence():
    torch.manual_seed(0)
    machine = Machine(nn.Linear(6, 4), 5)
    v = torch.rand(5, 6)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        machine.contrast(v).backward()
    chain = torch.zeros(5, 4)
    torch.manual_seed(1)
    with torch.no_grad():
        dreamt = torch.bernoulli(machine.down(chain))
        expected = machine.up(v).T @ v / 5 - machine.up(dreamt).T @ dreamt / 5
    assert torch.allclose(-machine.layer.weight.grad, expected, atol=1e-6)
    assert torch.allclose(-machine.visible.grad, v.mean(0) - dreamt.mean(0), atol=1e-6)


def test_pseudo_likelihood_is_that_of_scikit_learn():
    from sklearn.neural_network import BernoulliRBM

    rng = np.random.default_rng(0)
    data = (rng.random((60, 12)) < 0.3).astype(np.float32)
    theirs = BernoulliRBM(5, n_iter=3, random_state=0).fit(data)
    machine = Machine(nn.Linear(12, 5), 5)
    with torch.no_grad():
        machine.layer.weight.copy_(torch.from_numpy(theirs.components_))
        machine.layer.bias.copy_(torch.from_numpy(theirs.intercept_hidden_))
        machine.visible.copy_(torch.from_numpy(theirs.intercept_visible_))
        v = torch.from_numpy(data)
        torch.manual_seed(0)
        ours = torch.stack([pseudo_likelihood(machine, v) for _ in range(400)]).mean()
    expected = np.mean([theirs.score_samples(data).mean() for _ in range(400)])
    assert float(ours) == pytest.approx(expected, rel=0.02)


def test_the_command_line_pretrains_and_the_curve_names_the_winner(pictures, tmp_path):
    done = run_regraft(
        *("pretrain", pictures, "--method", "rotation", "--epochs", 1, "--out", tmp_path / "out"),
        *("--labelled", pictures, "--json"),
        cache=tmp_path / "store",
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["status"] == "finished"
    assert {p["name"] for p in record["curves"]["after"]["cuts"]} > {"input"}
    assert record["curves"]["before"]["backbone"]["weights"] != record["curves"]["after"]["backbone"]["weights"]
    assert "Depth curve before pretraining" in (tmp_path / "out" / "report.html").read_text()
    wrong = run_regraft("pretrain", pictures, "--method", "rbm", "--out", tmp_path / "b", cache=tmp_path / "store")
    assert wrong.returncode == 1
    assert len(wrong.stderr.strip().splitlines()) == 1


def test_beside_a_folder_scratch_is_its_network_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("regraft.candidates.FEWEST_STEPS", 4)
    monkeypatch.setattr("regraft.candidates.ENOUGH", 0)
    pictures = tiny.write_pictures(
        tmp_path / "p", each=14, draw=lambda kind, rng: tiny.stripes(kind, rng, size=(16, 16))
    )
    run = pretrain(pictures, method="rotation", out=tmp_path / "out", epochs=1)
    curves, gate = regraft.compare(pictures, [tmp_path / "out", "scratch"])
    assert len(curves) == 1
    names = {place.rival.name for place in gate.places}
    assert names == {str(tmp_path / "out"), f"{tmp_path / 'out'}, all layers trained", "scratch", "input"}
    assert gate.places[0].behind.score == 0
    assert gate.paid in (True, False)
    again, gate_again = regraft.compare(pictures, [tmp_path / "out", "scratch"])
    assert again[0].table.forward_passes == 0
    assert gate_again.to_json() == gate.to_json()
    assert torch.equal(
        load_backbone(tmp_path / "out").module.state_dict()["conv11.weight"],
        run.backbone.module.state_dict()["conv11.weight"],
    )


def test_layers_of_a_deep_belief_net_are_trained_one_after_another(pictures, tmp_path):
    run = pretrain(pictures, method="rbm", arch="dense-8-6-4", out=tmp_path / "out", epochs=5)
    begun = begin("dense-8-6-4", run.backbone.preprocess, sigmoid=True).module
    for i in (1, 2, 3):
        before, after = (m.get_submodule(f"hidden{i}").weight for m in (begun, run.backbone.module))
        assert not torch.equal(before, after)
    with torch.no_grad():
        out = run.backbone.module(prepare(load_data(pictures)).values.float() / 255)
    assert out.shape == (12, 4)
    assert 0 < float(out.min()) <= float(out.max()) < 1


def test_other_pictures_under_the_same_name_are_another_run(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (6, 12, 12), np.uint8)
    pretrain(images, method="masked", out=tmp_path / "out", epochs=1)
    with pytest.raises(RunError, match="other pictures"):
        pretrain(images[::-1] // 2, method="masked", out=tmp_path / "out", epochs=1)


def test_classes_that_were_learned_before_are_told(pictures, tmp_path):
    pretrain(pictures, method="labels", out=tmp_path / "out", epochs=1)
    with pytest.warns(UserWarning, match="learned the classes of 12 of these 12 pictures"):
        regraft.curve(pictures, tmp_path / "out")
    images = np.random.default_rng(0).integers(0, 255, (12, 16, 16, 3), np.uint8)
    regraft.curve((images, [i % 2 for i in range(12)]), tmp_path / "out")


def test_a_divergence_is_remembered(pictures, tmp_path, monkeypatch):
    real, rates = pretrain_steps.train, []

    def diverging_once(stages, plan, *args, **options):
        rates.append(plan.lr)
        if len(rates) == 1:
            raise pretrain_steps.Diverged(0, 1)
        if len(rates) == 2:
            raise KeyboardInterrupt
        return real(stages, plan, *args, **options)

    monkeypatch.setattr(pretrain_steps, "train", diverging_once)
    for stopped in (True, False):
        try:
            pretrain(pictures, method="masked", out=tmp_path / "out", epochs=1)
            assert not stopped
        except KeyboardInterrupt:
            assert stopped
    assert rates[1] == rates[2] == pytest.approx(rates[0] / 10)


def test_a_network_of_a_file_is_gone_on_from(pictures, tmp_path):
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.ReLU(), nn.Linear(24, 4), nn.Flatten()).eval()
    exported = torch.export.export(module, (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(exported, tmp_path / "mine.pt2")
    run = pretrain(pictures, method="autoencoder", out=tmp_path / "out", start=str(tmp_path / "mine.pt2"), epochs=1)
    assert run.backbone.preprocess.size == (8, 8)


def test_the_epochs_that_a_budget_fixed_outlive_an_interruption(pictures, tmp_path, monkeypatch):
    given = {"method": "masked", "out": tmp_path / "out", "budget": "6s"}
    monkeypatch.setattr(pretrain_steps, "MOST_EPOCHS", 6)
    stopped_after(4, monkeypatch, data=pictures, **given)
    plan = json.loads((tmp_path / "out" / "record.json").read_text())["plan"]
    monkeypatch.setattr(pretrain_steps, "MOST_EPOCHS", 3)  # a plan made anew would have no more than these
    run = pretrain(pictures, **given)
    assert plan["epochs"] > 3
    assert run.record["plan"] == plan
    assert len(run.record["losses"]) == plan["epochs"]


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(pictures, tmp_path):
    command = ["pretrain", pictures, "--method", "gan", "--epochs", 12, "--seed", 3, "--json", "--out"]
    whole = json.loads(run_regraft(*command, tmp_path / "whole", cache=tmp_path / "store").stdout)
    environment = {**os.environ, "PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1"}
    for wanted in (1, 4, 7, 10):
        process = subprocess.Popen(
            [sys.executable, "-m", "regraft", *map(str, command), str(tmp_path / "parts")],
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        while not list((tmp_path / "parts").rglob(f"epoch-{wanted:05}-*")) and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = run_regraft(*command, tmp_path / "parts", cache=tmp_path / "store")
    record = json.loads(done.stdout)
    assert record["losses"] == whole["losses"]
    assert record["weights"] == whole["weights"]
    assert not list((tmp_path / "parts").glob(".writing-*"))
