"""The mark of machine-made pictures, read by means that we did not write."""

from __future__ import annotations

import io
import struct
import sys
import types
import zlib
from xml.dom import minidom
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from safelight.store import manifests, xmp
from safelight.store.pictures import encode, read_metadata

TRAINED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
FORMATS = ["PNG", "JPEG", "WEBP"]


def file(format: str, *texts: str, **options) -> bytes:
    return encode(Image.new("RGB", (16, 16), (200, 10, 10)), format, *texts, **options)


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, place = [], 8
    while place < len(data):
        (length,), kind = struct.unpack_from(">I", data, place), data[place + 4 : place + 8]
        body = data[place + 8 : place + 8 + length]
        assert struct.unpack_from(">I", data, place + 8 + length)[0] == zlib.crc32(kind + body)
        chunks.append((kind, body))
        place += 12 + length
    return chunks


def jpeg_segments(data: bytes) -> list[tuple[int, bytes]]:
    segments, place = [], 2
    while data[place + 1] != 0xDA:
        (length,) = struct.unpack_from(">H", data, place + 2)
        segments.append((data[place + 1], data[place + 4 : place + 2 + length]))
        place += 2 + length
    return segments


def webp_chunks(data: bytes) -> dict[bytes, bytes]:
    assert struct.unpack_from("<I", data, 4)[0] == len(data) - 8
    chunks, place = {}, 12
    while place < len(data):
        kind, (length,) = data[place : place + 4], struct.unpack_from("<I", data, place + 4)
        chunks[kind] = data[place + 8 : place + 8 + length]
        place += 8 + length + length % 2
    return chunks


def packet_in(data: bytes, format: str) -> bytes:
    """The packet from where XMP's third part puts it."""
    if format == "PNG":
        # Keyword, NUL, not compressed (2 bytes), no language, no translated keyword.
        head = b"XML:com.adobe.xmp\0\0\0\0\0"
        kinds = [kind for kind, _ in png_chunks(data)]
        (found,) = [b for k, b in png_chunks(data) if k == b"iTXt" and b.startswith(head)]
        assert kinds.index(b"iTXt") < kinds.index(b"IDAT")
    elif format == "JPEG":
        head = b"http://ns.adobe.com/xap/1.0/\0"
        (found,) = [b for marker, b in jpeg_segments(data) if marker == 0xE1 and b.startswith(head)]
    else:
        head, chunks = b"", webp_chunks(data)
        found = chunks[b"XMP "]
        assert chunks[b"VP8X"][0] & 0x04, "the flag that announces XMP"
    return found.removeprefix(head)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("texts", [("a röd cube", '{"a": 1}'), ("", "")])
def test_every_file_is_marked_where_the_standard_says(format, texts):
    dom = minidom.parseString(packet_in(file(format, *texts), format))
    (element,) = dom.getElementsByTagNameNS(IPTC, "DigitalSourceType")
    assert TRAINED in element.toxml()


@pytest.mark.parametrize("format", FORMATS)
def test_pillow_reads_the_mark(format, monkeypatch):
    safe = types.ModuleType("defusedxml")  # what Pillow asks for; the parser is Python's own
    safe.ElementTree = ElementTree  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "defusedxml", safe)
    monkeypatch.setattr(Image, "ElementTree", ElementTree, raising=False)  # asked for at import
    with Image.open(io.BytesIO(file(format, "a cone", "{}"))) as image:
        found = image.getxmp()
    assert found["xmpmeta"]["RDF"]["Description"]["DigitalSourceType"] == TRAINED


@pytest.mark.parametrize("format", FORMATS)
def test_we_read_the_mark_and_its_absence(format):
    found = read_metadata(file(format, "a cone", "{}"))
    assert found.xmp is not None
    assert xmp.source_type(found.xmp) == TRAINED
    assert xmp.creator_tool(found.xmp) == "Safelight"
    assert (found.parameters, found.json, found.other) == ("a cone", "{}", {})
    assert read_metadata(file(format, "a cone", xmp=b"")).xmp is None


def test_the_mark_says_nothing_about_people_or_time():
    assert set(xmp.properties(xmp.MARK)) == {
        f"{{{IPTC}}}DigitalSourceType",
        "{http://ns.adobe.com/xap/1.0/}CreatorTool",
    }


HEAD = '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
SPACE = f'xmlns:i="{IPTC}"'


@pytest.mark.parametrize(
    "text",
    [
        f'{HEAD}{SPACE} i:DigitalSourceType="{TRAINED}"/></rdf:RDF>',
        f"{HEAD}{SPACE}><i:DigitalSourceType>\n {TRAINED} </i:DigitalSourceType>"
        "</rdf:Description></rdf:RDF>",
        f'{HEAD}{SPACE}><i:DigitalSourceType rdf:resource="{TRAINED}"/>'
        "</rdf:Description></rdf:RDF>",
    ],
)
def test_other_writers_marks_are_read(text):
    assert xmp.source_type(text) == TRAINED
    assert xmp.source_type(("\ufeff" + text).encode()) == TRAINED


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]><x>&b;</x>'


@pytest.mark.parametrize("text", ["", "<", "<a/>", BOMB, "a" * (xmp.MAX_BYTES + 1), "<?xml?>"])
def test_broken_packets_say_nothing(text):
    assert xmp.properties(text) == {}


@given(st.binary(max_size=200), st.integers(0, len(xmp.MARK)))
def test_nothing_in_a_packet_breaks_the_reader(noise, place):
    xmp.source_type(xmp.MARK[:place] + noise + xmp.MARK[place + len(noise) :])


# -- C2PA manifests, found by their place ---------------------------------------------------------


def jumbf(body: bytes = b"") -> bytes:
    return b"JP\0\1\0\0\0\1" + b"\0\0\0\x40jumb\0\0\0\x1ejumdc2pa" + b"\0" * 20 + body


def with_manifest(format: str) -> bytes:
    data = file(format)
    if format == "PNG":
        body = b"caBX" + jumbf()
        chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        return data[:33] + chunk + data[33:]
    if format == "JPEG":
        return data[:2] + b"\xff\xeb" + struct.pack(">H", len(jumbf()) + 2) + jumbf() + data[2:]
    return data + b"C2PA" + struct.pack("<I", len(jumbf())) + jumbf()


@pytest.mark.parametrize("format", FORMATS)
def test_manifests_are_found(format):
    assert manifests.has_manifest(with_manifest(format))
    assert not manifests.has_manifest(file(format, "c2pa jumb caBX C2PA"))


@given(st.sampled_from(FORMATS), st.integers(0, 300), st.binary(min_size=1, max_size=8))
def test_broken_files_are_no_trouble(format, place, noise):
    data = bytearray(with_manifest(format))
    data[place : place + len(noise)] = noise
    assert manifests.has_manifest(bytes(data)) in (True, False)
    assert manifests.has_manifest(bytes(data[:place])) in (True, False)
