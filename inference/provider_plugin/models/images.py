"""Which images a model's server can read, judged before it is asked. Without the SDK, so that it is tested without."""

import base64
import binascii
import io

import imagesize

# What every server's image library reads, by how its files begin. Dify also lets people send SVG, which none reads.
READABLE = {
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "JPEG": (b"\xff\xd8\xff",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "WebP": (b"RIFF",),
    "BMP": (b"BM",),
}
# Pillow, which decodes for vLLM and SGLang, takes more than this for an attack on the memory.
MOST_PIXELS = 178_956_970


class ImageProblem(ValueError):
    """An image that cannot be asked about; the text says why and what to do."""


def size(content: bytes) -> tuple[int, int]:
    """Width and height in pixels; (-1, -1) where they cannot be read."""
    try:
        width, height = imagesize.get(io.BytesIO(content))
    except ValueError:
        return -1, -1
    return width, height


def estimate(encoded: str) -> int:
    """About how many tokens an image (base64) takes, as Kimi-VL counts: one for 28 x 28 pixels, at most 1024."""
    try:
        width, height = size(base64.b64decode(encoded))
    except binascii.Error:
        return 0
    return min(1024, -(-width // 28) * -(-height // 28)) if width > 0 and height > 0 else 1024


def check(encoded: str, name: str) -> None:
    """Raises ImageProblem unless `encoded` (base64) is an image that a server can read; `name` is for people."""
    try:
        content = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        raise ImageProblem(f"{name} arrived damaged (it is no base64). Upload it again.") from None
    if not any(content.startswith(begins) for begins in READABLE.values()):
        kind = "an SVG drawing" if b"<svg" in content[:1000] else "in a format that model servers don't read"
        raise ImageProblem(f"{name} is {kind}. Send it as PNG, JPEG, WebP or GIF.")
    width, height = size(content)
    if width < 1 or height < 1:
        raise ImageProblem(f"{name} is damaged: its size cannot be read. Save it anew and send it again.")
    if width * height > MOST_PIXELS:
        megapixels = MOST_PIXELS // 1_000_000
        raise ImageProblem(
            f"{name} has {width} x {height} pixels; model servers read at most {megapixels} million. Make it smaller."
        )
