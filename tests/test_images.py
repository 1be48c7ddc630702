"""Pictures: Qwen's preprocessing against its stored tensors and against transformers, and hostile files."""

import base64
import json
import shutil
import struct
import zlib
from io import BytesIO

import numpy
import pytest
from conftest import REFERENCE, shared
from PIL import Image

from data.errors import UserError
from data.images import (
    FREE_BYTES,
    MAX_DECODED_PIXELS,
    MAX_FILE_BYTES,
    find_image,
    image_size,
    open_image,
    open_resized,
    patchify,
    smart_resize,
)
from model.family import Options
from model.tiny import write_tiny

FAMILIES = ["qwen2_5_vl", "minicpm_v", "cogagent", "phi3_vision"]
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
            image = open_image(folder / "images" / f"{name}.png")
            factor = config["patch_size"] * config["merge_size"]
            height, width = smart_resize(image.height, image.width, factor, config["min_pixels"], config["max_pixels"])
            patches, grid = patchify(image.resize((width, height)), config["patch_size"], config["merge_size"],
                                     config["temporal_patch_size"], config["image_mean"], config["image_std"])
            assert (patches - golden.get_tensor(f"image.{name}.pixel_values")).abs().max() == 0
            assert list(grid) == golden.get_tensor(f"image.{name}.image_grid_thw")[0].tolist()


@pytest.mark.parametrize("size", [(333, 517), (28, 28), (1000, 40), (9, 900)])
def test_patches_equal_transformers(size):
    processor_module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    noise = numpy.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=numpy.uint8)
    for image in (Image.fromarray(noise[..., :3]), Image.fromarray(noise, "RGBA")):
        processor = processor_module.Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=100_352)
        theirs = processor(image, return_tensors="pt")
        height, width = smart_resize(image.height, image.width, 28, 3136, 100_352)
        patches, grid = patchify(open_image(image).resize((width, height)), 14, 2, 2, **CLIP)
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


def deep_png(kind, num_channels):
    """A PNG of 16 bits a channel: of grey (0), colour (2), grey with alpha (4), colour with alpha (6)."""
    values = numpy.random.default_rng(kind).integers(0, 65536, (12, 16, num_channels)).astype(">u2")
    return png(16, 12, zlib.compress(b"".join(b"\0" + row.tobytes() for row in values)), kind, depth=16)


@pytest.fixture(scope="module")
def pictures_of_every_kind(tmp_path_factory):
    """Paths of pictures in all modes and formats, animated ones too."""
    folder = tmp_path_factory.mktemp("kinds")
    noise = numpy.random.default_rng(0).integers(0, 256, (12, 16, 4), dtype=numpy.uint8)
    rgba, rgb, grey = Image.fromarray(noise), Image.fromarray(noise[..., :3]), Image.fromarray(noise[..., 0])
    palette = rgb.quantize(16)
    files = {
        "rgb.png": (rgb, {}), "rgba.png": (rgba, {}), "rgba.webp": (rgba, dict(lossless=True)), "rgb.bmp": (rgb, {}),
        "rgba.bmp": (rgba, {}), "l.png": (grey, {}), "la.png": (Image.fromarray(noise[..., :2], "LA"), {}),
        "1.png": (grey.convert("1"), {}), "p.png": (palette, {}), "p.bmp": (palette, {}), "p.gif": (palette, {}),
        "p-transparent.png": (palette, dict(transparency=3)), "p-transparent.gif": (palette, dict(transparency=2)),
        "p-translucent.png": (palette, dict(transparency=bytes(range(0, 256, 16)))),
        "l-transparent.png": (grey, dict(transparency=int(noise[0, 0, 0]))),
        "rgb-transparent.png": (rgb, dict(transparency=tuple(map(int, noise[0, 0, :3])))),
        "cmyk.jpg": (Image.fromarray(noise, "CMYK"), {}), "l.jpg": (grey, {}),
        "frames.gif": (palette, dict(save_all=True, append_images=[rgb.rotate(180).quantize(16)])),
        "frames.webp": (rgba, dict(save_all=True, append_images=[rgba.rotate(180)], lossless=True)),
        "frames.png": (rgba, dict(save_all=True, append_images=[rgba.rotate(180)])),
    }
    for name, (image, settings) in files.items():
        image.save(folder / name, **settings)
    for name, kind, num_channels in (("rgb16.png", 2, 3), ("la16.png", 4, 2), ("rgba16.png", 6, 4)):
        (folder / name).write_bytes(deep_png(kind, num_channels))
    return sorted(folder.iterdir())


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_picture_is_seen_as_the_makers_code_sees_it(tmp_path, pictures_of_every_kind, name):
    """Theirs convert("RGB") and resize; only transformers 5 lays transparency over white, for Qwen. 16-bit grey is our own
    rule: the high byte, where convert() clips all but black to white."""
    from transformers.image_transforms import convert_to_rgb

    family = write_tiny(name, tmp_path / "tiny")
    for path in pictures_of_every_kind:
        with Image.open(path) as image:
            rgb = convert_to_rgb(image) if name == "qwen2_5_vl" else image.convert("RGB")
        theirs, ours = family.picture(rgb), family.picture(str(path))
        assert theirs[1] == ours[1] == family.picture_positions(*image_size(path)), path.name
        assert all((tensor == ours[0][key]).all() for key, tensor in theirs[0].items()), path.name


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


def test_later_frames_are_never_looked_for(tmp_path):
    """A film as large as a picture file may be costs one frame: what follows the first is not even read as a header."""
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    content = (tmp_path / "film.gif").read_bytes()
    second = content.index(b"\x21\xf9", content.index(b"\x2c"))  # the control block behind the first frame
    (tmp_path / "film.gif").write_bytes(content[:second] + b"\x2c" + b"\xff" * 100)
    assert open_image(tmp_path / "film.gif").size == (8, 8)


def png(width, height, data=b"", kind=2, depth=8):
    """A PNG of that size in its header with `data` as its compressed pixels."""
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
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


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_whole_picture_is_not_decoded_to_know_its_size(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"page.{suffix}"
    Image.new("RGB", (32, 24), "teal").save(path)
    whole = path.read_bytes()
    monkeypatch.setattr("data.images.open_image", lambda *_: pytest.fail("decoded"))
    for behind in (b"", b"\0" * 500):
        path.write_bytes(whole + behind)
        assert image_size(path) == image_size(path.read_bytes()) == (32, 24)
    monkeypatch.undo()
    path.write_bytes(whole + b"\0" * 5000)  # what it then takes to tell it from one that was cut
    assert image_size(path) == (32, 24)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp"])
def test_every_cut_and_every_flip_is_a_picture_or_a_sentence(tmp_path, suffix):
    """No cut is silently completed with grey, no damaged byte is a traceback."""
    noise = numpy.random.default_rng(1).integers(0, 256, (24, 32, 3), dtype=numpy.uint8)
    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"damaged.{suffix}"
    Image.fromarray(noise).save(whole)
    content, pixels = whole.read_bytes(), open_image(whole).tobytes()
    for end in range(0, len(content), 3):
        path.write_bytes(content[:end])
        try:
            assert open_image(path).tobytes() == pixels  # a PNG lacks its last mark alone
            assert len(content) - end <= 20
            assert image_size(path) == (32, 24)
        except UserError as error:
            assert "damaged" in str(error)
            if suffix in ("png", "jpg"):  # seen before a run, without a pixel decoded of whole files
                with pytest.raises(UserError, match="damaged"):
                    image_size(path)
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


# ---- the cache ------------------------------------------------------------------------------------------------------


def entries(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def screens(tmp_path_factory):
    """Wide, tall and small pictures; as screenshots have it, flat areas and detail."""
    folder, rng = tmp_path_factory.mktemp("screens"), numpy.random.default_rng(3)
    for name, (width, height) in {"wide.png": (331, 140), "tall.jpg": (120, 450), "small.webp": (31, 40)}.items():
        pixels = numpy.full((height, width, 3), 200, numpy.uint8)
        pixels[height // 3 :, width // 2 :] = rng.integers(0, 256, 3)
        pixels[: height // 2, : width // 4] = rng.integers(0, 256, (height // 2, width // 4, 3))
        Image.fromarray(pixels).save(folder / name)
    Image.new("RGBA", (60, 50), (250, 0, 0, 99)).save(folder / "translucent.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_cache_changes_no_bit(tmp_path, screens, name):
    family = write_tiny(name, tmp_path / "tiny")
    plain = [family.picture(str(path)) for path in screens]
    family.options = Options(image_cache=str(tmp_path / "cache"))
    for _ in range(2):  # written, then read
        for path, (tensors, num_positions) in zip(screens, plain, strict=True):
            cached, positions = family.picture(str(path))
            assert positions == num_positions and all((cached[key] == tensor).all() for key, tensor in tensors.items())
    assert len(entries(tmp_path / "cache")) >= len(screens)


def open_cached(path, cache, sizes=((20, 30),), **rules):
    (image,) = open_resized(path, list(sizes), Image.Resampling.BICUBIC, cache=str(cache), **rules)
    return image


def test_the_cache_is_read_and_goes_by_content(tmp_path, screens, monkeypatch):
    first = open_cached(screens[0], tmp_path / "cache")
    copy = tmp_path / "copy.png"
    copy.write_bytes(screens[0].read_bytes())
    monkeypatch.setattr("data.images.open_image", lambda *arguments: pytest.fail("decoded again"))
    assert open_cached(copy, tmp_path / "cache").tobytes() == first.tobytes()
    monkeypatch.undo()
    Image.new("RGB", (90, 90), "blue").save(copy)  # the same name with other content
    assert open_cached(copy, tmp_path / "cache").getpixel((5, 5)) == (0, 0, 255)


def test_each_rule_has_an_entry_of_its_own(tmp_path, screens):
    path = next(path for path in screens if path.stem == "translucent")
    for rules in ({}, {"over_white": False}, {"sizes": [(30, 20)]}, {"transpose": True}):
        assert open_cached(path, tmp_path, **rules).size == rules.get("sizes", [(20, 30)])[0]
    assert len(entries(tmp_path)) == 4


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[: len(content) // 2],
                                    lambda content: bytes(len(content)), lambda content: png(20, 31, b"")])
def test_a_damaged_entry_is_made_again(tmp_path, screens, damage):
    whole = open_cached(screens[0], tmp_path)
    (entry,) = entries(tmp_path)
    content = entry.read_bytes()
    entry.write_bytes(damage(content))
    assert open_cached(screens[0], tmp_path).tobytes() == whole.tobytes()
    assert entry.read_bytes() == content and entries(tmp_path) == [entry]


def test_the_cache_leaves_room_on_the_disk(tmp_path, screens, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("data.images.shutil.disk_usage", lambda path: usage._replace(free=FREE_BYTES - 1))
    assert open_cached(screens[0], tmp_path).size == (20, 30) and entries(tmp_path) == []


def test_a_cache_that_refuses_an_entry_costs_no_row(tmp_path, screens):
    (tmp_path / "file").write_text("in the way")
    assert open_cached(screens[0], tmp_path / "file").size == (20, 30)


def test_the_cache_checks_a_file_before_reading_it(tmp_path):
    for content in (b"hello", png(20_000, 20_000)):
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(UserError, match="x.png"):
            open_cached(tmp_path / "x.png", tmp_path / "cache")


def test_the_cache_tells_parts_of_a_picture_apart(tmp_path, screens):
    path, url = screens[-1], data_url(Image.open(screens[-1]).convert("RGB"))
    for source in (f"{path}#xywh=0,0,60,90", f"{path}#xywh=9,0,60,90", url, url + "#xywh=0,0,60,90"):
        plain = open_resized(source, [(20, 30)], Image.Resampling.BICUBIC)[0].tobytes()
        assert [open_cached(source, tmp_path).tobytes() for _ in range(2)] == [plain] * 2
    assert len(entries(tmp_path)) == 3  # the url holds the file's own bytes


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
    ("data:image/png;base64,iVBORw0", "not base64|header is damaged"), ("data:image/png;base64,????", "not base64"),
    ("data:image/jpeg;base64,QUJD", "header is damaged"),
    (f"data:image/png;base64,{base64.b64encode(png(60_000, 60_000)).decode()}", "pixels"),
])
def test_a_bad_data_url_is_a_sentence(url, expected):
    for function in (image_size, open_image):
        with pytest.raises(UserError, match=expected) as caught:
            function(url)
        assert "the row's own picture" in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("url", ["data:text/plain,hello", "data:image/png,abc", "http://host/a.png#xywh=0,0,1,1"])
def test_other_urls_are_not_fetched(tmp_path, url):
    with pytest.raises(UserError, match="is a URL; nothing is fetched"):
        find_image(url, str(tmp_path), str(tmp_path), False)
