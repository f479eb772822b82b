"""Where C2PA manifests lie in a picture's file, found without the C2PA library.

C2PA 2.1, appendix A.3: PNG chunk ``caBX``; JPEG ``APP11`` segments with JUMBF boxes (ISO 19566-5);
WebP (RIFF) chunk ``C2PA``. Found is not checked: that takes the extra ``sign``.
"""

from __future__ import annotations

import struct

_PNG = b"\x89PNG\r\n\x1a\n"


def has_manifest(data: bytes) -> bool:
    """Whether a PNG, JPEG or WebP file holds a C2PA manifest store. Broken files hold none."""
    if data.startswith(_PNG):
        return _in_png(data)
    if data.startswith(b"\xff\xd8"):
        return _in_jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _in_riff(data)
    return False


def _in_png(data: bytes) -> bool:
    place = len(_PNG)
    while place + 8 <= len(data):
        (length,), kind = struct.unpack_from(">I", data, place), data[place + 4 : place + 8]
        if kind == b"caBX":
            return True
        place += 12 + length
    return False


def _in_jpeg(data: bytes) -> bool:
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        if marker in (0xDA, 0xD9):  # the scan begins, or the file ends
            return False
        (length,) = struct.unpack_from(">H", data, place + 2)
        body = data[place + 4 : place + 2 + length]
        # "JP", box instance, packet number, then a "jumb" superbox that describes itself as c2pa.
        if marker == 0xEB and body[:2] == b"JP" and b"jumb" in body[:20] and b"c2pa" in body[:64]:
            return True
        place += 2 + length
    return False


def _in_riff(data: bytes) -> bool:
    place = 12
    while place + 8 <= len(data):
        kind, (length,) = data[place : place + 4], struct.unpack_from("<I", data, place + 4)
        if kind == b"C2PA":
            return True
        place += 8 + length + length % 2
    return False
