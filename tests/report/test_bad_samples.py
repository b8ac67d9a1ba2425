"""Bad samples in the report: what can still be seen of them, harmless."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.report import bad_samples
from pipeline.stages import report
from tests.report.made_up import fake_run, page_of, png_of, random_images, random_probs


def jpeg(side: int = 64) -> bytes:
    out = io.BytesIO()
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).resize((side, side)).save(out, "jpeg", quality=90)
    return out.getvalue()


def test_of_a_truncated_picture_the_part_that_is_there_is_seen() -> None:
    whole = jpeg(256)
    seen = bad_samples.glimpse(whole[: len(whole) * 2 // 3])
    assert seen is not None and seen.size == (256, 256)
    original = np.asarray(Image.open(io.BytesIO(whole)).convert("RGB")).astype(int)
    assert np.abs(np.asarray(seen)[:48].astype(int) - original[:48]).mean() < 2


@pytest.mark.parametrize("data", [b"", b"<html>", jpeg()[:100], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_of_other_damage_nothing_is_seen(data: bytes) -> None:
    assert bad_samples.glimpse(data) is None


def test_a_giant_is_not_decoded() -> None:
    header = png_of(np.zeros((1, 1, 3), np.uint8))
    giant = header[:16] + (60_000).to_bytes(4, "big") * 2 + header[24:]
    assert bad_samples.glimpse(giant) is None
    out = io.BytesIO()
    Image.new("L", (8000, 6000)).save(out, "png")
    assert bad_samples.glimpse(out.getvalue()) is None


def test_bad_samples_are_shown_with_reason_and_beginning(tmp_path: Path) -> None:
    pictures = [random_images(30, 1)]
    pictures[0][3] = b"<script>alert(1)</script>"
    pictures[0][5] = jpeg()[:-200]
    pictures[0][7] = b"\x1b[31m\xe2\x80\xae"
    probs = [[random_probs(30, 3, 1)]]
    context = fake_run(tmp_path, pictures=pictures, probs=probs, bad={3, 5, 7}, top1=(0.8, 0.9), key='"><b>')
    report.run(context)
    page, parsed = page_of(context)
    assert "<script" not in page and not {c for c in page if c in "\x1b\u202e"}
    assert "<script>alert(1)</script"[:24] in parsed.text and "\\x1b[31m\\xe2\\x80\\xae" in parsed.text
    assert '"><b>00003' in parsed.text and "3 bad samples" in parsed.text
    assert page.count('<img class="seen"') == 1  # of the truncated one the part that is there
