"""BMP files: size, and whether the pixels of an uncompressed file are all there."""

from __future__ import annotations

import struct

from regraft.picture_files.container import Container, Damaged, check_size

BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)
_UNCOMPRESSED = (0, 3)


def read_bmp(data: bytes, where: str) -> Container:
    """Rows are padded to 4 bytes; a negative height means that the top row comes first."""
    (start,) = struct.unpack_from("<I", data, 10)
    if data[14] == BMP_HEADERS[0]:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression = 0
    else:
        width, height, _, bits, compression = struct.unpack_from("<IiHHI", data, 18)
    check_size(width, abs(height), where)
    row = (width * bits + 31) // 32 * 4
    if compression in _UNCOMPRESSED and start + row * abs(height) > len(data):
        raise Damaged("it ends in the middle of its pixels")
    return Container("BMP", width, abs(height), (data,))
