"""Data sets as they lie: what is found, what is passed over, what is refused, and that each file is opened once."""

from __future__ import annotations

import errno
import io
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tiny
from regraft.data import LeftOut, from_arrays, load_data, open_picture, pixel_digest, read, subset
from regraft.errors import DataError, PictureError
from regraft.printable import printable


def png(level=10):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), level, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def put(root, *names):
    """A different picture under each name."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    return root


def places(dataset, label=None):
    return [e.where for e in dataset.examples if label is None or dataset.labels[e.label] == label]


def refusal(*args, **options):
    with pytest.raises(DataError) as caught:
        load_data(*args, **options)
    return str(caught.value)


# ---- what is found -----------------------------------------------------------------------------------------------


def test_labels_are_folder_names_in_code_point_order(tmp_path):
    names = ["ant", "Zebra", "Äpfel", "10", "2", "ant eater"]
    put(tmp_path, *(f"{name}/{i}.png" for i, name in enumerate(names)))
    assert load_data(tmp_path).labels == ("10", "2", "Zebra", "ant", "ant eater", "Äpfel")


def test_pictures_are_found_at_any_depth_and_by_any_spelling_of_their_ending(tmp_path):
    put(tmp_path, "a/1.PNG", "a/deep/er/2.jpeg", "a/3.TIFF", "b/4.webp")
    assert places(load_data(tmp_path)) == ["a/1.PNG", "a/3.TIFF", "a/deep/er/2.jpeg", "b/4.webp"]


@pytest.mark.parametrize("train", ["train", "Train"])
@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_split_folders_become_splits(tmp_path, train, validation):
    put(tmp_path, f"{train}/a/1.png", f"{train}/b/2.png", f"{validation}/a/3.png", "test/b/4.png")
    dataset = load_data(tmp_path)
    assert dataset.labels == ("a", "b")
    found = {split: places(subset(dataset, split)) for split in ("train", "validation", "test")}
    assert found == {
        "train": [f"{train}/a/1.png", f"{train}/b/2.png"],
        "validation": [f"{validation}/a/3.png"],
        "test": ["test/b/4.png"],
    }


def test_a_class_may_be_called_train(tmp_path):
    put(tmp_path, "train/1.png", "car/2.png")
    assert load_data(tmp_path).labels == ("car", "train")


def test_a_class_called_train_inside_train_keeps_its_groups(tmp_path):
    put(tmp_path, "train/train/x-1.png", "train/train/x-2.png", "train/car/y-1.png")
    groups = {e.where: e.group for e in load_data(tmp_path, group="^([a-z])-").examples}
    assert groups == {"train/train/x-1.png": "x", "train/train/x-2.png": "x", "train/car/y-1.png": "y"}


def test_mixed_layouts_are_refused_by_name(tmp_path):
    put(tmp_path, "train/a/1.png", "test/a/2.png", "notes/3.png")
    assert "found notes" in refusal(tmp_path)


@pytest.mark.parametrize("split", ["test", "val", "Train"])
def test_a_split_beside_class_folders_is_not_taken_for_a_class(tmp_path, split):
    put(tmp_path, "a/1.png", "b/2.png", f"{split}/a/3.png", f"{split}/b/4.png")
    (tmp_path / split / "notes.txt").write_text("")
    said = refusal(tmp_path)
    assert f"{split}/ in {tmp_path} must hold pictures and be a class" in said
    assert "move the class folders into train/" in said
    put(tmp_path, f"{split}/5.png")
    assert set(load_data(tmp_path).labels) == {"a", "b", split}


def test_what_systems_leave_about_is_named_and_never_a_class(tmp_path):
    put(tmp_path, "a/1.png", "b/2.png")
    junk = [".DS_Store", "Thumbs.db", "a/.ipynb_checkpoints/1-checkpoint.png", "a/._1.png", "__MACOSX/a/1.png"]
    put(tmp_path, *junk, "a/Desktop.ini", "b/@eaDir/1.png", "b/notes.txt", "readme.md")
    dataset = load_data(tmp_path)
    assert dataset.labels == ("a", "b")
    assert places(dataset) == ["a/1.png", "b/2.png"]
    named = {item.where for item in dataset.ignored}
    assert named == {
        ".DS_Store",
        "Thumbs.db",
        "__MACOSX",
        "a/.ipynb_checkpoints",
        "a/._1.png",
        "a/Desktop.ini",
        "b/@eaDir",
        "b/notes.txt",
        "readme.md",
    }
    assert LeftOut("b/notes.txt", "its name does not end like a picture's") in dataset.ignored


def test_links_in_a_circle_end_and_each_file_counts_once(tmp_path):
    put(tmp_path, "a/1.png", "a/deep/2.png", "b/3.png")
    (tmp_path / "a/deep/up").symlink_to("..")
    (tmp_path / "a/root").symlink_to(tmp_path)
    (tmp_path / "c").symlink_to(tmp_path)
    (tmp_path / "a/self.png").symlink_to("self.png")
    (tmp_path / "a/again.png").symlink_to("1.png")
    os.link(tmp_path / "a/1.png", tmp_path / "a/hard.png")
    (tmp_path / "a/twin").symlink_to("deep")
    dataset = load_data(tmp_path)
    assert dataset.labels == ("a", "b")
    assert places(dataset) == ["a/1.png", "a/self.png", "a/deep/2.png", "b/3.png"]
    reasons = {item.where: item.reason for item in dataset.ignored}
    assert reasons["c"] == reasons["a/root"] == reasons["a/deep/up"] == "a link to a folder that it lies in"
    assert reasons["a/hard.png"] == reasons["a/twin"] == "another name of what is listed already"
    with pytest.raises(PictureError, match="a/self.png cannot be read: Too many levels of symbolic links"):
        read(next(e for e in dataset.examples if e.where == "a/self.png"))


def test_a_linked_class_folder_is_followed(tmp_path):
    put(tmp_path, "elsewhere/1.png", "data/b/2.png")
    (tmp_path / "data/a").symlink_to(tmp_path / "elsewhere")
    assert places(load_data(tmp_path / "data")) == ["a/1.png", "b/2.png"]


def test_a_pipe_named_like_a_picture_is_never_opened(tmp_path):
    put(tmp_path, "a/1.png", "b/2.png")
    os.mkfifo(tmp_path / "a/0.png")
    dataset = load_data(tmp_path)
    assert places(dataset) == ["a/1.png", "b/2.png"]
    assert LeftOut("a/0.png", "not a file with bytes to read") in dataset.ignored


NAMES = [
    b"caf\xe9.png",
    b"two\nlines.png",
    "\N{GRINNING FACE}.png".encode(),
    b"x" * 251 + b".png",
    b"-rf.png",
    unicodedata.normalize("NFC", "é.png").encode(),
    unicodedata.normalize("NFD", "é.png").encode(),
    b" .png",
]


def test_any_file_name_works_and_survives_json_byte_for_byte(tmp_path):
    put(tmp_path, "b/1.png")
    (tmp_path / "a").mkdir()
    for i, name in enumerate(NAMES):
        Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"/" + name)).write_bytes(png(i))
    dataset = load_data(tmp_path)
    found = json.loads(json.dumps(places(dataset, "a")))
    assert sorted(os.fsencode(where) for where in found) == sorted(b"a/" + name for name in NAMES)
    assert len({read(e).id for e in dataset.examples if dataset.labels[e.label] == "a"}) == len(NAMES)


def test_names_are_escaped_for_the_terminal():
    assert printable(os.fsdecode(b"caf\xe9\n\x1b[31m\xc3\xa9")) == "caf\\xe9\\n\\x1b[31mé"


# ---- opened once -------------------------------------------------------------------------------------------------


def test_the_bytes_that_were_hashed_are_decoded_though_the_file_is_replaced_meanwhile(tmp_path):
    put(tmp_path, "a/1.png", "b/2.png")
    example = load_data(tmp_path).examples[0]
    raw = read(example)
    example.path.write_bytes(png(200))
    assert (raw.decode().pixels == 0).all()
    assert read(example).id != raw.id


def test_touching_or_moving_a_file_changes_no_digest(tmp_path):
    put(tmp_path, "x/a/1.png", "x/b/2.png")
    before = [read(e).id for e in load_data(tmp_path / "x").examples]
    os.utime(tmp_path / "x/a/1.png", (1, 1))
    (tmp_path / "x").rename(tmp_path / "y")
    assert [read(e).id for e in load_data(tmp_path / "y").examples] == before


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO], ids=["no permission", "broken disk"])
def test_a_file_that_the_system_refuses_is_named(tmp_path, monkeypatch, number):
    put(tmp_path, "a/1.png", "b/2.png")
    example = load_data(tmp_path).examples[0]

    def refuse(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(PictureError, match=f"a/1.png cannot be read: {os.strerror(number)}"):
        read(example)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    put(tmp_path, "a/1.png", "b/2.png")
    listing = Path.iterdir

    def refuse(path):
        if path.name == "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert f"{tmp_path / 'b'} must be readable, and cannot be listed: Permission denied." in refusal(tmp_path)


def test_equal_pixels_have_one_digest_whatever_the_file(tmp_path):
    pixels = tiny.stripes(0, np.random.default_rng(0))
    grey = pixels[..., 0]
    Image.fromarray(pixels).save(tmp_path / "1.png")
    Image.fromarray(pixels).save(tmp_path / "2.bmp")
    Image.fromarray(np.stack([grey] * 3, 2)).save(tmp_path / "3.png")
    Image.fromarray(grey).save(tmp_path / "4.tiff")
    other = pixels.copy()
    other[39, 47, 2] ^= 1
    Image.fromarray(other).save(tmp_path / "5.png")
    Image.fromarray(pixels.reshape(48, 40, 3)).save(tmp_path / "6.png")
    found = [
        pixel_digest(open_picture(path, where=path.name).decode())
        for path in sorted(tmp_path.iterdir())
        if path.is_file()
    ]
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert len(set(found)) == 4


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_one_class_is_refused_with_its_count(tmp_path):
    put(tmp_path, "cat/1.png", "cat/2.png")
    assert refusal(tmp_path).startswith("There must be at least 2 classes with pictures; found in ")
    assert refusal(tmp_path).endswith(": cat (2).")


def test_no_pictures_are_refused(tmp_path):
    assert "has no class folders" in refusal(tmp_path)
    put(tmp_path, "1.png")
    assert "has no class folders" in refusal(tmp_path)


def test_an_empty_class_folder_is_refused_by_name_or_keeps_its_place(tmp_path):
    put(tmp_path, "a/1.png", "c/2.png")
    (tmp_path / "b").mkdir()
    assert "'b'" in refusal(tmp_path)
    dataset = load_data(tmp_path, allow_empty_class=True)
    assert dataset.labels == ("a", "b", "c")
    assert [e.label for e in dataset.examples] == [0, 2]


def test_a_class_that_is_only_in_test_is_refused_by_name(tmp_path):
    put(tmp_path, "train/a/1.png", "train/b/2.png", "test/zebra/3.png")
    assert "'zebra'" in refusal(tmp_path)


def test_one_class_is_enough_to_be_judged(tmp_path):
    put(tmp_path, "test/cat/1.png")
    dataset = load_data(tmp_path, to_learn=False)
    assert places(dataset) == ["test/cat/1.png"]
    assert dataset.examples[0].split == "test"


@pytest.mark.parametrize(
    ("names", "form"),
    [
        (["table.csv"], "found"),
        (["photo.png"], "found"),
        (["pictures.zip"], "found"),
        (["JPEGImages/1.png", "Annotations/1.xml"], "looks like a Pascal VOC folder"),
        (["annotations/all.json", "images/1.png"], "looks like a COCO folder"),
        (["dataset_dict.json", "train/data.arrow"], "looks like a Hugging Face data set"),
    ],
    ids=["table", "one picture", "archive", "voc", "coco", "hugging face"],
)
def test_other_forms_get_one_sentence(tmp_path, names, form):
    put(tmp_path, *names)
    where = tmp_path / names[0] if len(names) == 1 else tmp_path
    said = refusal(where)
    assert said.startswith("The data must be a folder of class folders")
    assert form in said
    assert "\n" not in said


def test_a_place_where_nothing_is_gets_one_sentence(tmp_path):
    assert refusal(tmp_path / "no such") == f"The data must exist; nothing is at {tmp_path / 'no such'}."


# ---- arrays ------------------------------------------------------------------------------------------------------


def test_npz_and_arrays_are_the_same_data(tmp_path):
    images = np.arange(4 * 5 * 6 * 3, dtype=np.uint8).reshape(4, 5, 6, 3)
    np.savez(tmp_path / "data.npz", images=images, labels=np.array(["b", "a", "b", "a"]))
    stored, given = load_data(tmp_path / "data.npz"), load_data((images, ["b", "a", "b", "a"]))
    assert stored.labels == given.labels == ("a", "b")
    assert [e.label for e in stored.examples] == [e.label for e in given.examples] == [1, 0, 1, 0]
    assert [read(e).id for e in stored.examples] == [read(e).id for e in given.examples]
    assert len({read(e).id for e in stored.examples}) == 4
    assert np.array_equal(read(stored.examples[2]).decode().pixels, images[2])


def test_whole_number_labels_are_ordered_by_value():
    images = np.zeros((3, 2, 2), np.uint8)
    assert load_data((images, np.array([10, 9, 2]))).labels == ("2", "9", "10")


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (np.zeros((3, 2, 2)), [0, 1], "equally many; found 3 and 2"),
        (np.zeros((2, 2, 2)), [0.5, 1.0], "all text or all whole numbers; found float"),
        (np.zeros((2, 2, 2)), ["a", 1], "all text or all whole numbers; found int and str"),
        (np.zeros((2, 2, 2)), np.zeros((2, 3), int), "all text or all whole numbers; found list"),
        (np.zeros((2, 2, 2)), ["a", "a"], r"at least 2 classes with pictures; found in arrays: a \(2\)"),
        ([], [], "at least 2 classes with pictures; found in arrays: none"),
    ],
    ids=["lengths", "floats", "mixed", "one-hot", "one class", "none"],
)
def test_arrays_that_are_no_labelled_pictures_get_one_sentence(images, labels, said):
    with pytest.raises(DataError, match=said):
        load_data((images, labels))


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": np.zeros((2, 2, 2))}, "must hold `images` and `labels`; found images."),
        ({"images": np.zeros((2, 4)), "labels": np.arange(2)}, r"found \(2, 4\) and \(2,\)"),
        ({"images": np.array([{}, {}]), "labels": np.arange(2)}, "cannot be read: Object arrays cannot be loaded"),
    ],
    ids=["no labels", "flat", "objects"],
)
def test_npz_of_another_content_gets_one_sentence(tmp_path, arrays, said):
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(DataError, match=said):
        load_data(tmp_path / "data.npz")


def test_a_file_that_is_only_named_npz_gets_one_sentence(tmp_path):
    (tmp_path / "data.npz").write_text("hello")
    assert "cannot be read: it is no whole zip archive." in refusal(tmp_path / "data.npz")


def test_npz_cut_short_anywhere_gets_one_sentence(tmp_path):
    np.savez_compressed(tmp_path / "whole.npz", images=np.zeros((9, 8, 8), np.uint8), labels=np.arange(9))
    data = (tmp_path / "whole.npz").read_bytes()
    for length in range(0, len(data), len(data) // 25):
        (tmp_path / "cut.npz").write_bytes(data[:length])
        assert "cut.npz must be a .npz file of plain arrays" in refusal(tmp_path / "cut.npz")


def test_an_array_that_is_no_picture_is_named():
    half = io.BytesIO(png()[:-25])
    dataset = from_arrays([np.zeros((3, 4, 7)), np.array([None, {}]), [[1], [2, 3]], Image.open(half)], list("abab"))
    with pytest.raises(PictureError, match=r"images\[0\]"):
        read(dataset.examples[0]).decode()
    with pytest.raises(PictureError, match=r"images\[1\] must be a path"):
        read(dataset.examples[1])
    for i in (2, 3):
        with pytest.raises(PictureError, match=rf"images\[{i}\] cannot be read: "):
            read(dataset.examples[i])


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16", "CMYK"])
def test_a_pil_image_is_read_as_its_file_would_be(tmp_path, mode):
    pixels = tiny.stripes(2, np.random.default_rng(0))
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(pixels).convert(mode)
    suffix = "tiff" if mode == "CMYK" else "png"
    image.save(tmp_path / f"1.{suffix}")
    from_file = open_picture(tmp_path / f"1.{suffix}", where="file").decode().pixels
    from_image = open_picture(image, where="image").decode().pixels
    if from_file.shape[2] == 1:
        from_image = from_image[..., :1]
    assert np.abs(from_file.astype(int) - from_image).max() <= 1


@pytest.mark.parametrize(("mode", "scale"), [("I", 257), ("F", 1), ("F", 1 / 255)])
def test_a_deep_pil_image_is_read_as_its_file_would_be(tmp_path, mode, scale):
    grey = tiny.stripes(2, np.random.default_rng(0))[..., 0].astype(np.int32)
    image = Image.fromarray((grey * scale).astype({"I": np.int32, "F": np.float32}[mode]))
    assert image.mode == mode
    image.save(tmp_path / "1.tiff")
    from_file = open_picture(tmp_path / "1.tiff", where="file").decode().pixels
    assert np.array_equal(open_picture(image, where="image").decode().pixels, from_file)
    assert np.array_equal(from_file[..., 0], grey)


def test_a_pil_image_is_turned_upright_and_its_hidden_colours_stay_hidden(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.arange(60, dtype=np.uint8).reshape(5, 12)).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        assert open_picture(image, where="turned").decode().pixels.shape == (12, 5, 1)
    palette = Image.new("P", (3, 3), 0)
    palette.putpalette([255, 0, 0])
    palette.info["transparency"] = 0
    assert (open_picture(palette, where="hidden").decode().pixels == 255).all()


# ---- groups ------------------------------------------------------------------------------------------------------


def test_pictures_with_the_same_first_bracket_are_one_group(tmp_path):
    put(tmp_path, "a/emoji-1.png", "a/emoji-2.png", "b/emoji-3.png", "b/other.png")
    groups = {e.where: e.group for e in load_data(tmp_path, group=r"([^/]+)-\d").examples}
    assert groups == {"a/emoji-1.png": "emoji", "a/emoji-2.png": "emoji", "b/emoji-3.png": "emoji", "b/other.png": ""}


def test_groups_are_searched_inside_the_class_folder_only(tmp_path):
    put(tmp_path, "a1/x.png", "a2/x.png")
    assert "matches none" in refusal(tmp_path, group=r"(a\d)")


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("x-", "must have a bracket"), ("(x", "must be a regular expression"), ("(q)", "matches none")],
)
def test_a_pattern_without_use_gets_one_sentence(tmp_path, pattern, said):
    put(tmp_path, "a/x-1.png", "b/x-2.png")
    assert said in refusal(tmp_path, group=pattern)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "found None"),
        (5, "found 5"),
        ("", "found ''"),
        ([[1], [2]], "found a list"),
        (([1], [2], [3]), "found a tuple of list, list, list"),
        ((iter([1]), [2]), "found a tuple of list_iterator, list"),
    ],
)
def test_what_is_no_data_at_all_is_refused_with_what_it_is(data, said):
    with pytest.raises(DataError, match=f"or a pair .images, labels. of arrays or lists; {said}"):
        load_data(data)
