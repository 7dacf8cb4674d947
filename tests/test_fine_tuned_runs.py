"""Whole jobs that end with a fine-tuned winner: what is saved, given back, resumed, and kept through kills."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import regraft
import tiny
from regraft.artifact import load_model
from regraft.errors import ArtifactError
from regraft.store import open_store


def fit(data, out, **options):
    options = {"budget": "2trials", **options}
    return regraft.fit(data, tiny.Poor(), example=tiny.EXAMPLE, out=out, **options)


def hard(root, each=20):
    return tiny.write_pictures(root, draw=tiny.tiles, each=each)


def probabilities(model, pictures):
    return [dict(p.ranked) for p in model.predict(pictures)]


@pytest.fixture(scope="module")
def won(tmp_path_factory):
    """A run whose fine-tuned candidate won, its pictures and its store."""
    place = tmp_path_factory.mktemp("won")
    hard(place / "data" / "train")
    tiny.write_pictures(place / "data" / "test", draw=tiny.tiles, each=6, seed=1)
    store = open_store(place / "store")
    return fit(place / "data", place / "run", store=store), place / "data", store


def test_pictures_that_need_fine_tuning_get_it_and_the_record_says_what_was_tried(won):
    run, _, _ = won
    found = run.record["ladder"]
    status = {a["name"]: a["status"] for a in found["attempts"]}
    assert status["scratch"] == "finished"
    assert found["winner"] == run.record["chosen"]["name"] == "scratch"
    assert found["reason"].startswith("scratch: a small network from random weights")
    assert run.record["chosen"]["score"]["score"] > found["probe"]["score"]


def test_a_record_in_memory_is_the_one_on_the_disk(won):
    run, _, _ = won
    assert json.loads((run.folder / "record.json").read_bytes()) == run.record


def test_a_picture_has_the_same_probabilities_whatever_stands_beside_it(won):
    run, data, _ = won
    paths = sorted((data / "test").rglob("*.png"))
    together = probabilities(run.model, paths)
    assert [probabilities(run.model, [path])[0] for path in paths] == together
    assert probabilities(run.model, paths[::-1])[::-1] == together
    assert len({max(p, key=p.get) for p in together}) > 1


LOADED = """
import json, sys
import torch
torch.set_num_threads(1)
import tiny
from regraft.artifact import load_model
model = load_model(sys.argv[1], backbone=tiny.Poor())
print(json.dumps([dict(model.predict(sys.argv[2:])[-1].ranked), dict(model.predict(sys.argv[-1:])[0].ranked)]))
"""


def test_a_winner_loads_in_a_fresh_process_and_answers_as_it_did_in_memory(won):
    run, data, _ = won
    paths = sorted((data / "test").rglob("*.png"))[:5]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOADED, str(run.folder), *map(str, paths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    expected = probabilities(run.model, paths)[-1]
    assert json.loads(done.stdout) == [expected, expected]


def test_a_finished_run_with_a_winner_is_given_back_and_a_new_one_computes_no_pass(won, tmp_path):
    run, data, store = won
    again = fit(data, run.folder, store=store)
    assert again.record["forward_passes"] == 0
    assert again.record["ladder"] == json.loads((run.folder / "record.json").read_bytes())["ladder"]
    anew = fit(data, tmp_path / "anew", store=store)
    assert anew.record["forward_passes"] == 0
    for name in ("model.safetensors", "model.json"):
        assert (anew.folder / name).read_bytes() == (run.folder / name).read_bytes()
    paths = sorted((data / "test").rglob("*.png"))
    assert probabilities(again.model, paths) == probabilities(run.model, paths) == probabilities(anew.model, paths)


def test_a_run_whose_time_is_over_when_it_is_resumed_ends_with_the_best_that_it_had_tried(won, tmp_path):
    _, data, store = won
    first = fit(data, tmp_path / "run", budget="9h", store=store)
    assert first.record["ladder"]["winner"] == "scratch"
    for left in [path for path in first.folder.iterdir() if path.name != "record.json"]:
        left.unlink()
    record = {"status": "running", "options": first.record["options"], "spent": 9 * 3600 + 1.0}
    (first.folder / "record.json").write_text(json.dumps(record))
    again = fit(data, first.folder, budget="9h", store=store)
    assert again.record["ladder"]["winner"] == "scratch"
    assert again.record["forward_passes"] == 0


def test_checkpoints_that_a_kill_left_in_a_finished_run_are_removed(won):
    run, data, store = won
    left = run.folder / "checkpoints" / "epoch-00001-00.safetensors"
    left.parent.mkdir()
    left.write_bytes(b"left")
    fit(data, run.folder, store=store)
    assert not left.parent.exists()


@pytest.mark.slow
def test_a_new_store_comes_to_the_same_model(won, tmp_path):
    run, data, _ = won
    anew = fit(data, tmp_path / "anew", store=open_store(tmp_path / "new"))
    assert anew.record["forward_passes"] == run.record["forward_passes"] > 60
    assert (anew.folder / "model.safetensors").read_bytes() == (run.folder / "model.safetensors").read_bytes()


def test_a_damaged_trained_part_is_refused(won, tmp_path):
    run, _, _ = won
    for name in ("model.json", "model.safetensors"):
        (tmp_path / name).write_bytes((run.folder / name).read_bytes())
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        load_model(tmp_path, backbone=tiny.Poor())


def test_no_trials_stop_at_the_curve(tmp_path):
    run = fit(hard(tmp_path / "data"), tmp_path / "run", budget="0trials")
    assert {a["status"] for a in run.record["ladder"]["attempts"]} == {"skipped"}
    assert run.record["ladder"]["winner"] is None
    assert run.record["chosen"]["name"] == run.record["curve"]["recommended"]
    assert run.record["forward_passes"] == 60
    assert run.model.tuned is None


@pytest.mark.slow
def test_three_trials_are_tried_in_order_and_the_whole_repeats(tmp_path):
    data = hard(tmp_path / "data")
    run = fit(data, tmp_path / "run", budget="3trials")
    assert "skipped" not in [a["status"] for a in run.record["ladder"]["attempts"]]
    anew = fit(data, tmp_path / "anew", budget="3trials")
    assert anew.record["forward_passes"] == 0
    assert (anew.folder / "model.safetensors").read_bytes() == (run.folder / "model.safetensors").read_bytes()
    torch.set_num_threads(2)  # folds side by side, a thread each; the final fit, which has both, sums in another order
    try:
        aside = fit(data, tmp_path / "aside", budget="3trials", store=open_store(tmp_path / "another"))
    finally:
        torch.set_num_threads(1)
    assert aside.record["forward_passes"] > 0
    for key in ("winner", "reason"):
        assert aside.record["ladder"][key] == run.record["ladder"][key]
    gains = [[(a["name"], a["gain"], a["epochs"]) for a in r.record["ladder"]["attempts"]] for r in (run, aside)]
    assert gains[0] == gains[1]


# ---- kills -------------------------------------------------------------------------------------------------------


def command_kill(place, kills, seed, budget):
    """Kill fits at random moments, the same run again each time, to its end; prints what came of it as JSON."""
    rng, data = random.Random(seed), place / "data"
    for name in ("cold", "whole"):
        begun = time.perf_counter()
        whole = (
            fit(data, place / name, store=open_store(place / "stores" / name), budget=budget).folder
            / "model.safetensors"
        )
        longest = time.perf_counter() - begun
    counts = {"kills": 0, "finished": 0, "other": 0, "left": 0, "checkpoints": 0}
    run = 0
    while counts["kills"] < kills:
        out, store = place / f"run{run}", place / "stores" / f"{run}"
        child = os.fork()
        if child == 0:
            fit(data, out, store=open_store(store), budget=budget)
            os._exit(0)
        end = time.perf_counter() + rng.uniform(0.05, 0.95) * longest
        in_the_final_fit = rng.random() < 0.4
        while time.perf_counter() < end + in_the_final_fit * longest:
            if in_the_final_fit and list(out.glob("checkpoints/*/epoch-*")):
                break
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        counts["kills" if os.WIFSIGNALED(status) else "finished"] += 1
        counts["checkpoints"] += bool(list(out.glob("checkpoints/*/epoch-*")))
        if not os.WIFSIGNALED(status) or rng.random() < 0.4 or counts["kills"] == kills:
            done = fit(data, out, store=open_store(store), budget=budget)
            counts["other"] += (done.folder / "model.safetensors").read_bytes() != whole.read_bytes()
            counts["left"] += (done.folder / "checkpoints").exists()
            run += 1
    print(json.dumps(counts))


def killed(tmp_path, kills, seed, budget):
    hard(tmp_path / "data")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path), str(kills), str(seed), budget]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    print(counts)
    return counts


def test_a_run_killed_3_times_ends_with_the_same_model(tmp_path):
    counts = killed(tmp_path, 3, 2, "1trials")
    assert (counts["other"], counts["left"]) == (0, 0)


@pytest.mark.slow
def test_a_run_killed_20_times_ends_with_the_same_model(tmp_path):
    counts = killed(tmp_path, 20, 1, "2trials")
    assert counts["checkpoints"] > 0  # some were hit in the final fit
    assert (counts["other"], counts["left"]) == (0, 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    command_kill(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
