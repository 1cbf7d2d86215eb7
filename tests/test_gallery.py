"""The gallery: one page of all families that needs nothing else, and the same as a picture."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from genengine import cli, gallery, models

pytest.importorskip("matplotlib", reason="the gallery needs Matplotlib")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    assert cli.main(["gallery", "gan", "vae", "--out", str(folder), "--device", "cpu", "--threads", "1"]) == 0
    return folder


def test_the_page_needs_nothing_else(folder):
    page = (folder / "gallery.html").read_text(encoding="utf-8")
    assert not re.findall(r"<script|https?://|<link|url\(", page)
    assert 'id="gan"' in page and 'id="vae"' in page and 'id="flow"' not in page
    for text in (
        "training loss by step",
        "loss of the discriminator by step",
        "Fréchet distance",
        "genengine train gan",
    ):
        assert text in page
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) >= 5
    for text in pictures:
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
        assert picture.ndim == 2 and picture.std() > 30  # ink and paper, not a blank


def test_the_picture_shows_them_too(folder):
    with Image.open(folder / "gallery.png") as picture:
        assert picture.width > 800 and picture.height > 400
        assert np.asarray(picture.convert("L")).std() > 20


def test_every_family_has_a_title_and_a_summary():
    assert set(gallery.TITLES) == set(models.FAMILIES)


def test_a_family_without_a_model_is_refused(tmp_path, capsys):
    assert cli.main(["gallery", "diffusion", "--out", str(tmp_path), "--device", "cpu"]) == 2
    assert "family must be one of ddpm" in capsys.readouterr().err
