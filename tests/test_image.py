"""One decode: what comes in, what is refused, and where a map lands on the photograph."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw

from kizu.data import image, masks
from kizu.data.preprocessing import Preprocessing, batches
from kizu.errors import BadImage
from kizu.inference.prediction import Photo


def photograph(height=60, width=80, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, picture, **options):
    Image.fromarray(picture).save(path, **options)
    return path


def test_files_bytes_arrays_and_pil_images_give_the_same_pixels(tmp_path):
    rgb = photograph()
    path = save(tmp_path / "a.png", rgb)
    for source in (path, str(path), path.read_bytes(), rgb, Image.fromarray(rgb), Image.open(path)):
        np.testing.assert_array_equal(image.read(source), rgb)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = np.arange(40 * 40, dtype=np.uint8).reshape(40, 40)
    picture = Image.fromarray(grey)
    if mode == "I;16":
        picture = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "I":
        picture = Image.fromarray(grey.astype(np.int32) * 257)
    elif mode == "F":
        picture = Image.fromarray((grey / 255).astype(np.float32))
    else:
        picture = picture.convert(mode)
    path = tmp_path / "a.tiff"
    picture.save(path)
    rgb = image.read(path)
    assert rgb.shape == (40, 40, 3) and rgb.dtype == np.uint8
    if mode not in ("1", "P"):
        assert np.abs(rgb.astype(int) - grey[..., None]).max() <= 1


def test_exif_orientation_is_applied(tmp_path):
    rgb = photograph(30, 50)
    rgb[:10, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter to the right when shown
    path = save(tmp_path / "a.png", rgb, exif=exif)
    np.testing.assert_array_equal(image.read(path), np.rot90(rgb, -1))


def claiming(png, width, height):
    """The same file with other dimensions in its header."""
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def bad_files(folder):
    """One of every kind, with a word of the reason."""
    good = save(folder / "whole.jpg", photograph(200, 200))
    kinds = {
        "truncated.jpg": (good.read_bytes()[:1500], "damaged"),
        "empty.png": (b"", "empty"),
        "text.png": (b"this is no image\n" * 20, "not an image"),
        "noise.jpg": (os.urandom(3000), "not an image"),
        "halfpng.png": (image.encode(photograph())[:200], "damaged"),
    }
    for name, (content, reason) in kinds.items():
        (folder / name).write_bytes(content)
        yield folder / name, reason
    yield save(folder / "dot.png", photograph(1, 1)), "1×1"
    (folder / "bomb.png").write_bytes(claiming(image.encode(photograph()), 50_000, 50_000))
    yield folder / "bomb.png", "megapixels"
    (folder / "folder.png").mkdir()
    yield folder / "folder.png", "folder"
    yield folder / "vanished.png", "does not exist"
    (folder / "broken_link.png").symlink_to(folder / "nowhere.png")
    yield folder / "broken_link.png", "does not exist"
    good.unlink()


def test_bad_files_are_named_with_the_reason(tmp_path):
    for path, reason in bad_files(tmp_path):
        with pytest.raises(BadImage) as caught:
            image.read(path)
        assert str(path) in str(caught.value) and reason in str(caught.value)


def test_an_unreadable_file_says_so(tmp_path):
    path = save(tmp_path / "a.png", photograph())
    path.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:  # who may read everything
            os.seteuid(65534)
        with pytest.raises(BadImage, match="permissions"):
            image.read(path)
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    ("array", "word"),
    [
        (np.zeros((20, 20, 2), np.uint8), "shape"),
        (np.zeros(20, np.uint8), "shape"),
        (np.zeros((20, 20), bool), "bool"),
        (np.full((20, 20), 3.0), "outside 0…1"),
        (np.full((20, 20), np.nan), "outside 0…1"),
        (np.full((20, 20), -1), "outside 0…65535"),
        (np.zeros((0, 20, 3), np.uint8), "pixels"),
    ],
)
def test_arrays_that_are_no_image_are_refused(array, word):
    with pytest.raises(BadImage, match=word):
        image.read(array)


def test_a_batch_goes_on_without_the_bad_ones_and_keeps_order(tmp_path):
    bad = [path for path, _ in bad_files(tmp_path)]
    good = [save(tmp_path / f"{n}.png", photograph(seed=n)) for n in range(5)]
    mixed = [path for pair in zip(good, bad, strict=False) for path in pair] + bad[5:]
    preprocessing = Preprocessing((32, 32))
    seen, failed = [], []
    for batch in batches([Photo(path) for path in mixed], preprocessing, batch_size=3):
        assert batch.pixels.shape == (len(batch.items), 3, 32, 32)
        for item, pixels in zip(batch.items, batch.pixels, strict=True):
            np.testing.assert_array_equal(pixels.transpose(1, 2, 0), preprocessing(item.read()[0]))
        seen += [item.source for item in batch.items]
        failed += [item.source for item, _ in batch.failures]
    assert seen == good and failed == bad


@pytest.mark.parametrize("resize", [None, 96])
@pytest.mark.parametrize("shape", [(200, 120), (90, 300), (64, 64)])
def test_a_spot_on_the_photograph_and_its_map_are_at_the_same_place(resize, shape):
    preprocessing = Preprocessing((64, 80), resize)
    at = (shape[0] // 2 + 5, shape[1] // 2 - 7)
    canvas = Image.new("RGB", (shape[1], shape[0]))
    ImageDraw.Draw(canvas).ellipse((at[1] - 6, at[0] - 6, at[1] + 6, at[0] + 6), fill="white")
    seen = preprocessing(np.asarray(canvas))
    assert seen.shape == (64, 80, 3)
    back = preprocessing.restore(seen[..., 0].astype(np.float32), shape)
    assert back.shape == shape
    weights = back / back.sum()
    centre = [(weights * grid).sum() for grid in np.indices(shape)]
    assert np.abs(np.subtract(centre, at)).max() < 1.0


def test_the_overlay_leaves_good_pixels_alone_and_outlines_bad_ones():
    rgb = photograph(100, 100)
    values = np.zeros((100, 100), np.float32)
    values[40:60, 40:60] = 1
    glow = image.overlay(rgb, values, 0.0, 1.0, threshold=0.5)
    np.testing.assert_array_equal(glow[:35, :35], rgb[:35, :35])
    assert (glow[40, 40:60] == (255, 64, 96)).all() and not (glow[50, 45:55] == (255, 64, 96)).all(axis=1).any()
    edge = image.outline(np.ones((5, 5), bool))
    assert edge.sum() == 16  # a region that fills the picture is closed at its border


def test_an_interrupted_write_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(image, "encode", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        image.write(tmp_path / "a.png", photograph())
    assert not list(tmp_path.iterdir())


def test_masks_of_any_kind_are_read_as_regions(tmp_path):
    region = np.zeros((20, 20), np.uint8)
    region[5:9, 3:8] = 255
    for name, mask in {
        "grey.png": Image.fromarray(region),
        "bits.png": Image.fromarray(region).convert("1"),
        "palette.png": Image.fromarray(region).convert("P"),
        "alpha.png": Image.fromarray(region).convert("RGBA"),
        "ones.png": Image.fromarray(region // 255),
    }.items():
        mask.save(tmp_path / name)
        np.testing.assert_array_equal(masks.read_mask(tmp_path / name), region > 0, err_msg=name)
