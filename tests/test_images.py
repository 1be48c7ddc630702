"""Pictures: Qwen's preprocessing against its stored tensors and against transformers, and hostile files."""

import base64
import json
import struct
import zlib
from io import BytesIO

import numpy
import pytest
from conftest import REFERENCE, shared
from PIL import Image

from data.errors import UserError
from data.images import MAX_DECODED_PIXELS, MAX_FILE_BYTES, find_image, image_size, open_image, patchify, smart_resize

CLIP = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))


def reference_folders():
    return sorted(folder.parent for folder in REFERENCE.glob("*/smart_resize.json"))


@pytest.mark.parametrize("folder", reference_folders(), ids=lambda folder: folder.name)
def test_smart_resize_reference(folder):
    rows = json.loads((folder / "smart_resize.json").read_text())
    assert rows
    for row in rows:
        height, width = smart_resize(row["height"], row["width"], 28, row["min_pixels"], row["max_pixels"])
        assert [height, width] == row["hf"] and height * width // 784 == row["image_tokens"], row


@pytest.mark.parametrize("folder", reference_folders(), ids=lambda folder: folder.name)
def test_patches_reference(folder):
    from safetensors import safe_open

    config = json.loads((folder / "preprocessor_config.json").read_text())
    with safe_open(folder / "golden.safetensors", "pt") as golden:
        names = [key.split(".")[1] for key in golden.keys() if key.startswith("image.") and "pixel" in key]
        assert names
        for name in names:
            patches, grid = patchify(
                open_image(folder / "images" / f"{name}.png"), config["patch_size"], config["merge_size"],
                config["temporal_patch_size"], config["min_pixels"], config["max_pixels"],
                config["image_mean"], config["image_std"])
            assert (patches - golden.get_tensor(f"image.{name}.pixel_values")).abs().max() == 0
            assert list(grid) == golden.get_tensor(f"image.{name}.image_grid_thw")[0].tolist()


@pytest.mark.parametrize("size", [(333, 517), (28, 28), (1000, 40), (9, 900)])
def test_patches_equal_transformers(size):
    processor_module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    noise = numpy.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=numpy.uint8)
    for image in (Image.fromarray(noise[..., :3]), Image.fromarray(noise, "RGBA")):
        processor = processor_module.Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=100_352)
        theirs = processor(image, return_tensors="pt")
        patches, grid = patchify(open_image(image), 14, 2, 2, 3136, 100_352, **CLIP)
        assert (patches - theirs["pixel_values"]).abs().max() == 0
        assert list(grid) == theirs["image_grid_thw"][0].tolist()


def test_screenshot_tokens():
    height, width = smart_resize(1970, 1330, 28, 3136, 12_845_056)
    assert height * width // 784 == 3360  # the screenshot of Proxy-Lite at the hub's limits


def test_smart_resize_refuses_slivers():
    assert smart_resize(10, 2000, 28, 3136, 12_845_056) == (28, 812)
    with pytest.raises(UserError, match="200 times"):
        smart_resize(10, 2001, 28, 3136, 12_845_056)


@pytest.mark.parametrize("mode, color, expected", [
    ("RGBA", (255, 0, 0, 0), (255, 255, 255)), ("RGBA", (255, 0, 0, 255), (255, 0, 0)), ("LA", (0, 0), (255, 255, 255)),
    ("L", 7, (7, 7, 7)), ("1", 1, (255, 255, 255)), ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ("I;16", 0x80FF, (128, 128, 128)), ("I;16", 0x0101, (1, 1, 1)), ("P", 3, (3, 6, 9)),
])
def test_modes(tmp_path, mode, color, expected):
    image = Image.new(mode, (4, 3), color)
    if mode == "P":
        image.putpalette([value * factor for value in range(64) for factor in (1, 2, 3)])
    path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    image.save(path, **({"quality": 100} if mode == "CMYK" else {}))
    opened = open_image(path)
    assert opened.mode == "RGB" and opened.size == (4, 3) == image_size(path)
    assert numpy.abs(numpy.asarray(opened).astype(int) - expected).max() <= (2 if mode == "CMYK" else 0)
    assert open_image(image).getpixel((0, 0)) == pytest.approx(expected, abs=2)


def test_transparent_palette_lies_over_white(tmp_path):
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 200, 0, 0])
    image.save(tmp_path / "p.png", transparency=1)
    assert open_image(tmp_path / "p.png").getpixel((0, 0)) == (255, 255, 255)


def test_pixels_stay_as_stored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees when shown"
    Image.new("RGB", (40, 20)).save(tmp_path / "phone.jpg", exif=exif)
    assert open_image(tmp_path / "phone.jpg").size == image_size(tmp_path / "phone.jpg") == (40, 20)


def test_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for suffix in ("gif", "webp", "png"):
        frames[0].save(tmp_path / f"two.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
        assert open_image(tmp_path / f"two.{suffix}").getpixel((4, 4)) == pytest.approx((255, 0, 0), abs=2)


def png(width, height, data=b"", kind=2):
    """A PNG of that size in its header with `data` as its compressed pixels."""
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width, height", [(20_000, 20_000), (8_000, 6_251), (2**31 - 1, 2**31 - 1)])
def test_bomb_is_refused_by_its_header(tmp_path, width, height, recwarn):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height, zlib.compress(bytes(2**22), 9)))
    assert width * height > MAX_DECODED_PIXELS
    for function in (image_size, open_image):
        with pytest.raises(UserError, match="bomb.png"):
            function(path)
    assert not recwarn.list


def test_pixels_of_an_object_are_bounded_too():
    with pytest.raises(UserError, match="pixels"):
        open_image(Image.new("1", (10_000, 5_001)))


def test_large_file_is_refused(tmp_path):
    path = tmp_path / "large.png"
    with open(path, "wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(UserError, match="large.png is .* bytes"):
        image_size(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp"])
def test_every_cut_and_every_flip_is_a_picture_or_a_sentence(tmp_path, suffix):
    """No cut is silently completed with grey, no damaged byte is a traceback."""
    noise = numpy.random.default_rng(1).integers(0, 256, (24, 32, 3), dtype=numpy.uint8)
    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"damaged.{suffix}"
    Image.fromarray(noise).save(whole)
    content = whole.read_bytes()
    for end in range(0, len(content) // 2, 7):
        path.write_bytes(content[:end])
        with pytest.raises(UserError, match="damaged"):
            open_image(path)
    rng = numpy.random.default_rng(2)
    for _ in range(200):
        flipped = bytearray(content)
        for position in rng.integers(0, min(len(content), 200), 3):
            flipped[position] = rng.integers(256)
        path.write_bytes(flipped)
        try:
            assert open_image(path).mode == "RGB"
        except UserError as error:
            assert "damaged" in str(error)


@pytest.mark.parametrize("content", [
    b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"II*\0\x08\0\0\0", b"\x89PNG\r\n\x1a\n", b"<svg xmlns=''/>",
])
def test_other_formats_are_refused(tmp_path, content):
    (tmp_path / "odd.png").write_bytes(content)
    with pytest.raises(UserError, match="odd.png"):
        open_image(tmp_path / "odd.png")


def test_not_a_file(tmp_path):
    for path in (tmp_path, tmp_path / "absent.png", "/dev/zero"):
        with pytest.raises(UserError, match="not a file"):
            open_image(path)


def test_real_screenshots():
    for path in sorted(shared("samples").glob("*/*.[jp][pn]g")):
        assert open_image(path).size == image_size(path)


# ---- parts of pictures, and pictures inside rows -------------------------------------------------------------------

def test_a_fragment_is_a_part_of_a_picture(tmp_path):
    page = Image.effect_noise((60, 200), 90).convert("RGB")
    page.save(tmp_path / "page.png")
    name = f"{tmp_path / 'page.png'}#xywh=10,120,40,80"
    assert image_size(name) == (40, 80)
    assert open_image(name).tobytes() == page.crop((10, 120, 50, 200)).tobytes()
    found, size = find_image("page.png#xywh=10,120,40,80", str(tmp_path), str(tmp_path), False)
    assert (found, size) == (name, (40, 80))
    assert find_image("page.png", str(tmp_path), str(tmp_path), False) == (str(tmp_path / "page.png"), (60, 200))


@pytest.mark.parametrize("part", ["10,120,51,80", "10,121,40,80", "0,0,0,5", "60,0,1,1"])
def test_a_part_outside_its_picture_is_refused(tmp_path, part):
    Image.new("RGB", (60, 200)).save(tmp_path / "page.png")
    name = f"{tmp_path / 'page.png'}#xywh={part}"
    for function in (image_size, open_image, lambda name: find_image(name, str(tmp_path), str(tmp_path), False)):
        with pytest.raises(UserError, match="page.png is 60 x 200, which has no part #xywh="):
            function(name)


def test_a_name_that_only_resembles_a_fragment_is_a_file(tmp_path):
    for name in ("a#xywh=1.png", "b#xywh=0,0,1,1.png"):
        Image.new("RGB", (7, 5)).save(tmp_path / name)
        assert image_size(tmp_path / name) == open_image(str(tmp_path / name)).size == (7, 5)


def data_url(image, kind="png"):
    stream = BytesIO()
    image.save(stream, kind)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def test_a_data_url_is_a_picture(tmp_path):
    image = Image.effect_noise((30, 20), 90).convert("RGB")
    url = data_url(image)
    assert image_size(url) == (30, 20) and open_image(url).tobytes() == image.tobytes()
    assert find_image(url, str(tmp_path), str(tmp_path), False) == (url, (30, 20))
    assert open_image(url + "#xywh=5,5,10,10").tobytes() == image.crop((5, 5, 15, 15)).tobytes()


@pytest.mark.parametrize("url, expected", [
    ("data:image/png;base64,iVBORw0", "base64|header is damaged"), ("data:image/png;base64,????", "not base64"),
    ("data:image/jpeg;base64,QUJD", "header is damaged"),
    (f"data:image/png;base64,{base64.b64encode(png(60_000, 60_000)).decode()}", "pixels"),
])
def test_a_bad_data_url_is_a_sentence(url, expected):
    for function in (image_size, open_image):
        with pytest.raises(UserError, match=expected) as caught:
            function(url)
        assert "a picture given as a data URL" in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("url", ["data:text/plain,hello", "data:image/png,abc", "http://host/a.png#xywh=0,0,1,1"])
def test_other_urls_are_not_fetched(tmp_path, url):
    with pytest.raises(UserError, match="is a URL; nothing is fetched"):
        find_image(url, str(tmp_path), str(tmp_path), False)
