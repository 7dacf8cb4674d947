"""The command line: exit codes, one sentence on stderr, one JSON document on stdout."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import regraft
import tiny
from conftest import SOURCES
from conftest import regraft as command_line
from regraft.cli import main
from regraft.errors import DataError, RegraftError
from regraft.store import open_store
from regraft.terminal import guarded, lines_of_stdin, progress

pytestmark = pytest.mark.xdist_group("real")


def run(*args, code=0, **options):
    """A command in this process; its exit code must be `code`."""
    done = CliRunner().invoke(main, [str(a) for a in args], **options)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.stderr
    return done


def refusal(*args, **options):
    """The one sentence of a command that fails."""
    done = run(*args, code=1, **options)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.rstrip().endswith(".")
    return done.stderr


def commands(group=main, path=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        yield (*path, name), command


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A finished run whose head reads the raw input, and the folder of its pictures."""
    place = tmp_path_factory.mktemp("plain")
    data = tiny.write_pictures(place / "pictures", draw=tiny.colours)
    store = open_store(place / "store")
    return regraft.fit(data, tiny.TinyNet(), example=tiny.EXAMPLE, out=place / "run", store=store).folder, data


# ---- help and usage ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [(), *(path for path, _ in commands())], ids=" ".join)
def test_every_command_has_help_with_an_example(path):
    said = run(*path, "--help").stdout
    assert "Example:" in said
    assert f"regraft {' '.join(path)}".strip() in said


@pytest.mark.parametrize("path", [path for path, c in commands() if not isinstance(c, click.Group)], ids=" ".join)
def test_every_command_has_json_and_debug(path):
    said = run(*path, "--help").stdout
    assert "--json" in said
    assert "--debug" in said


@pytest.mark.parametrize(
    "args",
    [("fit",), ("fit", "data"), ("nothing",), ("predict", "run"), ("fit", "d", "--out", "r", "--device", "abacus")],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(args):
    assert "Usage: " in run(*args, code=2).stderr


def test_the_version_is_that_of_the_package():
    assert regraft.__version__ in run("--version").stdout


# ---- what the user can mend --------------------------------------------------------------------------------------


def test_data_that_cannot_be_used_gets_one_sentence(tmp_path, tiny_images):
    out = tmp_path / "run"
    assert "nothing is at" in refusal("fit", tmp_path / "none", "--out", out)
    assert "found" in refusal("fit", tiny_images / "ant" / "0.png", "--out", out)
    assert "must have a bracket" in refusal("fit", tiny_images, "--out", out, "--group", "x")
    assert "must have a bracket" in refusal("curve", tiny_images, "--group", "x")
    shutil.rmtree(tiny_images / "bee")
    shutil.rmtree(tiny_images / "cat")
    assert "at least 2 classes with pictures; found in" in refusal("fit", tiny_images, "--out", out, "--json")
    assert not out.exists()


def test_places_that_cannot_be_written_to_get_one_sentence(tmp_path, tiny_images):
    (tmp_path / "file").write_text("")
    assert "must be a folder" in refusal("fit", tiny_images, "--out", tmp_path / "file")
    assert "must not lie inside the data" in refusal("fit", tiny_images, "--out", tiny_images / "run")
    assert "must be a folder" in refusal("fit", tiny_images, "--out", "/dev/null/run")
    assert "/proc/no" in refusal("fit", tiny_images, "--out", "/proc/no/run")


def test_a_run_that_is_none_gets_one_sentence(tmp_path, tiny_images):
    for command in (("predict", tmp_path, tiny_images), ("evaluate", tmp_path, tiny_images)):
        assert "must hold a finished model" in refusal(*command)
    assert "must hold a finished model" in refusal("predict", tmp_path / "nowhere", tiny_images)


def test_an_unknown_network_gets_one_sentence_with_near_names(tmp_path, tiny_images):
    assert "nearest: resnet18" in refusal("inspect", "resnet19")
    assert "nearest: resnet18" in refusal("curve", tiny_images, "--backbone", "resnet19")
    assert "no weights called 'x'; there are: a1_in1k" in refusal("inspect", "resnet18.x")
    assert "has no pretrained weights" in refusal("inspect", "botnet50ts_256")


def test_a_store_that_is_no_folder_gets_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    assert "must be a folder" in refusal("cache", "list", env={"REGRAFT_CACHE": str(tmp_path / "file")})


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(DataError):
        run("curve", tmp_path / "none", "--debug")
    (tmp_path / "file").write_text("")
    done = command_line("cache", "list", "--debug", cache=tmp_path / "file")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last)")


# ---- a command that fails or is stopped ----------------------------------------------------------------------------


def guarded_command(action):
    @click.command()
    @guarded("half is kept")
    def command():
        action()

    return command


def fail_with(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ZeroDivisionError("by\nzero"), "An unforeseen ZeroDivisionError came up (by): --debug shows where"),
        (
            OSError(30, "Read-only file system", "/a/b"),
            "The system refused an operation at /a/b: Read-only file system.",
        ),
        (MemoryError(), "An unforeseen MemoryError came up"),
        (DataError("two\nlines \x1b[31m"), "two lines \\x1b[31m\n"),
    ],
    ids=["fault", "system", "memory", "own"],
)
def test_any_exception_is_one_sentence(error, said):
    done = CliRunner().invoke(guarded_command(fail_with(error)))
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "interrupted: half is kept\n"), (signal.SIGTERM, 143, "terminated: half is kept\n")],
)
def test_a_stopped_command_says_what_is_left(number, code, said):
    def action():
        os.kill(os.getpid(), number)
        time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    done = CliRunner().invoke(guarded_command(action))
    assert (done.exit_code, done.stderr) == (code, said)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_that_a_library_turns_into_another_error_is_a_stop(number, code):
    def action():
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except KeyboardInterrupt:
            raise AttributeError("half of a library was imported") from None

    done = CliRunner().invoke(guarded_command(action))
    assert done.exit_code == code
    assert done.stderr.endswith(": half is kept\n")


def test_a_shell_that_has_interrupts_ignored_is_heeded():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        done = CliRunner().invoke(guarded_command(lambda: os.kill(os.getpid(), signal.SIGINT)))
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.exit_code, done.stderr) == (0, "")


def test_options_are_read_before_anything_heavy_is_imported():
    """A stop while torch is imported must find somebody who answers it."""
    said = "import sys; from regraft.cli import main; main(['fit', 'x', '--out', 'y', '--clip', 'norm:0'], "
    said += "standalone_mode=False)"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", said],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
    )
    assert "is not norm:LIMIT or value:LIMIT with a limit above 0" in done.stderr
    assert not [line for line in done.stderr.splitlines() if line.rsplit("|", 1)[-1].strip() in ("torch", "numpy")]


def test_warnings_are_one_line_each():
    def action():
        warnings.simplefilter("always")
        warnings.warn("the store\ncannot be written", stacklevel=1)

    done = CliRunner().invoke(guarded_command(action))
    assert (done.exit_code, done.stderr) == (0, "warning: the store cannot be written\n")


def test_progress_is_one_line_that_is_written_over_and_cleared(monkeypatch, capsys):
    with progress() as say:
        say("counting", 1, 3)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("REGRAFT_PROGRESS", "1")
    with progress() as say:
        say("counting", 1, 3)
        say("counting", 2, 3)  # too soon after the one before
    assert capsys.readouterr().err == "\rcounting 1/3\r"
    with progress() as say:
        say("counting", 3, 3)
    assert capsys.readouterr().err == "\rcounting 3/3\n"


# ---- predict and evaluate ------------------------------------------------------------------------------------------


def test_predict_prints_a_line_for_each_picture(plain):
    folder, data = plain
    lines = run("predict", folder, data / "ant", data / "bee" / "3.png").stdout.splitlines()
    assert len(lines) == 9
    assert lines[-1].startswith(f"{data / 'bee' / '3.png'}  bee ")
    ranked = run("predict", folder, data / "bee" / "3.png", "--top", "2").stdout.split()
    assert ranked[1] == "bee"
    assert ranked[3] in ("ant", "cat")
    assert float(ranked[2]) > float(ranked[4])


def test_predict_json_has_path_label_and_probability(plain):
    folder, data = plain
    document = json.loads(run("predict", folder, data, "--json", "--top", "9").stdout)
    assert len(document["predictions"]) == 24
    for row in document["predictions"]:
        assert row["label"] == Path(row["path"]).parent.name
        assert 1 / 3 < row["probability"] <= 1
        assert [t["label"] for t in row["top"]][0] == row["label"]
        assert sum(t["probability"] for t in row["top"]) == pytest.approx(1)
    assert document["left_out"] == []


def test_predict_takes_paths_from_standard_input_and_any_file_name(plain, tmp_path):
    folder, data = plain
    names = [b"caf\xe9.png", b"-x.png", "\N{SNOWMAN}.png".encode()]
    paths = [os.fsencode(tmp_path) + b"/" + name for name in names]
    for path in paths:
        shutil.copy(data / "cat" / "0.png", path)
    document = json.loads(run("predict", folder, "-", "--json", input=b"\r\n".join(paths) + b"\n").stdout)
    assert [os.fsencode(row["path"]) for row in document["predictions"]] == paths
    assert {row["label"] for row in document["predictions"]} == {"cat"}
    assert "caf\\xe9.png  cat" in run("predict", folder, tmp_path).stdout
    assert run("predict", folder, "--", "-").stdout == ""


def test_paths_from_a_closed_standard_input_get_one_sentence(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(RegraftError, match="must be open to read paths from it"):
        lines_of_stdin()


def test_pictures_that_cannot_be_read_are_named_and_the_others_predicted(plain, tmp_path):
    folder, data = plain
    (tmp_path / "bad.png").write_bytes(b"")
    args = ("predict", folder, data / "ant" / "0.png", tmp_path / "bad.png")
    done = run(*args, code=1)
    assert done.stdout.startswith(f"{data / 'ant' / '0.png'}  ant ")
    assert done.stderr.count("\n") == 1
    assert str(tmp_path / "bad.png") in done.stderr
    document = json.loads(run(*args, "--json", code=1).stdout)
    assert [row["where"] for row in document["left_out"]] == [str(tmp_path / "bad.png")]
    skipped = run(*args, tmp_path / "gone.png", "--on-bad", "skip")
    assert skipped.stderr.startswith("2 pictures were left out:\n")
    (tmp_path / "empty").mkdir()
    assert "must hold pictures" in refusal("predict", folder, tmp_path / "empty")


def test_evaluate_prints_a_table_and_json_has_the_names_of_the_contract(plain, tmp_path):
    folder, _ = plain
    data = tiny.write_pictures(tmp_path / "data", draw=tiny.colours, each=3, seed=5)
    assert "test accuracy 1.000" in run("evaluate", folder, data).stdout
    (data / "bee" / "0.png").write_bytes(b"")
    document = json.loads(run("evaluate", folder, data, "--json", "--on-bad", "skip").stdout)
    assert document["accuracy"] == document["balanced_accuracy"] == 1
    low, high = document["interval"]
    assert low < high <= 1
    assert {"per_class", "confusion", "calibration_error", "pictures", "labels", "worst"} <= set(document)
    assert document["pictures"] == 8
    assert "0 bytes" in run("evaluate", folder, data, code=1).stderr
    (data / "bee").rename(data / "wasp")
    assert "'wasp'" in refusal("evaluate", folder, data)


def test_a_reader_that_leaves_early_makes_no_noise(plain, tmp_path):
    folder, data = plain
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    words = f"{sys.executable} -m regraft predict {folder} {' '.join([str(data)] * 40)} | head -1"
    done = subprocess.run(words, shell=True, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_names_that_the_terminal_cannot_show_are_escaped(plain, tmp_path):
    folder, data = plain
    shutil.copy(data / "ant" / "0.png", tmp_path / "\N{SNOWMAN}.png")
    done = CliRunner(charset="latin-1").invoke(main, ["predict", str(folder), str(tmp_path / "\N{SNOWMAN}.png")])
    assert done.exit_code == 0, done.stderr
    assert "\\u2603.png  ant" in done.stdout


# ---- the whole job on the default network ----------------------------------------------------------------------------


def test_fit_prints_its_record_as_one_document(real_run):
    folder, _, done = real_run
    record = json.loads(done.stdout)
    assert record == json.loads((folder / "record.json").read_bytes())
    assert record["forward_passes"] == 30
    assert record["seconds"]["total"] > 0
    assert record["curve"]["transfer_helps"]
    assert record["test"]["accuracy"] > 0.8
    assert record["test"]["pictures"] == 12
    assert done.stderr == ""


def test_a_finished_fit_is_shown_again_with_no_passes_and_other_options_are_refused(real_run, tmp_path):
    folder, data, _ = real_run
    again = json.loads(run("fit", data, "--out", folder, "--json").stdout)
    assert again["forward_passes"] == 0
    shown = run("fit", data, "--out", folder).stdout
    assert f"report: {folder / 'report.html'}" in shown
    assert "test accuracy" in shown
    assert "(seed was 0 and is 1)" in refusal("fit", data, "--out", folder, "--seed", "1")
    lost = shutil.copytree(folder, tmp_path / "lost")
    (lost / "report.html").unlink()
    run("fit", data, "--out", lost)
    assert (lost / "report.html").read_text() == (folder / "report.html").read_text()
    other = shutil.copytree(data, tmp_path / "other")
    (other / "train" / "ant" / "0.png").unlink()
    assert "other training pictures" in refusal("fit", other, "--out", folder)


def test_curve_ranks_networks_and_json_has_the_names_of_the_contract(real_run):
    folder, data, _ = real_run
    store = {"REGRAFT_CACHE": str(folder.parent / "store")}
    document = json.loads(run("curve", data, "--json", env=store).stdout)
    assert document["forward_passes"] == 0
    assert all({"name", "depth", "dim", "score", "low", "high"} <= set(point) for point in document["cuts"])
    names = [point["name"] for point in document["cuts"]]
    assert names[0] == "input"
    assert 10 <= len(names) <= 26
    assert document["recommended"] in names or document["recommended"] in {p["name"] for p in document["several"]}
    assert document["ranking"] == [
        {"backbone": "default", "score": document["score"], "interval": document["interval"]}
    ]


def test_curve_names_what_was_left_out_and_what_was_passed_over(real_run, tmp_path):
    folder, data, _ = real_run
    store = {"REGRAFT_CACHE": str(folder.parent / "store")}
    few = tmp_path / "few"
    for name in tiny.CLASSES:
        shutil.copytree(data / "train" / name, few / name)
        for i in range(3, 10):
            (few / name / f"{i}.png").unlink()
    (few / "ant" / "bad.png").write_bytes(b"")
    (few / "ant" / "notes.txt").write_text("")
    done = run("curve", few, "-v", env=store)
    lines = done.stderr.splitlines()
    assert lines[0] == "1 picture was left out:"
    assert lines[1].startswith("- ant/bad.png must ")
    assert lines[2] == "passed over ant/notes.txt: its name does not end like a picture's"
    assert lines[3].startswith("warning: judged with 3 folds instead of 5")
    assert "reuse up to" in done.stdout
    assert "--strict allows nothing to be left out" in refusal("curve", few, "--strict", env=store)


def test_inspect_json_has_the_names_of_the_contract():
    document = json.loads(run("inspect", "--json").stdout)
    assert document["parameters"] == document["trainable"] + document["frozen"] == 4_652_008
    assert document["architecture"] == "tf_efficientnet_lite0"
    below = [cut["parameters"] for cut in document["cuts"]]
    assert below == sorted(below)
    assert 0 < below[-1] < document["parameters"]
    shown = run("inspect").stdout.splitlines()
    assert len(shown) == 2 + sum(cut["shown"] for cut in document["cuts"])


def test_the_store_is_listed_verified_and_pruned(real_run, tmp_path):
    folder, _, _ = real_run
    store = {"REGRAFT_CACHE": str(shutil.copytree(folder.parent / "store", tmp_path / "copy"))}
    listed = json.loads(run("cache", "list", "--json", env=store).stdout)
    features = [entry for entry in listed["entries"] if entry["facts"]["kind"] != "probes"]
    probes = [entry for entry in listed["entries"] if entry not in features]
    assert {entry["pictures"] for entry in features} == {30}
    assert probes
    assert f"{len(listed['entries'])} keys" in run("cache", "list", env=store).stdout
    verified = json.loads(run("cache", "verify", "--json", env=store).stdout)
    assert verified["damaged"] == []
    assert verified["rows"] == 30 * len(features) + sum(entry["pictures"] for entry in probes)
    assert " 0 files damaged" in run("cache", "verify", env=store).stdout
    pruned = json.loads(run("cache", "prune", "--max-bytes", "0", "--json", env=store).stdout)
    assert len(pruned["keys"]) == len(listed["entries"])
    assert json.loads(run("cache", "list", "--json", env=store).stdout)["entries"] == []
    assert run("cache", "prune", "--older-than", "30", env=store).stdout.startswith("removed 0 keys")


def test_leaks_are_told(real_run, tmp_path):
    folder, data, _ = real_run
    store = {"REGRAFT_CACHE": str(folder.parent / "store")}
    leaky = shutil.copytree(data, tmp_path / "leaky")
    shutil.copy(leaky / "train" / "ant" / "0.png", leaky / "test" / "ant" / "again.png")
    done = run("fit", leaky, "--out", tmp_path / "run", env=store)
    assert "warning: test pictures that were also learned from: 1; " in done.stderr
    assert "test/ant/again.png, with bytes equal to train/ant/0.png" in done.stderr


def test_an_interrupted_fit_says_so_and_computes_only_the_rest_afterwards(tmp_path):
    """Ctrl-C during the extraction."""
    data, cache = tmp_path / "data", tmp_path / "store"
    rng = np.random.default_rng(0)
    for i in range(160):
        path = data / tiny.CLASSES[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tiny.stripes(i % 2, rng)).save(path)
    environment = {
        **os.environ,
        "REGRAFT_CACHE": str(cache),
        "PYTHONPATH": str(SOURCES),
        "OMP_NUM_THREADS": "1",
        "REGRAFT_PROGRESS": "1",
    }
    command = [sys.executable, "-m", "regraft", "fit", str(data), "--out", str(tmp_path / "run"), "--json"]
    command += ["--budget", "0trials"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    seen = b""
    while b"features 4" not in seen and child.poll() is None:  # forty-odd pictures
        seen += os.read(child.stderr.fileno(), 4096)
    child.send_signal(signal.SIGINT)
    stopped = time.monotonic()
    output, rest = child.communicate(timeout=60)
    assert time.monotonic() - stopped < 5
    assert child.returncode == 130
    assert output == b""
    assert rest.endswith(b"interrupted: what was computed is kept, and the same command continues\n")
    kept = json.loads(run("cache", "list", "--json").stdout)["entries"]
    pictures = {entry["pictures"] for entry in kept}
    assert len(pictures) == 1
    assert 40 <= max(pictures) < 160
    record = json.loads(run("fit", data, "--out", tmp_path / "run", "--json", "--budget", "0trials").stdout)
    assert record["forward_passes"] == 160 - max(pictures)
    assert record["status"] == "finished"


@pytest.mark.slow
def test_the_default_network_says_the_same_on_a_processor_with_fewer_instructions(real_run, tmp_path):
    folder, data, _ = real_run
    few = ("env", "ONEDNN_MAX_CPU_ISA=AVX2", "ATEN_CPU_CAPABILITY=avx2")
    here, there = (
        json.loads(command_line("predict", folder, data, "--json", "--top", "3", cache=tmp_path, before=before).stdout)
        for before in ((), few)
    )
    for ours, theirs in zip(here["predictions"], there["predictions"], strict=True):
        assert ours["label"] == theirs["label"]
        there_by_label = {t["label"]: t["probability"] for t in theirs["top"]}
        assert all(abs(t["probability"] - there_by_label[t["label"]]) < 0.01 for t in ours["top"])


@pytest.mark.parametrize("seed", ["-1", "4294967296"])
def test_a_seed_that_no_generator_takes_is_refused(tmp_path, seed):
    data = tiny.write_pictures(tmp_path / "data")
    asked = [("fit", "--out", tmp_path / "run"), ("curve",), ("pretrain", "--method", "gan", "--out", tmp_path / "own")]
    for name, *rest in asked:
        assert f"from 0 to 4294967295; found {seed}." in refusal(name, data, *rest, "--seed", seed)
    assert not (tmp_path / "run").exists()
