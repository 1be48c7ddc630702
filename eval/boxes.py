"""The arithmetic on boxes, and drawing them; data/boxes.py reads them out of text.

What the numbers count (pixels, or thousandths of the picture) does not matter here: answer and label are read alike.
"""

from PIL import Image, ImageDraw

from data.boxes import Box


def centre(box: Box) -> tuple[float, float]:
    """The point in the middle of a box."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def holds(box: Box, point: tuple[float, float]) -> bool:
    """Whether a point lies in a box, its edge included."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def intersection_over_union(a: Box, b: Box) -> float:
    """Shared area / joint area, in [0, 1]; 0 where neither box has an area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    joint = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - shared
    return shared / joint if joint else 0.0


def draw_boxes(picture: Image.Image, boxes: list[Box], scale: tuple[float, float]) -> Image.Image:
    """A copy of the picture with the boxes in red, points as discs; scale is (x, y) pixels a unit of the boxes."""
    copy = picture.convert("RGB")
    pen, line = ImageDraw.Draw(copy), max(2, max(copy.size) // 400)
    for x1, y1, x2, y2 in boxes:
        corners = (x1 * scale[0], y1 * scale[1], x2 * scale[0], y2 * scale[1])
        if (x1, y1) == (x2, y2):
            pen.circle(corners[:2], 2 * line, fill="red")
        else:
            pen.rectangle(corners, outline="red", width=line)
    return copy
