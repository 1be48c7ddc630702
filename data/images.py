"""Pictures: opened safely, resized by Qwen's rule, cut into the patches that the vision tower takes.

A picture file is a stranger's file: size on disk and size in pixels are read from the header and bounded before a
single pixel is decoded, only five plain formats are tried, and whatever the decoder objects to becomes one sentence
that names the file. A PNG or JPEG whose end is missing is found before a run, without decoding the others. EXIF
orientation is NOT applied: the original Qwen, MiniCPM, CogAgent and Phi-3 code reads the stored pixels too, and boxes in
the rows are written for those. Header and end cost about 0.1 ms, an annotated screenshot (1330 x 1970) about 0.2 s and 63 MB
of patches. With --image_cache the resized picture stays on disk as a PNG.

A picture is a path, the bytes of a file, or a data URL (saved runs of agents hold those); "page.png#xywh=0,720,1280,720",
the notation of W3C's Media Fragments, is a part of a picture, cut out when it is opened.
"""

import base64
import hashlib
import io
import math
import os
import re
import shutil
import warnings
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import PIL
from PIL import Image

from data.boxes import Box
from data.errors import UserError

if TYPE_CHECKING:
    import torch

MAX_DECODED_PIXELS = 50_000_000  # 150 MB as RGB; a page of 1,280 x 7,412, which Mind2Web has, is 9.5 million
MAX_FILE_BYTES = 64 * 2**20
MAX_ASPECT_RATIO = 200
MAX_PATH = 4096  # letters; Linux opens none that is longer
FREE_BYTES = 2**30  # of the disk that the cache leaves alone
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
ENDS = {"PNG": b"IEND", "JPEG": b"\xff\xd9"}  # what a whole file ends with, perhaps with some bytes behind
TAIL_BYTES = 1024
FRAGMENT = re.compile(r"#xywh=(\d{1,6}),(\d{1,6}),(\d{1,6}),(\d{1,6})\Z")
DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,")


class OutsideRoot(UserError):
    """A picture lies outside the image root; `.folder` is the root that would admit it."""

    def __init__(self, message: str, folder: str):
        super().__init__(message)
        self.folder = folder


def find_image(name: str, root: str, data_folder: str, anywhere: bool) -> tuple[str, tuple[int, int]]:
    """(name with an absolute path, (width, height)) of the picture, or part of one, that a row names; see find_file."""
    if DATA_URL.match(name):
        return name, image_size(name)
    path, part = split_part(name)
    found, size = find_file(path, root, data_folder, anywhere)
    if part is None:
        return found, size
    return f"{found}{name[len(path):]}", check_part(part, size, _name(found))


def split_part(name: str | os.PathLike | bytes) -> tuple[str | bytes, tuple[int, int, int, int] | None]:
    """(name without its fragment, (left, top, width, height) of the part that the fragment asks for, or None)."""
    if isinstance(name, bytes):
        return name, None
    name = os.fspath(name)
    found = FRAGMENT.search(name)
    return (name[: found.start()], tuple(map(int, found.groups()))) if found else (name, None)


def check_part(part: tuple[int, int, int, int], size: tuple[int, int], name: str) -> tuple[int, int]:
    """(width, height) of a part. UserError unless it lies in a picture of that size."""
    left, top, width, height = part
    if not (width and height) or left + width > size[0] or top + height > size[1]:
        raise UserError(f"{name} is {size[0]} x {size[1]}, which has no part #xywh={left},{top},{width},{height}")
    return width, height


@lru_cache(maxsize=65536)  # many rows of a data set ask about one screenshot
def find_file(path: str, root: str, data_folder: str, anywhere: bool) -> tuple[str, tuple[int, int]]:
    """(absolute path, (width, height)) of a picture file that a row names; `root` and `data_folder` are real paths.

    A relative path starts from the root, else from the data file's folder, so that whatever an error proposes as root
    works for the same rows. Links are followed before the comparison: none leads out of the root. OutsideRoot, or
    UserError for a URL, a missing file, an unreadable header.
    """
    if path.startswith(("http://", "https://", "data:")):
        raise UserError(f"{path[:60]} is a URL; nothing is fetched while training, save the picture as a file")
    if "\0" in path or len(path) > MAX_PATH:
        raise UserError(f"{path[:60]!r} is not a path")
    targets = [os.path.realpath(os.path.join(base, path.removeprefix("file://"))) for base in (root, data_folder)]
    inside = [target for target in targets if anywhere or os.path.commonpath([root, target]) == root]
    found = next(filter(os.path.isfile, inside), None)
    if found:
        return found, image_size(found)
    if inside:
        raise UserError(f"no file {inside[0]} (relative paths start from --image_root, now {root})")
    target = next(filter(os.path.isfile, targets), targets[0])
    folder, gone = os.path.dirname(target), "" if os.path.isfile(target) else " (and there is no such file)"
    raise OutsideRoot(f"{target}{gone} is not below {root}; --image_root {folder} would admit it", folder)


def _name(source: str | os.PathLike | bytes) -> str:
    in_the_row = isinstance(source, bytes) or (isinstance(source, str) and DATA_URL.match(source))
    return "the row's own picture" if in_the_row else f"picture {source}"


def _decode_url(source: str | os.PathLike | bytes) -> str | os.PathLike | bytes:
    """The bytes that a data URL holds; another source as it is."""
    found = DATA_URL.match(source) if isinstance(source, str) else None
    try:
        return base64.b64decode(source[found.end() :], validate=True) if found else source
    except ValueError as error:
        raise UserError(f"{_name(source)} is a data URL that is not base64 ({error})") from None


def _open_header(source: str | os.PathLike | bytes) -> Image.Image:
    """The picture of a file, a file's bytes or a data URL with its header read and its size checked, no pixel decoded."""
    name, source = _name(source), _decode_url(source)
    in_memory = isinstance(source, bytes)
    if not in_memory and not os.path.isfile(source):  # also keeps pipes and devices out, which would never end
        raise UserError(f"{name} does not exist or is not a file")
    num_bytes = len(source) if in_memory else os.path.getsize(source)
    if num_bytes > MAX_FILE_BYTES:
        raise UserError(f"{name} is {num_bytes:,} bytes on disk, more than {MAX_FILE_BYTES:,}; save it smaller")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own, lower limit follows
            image = Image.open(io.BytesIO(source) if in_memory else source, formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise UserError(f"{name} is not one of {', '.join(FORMATS)}, or its header is damaged") from None
    except Exception as error:  # decoders meet hostile bytes with errors of every type
        raise UserError(f"{name} cannot be opened: {error}") from None
    try:
        _check_pixels(image, name)
    except UserError:
        image.close()
        raise
    return image


def _check_pixels(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_DECODED_PIXELS:
        raise UserError(f"{name} has {width} x {height} pixels, more than {MAX_DECODED_PIXELS:,}; save it smaller")


def image_size(source: str | os.PathLike | bytes | Image.Image) -> tuple[int, int]:
    """(width, height) in pixels from the header; only where the end of the file is missing is it decoded, to see whether it
    was cut short. UserError where open_image would refuse the one or the other."""
    if isinstance(source, Image.Image):
        return source.size
    file, part = split_part(source)
    with _open_header(file) as image:
        size, is_whole = image.size, _has_end(image)
    if not is_whole:
        open_image(file).close()
    return size if part is None else check_part(part, size, _name(file))


def _has_end(image: Image.Image) -> bool:
    """Whether an opened file ends as its format does; True where the format does not tell."""
    if image.format not in ENDS:
        return True
    image.fp.seek(0, os.SEEK_END)
    image.fp.seek(max(0, image.fp.tell() - TAIL_BYTES))
    return ENDS[image.format] in image.fp.read()


def picture_format(raw: bytes) -> str:
    """PNG, JPEG, WEBP, BMP or GIF: what a file's bytes are. UserError where open_image would refuse the header."""
    with _open_header(raw) as image:
        return image.format


def open_image(source: str | os.PathLike | bytes | Image.Image, over_white: bool = True) -> Image.Image:
    """A path, the bytes of a file, a data URL or a PIL picture as RGB: the first frame, its pixels as stored, the part
    that a fragment asks for, transparency laid over white or dropped.

    UserError (naming the file) if it is missing, too large, of another format, damaged or cut short.
    """
    if isinstance(source, Image.Image):
        _check_pixels(source, "a picture given as a PIL object")
        return _to_rgb(source, over_white)
    file, part = split_part(source)
    with _open_header(file) as image:
        if part is not None:
            check_part(part, image.size, _name(file))
        try:
            image.load()
            if part is not None:
                left, top, width, height = part
                image = image.crop((left, top, left + width, top + height))
            return _to_rgb(image, over_white)
        except Exception as error:
            raise UserError(f"{_name(file)} is damaged or cut short: {error}") from None


def open_resized(
    source: str | os.PathLike | bytes | Image.Image, sizes: list[tuple[int, int]], resample: Image.Resampling,
    over_white: bool = True, transpose: bool = False, cache: str | None = None,
) -> list[Image.Image]:
    """open_image(source), mirrored along its diagonal if asked, in each of the sizes (width, height).

    A file's results are kept as PNG in the folder `cache`, under the hash of the file's bytes and all else that they follow
    from. An entry that does not read is made again; none is added where the disk has less than FREE_BYTES left.
    """
    paths: list[str] = []
    if cache and not isinstance(source, Image.Image):
        image_size(source)  # its checks, before the file's bytes are read
        file, part = split_part(source)
        file = _decode_url(file)
        digest = hashlib.sha256(file if isinstance(file, bytes) else Path(file).read_bytes()).hexdigest()
        rule = f"{'-'.join(map(str, part))}-" if part else ""
        rule += f"{resample.name.lower()}{'-white' * over_white}{'-transposed' * transpose}-pillow{PIL.__version__}"
        paths = [os.path.join(cache, digest[:2], f"{digest}-{width}x{height}-{rule}.png") for width, height in sizes]
        kept = [_read_kept(path, size) for path, size in zip(paths, sizes, strict=True)]
        if all(kept):
            return kept
    image = open_image(source, over_white)
    if transpose:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    resized = [image.resize(size, resample) for size in sizes]
    for path, picture in zip(paths, resized, strict=False):
        _keep(picture, path)
    return resized


def _read_kept(path: str, size: tuple[int, int]) -> Image.Image | None:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            return image if image.mode == "RGB" and image.size == size else None
    except Exception:  # not there, or torn: it is made again
        return None


def _keep(image: Image.Image, path: str) -> None:
    """Write an entry of the cache whole or not at all; workers may write the same one at once."""
    part = f"{path}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if shutil.disk_usage(os.path.dirname(path)).free >= FREE_BYTES:
            image.save(part, "PNG", compress_level=1)
            os.replace(part, path)
    except OSError:  # a disk that refuses an entry costs time, not a row
        if os.path.exists(part):
            os.unlink(part)


def _to_rgb(image: Image.Image, over_white: bool) -> Image.Image:
    """Any mode as RGB. White below transparency is what transformers 5 and qwen_vl_utils do for Qwen; the code of
    MiniCPM-V, CogAgent and Phi-3 takes the stored colours and forgets the transparency."""
    if image.mode.startswith("I"):  # 16-bit grey: the high byte, where convert() would clip all but black to white
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if over_white and image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def cells(
    size: tuple[float, float], columns: int, rows: int, canvas: tuple[float, float] | None = None
) -> list[Box | None]:
    """The parts, as left, top, right, bottom, of a picture of this (width, height) that is cut into equal columns and rows,
    row by row. With a canvas (its width and height in the picture's pixels) that is cut instead, the picture in its middle;
    None for a part without picture."""
    across, down = canvas or size
    left, top = (size[0] - across) / 2, (size[1] - down) / 2
    xs = [min(max(left + across * x / columns, 0), size[0]) for x in range(columns + 1)]
    ys = [min(max(top + down * y / rows, 0), size[1]) for y in range(rows + 1)]
    parts = [(x0, y0, x1, y1) for y0, y1 in pairwise(ys) for x0, x1 in pairwise(xs)]
    return [part if part[0] < part[2] and part[1] < part[3] else None for part in parts]


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) that Qwen2-VL resizes a picture to: multiples of `factor`, min_pixels <= area <= max_pixels,
    the aspect ratio nearly kept. The rule of transformers' Qwen2VLImageProcessor (halves round to even; a sliver may
    exceed max_pixels). UserError if one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise UserError(f"a picture of {width} x {height} pixels is more than {MAX_ASPECT_RATIO} times as long as wide")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def patchify(
    image: Image.Image, patch_size: int, merge_size: int, temporal_patch_size: int, mean: Sequence[float], std: Sequence[float]
) -> tuple["torch.Tensor", tuple[int, int, int]]:
    """An RGB picture in the size of smart_resize as Qwen2-VL's patches: float32 (P, C * temporal_patch_size * patch_size^2)
    and its grid (1, h, w) in patches, P = h * w. The merge_size^2 patches that become one token lie next to each other.

    Bit-equal to transformers' processor: bytes resized bicubically by Pillow, / 255, minus mean, / std.
    """
    import numpy
    import torch

    pixels = numpy.asarray(image)  # (height, width, C) bytes
    rows, columns = image.height // patch_size, image.width // patch_size
    pixels = pixels.reshape(
        rows // merge_size, merge_size, patch_size, columns // merge_size, merge_size, patch_size, 3
    ).transpose(6, 0, 3, 1, 4, 2, 5).reshape(3, rows * columns, patch_size, patch_size)  # (C, P, patch, patch) bytes
    # A channel has 256 possible values: normalising those once and looking them up is exact, and the shuffling above
    # moves bytes instead of floats.
    levels = (numpy.arange(256) * (1 / 255)).astype(numpy.float32)
    patches = numpy.empty((rows * columns, 3, temporal_patch_size, patch_size, patch_size), numpy.float32)
    for channel in range(3):
        table = (levels - numpy.float32(mean[channel])) / numpy.float32(std[channel])
        patches[:, channel] = table[pixels[channel]][:, None]  # a still picture repeats itself in time
    return torch.from_numpy(patches.reshape(rows * columns, -1)), (1, rows, columns)
