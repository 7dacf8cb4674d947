"""The gate for pictures: faithful pixels or one sentence. All pictures are made here."""

from __future__ import annotations

import io
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageCms, ImageFile, ImageOps

from picture_makers import COLOUR, GREY, UPRIGHT, WHOLE, chunk, encode, exif, photograph, pixels_of, png, tiff
from regraft.errors import PictureError
from regraft.pictures import SUFFIXES, decode, from_array


def pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)))


# ---- JPEG equals Pillow ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411"])
@pytest.mark.parametrize("size", [(97, 131), (64, 64), (1, 1), (2, 3), (33, 1)], ids=str)
def test_colour_jpeg_equals_pillow_bit_for_bit(size, subsampling):
    data = simplejpeg.encode_jpeg(photograph(*size), quality=80, colorsubsampling=subsampling)
    assert np.array_equal(pixels_of(data), pillow(data))


@pytest.mark.parametrize(
    "options",
    [
        {"progressive": True, "subsampling": 0},
        {"progressive": True, "subsampling": 2},
        {"keep_rgb": True},
        {"restart_marker_rows": 1},
        {"quality": 20},
    ],
    ids=str,
)
def test_jpeg_variants_equal_pillow_bit_for_bit(options):
    data = encode(photograph(), "JPEG", **options)
    assert np.array_equal(pixels_of(data), pillow(data))


def test_grey_jpeg_keeps_one_channel_and_equals_pillow():
    data = encode(photograph(channels=1), "JPEG")
    assert np.array_equal(pixels_of(data), pillow(data)[:, :, None])


@pytest.mark.parametrize("kind", ["cmyk", "ycck"])
def test_jpeg_in_inks_keeps_the_mean_of_its_source(kind):
    source = photograph()
    inks = Image.fromarray(source).convert("CMYK")
    inverted = np.ascontiguousarray(255 - np.asarray(inks))
    data = (
        encode(inks, "JPEG", quality=95)
        if kind == "cmyk"
        else simplejpeg.encode_jpeg(inverted, quality=95, colorspace="CMYK", colorsubsampling="444")
    )
    pixels = pixels_of(data)
    assert pixels.shape == source.shape
    assert np.abs(pixels.mean((0, 1)) - source.mean((0, 1))).max() < 2
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_mpo_is_read_as_its_first_jpeg():
    first, second = Image.fromarray(photograph()), Image.fromarray(255 - photograph())
    data = encode(first, "MPO", save_all=True, append_images=[second])
    assert np.array_equal(pixels_of(data), pixels_of(encode(first, "JPEG")))


# ---- orientation -----------------------------------------------------------------------------------------------------

UNDO = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: np.rot90(a, 2),
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", UNDO)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_orientation_gives_the_same_upright_pixels(kind, orientation):
    stored = np.ascontiguousarray(UNDO[orientation](UPRIGHT))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    picture = decode(encode(stored, kind, exif=exif(orientation), **options), where="a")
    assert np.array_equal(picture.pixels, UPRIGHT)
    assert picture.notes == ()
    assert picture.pixels.flags.c_contiguous


@pytest.mark.parametrize("orientation", UNDO)
def test_orientation_of_jpeg_equals_that_of_pillow(orientation):
    data = encode(UPRIGHT, "JPEG", exif=exif(orientation))
    assert np.array_equal(pixels_of(data), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))


@pytest.mark.parametrize(
    "block", [b"Exif\0\0rubbish", exif(6)[:20], exif(6).replace(b"\x01\x12\x00\x03", b"\x01\x12\x00\x63")]
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_broken_exif_is_ignored_with_a_note(kind, block):
    picture = decode(encode(UPRIGHT, kind, exif=block), where="a")
    assert picture.pixels.shape == UPRIGHT.shape
    assert picture.notes == ("broken EXIF block ignored",)


@pytest.mark.parametrize(("value", "notes"), [(0, ()), (9, ("unknown orientation 9 ignored",))])
def test_unknown_orientation_leaves_the_picture_as_stored(value, notes):
    picture = decode(encode(UPRIGHT, "PNG", exif=exif(value)), where="a")
    assert np.array_equal(picture.pixels, UPRIGHT)
    assert picture.notes == notes


# ---- deep samples ----------------------------------------------------------------------------------------------------

RAMP = np.tile(np.linspace(0, 65535, 640).round().astype(np.uint16), (4, 1))
RAMP_LEVELS = np.round(RAMP / 257).astype(np.uint8)[:, :, None]


def samples(values, dtype):
    return values.astype(dtype).tobytes()


DEEP = {
    "png": encode(RAMP, "PNG"),
    "tiff": encode(RAMP, "TIFF"),
    "tiff-lzw": encode(RAMP, "TIFF", compression="tiff_lzw"),
    "tiff-big-endian": tiff(640, 4, 16, samples(RAMP, ">u2"), order=">"),
    "tiff-bigtiff": tiff(640, 4, 16, samples(RAMP, "<u2"), big=True),
    "tiff-white-is-zero": tiff(640, 4, 16, samples(65535 - RAMP, "<u2"), photometric=0),
    "tiff-int32": encode(RAMP.astype(np.int32), "TIFF"),
    "tiff-float": encode((RAMP / 65535).astype(np.float32), "TIFF"),
    "tiff-float-255": encode((RAMP / 257).astype(np.float32), "TIFF"),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_grey_is_scaled_and_never_clipped(name):
    pixels = pixels_of(DEEP[name])
    assert len(np.unique(pixels)) >= 250
    assert np.array_equal(pixels, RAMP_LEVELS)


def test_twelve_bit_grey_uses_its_whole_range():
    values = np.linspace(0, 4095, 640).round().astype(np.uint32)
    packed = b"".join((int(a) << 12 | int(b)).to_bytes(3, "big") for a, b in values.reshape(-1, 2))
    pixels = pixels_of(tiff(640, 1, 12, packed))
    assert np.array_equal(pixels[0, :, 0], np.round(values * 255 / 4095))


def test_integers_of_32_bits_in_the_16_bit_range_are_noted():
    assert decode(DEEP["tiff-int32"], where="a").notes == ("32-bit samples read as 16-bit ones",)


@pytest.mark.parametrize("deep", [2, 6], ids=["rgb", "rgba"])
def test_colour_of_16_bits_keeps_all_levels(deep):
    channels = {2: 3, 6: 4}[deep]
    rows = np.repeat(RAMP[:, :, None], channels, axis=2).astype(">u2")
    rows[:, :, 3:] = 65535
    pixels = pixels_of(png(640, 4, 16, deep, [row.tobytes() for row in rows]))
    assert len(np.unique(pixels)) == 256
    assert np.abs(pixels.astype(int) - RAMP_LEVELS).max() <= 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.array([[0, 70000]], np.int32), "hold samples from 0 to 65535"),
        (np.array([[-5, 70]], np.int32), "hold samples from 0 to 65535"),
        (np.array([[0, 300]], np.float32), "floats from 0 to 1 or from 0 to 255"),
        (np.array([[-1, 1]], np.float32), "floats from 0 to 1 or from 0 to 255"),
        (np.array([[np.nan, 1]], np.float32), "floats from 0 to 1 or from 0 to 255"),
        (np.array([[np.inf, 1]], np.float32), "floats from 0 to 1 or from 0 to 255"),
    ],
    ids=["int-large", "int-negative", "float-large", "float-negative", "nan", "inf"],
)
def test_samples_without_a_known_range_are_refused(values, words):
    with pytest.raises(PictureError, match=words):
        pixels_of(encode(values, "TIFF"))


# ---- transparency ----------------------------------------------------------------------------------------------------

ALPHA = np.zeros((20, 30), np.uint8)
ALPHA[:, 10:20] = 100
ALPHA[:, 20:] = 255


def hidden_differs():
    """Two pictures that differ only where they are fully transparent."""
    other = UPRIGHT.copy()
    other[:, :10] = 255 - other[:, :10]
    return UPRIGHT, other


def with_alpha(colours, kind):
    rgba = np.dstack([colours, ALPHA])
    if kind == "rgba-png":
        return encode(rgba, "PNG")
    if kind == "la-png":
        return encode(np.dstack([colours[:, :, 0], ALPHA]), "PNG")
    if kind == "rgba-webp":
        return encode(rgba, "WEBP", lossless=True, exact=True)
    if kind == "rgba-tiff":
        return encode(rgba, "TIFF", compression="tiff_lzw")
    deep = np.dstack([colours[:, :, 0], ALPHA]).astype(">u2") * 257
    return png(30, 20, 16, 4, [row.tobytes() for row in deep])


@pytest.mark.parametrize("kind", ["rgba-png", "la-png", "rgba-webp", "rgba-tiff", "la-16-png"])
def test_hidden_colours_have_no_effect(kind):
    first, second = (pixels_of(with_alpha(colours, kind)) for colours in hidden_differs())
    assert np.array_equal(first, second)
    assert (first[:, :10] == 255).all()


@pytest.mark.parametrize("background", [0, 128, 255])
@pytest.mark.parametrize("kind", ["rgba-png", "la-png", "rgba-webp", "rgba-tiff", "la-16-png"])
def test_transparent_pixels_are_laid_on_the_background(kind, background):
    share = ALPHA[:, :, None] / 255
    colours = UPRIGHT[:, :, :1] if kind.startswith("la") else UPRIGHT
    expected = np.round(colours * share + background * (1 - share)).astype(np.uint8)
    assert np.array_equal(pixels_of(with_alpha(UPRIGHT, kind), background=background), expected)


def test_background_outside_the_grey_levels_is_refused():
    with pytest.raises(PictureError, match="from 0 to 255; found 300"):
        pixels_of(with_alpha(UPRIGHT, "rgba-png"), background=300)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
@pytest.mark.parametrize("hidden", [(9, 200, 9), (200, 9, 9)], ids=str)
def test_transparent_palette_entry_is_laid_on_the_background(kind, hidden):
    indices = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3
    image = Image.fromarray(indices).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([*hidden, 0, 255, 0, 0, 0, 255])
    pixels = pixels_of(encode(image, kind, transparency=0), background=7)
    assert np.array_equal(pixels[indices == 0], [[7, 7, 7]] * 4)
    assert np.array_equal(pixels[indices == 1], [[0, 255, 0]] * 4)


def test_palette_with_several_alphas_is_laid_on_the_background():
    palette = chunk(b"PLTE", bytes([255, 0, 0, 0, 0, 0, 9, 9, 9])) + chunk(b"tRNS", bytes([51, 0]))
    pixels = pixels_of(png(3, 1, 8, 3, [bytes([0, 1, 2])], palette))
    assert pixels.tolist() == [[[255, 204, 204], [255, 255, 255], [9, 9, 9]]]


@pytest.mark.parametrize(
    ("bits", "row", "key", "levels"),
    [
        (1, bytes([0b01000000]), 1, [0, 7, 0]),
        (2, bytes([0b00011000]), 1, [0, 7, 170]),
        (4, bytes([0x15, 0xF0]), 5, [17, 7, 255]),
        (8, bytes([17, 5, 255]), 5, [17, 7, 255]),
        (16, struct.pack(">3H", 300, 301, 65535), 301, [1, 7, 255]),
    ],
)
def test_transparent_grey_level_is_compared_as_stored(bits, row, key, levels):
    pixels = pixels_of(png(3, 1, bits, 0, [row], chunk(b"tRNS", struct.pack(">H", key))), background=7)
    assert pixels[0, :, 0].tolist() == levels


def test_transparent_rgb_colour_is_laid_on_the_background():
    row = bytes([1, 2, 3, 1, 2, 4])
    pixels = pixels_of(png(2, 1, 8, 2, [row], chunk(b"tRNS", struct.pack(">3H", 1, 2, 3))))
    assert pixels.tolist() == [[[255, 255, 255], [1, 2, 4]]]


def test_transparent_colour_of_16_bits_is_refused():
    data = png(1, 1, 16, 2, [bytes(6)], chunk(b"tRNS", bytes(6)))
    with pytest.raises(PictureError, match="save it with an alpha channel"):
        pixels_of(data)


# ---- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_one_bit_picture_is_black_and_white_in_one_channel(kind):
    bits = photograph(channels=1) > 128
    assert np.array_equal(pixels_of(encode(Image.fromarray(bits), kind)), np.where(bits, 255, 0)[:, :, None])


BMP_HEADERS = {
    "os2": struct.pack("<IHHHH", 12, 30, 20, 1, 24),
    "bottom-up": struct.pack("<IiiHHIIIIII", 40, 30, 20, 1, 24, *[0] * 6),
    "top-down": struct.pack("<IiiHHIIIIII", 40, 30, -20, 1, 24, *[0] * 6),
}


@pytest.mark.parametrize("name", BMP_HEADERS)
def test_bmp_rows_come_out_from_the_top(name):
    rows = UPRIGHT[:, :, ::-1] if name == "top-down" else UPRIGHT[::-1, :, ::-1]
    content = b"".join(row.tobytes() + b"\0\0" for row in rows)
    data = b"BM" + struct.pack("<III", 0, 0, 14 + len(BMP_HEADERS[name])) + BMP_HEADERS[name] + content
    assert np.array_equal(pixels_of(data), UPRIGHT)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_grey_values_stored_as_rgb_keep_three_channels(kind):
    grey = np.repeat(GREY[:, :, None], 3, axis=2)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(pixels_of(encode(grey, kind, **options)), grey)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_grey_file_keeps_one_channel(kind):
    assert np.array_equal(pixels_of(encode(GREY, kind)), GREY[:, :, None])


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
def test_palette_becomes_rgb(kind):
    image = Image.fromarray(COLOUR).quantize(32)
    assert np.array_equal(pixels_of(encode(image, kind)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["LAB", "YCbCr", "CMYK"])
def test_other_colour_spaces_become_rgb_near_the_source(mode):
    source = Image.fromarray(COLOUR)
    if mode == "LAB":
        source = ImageCms.profileToProfile(
            source, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    source = source if mode == "LAB" else source.convert(mode)
    pixels = pixels_of(encode(source, "TIFF", compression="tiff_lzw"))
    assert pixels.shape == COLOUR.shape
    assert np.abs(pixels.mean((0, 1)) - COLOUR.mean((0, 1))).max() < 2


@pytest.mark.parametrize(("bits", "stored"), [(1, b"\xa0"), (8, bytes([255, 0, 254, 1])), (4, bytes([0xF0, 0xE1]))])
def test_grey_that_runs_from_white_to_black_is_inverted(bits, stored):
    plain, inverted = (pixels_of(tiff(4, 1, bits, stored, photometric=p)) for p in (1, 0))
    assert np.array_equal(inverted, 255 - plain)


def test_signed_bytes_are_refused():
    with pytest.raises(PictureError, match="must hold unsigned samples"):
        pixels_of(tiff(16, 16, 8, bytes(256), more=[(339, 3, 2)]))


@pytest.mark.parametrize("value", [0, 9, 300])
def test_tiff_with_an_unknown_orientation_is_read_as_stored(value):
    assert np.array_equal(pixels_of(tiff(80, 60, 8, GREY.tobytes(), more=[(274, 3, value)])), GREY[:, :, None])


def test_thumbnail_page_of_a_raw_camera_file_is_refused():
    with pytest.raises(PictureError, match="its first page is a thumbnail"):
        pixels_of(tiff(16, 16, 8, bytes(256), more=[(254, 4, 1)]))


# ---- manners ---------------------------------------------------------------------------------------------------------


def test_threads_decode_alike_and_leave_pillow_as_it_was():
    """Warnings are errors here, so one that leaks from any thread fails the test."""
    settings = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    names = list(WHOLE) * 4
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda name: pixels_of(WHOLE[name]), names))
    assert all(np.array_equal(pixels, pixels_of(WHOLE[name])) for name, pixels in zip(names, results, strict=True))
    assert settings == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


@pytest.mark.parametrize("name", WHOLE)
def test_pixels_are_contiguous_writable_bytes_of_their_own(name):
    pixels = pixels_of(WHOLE[name])
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] in (1, 3)
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable


def test_error_of_a_decoder_is_kept_as_the_cause():
    data = WHOLE["webp-lossless"]
    with pytest.raises(PictureError) as caught:
        decode(data[:60] + bytes(len(data) - 60), where="photos/cat.webp")
    assert str(caught.value).startswith("photos/cat.webp must be a whole WEBP picture, but its decoder says")
    assert isinstance(caught.value.__cause__, Exception)


def test_suffixes_are_lower_case_and_cover_the_formats():
    assert {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"} <= SUFFIXES
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in SUFFIXES)


# ---- arrays ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (COLOUR, COLOUR),
        (GREY, GREY[:, :, None]),
        (GREY[:, :, None], GREY[:, :, None]),
        (RAMP, RAMP_LEVELS),
        (RAMP.astype(">u2"), RAMP_LEVELS),
        ((COLOUR / 255).astype(np.float32), COLOUR),
        ((COLOUR / 255).astype(np.float16), COLOUR),
        (COLOUR / 255, COLOUR),
        (COLOUR[::-1, ::-1], COLOUR[::-1, ::-1]),
    ],
    ids=["rgb", "grey", "grey-1", "uint16", "uint16-big", "float32", "float16", "float64", "strided"],
)
def test_array_becomes_the_same_picture(array, expected):
    picture = from_array(array, where="item 3")
    assert np.array_equal(picture.pixels, expected)
    assert picture.notes == ()


def test_array_with_alpha_is_laid_on_white():
    array = np.dstack([UPRIGHT, ALPHA])
    assert np.array_equal(from_array(array, where="a").pixels, pixels_of(encode(array, "PNG")))


def test_picture_of_an_array_does_not_share_its_memory():
    array = COLOUR.copy()
    picture = from_array(array, where="a")
    array[:] = 0
    assert np.array_equal(picture.pixels, COLOUR)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((3, 20, 20), np.uint8), "channels last"),
        (np.zeros(20, np.uint8), r"found \(20,\)"),
        (np.zeros((0, 4), np.uint8), r"found \(0, 4, 1\)"),
        (np.zeros((4, 4, 2), np.uint8), "channels last"),
        (np.zeros((4, 4), np.int64), "found int64"),
        (np.zeros((4, 4), bool), "found bool"),
        (np.full((4, 4), "a"), "found <U1"),
        (np.full((4, 4), 200.0), "found 200 to 200"),
        (np.full((4, 4), -0.1), "floats from 0 to 1"),
        (np.full((4, 4), np.nan), "holds NaN or infinity"),
    ],
    ids=["channels-first", "line", "empty", "two-channels", "int64", "bool", "text", "255", "negative", "nan"],
)
def test_array_that_is_no_picture_is_refused(array, words):
    with pytest.raises(PictureError, match=words) as caught:
        from_array(array, where="item 3")
    assert str(caught.value).startswith("item 3 must h")
