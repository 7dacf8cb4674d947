"""The whole job end to end on a tiny network: what a run holds, what it computes again, what it refuses and reports."""

from __future__ import annotations

import io
import json
import os
import shutil

import numpy as np
import pytest
import safetensors.torch
from PIL import Image

import regraft
import tiny
from regraft.artifact import load_model
from regraft.data import load_data
from regraft.errors import ArtifactError, BackboneError, DataError, RunError
from regraft.predict import evaluate_model
from regraft.store import open_store


def fit(data, out, module=None, **options):
    return regraft.fit(data, module or tiny.TinyNet(), example=tiny.EXAMPLE, out=out, **options)


def recorded(folder):
    return json.loads((folder / "record.json").read_bytes())


def truncated(path):
    path.write_bytes(path.read_bytes()[:-30])


# ---- the run -----------------------------------------------------------------------------------------------------


def test_a_run_says_what_it_was_asked_what_it_did_and_what_came_of_it(tmp_path):
    tiny.write_pictures(tmp_path / "data" / "train")
    tiny.write_pictures(tmp_path / "data" / "test", each=3, seed=1)
    run = fit(tmp_path / "data", tmp_path / "run", seed=3)
    assert run.record == recorded(tmp_path / "run")
    assert run.record["status"] == "finished"
    assert run.record["options"]["seed"] == 3
    assert run.record["data"]["labels"] == list(tiny.CLASSES)
    assert run.record["data"]["per_class"] == [8, 8, 8]
    assert run.record["forward_passes"] == 24
    assert run.record["seconds"]["total"] > 0
    assert run.record["curve"]["transfer_helps"]
    points = run.record["curve"]["cuts"]
    assert points[0]["name"] == "input"
    assert {"name", "depth", "dim", "score", "low", "high"} <= set(points[0])
    assert [p["depth"] for p in points] == sorted(p["depth"] for p in points)
    assert all(0 <= p["low"] <= p["score"] <= p["high"] <= 1 for p in points)
    assert run.record["curve"]["recommended"] == run.record["chosen"]["name"]


def test_the_reported_test_score_is_that_of_the_saved_model_run_as_predict_runs_it(tmp_path):
    tiny.write_pictures(tmp_path / "data" / "train")
    tiny.write_pictures(tmp_path / "data" / "test", each=5, seed=1)
    run = fit(tmp_path / "data", tmp_path / "run")
    model = load_model(tmp_path / "run", backbone=tiny.TinyNet())
    paths = sorted((tmp_path / "data" / "test").rglob("*.png"))
    hits = [p.label == path.parent.name for p, path in zip(model.predict(paths), paths, strict=True)]
    assert run.record["test"]["accuracy"] == pytest.approx(np.mean(hits))
    assert run.record["test"]["pictures"] == 15


def test_the_same_fit_twice_is_the_same_model(tmp_path, tiny_images):
    one, two = (
        fit(tiny_images, tmp_path / "one"),
        fit(tiny_images, tmp_path / "two", store=open_store(tmp_path / "other")),
    )
    for name in ("model.json", "model.safetensors"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()
    changing = ("seconds", "options", "curve", "digest")
    assert {k: v for k, v in one.record.items() if k not in changing} == {
        k: v for k, v in two.record.items() if k not in changing
    }
    assert one.record["curve"]["cuts"] == two.record["curve"]["cuts"]


def test_classes_of_any_name_come_through_to_the_saved_model_and_the_report(tmp_path):
    names = [os.fsdecode(b"caf\xe9"), "two\nlines", "<b>&\N{GRINNING FACE}"]
    run = fit(tiny.write_pictures(tmp_path / "data", classes=names), tmp_path / "run")
    assert run.record["data"]["labels"] == sorted(names)
    assert load_model(run.folder, backbone=tiny.TinyNet()).labels == tuple(sorted(names))
    page = (run.folder / "report.html").read_text("utf-8")
    assert "caf\\xe9" in page
    assert "<b>&" not in page


def test_validation_pictures_are_learned_from_and_test_pictures_are_not(tmp_path):
    for i, (split, each) in enumerate({"train": 6, "val": 2, "test": 3}.items()):
        tiny.write_pictures(tmp_path / "data" / split, each=each, seed=i)
    run = fit(tmp_path / "data", tmp_path / "run")
    assert run.record["data"]["used"] == run.record["forward_passes"] == 24
    assert run.record["test"]["pictures"] == 9


def test_arrays_and_npz_are_fitted_like_folders(tmp_path):
    rng = np.random.default_rng(0)
    images = np.stack([tiny.stripes(i % 3, rng) for i in range(24)])
    labels = np.array(tiny.CLASSES)[np.arange(24) % 3]
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    one = fit((images, labels), tmp_path / "one")
    two = fit(tmp_path / "data.npz", tmp_path / "two")
    assert two.record["forward_passes"] == 0
    assert one.record["curve"]["cuts"] == two.record["curve"]["cuts"]
    assert [p.label for p in one.model.predict(images[:3])] == list(tiny.CLASSES)


# ---- nothing twice -----------------------------------------------------------------------------------------------


def test_a_finished_run_is_given_back_without_computing_and_its_record_stays(tmp_path, tiny_images):
    first = fit(tiny_images, tmp_path / "run")
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").iterdir()}
    again = fit(tiny_images, tmp_path / "run")
    assert again.record["forward_passes"] == 0
    assert again.record["seconds"]["total"] < first.record["seconds"]["total"]
    assert again.record["curve"] == first.record["curve"]
    assert recorded(tmp_path / "run") == first.record
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").iterdir()} == stamps
    assert again.model.predict([tiny_images / "ant" / "0.png"])[0].label == "ant"


def test_a_backbone_that_was_loaded_before_can_be_fitted_and_fitted_again(tmp_path, tiny_images):
    backbone = regraft.load_backbone(tiny.TinyNet(), example=tiny.EXAMPLE)
    regraft.fit(tiny_images, backbone, out=tmp_path / "run")
    assert regraft.fit(tiny_images, backbone, out=tmp_path / "run").record["forward_passes"] == 0


def test_only_new_bytes_are_computed(tmp_path, tiny_images):
    assert fit(tiny_images, tmp_path / "1").record["forward_passes"] == 24
    rng = np.random.default_rng(5)
    for i in range(2):
        Image.fromarray(tiny.stripes(0, rng)).save(tiny_images / "ant" / f"new{i}.png")
    assert fit(tiny_images, tmp_path / "2").record["forward_passes"] == 2
    for path in tiny_images.rglob("*.png"):
        os.utime(path, (1, 1))
    moved = tiny_images.rename(tmp_path / "moved")
    assert fit(moved, tmp_path / "3").record["forward_passes"] == 0
    (moved / "ant" / "0.png").unlink()
    (moved / "bee" / "0.png").rename(moved / "bee" / "renamed.png")
    run = fit(moved, tmp_path / "4")
    assert run.record["forward_passes"] == 0
    assert run.record["data"]["per_class"] == [9, 8, 8]
    assert fit(moved, tmp_path / "5", tiny.TinyNet(seed=1)).record["forward_passes"] == 25


def test_one_picture_under_two_names_is_computed_once(tmp_path, tiny_images):
    shutil.copy(tiny_images / "ant" / "0.png", tiny_images / "ant" / "copy.png")
    run = fit(tiny_images, tmp_path / "run")
    assert run.record["forward_passes"] == 24
    assert run.record["data"]["used"] == 25


# ---- another run -------------------------------------------------------------------------------------------------


def test_other_options_into_a_run_are_refused_by_name(tmp_path, tiny_images):
    fit(tiny_images, tmp_path / "run")
    with pytest.raises(RunError, match=r"other options \(seed was 0 and is 1\)"):
        fit(tiny_images, tmp_path / "run", seed=1)
    with pytest.raises(RunError, match=r"backbone was 'TinyNet \w+' and is 'TinyNet \w+'"):
        fit(tiny_images, tmp_path / "run", tiny.TinyNet(seed=1))
    with pytest.raises(RunError, match="group was None and is"):
        fit(tiny_images, tmp_path / "run", group="([0-9])")


def test_other_weights_in_the_same_file_are_refused(tmp_path, tiny_images):
    file, given = tmp_path / "weights.safetensors", {"arch": "tiny:TinyNet", "budget": "0trials"}
    safetensors.torch.save_file(tiny.TinyNet().state_dict(), file)
    asked = {**given, "out": tmp_path / "run"}
    regraft.fit(tiny_images, str(file), **asked)
    assert regraft.fit(tiny_images, str(file), **asked).record["forward_passes"] == 0
    safetensors.torch.save_file(tiny.TinyNet(seed=1).state_dict(), file)
    with pytest.raises(RunError, match=r"holds a run on other weights \(their digest was \w+ and is \w+\)"):
        regraft.fit(tiny_images, str(file), **asked)
    file.unlink()
    assert regraft.fit(tiny_images, str(file), **asked).record["forward_passes"] == 0


@pytest.mark.parametrize("option", [{"adapt": True}, {"min_coverage": 0.0}])
def test_how_weights_are_loaded_is_part_of_what_a_run_was_asked(tmp_path, tiny_images, option):
    file, given = tmp_path / "weights.safetensors", {"arch": "tiny:TinyNet", "budget": "0trials"}
    safetensors.torch.save_file(tiny.TinyNet().state_dict(), file)
    run = regraft.fit(tiny_images, str(file), out=tmp_path / "run", **given, **option)
    assert option.items() <= run.record["options"].items()
    other = regraft.fit(tiny_images, str(file), out=tmp_path / "other", **given)
    with pytest.raises(RunError, match=f"other options .{next(iter(option))} was None and is"):
        regraft.fit(tiny_images, str(file), out=other.folder, **given, **option)


def test_other_pictures_into_a_run_are_refused_wherever_they_lie(tmp_path, tiny_images):
    other = tiny.write_pictures(tmp_path / "other", each=3, seed=2)
    fit(tiny_images, tmp_path / "run")
    moved = tiny_images.rename(tmp_path / "moved")
    assert fit(moved, tmp_path / "run").record["forward_passes"] == 0
    with pytest.raises(RunError, match="other test pictures"):
        fit(moved, tmp_path / "run", test=other)
    truncated(moved / "ant" / "0.png")
    with pytest.raises(RunError, match=r"other training pictures \(24 in all then, 24 now\)"):
        fit(moved, tmp_path / "run")


def test_a_finished_run_knows_test_pictures_that_are_named_like_its_training_pictures(tmp_path, tiny_images):
    other = tiny.write_pictures(tmp_path / "other", each=3, seed=2)
    fit(tiny_images, tmp_path / "run", test=other)
    assert fit(tiny_images, tmp_path / "run", test=other).record["forward_passes"] == 0
    tiny.write_pictures(other, each=1, seed=3)
    with pytest.raises(RunError, match="other test pictures"):
        fit(tiny_images, tmp_path / "run", test=other)


def test_what_is_no_backbone_gets_one_sentence(tmp_path, tiny_images):
    with pytest.raises(BackboneError, match="A backbone must be a name, a path, a module .*; found None"):
        regraft.fit(tiny_images, None, out=tmp_path / "run")


def test_an_interrupted_run_belongs_to_its_options(tmp_path, tiny_images):
    with pytest.raises(DataError, match="at least 2 different pictures"):  # after its record was begun
        fit(
            (np.zeros((3, 8, 8), np.uint8) + np.arange(3, dtype=np.uint8)[:, None, None], ["a", "a", "b"]),
            tmp_path / "run",
        )
    assert recorded(tmp_path / "run")["status"] == "running"
    with pytest.raises(RunError, match="data was 'arrays' and is"):
        fit(tiny_images, tmp_path / "run")


def test_a_folder_of_other_files_is_not_written_to(tmp_path, tiny_images):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("text")
    with pytest.raises(RunError, match="must be new, empty or a run; it holds other files"):
        fit(tiny_images, other)
    with pytest.raises(RunError, match="must not lie inside the data"):
        fit(tiny_images, tiny_images / "run")
    tested = tiny.write_pictures(tmp_path / "tested", each=1, seed=1)
    with pytest.raises(RunError, match="must not lie inside the data"):
        fit(tiny_images, tested / "run", test=tested)
    (tmp_path / "file").write_text("text")
    with pytest.raises(RunError, match="must be a folder"):
        fit(tiny_images, tmp_path / "file")
    with pytest.raises(RunError, match="must be a folder"):
        fit(tiny_images, tmp_path / "file" / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "record.json").write_text('{"status": "fin')
    with pytest.raises(RunError, match="must be the record of a run"):
        fit(tiny_images, tmp_path / "run")


def test_what_a_killed_writer_left_does_not_stop_a_run_and_is_removed(tmp_path, tiny_images):
    left = tmp_path / "run" / ".writing-00000000-1-2-abc"
    left.parent.mkdir()
    left.write_bytes(b"half")
    os.utime(left, (1, 1))
    fit(tiny_images, tmp_path / "run")
    assert not left.exists()


@pytest.mark.parametrize("file", ["model.json", "model.safetensors"])
@pytest.mark.parametrize("damage", [os.unlink, truncated])
def test_the_model_of_a_finished_run_is_made_again_where_it_is_lost(tmp_path, tiny_images, file, damage):
    whole = {p.name: p.read_bytes() for p in fit(tiny_images, tmp_path / "run").folder.glob("model.*")}
    damage(tmp_path / "run" / file)
    with pytest.raises(ArtifactError, match="model"):
        load_model(tmp_path / "run", backbone=tiny.TinyNet())
    with pytest.warns(UserWarning, match="The saved model in .* cannot be read and is made again"):
        again = fit(tiny_images, tmp_path / "run")
    assert again.record["forward_passes"] == 0
    assert again.record["status"] == recorded(tmp_path / "run")["status"] == "finished"
    assert {p.name: p.read_bytes() for p in again.folder.glob("model.*")} == whole


# ---- pictures that cannot be used --------------------------------------------------------------------------------


def test_unreadable_pictures_are_named_counted_and_left_out(tmp_path, tiny_images):
    clean = fit(tiny_images, tmp_path / "clean")
    (tiny_images / "ant" / "empty.png").write_bytes(b"")
    (tiny_images / "bee" / "page.jpg").write_text("<!DOCTYPE html><html>not found</html>")
    (tiny_images / "cat" / "pointer.png").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    )
    shutil.copy(tiny_images / "cat" / "0.png", tiny_images / "cat" / "half.png")
    truncated(tiny_images / "cat" / "half.png")
    (tiny_images / "cat" / "gone.png").symlink_to("nowhere.png")
    run = fit(tiny_images, tmp_path / "run")
    left_out = {item["where"]: item["reason"] for item in run.record["data"]["left_out"]}
    assert set(left_out) == {"ant/empty.png", "bee/page.jpg", "cat/half.png", "cat/pointer.png", "cat/gone.png"}
    assert all(where in reason for where, reason in left_out.items())
    assert run.record["data"]["used"] == 24
    assert (run.folder / "model.safetensors").read_bytes() == (clean.folder / "model.safetensors").read_bytes()
    with pytest.raises(DataError, match=r"--strict allows nothing to be left out; ant/empty\.png: "):
        fit(tiny_images, tmp_path / "strict", strict=True)


def test_a_class_with_only_unreadable_pictures_is_named_or_keeps_its_place(tmp_path):
    data = tiny.write_pictures(tmp_path / "data", classes=("ant", "bee", "cat", "bat"))
    shutil.rmtree(data / "bat")
    (data / "bat").mkdir()
    with pytest.raises(DataError, match="'bat'"):
        fit(data, tmp_path / "run")
    (data / "bat" / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"'?bat'? has none: bat/1\.png"):
        fit(data, tmp_path / "run")
    run = fit(data, tmp_path / "kept", allow_empty_class=True)
    assert run.record["data"]["labels"] == ["ant", "bat", "bee", "cat"]
    assert run.record["data"]["per_class"] == [8, 0, 8, 8]
    found = run.model.predict([data / "bee" / "1.png"])[0]
    assert found.label == "bee"
    assert len(found.ranked) == 4
    json.dumps(run.record, allow_nan=False)


def test_one_picture_under_two_labels_is_left_out_with_both_places(tmp_path, tiny_images):
    shutil.copy(tiny_images / "ant" / "0.png", tiny_images / "bee" / "same.png")
    with Image.open(tiny_images / "cat" / "0.png") as image:
        image.save(tiny_images / "ant" / "pixels.bmp")
    run = fit(tiny_images, tmp_path / "run")
    reasons = {item["where"]: item["reason"] for item in run.record["data"]["left_out"]}
    two = "the same picture stands under two labels: "
    assert reasons == {
        "ant/0.png": f"{two}ant here and bee as bee/same.png",
        "bee/same.png": f"{two}bee here and ant as ant/0.png",
        "cat/0.png": f"{two}cat here and ant as ant/pixels.bmp",
        "ant/pixels.bmp": f"{two}ant here and cat as cat/0.png",
    }
    assert run.record["data"]["used"] == 22
    with pytest.raises(DataError, match="--strict"):
        fit(tiny_images, tmp_path / "strict", strict=True)


def test_a_class_without_a_picture_of_its_own_is_named(tmp_path, tiny_images):
    shutil.rmtree(tiny_images / "cat")
    shutil.copytree(tiny_images / "bee", tiny_images / "cat")
    with pytest.raises(DataError, match="Every class must keep a picture of its own; bee/0.png"):
        fit(tiny_images, tmp_path / "run")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_tiny_classes_are_judged_with_fewer_folds_or_refused_by_name(tmp_path, count):
    data = tiny.write_pictures(tmp_path / "data", each=count)
    if count == 1:
        with pytest.raises(DataError, match="class 'ant' has 1"):
            fit(data, tmp_path / "run")
        return
    run = fit(data, tmp_path / "run")
    assert run.record["data"]["folds"]["folds"] == count
    json.dumps(run.record, allow_nan=False)


def test_one_class_is_refused_before_anything_is_written(tmp_path):
    tiny.write_pictures(tmp_path / "data", classes=("cat",))
    with pytest.raises(DataError, match=r"cat \(8\)"):
        fit(tmp_path / "data", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_groups_are_judged_together(tmp_path, tiny_images):
    run = fit(tiny_images, tmp_path / "run", group="([0-3])")
    assert run.record["data"]["folds"]["folds"] == 5
    with pytest.raises(DataError, match="class 'ant' has 8 in one group"):
        fit(tiny_images, tmp_path / "one", group=r"(png)")


# ---- learned and tested ------------------------------------------------------------------------------------------


PLANTED = 50


def planted(root):
    """150 training and 120 test pictures: 25 copies of training files, and 25 with their pixels in other files."""
    data = tiny.write_pictures(root / "train", each=50)
    tiny.write_pictures(root / "test", each=40, seed=1)
    rng = np.random.default_rng(2)
    sources = rng.permutation(sorted(data.rglob("*.png")))[:PLANTED]
    targets = rng.permutation(sorted((root / "test").rglob("*.png")))[:PLANTED]
    expected = {}
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if i % 2:
            target.write_bytes(source.read_bytes())
        else:
            buffer = io.BytesIO()
            with Image.open(source) as image:
                image.save(buffer, ("BMP", "TIFF", "PNG")[i % 3], **({"compress_level": 1} if i % 3 == 2 else {}))
            target.write_bytes(buffer.getvalue())
        where = str(target.relative_to(root))
        expected[where] = (str(source.relative_to(root)), "bytes" if i % 2 else "pixels")
    return root, expected


def test_all_planted_leaks_are_reported_and_no_others(tmp_path):
    data, expected = planted(tmp_path / "data")
    run = fit(data, tmp_path / "run")
    leaks = {leak["tested"]: (leak["learned"], leak["equal"]) for leak in run.record["data"]["leaks"]}
    assert len(leaks) == PLANTED
    assert leaks == expected
    with pytest.raises(DataError, match="--strict allows no picture to be learned from and tested on; found 50"):
        fit(data, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict" / "model.json").exists()


def test_equal_pictures_and_groups_never_stand_on_both_sides_of_a_fold(tmp_path, tiny_images):
    with Image.open(tiny_images / "ant" / "0.png") as image:
        image.save(tiny_images / "ant" / "pixels.bmp")
    shutil.copy(tiny_images / "ant" / "1.png", tiny_images / "ant" / "bytes.png")
    found = regraft.curve(tiny_images, tiny.TinyNet(), example=tiny.EXAMPLE, group="([67])")
    at = {e.where: i for i, e in enumerate(found.table.examples)}
    pairs = [("ant/0.png", "ant/pixels.bmp"), ("ant/1.png", "ant/bytes.png"), ("ant/6.png", "cat/6.png")]
    for one, two in pairs:
        assert np.array_equal(found.task.folds[:, at[one]], found.task.folds[:, at[two]])
    alone = found.task.folds[:, [at[f"bee/{i}.png"] for i in range(6)]]
    assert len(np.unique(alone)) > 1


def test_groups_parted_by_hand_are_reported(tmp_path):
    tiny.write_pictures(tmp_path / "data" / "train")
    tiny.write_pictures(tmp_path / "data" / "test", each=1, seed=1)
    run = fit(tmp_path / "data", tmp_path / "run", group="([0-9])")
    assert [leak["equal"] for leak in run.record["data"]["leaks"]] == ["group"] * 3


def test_test_pictures_given_apart_are_judged_instead_of_the_own_split(tmp_path, tiny_images):
    other = tiny.write_pictures(tmp_path / "other", classes=("ant", "bee"), each=2, seed=4)
    run = fit(tiny_images, tmp_path / "run", test=other)
    assert run.record["test"]["pictures"] == 4
    assert run.record["data"]["leaks"] == []
    assert evaluate_model(run.model, load_data(other)).accuracy.score == run.record["test"]["accuracy"]
    (other / "ant").rename(other / "wasp")
    with pytest.raises(DataError, match="'wasp'"):
        fit(tiny_images, tmp_path / "refused", test=other)


def test_only_test_pictures_are_nothing_to_learn_from(tmp_path):
    tiny.write_pictures(tmp_path / "data" / "test")
    with pytest.raises(DataError, match="pictures to learn from"):
        fit(tmp_path / "data", tmp_path / "run")
