"""zstd frames: the section of vma_tool.py, here as a file until it moves there."""

from __future__ import annotations

import array
import ctypes
import functools
import importlib
import itertools
import struct
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from vma_tool import (
    CLUSTER_SIZE,
    EXTENT_HEADER_SIZE,
    FULL_MASK,
    Buffer,
    Device,
    FormatError,
    VmaError,
    mask_size,
)

# ---------------------------------------------------------------------------------------------
# zstd frames: the compressed canonical archive. Each piece of the plain archive is a zstd frame;
# an index and a seek table follow in skippable frames. All numbers are little-endian.
# Sources: RFC 8878, cited as "RFC"; zstd's contrib/seekable_format for the seek table.

FRAME_MAGIC = 0xFD2FB528
FRAME_BLOCK_MAX = 128 << 10  # bytes that one block of a frame holds
SKIPPABLE = struct.Struct("<II")  # RFC 3.1.2: Magic_Number, Frame_Size
SKIPPABLE_MAGICS = range(0x184D2A50, 0x184D2A60)
INDEX_MAGIC = 0x184D2A5D
INDEX_NAME = b"VMAINDEX"
SEEK_TABLE_MAGIC = 0x184D2A5E
# Number_Of_Frames, Seek_Table_Descriptor, Seekable_Magic_Number
SEEK_FOOTER = struct.Struct("<IBI")
SEEKABLE_MAGIC = 0x8F92EAB1
SEEK_ENTRY_SIZE = 8  # Compressed_Size, Decompressed_Size
PIECE_SIZE = 1 << 20  # what one of our frames holds at most
PIECE_CLUSTERS = 16
RUN_EXTENTS = 128  # extents that store nothing, whose headers share a frame
FRAME_MAX_SIZE = 8 << 20  # what a frame may hold that is read at any place
COMPRESSION_LEVELS = range(1, 23)
DEFAULT_LEVEL = 3  # vzdump's
# Clusters of a whole extent, by the least align with so many
EXTENT_CLUSTER_COUNTS = {1 << 20: 48, 256 << 10: 56, 4 << 10: 58}


class Zstd:
    """The zstd library, for whole frames. Any thread may call it, and runs beside the others."""

    @staticmethod
    @functools.cache
    def load() -> Zstd | None:
        """Return Python's own zstd, else the system's library; None where there is neither.

        Both give the same bytes with the same version of the library.
        """
        try:
            return ModuleZstd(importlib.import_module("compression.zstd"))
        except ImportError:  # before Python 3.14, or built without it
            return LibraryZstd.load_library()

    def compress(self, data: Buffer, level: int) -> bytes:
        """Return data as one frame, with its content size and a checksum."""
        raise NotImplementedError

    def decompress_into(self, frame: Buffer, view: memoryview) -> None:
        """Decompress one frame that fills view exactly; raises FormatError."""
        found = parse_frame(frame)
        if found.size != len(frame):
            raise FormatError(f"the zstd frame ends after {found.size} of {len(frame)} bytes")
        if found.content_size not in (None, len(view)):
            raise FormatError(f"the zstd frame holds {found.content_size} bytes, not {len(view)}")
        try:
            size = self._decompress(frame, view)
        except FormatError as error:
            raise FormatError(f"the zstd frame is damaged: {error}") from None
        if size != len(view):
            raise FormatError(f"the zstd frame holds {size} bytes, expected {len(view)}")

    def _decompress(self, frame: Buffer, view: memoryview) -> int:
        """Decompress up to len(view) bytes into view, return how many; raises FormatError."""
        raise NotImplementedError


class ModuleZstd(Zstd):
    """zstd by Python's compression.zstd, or backports.zstd, which has the same interface."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self._compressors: dict[int, list[Any]] = {}  # idle ones, by level

    def compress(self, data: Buffer, level: int) -> bytes:
        parameter = self.module.CompressionParameter
        options = {parameter.compression_level: level, parameter.checksum_flag: 1}
        idle = self._compressors.setdefault(level, [])
        try:
            compressor = idle.pop()
        except IndexError:
            compressor = self.module.ZstdCompressor(options=options)
        frame: bytes = compressor.compress(data, compressor.FLUSH_FRAME)
        idle.append(compressor)
        return frame

    def _decompress(self, frame: Buffer, view: memoryview) -> int:
        decompressor = self.module.ZstdDecompressor()
        try:
            # One byte more than expected: the frame's end is only read with room left.
            data = decompressor.decompress(frame, len(view) + 1)
        except self.module.ZstdError as error:
            raise FormatError(str(error).rpartition(": ")[2].lower()) from None
        if len(data) > len(view):
            raise FormatError(f"it holds more than {len(view)} bytes")
        view[: len(data)] = data
        return len(data)


class LibraryZstd(Zstd):
    """zstd by the system's library. Debian always has it: dpkg needs it."""

    NAMES = (
        "libzstd.so.1",
        "libzstd.1.dylib",
        "/opt/homebrew/lib/libzstd.1.dylib",
        "/usr/local/lib/libzstd.1.dylib",
    )
    MIN_VERSION = 10400  # 1.4.0, from which on all that is called here is stable
    LEVEL, CHECKSUM = 100, 201  # ZSTD_c_compressionLevel, ZSTD_c_checksumFlag

    def __init__(self, library: Any) -> None:
        """Declare the functions used; raises AttributeError where one is missing."""
        address, size = ctypes.c_void_p, ctypes.c_size_t
        for name, result, arguments in (
            ("versionNumber", ctypes.c_uint, []),
            ("isError", ctypes.c_uint, [size]),
            ("getErrorName", ctypes.c_char_p, [size]),
            ("compressBound", size, [size]),
            ("createCCtx", address, []),
            ("createDCtx", address, []),
            ("CCtx_setParameter", size, [address, ctypes.c_int, ctypes.c_int]),
            ("compress2", size, [address, address, size, address, size]),
            ("decompressDCtx", size, [address, address, size, address, size]),
        ):
            function = getattr(library, f"ZSTD_{name}")
            function.restype = result
            function.argtypes = arguments
        self.library = library
        # Idle contexts; there are never more than threads that have worked at once, so that none
        # needs to be freed. With each compressing one, the buffer that it compresses into.
        self._compressors: list[tuple[Any, Any]] = []
        self._decompressors: list[Any] = []

    @classmethod
    def load_library(cls) -> LibraryZstd | None:
        """Return the first library found that is new enough."""
        for name in cls.NAMES:
            try:
                found = cls(ctypes.CDLL(name))
            except (OSError, AttributeError):
                continue
            if found.library.ZSTD_versionNumber() >= cls.MIN_VERSION:
                return found
        return None

    def compress(self, data: Buffer, level: int) -> bytes:
        library = self.library
        bound = library.ZSTD_compressBound(len(data))
        try:
            context, buffer = self._compressors.pop()
        except IndexError:
            context, buffer = self._created(library.ZSTD_createCCtx()), bytearray()
        if len(buffer) < bound:
            buffer = bytearray(bound)
        for parameter, value in ((self.LEVEL, level), (self.CHECKSUM, 1)):
            self._size(library.ZSTD_CCtx_setParameter(context, parameter, value))
        size = self._size(
            library.ZSTD_compress2(
                context, address_of(buffer), len(buffer), address_of(data), len(data)
            )
        )
        with memoryview(buffer) as view:
            frame = bytes(view[:size])
        self._compressors.append((context, buffer))
        return frame

    def _decompress(self, frame: Buffer, view: memoryview) -> int:
        library = self.library
        try:
            context = self._decompressors.pop()
        except IndexError:
            context = self._created(library.ZSTD_createDCtx())
        try:
            return self._size(
                library.ZSTD_decompressDCtx(
                    context, address_of(view), len(view), address_of(frame), len(frame)
                )
            )
        finally:
            self._decompressors.append(context)  # the next frame begins anew, also after an error

    def _created(self, context: Any) -> Any:
        if not context:
            raise VmaError("no memory for zstd")
        return context

    def _size(self, result: int) -> int:
        """Return a result that is a size; raises FormatError where it is an error's code."""
        if self.library.ZSTD_isError(result):
            raise FormatError(self.library.ZSTD_getErrorName(result).decode().lower())
        return result


def address_of(data: Buffer) -> Any:
    """Return data as an argument of a C function, without a copy where that is possible."""
    if isinstance(data, bytes):
        return data
    if not len(data):
        return None
    try:
        return ctypes.byref(ctypes.c_char.from_buffer(data))
    except TypeError:  # read-only memory, which ctypes takes as bytes only
        return bytes(data)


class Frame(NamedTuple):
    """A zstd frame, or one that decoders skip, as its headers describe it; sizes in bytes.

    `content_size` is None where the frame does not tell it.
    """

    size: int
    content_size: int | None
    has_checksum: bool


def parse_frame(data: Buffer, offset: int = 0) -> Frame:
    """Return the frame at an offset, found by its block headers alone; raises FormatError.

    RFC 3.1.1. The content of blocks is not looked at.
    """

    def number(start: int, size: int) -> int:
        field = bytes(data[start : start + size])
        if len(field) < size:
            raise FormatError("the zstd frame is cut off")
        return int.from_bytes(field, "little")

    magic = number(offset, 4)
    if magic in SKIPPABLE_MAGICS:
        size = SKIPPABLE.size + number(offset + 4, 4)
        if size > len(data) - offset:
            raise FormatError("the skippable frame is cut off")
        return Frame(size, 0, False)
    if magic != FRAME_MAGIC:
        raise FormatError(f"no zstd frame: magic 0x{magic:08x}, expected 0x{FRAME_MAGIC:08x}")
    descriptor = number(offset + 4, 1)
    single_segment = descriptor >> 5 & 1
    if descriptor & 8:
        raise FormatError("the zstd frame is of a later format: a reserved bit is set")
    # Window_Descriptor, which a single segment lacks, then Dictionary_ID
    position = offset + 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3]
    size = (single_segment, 2, 4, 8)[descriptor >> 6]
    content_size = number(position, size) + (256 if size == 2 else 0) if size else None
    position += size
    last = 0
    while not last:
        block = number(position, 3)
        last, kind, size = block & 1, block >> 1 & 3, block >> 3
        if kind == 3 or size > FRAME_BLOCK_MAX:  # 0 raw, 1 one byte repeated, 2 compressed
            raise FormatError(
                f"the zstd frame is damaged: no block after {position - offset} bytes"
            )
        position += 3 + (1 if kind == 1 else size)
    position += 4 * (descriptor >> 2 & 1)
    if position > len(data):
        raise FormatError("the zstd frame is cut off")
    return Frame(position - offset, content_size, bool(descriptor & 4))


class SeekTable(NamedTuple):
    """Where the frames of a seekable file begin: 16 bytes a frame.

    Both have one number more than there are frames, the end. `index_offset` is where the frames
    end and the index's skippable frame begins, `size` that of the plain archive.
    """

    offsets: array.array[int]  # in the plain archive
    compressed_offsets: array.array[int]  # in the file

    @property
    def size(self) -> int:
        return self.offsets[-1]

    @property
    def index_offset(self) -> int:
        return self.compressed_offsets[-1]


def native(numbers: array.array[int]) -> array.array[int]:
    """Turn little-endian numbers in an array into the machine's, or back; in place."""
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def pack_seek_table(sizes: array.array[int]) -> bytes:
    """Return the seek table for frames' sizes, compressed and decompressed in turn."""
    data = native(array.array("I", sizes)).tobytes()
    footer = SEEK_FOOTER.pack(len(sizes) // 2, 0, SEEKABLE_MAGIC)
    return SKIPPABLE.pack(SEEK_TABLE_MAGIC, len(data) + len(footer)) + data + footer


def parse_seek_footer(tail: Buffer) -> int | None:
    """Return the size of the seek table that ends a file, with its frame; None if there is none."""
    if len(tail) < SEEK_FOOTER.size:
        return None
    count, descriptor, magic = SEEK_FOOTER.unpack_from(tail, len(tail) - SEEK_FOOTER.size)
    # Descriptors with bits set are tables of other programs, with checksums in them.
    if magic != SEEKABLE_MAGIC or descriptor or not count:
        return None
    return SKIPPABLE.size + SEEK_ENTRY_SIZE * int(count) + SEEK_FOOTER.size


def parse_seek_table(data: bytes, file_size: int) -> SeekTable:
    """Return the seek table in its frame; raises FormatError where it cannot be the file's."""
    magic, size = SKIPPABLE.unpack_from(data)
    if magic != SEEK_TABLE_MAGIC or size != len(data) - SKIPPABLE.size:
        raise FormatError("the seek table has no skippable frame of its size")
    sizes = array.array("I", data[SKIPPABLE.size : -SEEK_FOOTER.size])
    native(sizes)
    compressed, plain = sizes[0::2], sizes[1::2]
    if not 0 < min(plain) <= max(plain) <= FRAME_MAX_SIZE or not min(compressed):
        raise FormatError(
            f"the seek table has frames of {min(plain)} to {max(plain)} bytes, "
            f"expected 1 to {FRAME_MAX_SIZE}"
        )
    table = SeekTable(
        array.array("Q", itertools.accumulate(plain, initial=0)),
        array.array("Q", itertools.accumulate(compressed, initial=0)),
    )
    if table.index_offset > file_size - len(data):
        raise FormatError("the seek table has more frames than the file")
    return table


def pack_index(zstd: Zstd, masks: array.array[int], level: int) -> bytes:
    """Return the index's skippable frame for all clusters' masks, in the archive's order."""
    frame = zstd.compress(native(array.array("H", masks)).tobytes(), level)
    return SKIPPABLE.pack(INDEX_MAGIC, len(INDEX_NAME) + len(frame)) + INDEX_NAME + frame


def parse_index(zstd: Zstd, data: bytes, max_count: int) -> array.array[int]:
    """Return the masks in the index's skippable frame; raises FormatError."""
    start = SKIPPABLE.size + len(INDEX_NAME)
    if len(data) < start or data[SKIPPABLE.size : start] != INDEX_NAME:
        raise FormatError("no index before the seek table")
    magic, size = SKIPPABLE.unpack_from(data)
    if magic != INDEX_MAGIC or size != len(data) - SKIPPABLE.size:
        raise FormatError("the index has no skippable frame of its size")
    frame = memoryview(data)[start:]
    content_size = parse_frame(frame).content_size
    if content_size is None or content_size % 2 or content_size > 2 * max_count:
        raise FormatError(f"the index holds {content_size} bytes, expected up to {2 * max_count}")
    masks = array.array("H", bytes(content_size))
    with memoryview(masks).cast("B") as view:
        zstd.decompress_into(bytes(frame), view)
    return native(masks)


class Cuts:
    """Where the canonical archive is cut into frames, extent by extent.

    Headers of extents that store nothing gather in a run, until `add` or `end` returns its size.
    """

    def __init__(self) -> None:
        self._run = 0
        self._place = (0, 0)

    @staticmethod
    def header(size: int) -> list[int]:
        """Return the sizes of the pieces of an archive's header."""
        return [min(PIECE_SIZE, size - start) for start in range(0, size, PIECE_SIZE)]

    @staticmethod
    def payload(masks: Sequence[int]) -> list[int]:
        """Return the sizes of the pieces of an extent's stored blocks; of none, none."""
        groups = (masks[i : i + PIECE_CLUSTERS] for i in range(0, len(masks), PIECE_CLUSTERS))
        return [size for group in groups if (size := sum(map(mask_size, group)))]

    def add(self, dev_id: int, number: int, payload: Sequence[int]) -> list[int]:
        """Return the sizes of the pieces that end with a device's extent, counted from 0."""
        place = dev_id, number // RUN_EXTENTS
        sizes = self.end() if payload or place != self._place else []
        self._place = place
        if payload:
            return [*sizes, EXTENT_HEADER_SIZE, *payload]
        self._run += EXTENT_HEADER_SIZE
        return sizes

    def end(self) -> list[int]:
        """Return the size of the run that ends here, if there is one."""
        run, self._run = self._run, 0
        return [run] if run else []


def index_entries(
    header_size: int, devices: Sequence[Device], masks: array.array[int], table: SeekTable
) -> list[array.array[int]]:
    """Return each device's entries as `DeviceIndex` has them, by the masks of a canonical archive.

    Devices come in canonical order. Raises FormatError unless the frames are cut as these masks
    say: then all offsets are right.
    """
    counts = [device.cluster_count for device in devices]
    if devices and devices[-1].is_vmstate:
        # A vmstate has as many clusters as are left, whatever its size is.
        counts[-1] = max(counts[-1], len(masks) - sum(counts[:-1]))
    if sum(counts) != len(masks):
        raise FormatError(f"the index has {len(masks)} clusters, the devices {sum(counts)}")
    for device, end in zip(devices, itertools.accumulate(counts)):
        if masks[end - 1] & ~device.block_mask(device.cluster_count - 1):
            raise FormatError(f"the index has blocks behind the end of {device.title}")
    for align, cluster_count in EXTENT_CLUSTER_COUNTS.items():
        if header_size % align == 0:
            entries, ends = entries_and_ends(header_size, devices, counts, masks, cluster_count)
            if ends == table.offsets:
                return entries
    raise FormatError("the index and the seek table contradict each other")


def entries_and_ends(
    header_size: int,
    devices: Sequence[Device],
    counts: Sequence[int],
    masks: array.array[int],
    cluster_count: int,
) -> tuple[list[array.array[int]], array.array[int]]:
    """Return each device's entries and all frames' ends, with this many clusters an extent."""
    zeros = array.array("H", bytes(2 * cluster_count))
    full = array.array("H", [FULL_MASK] * cluster_count)
    full_payload = Cuts.payload(full)
    step = CLUSTER_SIZE << 16  # from one entry to the next in an extent that stores all blocks
    cuts = Cuts()
    sizes = Cuts.header(header_size)
    offset = header_size
    first = 0
    result = []
    for device, count in zip(devices, counts):
        entries = array.array("Q")
        for number, start in enumerate(range(first, first + count, cluster_count)):
            chunk = masks[start : min(start + cluster_count, first + count)]
            offset += EXTENT_HEADER_SIZE
            base = offset << 16
            payload: Sequence[int] = ()
            # Nearly all extents of a disk store nothing or everything: those go fast.
            if chunk == zeros or not any(chunk):
                entries.extend(array.array("Q", (base,)) * len(chunk))
            elif chunk == full:
                payload = full_payload
                base |= FULL_MASK
                entries.extend(array.array("Q", range(base, base + step * cluster_count, step)))
            else:
                payload = Cuts.payload(chunk)
                offsets = itertools.accumulate(map(mask_size, chunk), initial=offset)
                entries.extend(array.array("Q", [at << 16 | m for at, m in zip(offsets, chunk)]))
            sizes += cuts.add(device.dev_id, number, payload)
            offset += sum(payload)
        result.append(entries)
        first += count
    if not devices:
        cuts.add(0, 0, ())  # one extent all the same
    sizes += cuts.end()
    return result, array.array("Q", itertools.accumulate(sizes, initial=0))
