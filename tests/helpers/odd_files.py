"""More than a hundred odd picture files, and what must become of each: the pixels that it shows, or a refusal."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

HEIGHT, WIDTH = 16, 24
RNG = np.random.default_rng(0)
LEVELS = RNG.integers(0, 65536, (HEIGHT, WIDTH, 4))  # of 16 bits
SHADES = (LEVELS // 257).astype(np.uint8)
RGB, RGBA, GRAY = SHADES[..., :3], SHADES, SHADES[..., 0]
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    6: lambda x: np.rot90(x, -1),
    8: lambda x: np.rot90(x),
}


class OddFile(NamedTuple):
    """One file.

    Args:
        name: its name, as bytes where that is no UTF-8.
        content: its bytes.
        shows: `[h, w]` or `[h, w, 3]`, 0 to 255, transparent pixels on white; None where it is enough that it is read.
        refusal: a part of the sentence that refuses it, or an empty text.
        tolerance: of the pixels.
    """

    name: str | bytes
    content: bytes
    shows: np.ndarray | None = None
    refusal: str = ""
    tolerance: float = 2.0


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(pixels: np.ndarray, **options) -> bytes:
    """A TIFF as tifffile writes it."""
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def plain_tiff(bits: int, photometric: int | None, body: bytes, samples: int = 1, order: str = "<", **tags) -> bytes:
    """An uncompressed TIFF of one strip with any tags, `t338=2`, that no library would write."""
    short, long = ("H", 3), ("I", 4)
    entries = {256: (long, [WIDTH]), 257: (long, [HEIGHT]), 258: (short, [bits] * samples), 259: (short, [1])}
    entries |= {277: (short, [samples]), 278: (long, [HEIGHT]), 279: (long, [len(body)]), 273: (long, [0])}
    if photometric is not None:
        entries[262] = (short, [photometric])
    for name, value in tags.items():
        entries[int(name[1:])] = (short, list(value) if isinstance(value, list | tuple) else [value])
    start = 8 + 2 + 12 * len(entries) + 4
    sizes = [struct.calcsize(code) * len(values) for (code, _), values in entries.values()]
    entries[273] = (long, [start + sum(size + size % 2 for size in sizes if size > 4)])
    table, data = b"", b""
    for tag, ((code, kind), values) in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(values)}{code}", *values)
        table += struct.pack(f"{order}HHI", tag, kind, len(values))
        if len(packed) <= 4:
            table += packed.ljust(4, b"\0")
        else:
            table += struct.pack(f"{order}I", start + len(data))
            data += packed + b"\0" * (len(packed) % 2)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(f"{order}IH", 8, len(entries)) + table + bytes(4) + data + body


def png(bits: int, color: int, values: np.ndarray, size: tuple[int, int] = (WIDTH, HEIGHT), **chunks: bytes) -> bytes:
    """A PNG of values `[h, w]` or `[h, w, c]` with chunks before its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + packed_bits(row.reshape(1, -1), bits) for row in values)
    header = struct.pack(">IIBBBBB", *size, bits, color, 0, 0, 0)
    extra = b"".join(chunk(kind.encode(), data) for kind, data in chunks.items())
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def packed_bits(values: np.ndarray, bits: int) -> bytes:
    """Values `[h, w]` of so many bits each, the highest first; every row begins with a byte."""
    ones = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(ones.astype(np.uint8).reshape(len(values), -1), axis=1).tobytes()


def on_white(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """What `[h, w, 3]` and an alpha `[h, w]` of 0 to 255 show."""
    share = alpha[..., None] / 255
    return colors * share + 255 * (1 - share)


def scaled(values: np.ndarray, top: int) -> np.ndarray:
    return values / top * 255


def tiffs() -> list[OddFile]:
    files = []
    for order, end in (("<", "little"), (">", "big")):
        for bits in (1, 2, 4, 8, 16):
            top = 2**bits - 1
            values = LEVELS[..., 0] & top
            body = values.astype(f"{order}u2").tobytes() if bits == 16 else packed_bits(values, bits)
            for photometric, name in ((1, "black"), (0, "white")):
                shows = scaled(values if photometric else top - values, top)
                refusal = "cannot read pixels of this kind" if (bits, photometric, end) == (16, 0, "big") else ""
                content = plain_tiff(bits, photometric, body, order=order)
                files.append(OddFile(f"{end}_{bits}_bits_{name}_is_zero.tif", content, shows, refusal))
        floats = tiff((GRAY / np.float32(255)).astype(f"{order}f4"), byteorder=order, photometric="minisblack")
        files.append(OddFile(f"{end}_float.tif", floats, GRAY))
        packed = tiff((GRAY / np.float32(255)).astype(f"{order}f4"), byteorder=order, compression="zlib")
        files.append(OddFile(f"{end}_float_deflate.tif", packed, GRAY))
        for depth, pixels in ((8, RGB), (16, RGB.astype("u2") * 257)):
            for planar in ("contig", "separate"):
                stored = pixels if planar == "contig" else np.ascontiguousarray(pixels.transpose(2, 0, 1))
                for packing in (None, "zlib"):
                    content = tiff(stored, photometric="rgb", planarconfig=planar, byteorder=order, compression=packing)
                    name = f"{end}_rgb_{depth}_{planar}_{packing}.tif"
                    files.append(OddFile(name, content, RGB))
    white_is_zero = tiff((1 - GRAY / np.float32(255)).astype("f4"), photometric="miniswhite")
    twelve = LEVELS[..., 0] >> 4
    palette = RNG.integers(0, 256, (256, 3))
    indexed = {tag: plain_tiff(8, 3, GRAY.tobytes(), t320=(palette.T * tag).ravel().tolist()) for tag in (257, 1)}
    tiles = tiff(RGB.transpose(2, 0, 1).copy(), photometric="rgb", planarconfig="separate", tile=(16, 16))
    cmyk = np.asarray(Image.fromarray(RGBA.copy(), "CMYK").convert("RGB"))
    lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    plain_color = Image.new("RGB", (WIDTH, HEIGHT), (200, 100, 50))
    alpha = RGBA[..., 3]
    files += [
        OddFile("float_white_is_zero.tif", white_is_zero, GRAY),
        OddFile("12_bits.tif", plain_tiff(12, 1, packed_bits(twelve, 12)), scaled(twelve, 4095)),
        OddFile(
            "palette.tif", plain_tiff(8, 3, GRAY.tobytes(), t320=(palette.T * 257).ravel().tolist()), palette[GRAY]
        ),
        OddFile("palette_8.tif", indexed[1], palette[GRAY]),
        OddFile("tiles_in_planes.tif", tiles, RGB),
        OddFile("cmyk.tif", plain_tiff(8, 5, RGBA.tobytes(), 4), cmyk),
        OddFile("lab.tif", saved(ImageCms.applyTransform(plain_color, lab), "TIFF"), np.asarray(plain_color), "", 4),
        OddFile("alpha.tif", plain_tiff(8, 2, RGBA.tobytes(), 4, t338=2), on_white(RGB, alpha)),
        OddFile("no_alpha.tif", plain_tiff(8, 2, RGBA.tobytes(), 4, t338=0), RGB),
        OddFile("bigtiff.tif", tiff(RGB, photometric="rgb", bigtiff=True), RGB),
        OddFile("fax.tif", saved(Image.fromarray(GRAY > 99), "TIFF", compression="group4"), (GRAY > 99) * 255),
        OddFile("lzw.tif", saved(Image.fromarray(RGB), "TIFF", compression="tiff_lzw"), RGB),
        OddFile("no_photometric.tif", plain_tiff(8, None, GRAY.tobytes()), None, "PhotometricInterpretation"),
        OddFile("signed_8.tif", plain_tiff(8, 1, GRAY.tobytes(), t339=2), None, "SampleFormat 2"),
        OddFile("signed_16.tif", tiff(GRAY.astype("i2")), None, "SampleFormat 2"),
        OddFile("fourth_channel.tif", plain_tiff(8, 2, RGBA.tobytes(), 4), None, "ExtraSamples"),
        OddFile("inks.tif", plain_tiff(8, 5, RGBA.tobytes(), 4, t332=2), None, "InkSet 2"),
        OddFile("inverted_inks.tif", plain_tiff(8, 5, RGBA.tobytes(), 4, t336=[255, 0]), None, "DotRange"),
        OddFile("ycbcr.tif", plain_tiff(8, 6, RGB.tobytes(), 3, t530=[1, 1]), None, "YCbCr"),
        OddFile("thumbnail.tif", plain_tiff(8, 1, GRAY.tobytes(), t254=1), None, "NewSubfileType 1"),
        OddFile("float64.tif", tiff(GRAY / 255), None, "cannot read pixels of this kind"),
        OddFile("float16.tif", tiff((GRAY / 255).astype("f2")), None, "cannot read pixels of this kind"),
        OddFile("five_bands.tif", plain_tiff(8, 1, np.dstack([RGBA, GRAY]).tobytes(), 5), None, "pixels of this kind"),
        OddFile("pages.tif", tiff(np.stack([GRAY, GRAY]), photometric="minisblack"), None, "several frames or pages"),
        OddFile("float_255.tif", tiff(GRAY.astype("f4")), None, "divide 0..255 by 255"),
        OddFile("float_minus.tif", tiff(GRAY / np.float32(128) - 1), None, "map [-1, 1]"),
        OddFile("nan.tif", tiff(np.where(GRAY[0, 0] == GRAY, np.nan, 0.5).astype("f4")), None, "NaN"),
        OddFile("int32.tif", tiff(LEVELS[..., 0].astype("i4") * 1000), None, "must lie in 0 ... 65535"),
        OddFile("int32_of_16_bits.tif", tiff(LEVELS[..., 0].astype("i4")), scaled(LEVELS[..., 0], 65535)),
    ]
    for orientation, turn in TURNS.items():
        content = tiff(RGB, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
        files.append(OddFile(f"turned_{orientation}.tif", content, turn(RGB)))
    return files


def pngs() -> list[OddFile]:
    files = []
    for bits in (1, 2, 4, 8, 16):
        top = 2**bits - 1
        values = LEVELS[..., 0] & top
        clear = int(values[0, 0])
        with_hole = np.where(values == clear, 255, scaled(values, top))
        files.append(OddFile(f"grey_{bits}.png", png(bits, 0, values), scaled(values, top)))
        files.append(OddFile(f"grey_{bits}_trns.png", png(bits, 0, values, tRNS=struct.pack(">H", clear)), with_hole))
        if bits < 16:
            palette, alpha = RNG.integers(0, 256, (top + 1, 3)), RNG.integers(0, 256, top + 1)
            stored = {"PLTE": palette.astype("u1").tobytes(), "tRNS": alpha.astype("u1").tobytes()}
            shows = on_white(palette[values], alpha[values])
            files.append(OddFile(f"palette_{bits}_trns.png", png(bits, 3, values, **stored), shows))
            stored.pop("tRNS")
            files.append(OddFile(f"palette_{bits}.png", png(bits, 3, values, **stored), palette[values]))
    gray_alpha = np.dstack([GRAY, RGBA[..., 3]])
    sixteen = png(16, 2, LEVELS[..., :3], tRNS=struct.pack(">3H", 1, 2, 3))
    text, turned = PngInfo(), Image.Exif()
    text.add_text("log", "x" * (2 << 20), zip=True)
    turned[274] = 6
    image = Image.fromarray(RGB)
    whole = png(8, 2, RGB)
    files += [
        OddFile("rgb_16.png", png(16, 2, LEVELS[..., :3]), scaled(LEVELS[..., :3], 65535)),
        OddFile("rgba_16.png", png(16, 6, LEVELS), on_white(LEVELS[..., :3] / 257, LEVELS[..., 3] / 257)),
        OddFile("rgb_16_trns.png", sixteen, None, "tRNS of 16-bit colours"),
        OddFile("grey_alpha.png", png(8, 4, gray_alpha), on_white(np.dstack([GRAY] * 3), RGBA[..., 3])),
        OddFile("rgba.png", png(8, 6, RGBA), on_white(RGB, RGBA[..., 3])),
        OddFile("short_palette.png", png(8, 3, GRAY, PLTE=bytes(30)), None, "palette lacks colours"),
        OddFile("long_text.png", saved(image, "PNG", pnginfo=text), RGB),
        OddFile("long_profile.png", saved(image, "PNG", icc_profile=b"0" * 3_000_000), RGB),
        OddFile("turned.png", saved(image, "PNG", exif=turned), np.rot90(RGB, -1)),
        OddFile("no_orientation.png", png(8, 2, RGB, eXIf=b"garbage"), RGB),
        OddFile("animated.png", saved(image, "PNG", save_all=True, append_images=[image.rotate(180)]), None, "frames"),
        OddFile("half.png", whole[: len(whole) // 2], None, "truncated or damaged"),
        OddFile("bad_sum.png", whole[:40] + bytes([whole[40] ^ 255]) + whole[41:], None, "truncated or damaged"),
        OddFile("header_only.png", png(8, 2, RGB[:0]), None, "truncated or damaged"),
        OddFile("giant.png", png(8, 2, RGB[:0], (20_000, 20_000)), None, "20000 x 20000 pixels are more than"),
        OddFile("tiny.png", saved(Image.new("L", (4, 4)), "PNG"), None, "4 x 4 pixels are too few"),
        OddFile("strip.png", saved(Image.new("L", (10, 400)), "PNG"), None, "too long a strip"),
        OddFile("longest.png", saved(Image.new("L", (256, 8), 7), "PNG"), np.full((8, 256), 7)),
    ]
    return files


def others() -> list[OddFile]:
    image, exif = Image.fromarray(RGB), Image.Exif()
    exif[274] = 8
    smooth = image.resize((4, 4)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    cmyk = Image.new("CMYK", (WIDTH, HEIGHT), (0, 255, 255, 0))
    red = np.full((HEIGHT, WIDTH, 3), (255, 0, 0))
    clear = RGBA.copy()
    clear[..., 3] = 0
    frames = {"save_all": True, "append_images": [image.rotate(180)]}
    files = []
    for magic, top in (("P5", 1), ("P5", 100), ("P5", 4095), ("P5", 65535), ("P2", 4095), ("P6", 15), ("P6", 4095)):
        values = LEVELS[..., :3] % (top + 1)
        values = values if magic == "P6" else values[..., 0]
        body = values.astype(">u2" if top > 255 else "u1").tobytes()
        body = " ".join(map(str, values.ravel())).encode() if magic == "P2" else body
        suffix = "ppm" if magic == "P6" else "pgm"
        content = f"{magic}\n{WIDTH} {HEIGHT}\n{top}\n".encode() + body
        files.append(OddFile(f"{magic}_{top}.{suffix}", content, scaled(values, top)))
    bmp = np.ascontiguousarray(clear[::-1][..., [2, 1, 0, 3]]).tobytes()
    header = struct.pack("<IHHI", 122 + len(bmp), 0, 0, 122)
    header += struct.pack("<IiiHHIIiiII", 108, WIDTH, HEIGHT, 1, 32, 3, len(bmp), 0, 0, 0, 0)
    header += struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + bytes(52)
    jpeg = saved(smooth, "JPEG", quality=95)
    webp = saved(Image.fromarray(RGBA), "WEBP", lossless=True, exact=True)
    return files + [
        OddFile("bitmap.pnm", b"P4\n24 16\n" + np.packbits(GRAY > 99, axis=1).tobytes(), (GRAY <= 99) * 255),
        OddFile("float.pgm", saved(Image.fromarray(GRAY / np.float32(255)), "PPM"), GRAY),
        OddFile("plain.bmp", saved(image, "BMP"), RGB),
        OddFile("palette.bmp", saved(image.quantize(16), "BMP"), np.asarray(image.quantize(16).convert("RGB"))),
        OddFile("no_transparency.bmp", b"BM" + header + bmp, RGB),
        OddFile("grey.jpg", saved(smooth.convert("L"), "JPEG", quality=95), np.asarray(smooth.convert("L")), "", 8),
        OddFile("photo.jpeg", jpeg, np.asarray(smooth), "", 30),
        OddFile("photo.jfif", jpeg, np.asarray(smooth), "", 30),
        OddFile("photo.JPE", jpeg, np.asarray(smooth), "", 30),
        OddFile("turned.jpg", saved(smooth, "JPEG", quality=95, exif=exif), np.rot90(np.asarray(smooth)), "", 30),
        OddFile("cmyk.jpg", saved(cmyk, "JPEG"), red, "", 8),
        OddFile("phone.jpg", saved(smooth, "MPO", save_all=True, append_images=[smooth]), np.asarray(smooth), "", 60),
        OddFile("half.jpg", jpeg[: len(jpeg) // 2], None, "truncated or damaged"),
        OddFile("start.jpg", jpeg[:2] + b"\xff", None, "truncated or damaged"),
        OddFile("grey_16.jp2", saved(Image.fromarray(LEVELS[..., 0].astype("u2")), "JPEG2000"), LEVELS[..., 0] / 257),
        OddFile("alpha.jp2", saved(Image.fromarray(RGBA), "JPEG2000"), on_white(RGB, RGBA[..., 3])),
        OddFile("alpha.webp", webp, on_white(RGB, RGBA[..., 3])),
        OddFile("animated.webp", saved(image, "WEBP", **frames), None, "several frames"),
        OddFile("half.webp", saved(image, "WEBP", lossless=True)[:200], None, "truncated or damaged"),
        OddFile("photo.avif", saved(smooth, "AVIF", quality=95), np.asarray(smooth), "", 40),
        OddFile("plain.gif", saved(image.quantize(16), "GIF"), np.asarray(image.quantize(16).convert("RGB"))),
        OddFile("animated.gif", saved(image, "GIF", **frames), None, "several frames"),
        OddFile("half.gif", saved(image.quantize(16), "GIF")[:150], None, "truncated or damaged"),
        OddFile("empty.png", b"", None, "0 bytes"),
        OddFile("page.png", b"<!DOCTYPE html><html>", None, "an HTML page"),
        OddFile("pointer.png", b"version https://git-lfs.github.com/spec/v1\n", None, "run git lfs pull"),
        OddFile("archive.jpg", b"PK\3\4" + bytes(99), None, "a zip archive"),
        OddFile("heic.jpg", b"\0\0\0\x18ftypheic\0\0", None, "a HEIC photo"),
        OddFile("array.png", b"\x93NUMPY\x01\0v\0", None, "a NumPy array"),
        OddFile("noise.bmp", bytes(range(128, 256)) * 3, None, "unknown data"),
        OddFile("bm.bmp", b"BM" + bytes(60), None, "truncated or damaged"),
        OddFile("ii.tif", b"II*\0" + bytes(60), None, "truncated or damaged"),
        OddFile("wrong suffix.png", saved(image, "BMP"), RGB),
    ]


def odd_names() -> list[OddFile]:
    """Names that somewhere become something else: an option, a pattern, markup, a line, a path, bytes."""
    names: list[str | bytes] = [
        "-x.png", "[a].png", "a*.png", "~.png", "a b.png", "%s.png", "{0}.png", "#1.png", "a,b.png", "'.png", "a:b.png",
        "größe.png", "gro\u0308ße.png", "日本.png", "🙂.png", "a\nb.png", "A.PNG", "a..png",
        f"{'n' * 200}.png", b"M\xfcnchen.png",
    ]  # fmt: skip
    images = [np.roll(RGB, index + 1, axis=0 if index % 2 else 1) for index in range(len(names))]
    return [OddFile(name, png(8, 2, image), image) for name, image in zip(names, images)]


def write_odd_files(folder: Path) -> dict[str, OddFile]:
    """Write them all, with a link to nothing and one to itself, and name them as `os` does."""
    folder.mkdir(parents=True)
    written = {}
    for file in [*tiffs(), *pngs(), *others(), *odd_names()]:
        name = os.fsdecode(file.name)
        assert name not in written, name
        (folder / name).write_bytes(file.content)
        written[name] = file
    for name, target in (("nowhere.png", "not here"), ("itself.png", "itself.png")):
        (folder / name).symlink_to(folder / target)
        written[name] = OddFile(name, b"", None, "no such file" if name == "nowhere.png" else "cannot be read")
    return written
