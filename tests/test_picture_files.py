"""What a file says of itself: whole or refused, a picture or not, small enough, how many frames."""

from __future__ import annotations

import io
import itertools
import json
import re
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from picture_makers import COLOUR, UPRIGHT, WHOLE, chunk, encode, fuzz, photograph, pixels_of, png, tiff
from regraft.errors import PictureError
from regraft.pictures import MAX_PIXELS, decode

# ---- whole or nothing ------------------------------------------------------------------------------------------------


def cuts(data):
    length = len(data)
    return sorted({int(length * i / 48) for i in range(48)} | {length - 2, length - 1})


@pytest.mark.parametrize("lenient", [False, True], ids=["strict-pillow", "lenient-pillow"])
@pytest.mark.parametrize("name", WHOLE)
def test_cut_file_is_refused_or_gives_all_its_pixels(name, lenient, monkeypatch):
    """Also where other code of the process has told Pillow to accept half a picture."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    data = WHOLE[name]
    whole, refused = pixels_of(data), 0
    assert len(cuts(data)) >= 50
    for at in cuts(data):
        try:
            pixels = pixels_of(data[:at])
        except PictureError:
            refused += 1
        else:
            assert np.array_equal(pixels, whole), at
    assert refused > 20


@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
def test_jpeg_with_missing_pixels_but_a_proper_end_is_refused(progressive):
    data = encode(COLOUR, "JPEG", progressive=progressive)
    for at in range(len(data) // 2, len(data) - 60, 60):
        with pytest.raises(PictureError, match=r"a\.jpg must be a whole JPEG picture"):
            pixels_of(data[:at] + b"\xff\xd9")


def test_progressive_jpeg_without_its_last_scans_is_refused():
    data = WHOLE["jpeg-progressive"]
    tables = [found.start() for found in re.finditer(b"\xff\xc4", data)]
    assert len(tables) > 5
    for at in tables[1:]:
        with pytest.raises(PictureError, match="its last scans are missing"):
            pixels_of(data[:at] + b"\xff\xd9")


@pytest.mark.parametrize("at_end", [False, True], ids=["first", "last"])
def test_jpeg_of_endless_scans_is_refused(at_end):
    data = WHOLE["jpeg-progressive"]
    first, second = (found.start() for found in itertools.islice(re.finditer(b"\xff\xda", data), 2))
    place = len(data) - 2 if at_end else first
    with pytest.raises(PictureError, match="over 100 scans"):
        pixels_of(data[:place] + data[first:second] * 200 + data[place:])


@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize(
    ("bits", "colour", "pixel"), [(8, 0, 1), (16, 0, 2), (8, 2, 3), (8, 4, 2), (8, 6, 4), (16, 6, 8)]
)
def test_png_whose_pixels_end_early_in_an_intact_file_is_refused(rows, bits, colour, pixel):
    data = png(8, 8, bits, colour, [b"\x99" * 8 * pixel] * rows)
    with pytest.raises(PictureError, match="its pixels end before its last row"):
        pixels_of(data)


def test_png_that_is_black_to_its_last_row_is_read():
    assert not pixels_of(png(8, 8, 8, 0, [bytes(8)] * 8)).any()


def interlaced(pixels, last=None):
    """Adam7: seven small pictures one after the other, each with its own rows."""
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = [row.tobytes() for x, y, dx, dy in passes for row in pixels[y::dy, x::dx] if row.size]
    return png(pixels.shape[1], pixels.shape[0], 8, 0, rows[:last], interlace=1)


@pytest.mark.parametrize("size", [(11, 13), (1, 9), (2, 1), (9, 8)], ids=str)
def test_interlaced_png_is_read_whole_or_refused(size):
    grey = photograph(*size, channels=1) | 1
    assert np.array_equal(pixels_of(interlaced(grey))[:, :, 0], grey)
    with pytest.raises(PictureError, match="must be a whole PNG picture"):
        pixels_of(interlaced(grey, last=-1))


def test_png_with_a_flipped_bit_in_its_pixels_is_refused():
    data = bytearray(WHOLE["png"])
    data[len(data) // 2] ^= 1
    with pytest.raises(PictureError, match="its IDAT chunk fails its checksum"):
        pixels_of(bytes(data))


def test_tiff_with_too_few_strips_is_refused():
    data = tiff(16, 16, 8, bytes(16 * 8)).replace(
        struct.pack("<HHII", 278, 4, 1, 16), struct.pack("<HHII", 278, 4, 1, 8)
    )
    with pytest.raises(PictureError, match="too few strips"):
        pixels_of(data)


@pytest.mark.parametrize("tail", [b"junk" * 9, b"\0" * 4096], ids=["rubbish", "zeros"])
@pytest.mark.parametrize("name", [name for name in WHOLE if "animated" not in name])
def test_rubbish_behind_a_whole_picture_changes_nothing(name, tail):
    assert np.array_equal(pixels_of(WHOLE[name] + tail), pixels_of(WHOLE[name]))


# ---- what is no picture ----------------------------------------------------------------------------------------------

NUMPY_FILE = io.BytesIO()
np.save(NUMPY_FILE, np.zeros(3))
DISGUISES = {
    "empty": (b"", r"empty \(0 bytes\)"),
    "zeros": (bytes(5000), "zero bytes"),
    "html": (b"\n<!DOCTYPE html><html><body>404</body></html>", "HTML page"),
    "text": ("not found, naïve".encode(), "is text"),
    "text-bm": (b"BMW is a maker of cars and motorcycles", "is text"),
    "json": (b'{"error": "not found"}', "JSON"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "npy": (NUMPY_FILE.getvalue(), "NumPy"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
    "eps-binary": (b"\xc5\xd0\xd3\xc6" + bytes(40), "EPS"),
    "pdf": (b"%PDF-1.7\n", "PDF"),
    "psd": (b"8BPS\0\1" + bytes(40), "Photoshop"),
    "fits": (b"SIMPLE  =                    T", "FITS"),
    "svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(20), "HEIC"),
    "zip": (b"PK\x03\x04" + bytes(30), "zip"),
    "unknown": (b"\x7fELF\x02\x01\x01" + bytes(30), "7f 45 4c 46"),
    "ppm": (encode(COLOUR, "PPM"), "begins with 50 36"),
    "ico": (encode(COLOUR, "ICO", sizes=[(16, 16)]), "begins with 00 00 01"),
}


@pytest.mark.parametrize("name", DISGUISES)
def test_what_is_no_picture_is_refused_with_a_fitting_sentence(name):
    data, words = DISGUISES[name]
    with pytest.raises(PictureError, match=words) as caught:
        decode(data, where="photos/cat.jpg")
    assert str(caught.value).startswith("photos/cat.jpg must be a picture")
    assert "\n" not in str(caught.value)


def run_child(code, payload):
    child = subprocess.run([sys.executable, "-c", code], input=payload, capture_output=True, timeout=60, check=False)
    assert child.returncode == 0, child.stderr.decode()
    return json.loads(child.stdout)


NO_CHILDREN = """
import json, sys
from regraft.errors import PictureError
from regraft.pictures import decode
started = []
sys.addaudithook(lambda event, _: started.append(event) if event.startswith(
    ("subprocess", "os.exec", "os.fork", "os.posix_spawn", "os.system", "os.startfile", "socket")) else None)
for line in sys.stdin:
    try:
        decode(bytes.fromhex(line), where="x.jpg")
    except PictureError:
        pass
print(json.dumps(started))
"""


def test_no_child_process_and_no_connection_is_started_for_a_disguised_file():
    files = "\n".join(data.hex() for data, _ in DISGUISES.values() if data)
    assert run_child(NO_CHILDREN, files.encode()) == []


def webp_header(side):
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + (side - 1).to_bytes(3, "little") * 2
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bomb(kind, side):
    """A small file whose header asks for side x side pixels."""
    if kind == "png":
        return png(side, side, 1, 0, [bytes((side + 7) // 8)] * min(side, 13000))
    if kind == "gif":
        screen = struct.pack("<HHBBB", 1, 1, 0, 0, 0)
        return b"GIF89a" + screen + b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x01\x04\0;"
    if kind == "bmp":
        return b"BM" + struct.pack("<IIIIiiHHIIIIII", 0, 0, 54, 40, side, side, 1, 24, *[0] * 6)
    if kind == "tiff":
        return tiff(side, side, 1, bytes(100))
    if kind == "jpeg":
        return WHOLE["jpeg"].replace(struct.pack(">HH", 60, 80), struct.pack(">HH", side, side), 1)
    return webp_header(side)


BOMBS = [(kind, side) for kind in ("png", "gif", "bmp", "tiff", "jpeg", "webp") for side in (9000, 13000, 65535)]
MEASURE = """
import json, re, resource, sys, time
from regraft.errors import PictureError
from regraft.pictures import decode
def resident():  # in kilobytes; not ru_maxrss, which a process inherits from the one that started it
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
files = [bytes.fromhex(line) for line in sys.stdin]
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
rows = []
for data in files:
    before, start = resident(), time.process_time()
    try:
        decode(data, where="x.jpg")
        message = "decoded"
    except PictureError as e:
        message = str(e)
    rows.append([message, time.process_time() - start, resident() - before])
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def measured_bombs():
    files = "\n".join(bomb(*which).hex() for which in BOMBS)
    return dict(zip(BOMBS, run_child(MEASURE, files.encode()), strict=True))


@pytest.mark.parametrize(("kind", "side"), BOMBS)
def test_pixel_bomb_is_refused_from_its_header(kind, side, measured_bombs):
    message, seconds, kilobytes = measured_bombs[kind, side]
    assert message.startswith(f"x.jpg must have at most {MAX_PIXELS:,} pixels, but its header says {side} x {side}")
    assert seconds < 0.05
    assert kilobytes < 20_000


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1)], ids=str)
def test_thin_pictures_are_read(kind, size):
    assert pixels_of(encode(photograph(*size), kind)).shape == (*size, 3)


def test_tile_much_larger_than_its_picture_is_refused():
    more = [(322, 4, 60000), (323, 4, 60000), (324, 4, 8), (325, 4, 100)]
    with pytest.raises(PictureError, match="pieces of 60000 x 60000"):
        pixels_of(tiff(16, 16, 8, bytes(256), more=more))


# ---- frames ----------------------------------------------------------------------------------------------------------


def many_frames(kind, count):
    if kind == "gif":
        first = encode(Image.fromarray(UPRIGHT).quantize(16), "GIF")
        start = first.index(b",", 13 + 3 * 16)
        return first[:-1] + first[start:-1] * (count - 1) + b";"
    if kind == "png":
        control = struct.pack(">IIIIHHBB", 30, 20, 0, 0, 1, 10, 0, 0)
        pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in UPRIGHT))
        later = b"".join(
            chunk(b"fcTL", struct.pack(">I", 2 * i - 1) + control)
            + chunk(b"fdAT", struct.pack(">I", 2 * i) + pixels[:50])
            for i in range(1, count)
        )
        before = chunk(b"acTL", struct.pack(">II", count, 0)), chunk(b"fcTL", bytes(4) + control)
        return png(30, 20, 8, 2, [row.tobytes() for row in UPRIGHT], *before, after=later)
    if kind == "webp":
        image = Image.fromarray(UPRIGHT)
        data = encode(image, "WEBP", save_all=True, append_images=[Image.fromarray(255 - UPRIGHT)], lossless=True)
        at = data.index(b"ANMF")
        frame = data[at : at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")]
        body = data[8:at] + frame * count
        return b"RIFF" + struct.pack("<I", len(body)) + body
    page = struct.pack("<H", 9) + tiff(30, 20, 8, UPRIGHT[:, :, 0].tobytes())[8 + 600 + 2 : -4]
    start = 8 + 600
    later = b"".join(page + struct.pack("<I", start + (len(page) + 4) * i) for i in range(1, count))
    return b"II*\0" + struct.pack("<I", start) + UPRIGHT[:, :, 0].tobytes() + later + page + bytes(4)


FRAME_NOTES = {
    "gif": "first of several frames used",
    "png": "first of 100000 frames used",
    "webp": "first of several frames used",
    "tiff": "first of several pages used",
}


@pytest.mark.parametrize("kind", FRAME_NOTES)
def test_first_of_very_many_frames_is_read_at_once_with_one_note(kind):
    data = many_frames(kind, 100_000)
    start = time.process_time()
    picture = decode(data, where="a")
    seconds = time.process_time() - start
    first = Image.fromarray(UPRIGHT).quantize(16).convert("RGB") if kind == "gif" else UPRIGHT
    assert np.array_equal(picture.pixels, UPRIGHT[:, :, :1] if kind == "tiff" else np.asarray(first))
    assert picture.notes == (FRAME_NOTES[kind],)
    assert seconds < 0.1


@pytest.mark.parametrize("kind", FRAME_NOTES)
def test_single_frame_has_no_note(kind):
    assert decode(many_frames(kind, 1), where="a").notes == ()


# ---- mutations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WHOLE)
def test_a_few_mutations_of_each_format_let_only_picture_errors_escape(name):
    assert fuzz(WHOLE[name], seconds=0.1, seed=1)[0] > 5
