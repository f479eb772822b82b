"""The mark of machine-made pictures: IPTC's digital source type in an XMP packet.

XMP is ISO 16684-1; the property is ``Iptc4xmpExt:DigitalSourceType`` of the IPTC Photo Metadata
Standard, its values https://cv.iptc.org/newscodes/digitalsourcetype/. Where the packet lies in a
file (PNG ``iTXt``, JPEG ``APP1``, WebP ``XMP``) is XMP's third part, and :mod:`~.pictures`' work.
"""

from __future__ import annotations

from html import escape
from xml.etree import ElementTree

CODES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
TRAINED = f"{CODES}trainedAlgorithmicMedia"
"""Made by a model that was trained on sampled content."""

MACHINE_MADE = {
    "trainedAlgorithmicMedia": "made by a trained model",
    "compositeWithTrainedAlgorithmicMedia": "put together with parts from a trained model",
    "algorithmicMedia": "made by an algorithm that was not trained",
    "compositeSynthetic": "put together, at least one part of it synthetic",
    "virtualRecording": "a recording of a virtual scene",
    "algorithmicallyEnhanced": "changed by an algorithm",
}
"""IPTC's codes that speak of machines, and what each says."""

MAX_BYTES = 1 << 20
"""Longer packets are not parsed."""

_IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_XMP = "http://ns.adobe.com/xap/1.0/"


def packet(source_type: str = TRAINED, tool: str = "Safelight") -> bytes:
    """An XMP packet that says where a picture comes from. Holds no time and no names of people.

    Args:
        source_type: one of IPTC's addresses.
        tool: ``xmp:CreatorTool``.
    """
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        f'<rdf:RDF xmlns:rdf="{_RDF}">'
        f'<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="{_IPTC}" xmlns:xmp="{_XMP}">'
        f"<Iptc4xmpExt:DigitalSourceType>{escape(source_type)}</Iptc4xmpExt:DigitalSourceType>"
        f"<xmp:CreatorTool>{escape(tool)}</xmp:CreatorTool>"
        "</rdf:Description></rdf:RDF></x:xmpmeta>"
        '<?xpacket end="r"?>'
    ).encode()


MARK = packet()
"""What every picture that is written carries."""


def properties(data: bytes | str) -> dict[str, str]:
    """The simple properties of a packet, as ``{namespace}name`` -> text.

    Reads both ways of writing them: elements (with text or ``rdf:resource``) and attributes of
    ``rdf:Description``. A packet that is too long, broken, or declares entities (which a parser
    could be made to expand without end) holds none.
    """
    text = data.decode("utf-8", "replace") if isinstance(data, bytes) else data
    text = text.strip("\0 \t\r\n\ufeff")
    if len(text) > MAX_BYTES or "<!" in text:
        return {}
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError, LookupError):
        return {}
    found: dict[str, str] = {}
    for description in root.iter(f"{{{_RDF}}}Description"):
        found.update((k, v) for k, v in description.attrib.items() if not k.startswith(f"{{{_RDF}"))
        for child in description:
            value = child.get(f"{{{_RDF}}}resource") or (child.text or "").strip()
            if value:
                found[child.tag] = value
    return found


def source_type(data: bytes | str) -> str | None:
    """IPTC's digital source type as the packet gives it, or None."""
    return properties(data).get(f"{{{_IPTC}}}DigitalSourceType")


def creator_tool(data: bytes | str) -> str | None:
    """The program that the packet names, or None."""
    return properties(data).get(f"{{{_XMP}}}CreatorTool")
