"""Build and read the compressed canonical archive with nothing but struct.

The tests' own idea of it: it never imports vma_tool, and it can make frames without a zstd library:
of raw blocks, which every decoder reads, with neither compression nor checksum. The header of an
extent that stores blocks is in such a frame in every archive.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from tests.archives import (
    ALIGNS,
    BLOCK,
    CANONICAL_UUID,
    CLUSTER,
    DEFAULT_ALIGN,
    EXTENT_HEADER,
    Archive,
    Device,
    clusters_per_extent,
    extent_bytes,
    extent_offsets,
    header_bytes,
    slots,
)

PIECE = 1 << 20
RUN = 1024  # extents that store nothing, whose headers share a frame at most
BLOCK_MAX = 128 << 10  # bytes in a block of a zstd frame
ZSTD_MAGIC = 0xFD2FB528
INDEX_MAGIC = 0x184D2A5D
TABLE_MAGIC = 0x184D2A5E
SEEKABLE_MAGIC = 0x8F92EAB1


class Seekable(NamedTuple):
    """A compressed archive: its frames, the size of what each holds, the index's zstd frame."""

    frames: list[bytes]
    sizes: list[int]
    masks: bytes


def raw_frame(data: bytes) -> bytes:
    """Return a zstd frame of raw blocks that tells its content size."""
    frame = struct.pack("<IBI", ZSTD_MAGIC, 0b10100000, len(data))
    for start in range(0, len(data) or 1, BLOCK_MAX):
        block = data[start : start + BLOCK_MAX]
        last = start + BLOCK_MAX >= len(data)
        frame += struct.pack("<I", len(block) << 3 | last)[:3] + block
    return frame


def header_frame(data: bytes) -> bytes:
    """Return the frame of the header of an extent that stores blocks: 522 bytes, as it is.

    It has a content size of two bytes, which stands for 256 more, and no checksum.
    """
    frame = struct.pack("<IBH", ZSTD_MAGIC, 0b01100000, len(data) - 256)
    return frame + struct.pack("<I", len(data) << 3 | 1)[:3] + data


def repeated_frame(byte: int, size: int) -> bytes:
    """Return a zstd frame of one byte, repeated: a few bytes for each block."""
    blocks = [min(BLOCK_MAX, size - start) for start in range(0, size, BLOCK_MAX)]
    headers = (count << 3 | 1 << 1 | (i == len(blocks) - 1) for i, count in enumerate(blocks))
    body = b"".join(struct.pack("<I", header)[:3] + bytes([byte]) for header in headers)
    return struct.pack("<IBI", ZSTD_MAGIC, 0b10100000, size) + body


def repeated_archive(size: int) -> bytes:
    """Return a compressed archive of a disk of size bytes, all of them 0xFF, in little memory."""
    align = ALIGNS[DEFAULT_ALIGN]
    count = clusters_per_extent(align)
    archive = Archive([Device(1, "drive-scsi0", b"", size)], [], uuid=CANONICAL_UUID)
    header = header_bytes(archive, align)
    made, sizes = [raw_frame(header)], [len(header)]
    clusters = size // CLUSTER
    payload = {n: repeated_frame(0xFF, n * CLUSTER) for n in range(1, count + 1)}
    for first in range(0, clusters, count):
        infos = [(0xFFFF, 1, number) for number in range(first, min(first + count, clusters))]
        blocks = [b""] * (16 * len(infos))
        made += [header_frame(extent_bytes(CANONICAL_UUID, infos, blocks)), payload[len(infos)]]
        sizes += [EXTENT_HEADER, len(infos) * CLUSTER]
    return join(Seekable(made, sizes, repeated_frame(0xFF, 2 * clusters)))


def skippable(magic: int, data: bytes) -> bytes:
    return struct.pack("<II", magic, len(data)) + data


class Piece(NamedTuple):
    """What a frame holds; `stored`: the header of an extent with data, which stays as it is."""

    data: bytes
    stored: bool


def cuts(plain: bytes) -> Iterator[int]:
    """Yield the lengths of the pieces that a plain canonical archive is cut into."""
    yield from (len(piece.data) for piece in pieces(plain))


def pieces(plain: bytes) -> Iterator[Piece]:
    """Yield the pieces of a plain canonical archive, or of a difference, which has longer extents.

    The headers of consecutive extents that store nothing are one piece, as long as they are of one
    device and the number of each among its device's, divided by 1,024, is the same.
    """
    start = 0
    for size, stored in _cuts(plain):
        yield Piece(plain[start : start + size], stored)
        start += size


def _cuts(plain: bytes) -> Iterator[tuple[int, bool]]:
    (header_size,) = struct.unpack_from(">I", plain, 56)
    for start in range(0, header_size, PIECE):
        yield min(PIECE, header_size - start), False
    run, run_place, seen = 0, (0, 0), dict.fromkeys(range(256), 0)
    for offset in extent_offsets(plain):
        clusters = slots(plain, offset)
        dev_id = clusters[0].dev_id if clusters else 0
        place = dev_id, seen[dev_id] // RUN
        seen[dev_id] += 1
        # Of an unused slot, only the dev_id says something.
        blocks = [bin(slot.mask).count("1") if slot.dev_id else 0 for slot in clusters]
        if run and (any(blocks) or place != run_place):
            yield run, False
            run = 0
        if any(blocks):
            yield EXTENT_HEADER, True
            for first in (0, 16, 32, 48):
                count = sum(blocks[first : first + 16])
                if count:
                    yield count * BLOCK, False
        else:
            run += EXTENT_HEADER
        run_place = place
    if run:
        yield run, False


def masks(plain: bytes) -> bytes:
    """Return what the index holds: all clusters' masks, in the archive's order."""
    found = [s.mask for offset in extent_offsets(plain) for s in slots(plain, offset) if s.dev_id]
    return struct.pack(f"<{len(found)}H", *found)


def seek_table(frames: Sequence[bytes], sizes: Sequence[int], descriptor: int = 0) -> bytes:
    entries = b"".join(struct.pack("<II", len(f), size) for f, size in zip(frames, sizes))
    footer = struct.pack("<IBI", len(frames), descriptor, SEEKABLE_MAGIC)
    return skippable(TABLE_MAGIC, entries + footer)


def compress(plain: bytes, frame: Callable[[bytes], bytes] = raw_frame) -> bytes:
    """Return the compressed form of a plain canonical archive.

    `frame` makes each frame but those of headers that stay as they are.
    """
    parts = list(pieces(plain))
    # An archive may be damaged, and end inside a header.
    made = [
        header_frame(part.data)
        if part.stored and len(part.data) == EXTENT_HEADER
        else frame(part.data)
        for part in parts
    ]
    return join(Seekable(made, [len(part.data) for part in parts], frame(masks(plain))))


def join(archive: Seekable) -> bytes:
    index = skippable(INDEX_MAGIC, b"VMAINDEX" + archive.masks)
    return b"".join((*archive.frames, index, seek_table(archive.frames, archive.sizes)))


def split(data: bytes) -> Seekable:
    """Return the frames of a compressed archive; raises ValueError where its table is not right."""
    count, descriptor, magic = struct.unpack("<IBI", data[-9:])
    start = len(data) - 8 * count - 17
    if (magic, descriptor) != (SEEKABLE_MAGIC, 0):
        raise ValueError("no seek table")
    if struct.unpack_from("<II", data, start) != (TABLE_MAGIC, 8 * count + 9):
        raise ValueError("the seek table's frame")
    frames, sizes, position = [], [], 0
    for i in range(count):
        compressed, size = struct.unpack_from("<II", data, start + 8 + 8 * i)
        frames.append(data[position : position + compressed])
        sizes.append(size)
        position += compressed
    if struct.unpack_from("<II", data, position) != (INDEX_MAGIC, start - position - 8):
        raise ValueError("the index's frame")
    if data[position + 8 : position + 16] != b"VMAINDEX":
        raise ValueError("the index's name")
    return Seekable(frames, sizes, data[position + 16 : start])


def decode(data: bytes) -> bytes | None:
    """Return what zstd makes of frames of raw blocks; None for an error, or any other block."""
    out = []
    at = 0
    try:
        while at < len(data):
            magic, size = struct.unpack_from("<II", data, at)
            if 0x184D2A50 <= magic <= 0x184D2A5F:
                at += 8 + size
                if at > len(data):
                    return None
                continue
            content, at = _decode_frame(data, at)
            out.append(content)
    except (struct.error, IndexError, ValueError):
        return None
    return b"".join(out)


def _decode_frame(data: bytes, at: int) -> tuple[bytes, int]:
    """Return what a frame holds, and where it ends; raises ValueError, IndexError, struct.error."""
    if struct.unpack_from("<I", data, at) != (ZSTD_MAGIC,):
        raise ValueError("magic")
    descriptor = data[at + 4]
    at += 5
    # A reserved bit, a checksum (which raw_frame never has), a dictionary
    if descriptor & 0b1111:
        raise ValueError("descriptor")
    limit = BLOCK_MAX
    if not descriptor & 0x20:
        exponent, mantissa = data[at] >> 3, data[at] & 7
        window = (1 << 10 + exponent) + ((1 << 10 + exponent) >> 3) * mantissa
        if window > 128 << 20:
            raise ValueError("window")
        limit = min(limit, window)
        at += 1
    width = (1 if descriptor & 0x20 else 0, 2, 4, 8)[descriptor >> 6]
    told = int.from_bytes(data[at : at + width], "little") + (256 if width == 2 else 0)
    at += width
    out = b""
    last = 0
    while not last:
        block = int.from_bytes(data[at : at + 3], "little") if at + 3 <= len(data) else 6
        last, kind, size = block & 1, block >> 1 & 3, block >> 3
        at += 3
        if kind > 1 or size > limit or at + (size, 1)[kind] > len(data):
            raise ValueError("block")
        out += data[at : at + size] if kind == 0 else data[at : at + 1] * size
        at += (size, 1)[kind]
    if width and len(out) != told:
        raise ValueError("content size")
    return out, at
