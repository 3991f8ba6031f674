"""Build and read the compressed canonical archive with nothing but struct.

The tests' own idea of it: it never imports vma_tool, and it can make frames without a zstd library:
of raw blocks, which every decoder reads, with neither compression nor checksum.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from tests.archives import BLOCK, EXTENT_HEADER, extent_offsets, slots

PIECE = 1 << 20
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


def skippable(magic: int, data: bytes) -> bytes:
    return struct.pack("<II", magic, len(data)) + data


def cuts(plain: bytes) -> Iterator[int]:
    """Yield the lengths of the pieces that a plain canonical archive is cut into."""
    (header_size,) = struct.unpack_from(">I", plain, 56)
    yield from (min(PIECE, header_size - start) for start in range(0, header_size, PIECE))
    run, run_place, seen = 0, (0, 0), dict.fromkeys(range(256), 0)
    for offset in extent_offsets(plain):
        clusters = slots(plain, offset)
        dev_id = clusters[0].dev_id if clusters else 0
        place = dev_id, seen[dev_id] // 128
        seen[dev_id] += 1
        blocks = [bin(slot.mask).count("1") for slot in clusters]
        if run and (any(blocks) or place != run_place):
            yield run
            run = 0
        if any(blocks):
            yield EXTENT_HEADER
            for first in (0, 16, 32, 48):
                count = sum(blocks[first : first + 16])
                if count:
                    yield count * BLOCK
        else:
            run += EXTENT_HEADER
        run_place = place
    if run:
        yield run


def pieces(plain: bytes) -> Iterator[bytes]:
    """Yield the pieces of a plain canonical archive."""
    start = 0
    for size in cuts(plain):
        yield plain[start : start + size]
        start += size


def masks(plain: bytes) -> bytes:
    """Return what the index holds: all clusters' masks, in the archive's order."""
    found = [s.mask for offset in extent_offsets(plain) for s in slots(plain, offset) if s.dev_id]
    return struct.pack(f"<{len(found)}H", *found)


def seek_table(frames: Sequence[bytes], sizes: Sequence[int], descriptor: int = 0) -> bytes:
    entries = b"".join(struct.pack("<II", len(f), size) for f, size in zip(frames, sizes))
    footer = struct.pack("<IBI", len(frames), descriptor, SEEKABLE_MAGIC)
    return skippable(TABLE_MAGIC, entries + footer)


def compress(plain: bytes, frame: Callable[[bytes], bytes] = raw_frame) -> bytes:
    """Return the compressed form of a plain canonical archive, each piece made by `frame`."""
    parts = list(pieces(plain))
    return join(Seekable([frame(part) for part in parts], [*map(len, parts)], frame(masks(plain))))


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
