"""What docs/benchmarks.md says of memory is what ``python -m benchmarks.leak`` kept."""

from __future__ import annotations

import torch
from benchmarks import leak, measure, systems


def test_the_page_has_the_kept_numbers() -> None:
    (kept,) = systems.newest("leak")[:1]
    page = (systems.PAGE.parent / "benchmarks.md").read_text(encoding="utf-8")
    section = page[page.index("## Memory over many pictures") :]
    rows = {row[0]: row[1:] for row in kept["pictures_resident_in_use_mib"]}
    resident = [kept["resident_mib_when_loaded"], *(rows[n][0] for n in (0, 50, 100, 150, 200))]
    assert "| resident | " + " | ".join(f"{mib:.1f}" for mib in resident) + " |" in section
    used = [rows[n][1] for n in (0, 50, 100, 150, 200)]
    assert "| in use | | " + " | ".join(f"{mib:.1f}" for mib in used) + " |" in section
    assert f"grows by {kept['second_half_kib_a_picture']:.1f} KiB a picture" in section
    assert kept["second_half_kib_a_picture"] < 10


def test_memory_in_use_is_seen() -> None:
    before = leak.in_use()
    if before is None:
        return
    held = torch.zeros(2**22)  # 16 MiB
    after = leak.in_use()
    assert after is not None
    assert 15 < after - before < 18, held.shape
    assert leak.resident() > 16
    assert len({leak.prompt(k) for k in range(200)}) == leak.PROMPTS
    assert measure.RESULTS == systems.RESULTS
