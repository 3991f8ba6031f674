#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""List, verify, unpack, pack and optimize Proxmox VE backup archives (.vma).

A .vma file is a header (the VM's configuration, the list of its disks), then extents that hold the
disks' clusters in the order in which a live backup happened to read them. `optimize` rewrites an
archive into the canonical layout, so that a deduplicating backup program finds in the next backup
what it has already:

    header    fixed uuid; blob buffer: configs in their order, device names by dev_id;
              zero-filled to a multiple of --align
    extents   one device after the other by dev_id, vmstate last; each device begins an extent
              clusters ascending, every one, as many an extent as make a multiple of --align (<= 58)
              zero blocks are stored explicitly until each payload is a multiple of --align

The layout depends on the archive's ctime, configs, devices, stored blocks and --align, on nothing
else; `lay_out_header` and `lay_out_extent` below decide it.

Exit status: 0 success, 1 a bad archive or a failed operation, 2 wrong usage, 128 + N ended by
signal N (130: Ctrl-C, 141: the reader of standard output went away).

Sources: the format is Proxmox's, in pve-qemu's public vma_spec.txt; cited below as "spec". Where
its `vma` program behaves otherwise, the program is followed, and a comment says so.
"""

from __future__ import annotations

import argparse
import array
import collections
import errno
import functools
import gc
import hashlib
import importlib
import io
import itertools
import operator
import os
import re
import signal
import stat
import struct
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any, Callable, NamedTuple, NoReturn, TypeVar, Union

__version__ = "1.0.0"

# ---------------------------------------------------------------------------------------------
# Errors


class VmaError(Exception):
    """A bad archive or a failed operation; its text is the one line that the user reads."""


class FormatError(VmaError):
    """Bytes that contradict the format; says in which archive and at which offset, if known."""

    def __init__(self, message: str, offset: int | None = None, archive: str = "") -> None:
        super().__init__(message)
        self.offset = offset
        self.archive = archive

    def __str__(self) -> str:
        offset = "" if self.offset is None else f"offset 0x{self.offset:x}"
        return ": ".join(filter(None, (self.archive, offset, super().__str__())))


@contextmanager
def in_archive(name: str) -> Iterator[None]:
    """Let a FormatError say in which archive it is."""
    try:
        yield
    except FormatError as error:
        error.archive = name
        raise


class Interrupted(BaseException):
    """A signal that ends the program, after everything unfinished has been removed."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def reason(error: OSError) -> str:
    """Return why the system refused something, without the file's name."""
    return error.strerror or str(error) or repr(error)


def refused(name: str, code: int) -> VmaError:
    """Return the error for what is refused here as the system would refuse it."""
    return VmaError(f"{name}: {os.strerror(code)}")


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Turn what the system refuses into a VmaError that names what it is about."""
    try:
        yield
    except BrokenPipeError:  # who reads our output has gone: no error of ours, main ends quietly
        raise
    except OSError as error:
        raise VmaError(f"{name}: {reason(error)}") from error


def escape(text: str) -> str:
    """Return text with all that could act on a terminal, or hide in it, as Python escapes."""
    return "".join(
        c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in text
    )


def quote(name: str) -> str:
    """Return a name from an archive as messages show it."""
    return f"'{escape(name)}'"


def shown(path: str, stream: str) -> str:
    """Return what messages call a file; `-` is standard `stream`: input or output."""
    return escape(path) if path != "-" else f"standard {stream}"


# ---------------------------------------------------------------------------------------------
# Format: constants, and codecs that need no file. All numbers are big-endian, except where a
# blob's length is little-endian.

BLOCK_SIZE = 4096
CLUSTER_BLOCKS = 16
CLUSTER_SIZE = CLUSTER_BLOCKS * BLOCK_SIZE
FULL_MASK = 0xFFFF
MAX_CLUSTERS = 1 << 32  # of a device: what cluster_num can count
Buffer = Union[bytes, bytearray, memoryview]
ZERO_CLUSTER = bytes(CLUSTER_SIZE)
ZERO_BLOCK = bytes(BLOCK_SIZE)

# spec, "VMA Header": magic, version, uuid, ctime, md5sum, blob_buffer_offset, blob_buffer_size,
# header_size; then, further on, the two tables of offsets and dev_info
HEADER = struct.Struct(">4sI16sq16sIII")
HEADER_MAGIC = b"VMA\0"
HEADER_FIXED_SIZE = 12288
HEADER_MD5 = slice(32, 48)
CONFIG_COUNT = 256
CONFIG_TABLE = struct.Struct(">256I")
CONFIG_NAMES_OFFSET = 2044
CONFIG_DATA_OFFSET = 3068
DEV_INFO = struct.Struct(">I4xQ16x")  # devname_ptr, size
DEV_INFO_OFFSET = 4096
DEV_IDS = range(1, 255)  # 0 is an empty slot; Proxmox does not look at 255
BLOB_MAX_SIZE = 0xFFFF
# 256 configs and 254 devices with names that file systems take fill 17 MB. More is no header.
HEADER_MAX_SIZE = 20 << 20
VMSTATE = "vmstate"
NAME_MAX_SIZE = 255  # bytes, as file systems have it

# spec, "VMA Extent Header": magic, reserved1, block_count, uuid, md5sum, blockinfo[59].
# A blockinfo is mask << 48 | reserved << 40 | dev_id << 32 | cluster_num.
EXTENT = struct.Struct(">4sHH16s16s59Q")
EXTENT_MAGIC = b"VMAE"
EXTENT_BLOCK_COUNT = slice(6, 8)
EXTENT_MD5 = slice(24, 40)
EXTENT_SLOTS = 59
EXTENT_HEADER_SIZE = 512
EXTENT_MAX_BLOCKS = EXTENT_SLOTS * CLUSTER_BLOCKS

if (HEADER.size, DEV_INFO.size, EXTENT.size) != (60, 32, EXTENT_HEADER_SIZE):
    raise ImportError("struct sizes differ from the format's")


class Config(NamedTuple):
    """A file of the VM's configuration; bytes of the name that are not UTF-8 are surrogates."""

    name: str
    data: bytes


class Device(NamedTuple):
    """A disk, or the RAM state if it is named vmstate; size in bytes."""

    dev_id: int
    name: str
    size: int

    @property
    def is_vmstate(self) -> bool:
        return self.name == VMSTATE

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"device {quote(self.name)} (dev_id {self.dev_id})"

    @property
    def cluster_count(self) -> int:
        """How many clusters hold the device; a vmstate may have more."""
        return -(-self.size // CLUSTER_SIZE)

    @property
    def max_size(self) -> int:
        """How many bytes are restored at most: a vmstate is as long as its clusters."""
        return sys.maxsize if self.is_vmstate else self.size

    @property
    def tail_size(self) -> int:
        """How many bytes of the last block are behind the device's end; they are zeros."""
        return 0 if self.is_vmstate else -self.size % BLOCK_SIZE

    def stores_tail(self, mask: int) -> bool:
        """Say whether the last cluster stores, with this mask, the last block and so a tail."""
        # The last block's bit is the highest that may be set: a mask above all others has it.
        return self.tail_size > 0 and mask > self.block_mask(self.cluster_count - 1) >> 1

    def block_mask(self, cluster_num: int) -> int:
        """Return the mask of the blocks of a cluster that begin inside the device."""
        # Proxmox restores a vmstate as long as its clusters are, whatever the header says.
        blocks = -(-self.size // BLOCK_SIZE) - cluster_num * CLUSTER_BLOCKS
        return FULL_MASK if self.is_vmstate or blocks >= CLUSTER_BLOCKS else (1 << blocks) - 1


class Header(NamedTuple):
    """An archive's header; uuid is 16 bytes, ctime seconds since the epoch, devices by dev_id.

    `size` is header_size in bytes; `md5` is over all of these, so it stands for the whole.
    """

    uuid: bytes
    ctime: int
    configs: tuple[Config, ...]
    devices: tuple[Device, ...]
    size: int = 0
    md5: bytes = b""


class Extent(NamedTuple):
    """An extent header: its offset in the archive, and blockinfo as 59 64-bit numbers.

    `md5` is over all of it, so it stands for the whole.
    """

    offset: int
    block_count: int
    blockinfo: tuple[int, ...]
    md5: bytes

    @property
    def payload_offset(self) -> int:
        return self.offset + EXTENT_HEADER_SIZE

    @property
    def payload_size(self) -> int:
        return self.block_count * BLOCK_SIZE


class Slot(NamedTuple):
    """A cluster as an extent has it: its stored blocks begin at start, and have size bytes.

    `start` is a place in the extent's payload, or where it is said, in the archive.
    """

    dev_id: int
    cluster_num: int
    mask: int
    start: int
    size: int


def md5_without(data: Buffer, field: slice) -> bytes:
    """Return the MD5 of data with the 16 bytes of a field zeroed."""
    # Hosts in FIPS mode refuse MD5 for anything that calls itself security.
    digest = hashlib.md5(data[: field.start], usedforsecurity=False)
    digest.update(bytes(16))
    with memoryview(data) as view:
        digest.update(view[field.stop :])
    return digest.digest()


def parse_header_size(start: Buffer) -> int:
    """Return header_size in bytes, from the first HEADER_FIXED_SIZE bytes of an archive.

    Raises FormatError where these cannot be the beginning of a supported header.
    """
    if start[:4] != HEADER_MAGIC:
        raise FormatError(f"not a VMA archive{'' if start else ', but an empty file'}")
    if len(start) < HEADER_FIXED_SIZE:
        raise FormatError(f"the archive ends inside its header, after {len(start)} bytes")
    _, version, *_, header_size = HEADER.unpack_from(start)
    if version != 1:
        raise FormatError(f"VMA version {version} is not supported", 4)
    if not HEADER_FIXED_SIZE < header_size <= HEADER_MAX_SIZE:
        raise FormatError(
            f"header_size is {header_size}, expected {HEADER_FIXED_SIZE + 1} to {HEADER_MAX_SIZE}",
            56,
        )
    return int(header_size)


def parse_header(data: Buffer) -> Header:
    """Return the header that these header_size bytes hold; raises FormatError.

    As in Proxmox's program, a device with size 0 or without a readable name does not count.
    """
    if len(data) < parse_header_size(data):
        raise FormatError(f"the archive ends inside its header, after {len(data)} bytes")
    _, _, uuid, ctime, digest, blob_offset, blob_size, _ = HEADER.unpack_from(data)
    if md5_without(data, HEADER_MD5) != digest:
        raise FormatError("the header's MD5 does not match", HEADER_MD5.start)
    if blob_offset + blob_size > len(data):
        raise FormatError(
            f"the blob buffer ends at {blob_offset + blob_size}, behind the header's {len(data)}",
            48,
        )
    buffer = memoryview(data)[blob_offset : blob_offset + blob_size]
    names = CONFIG_TABLE.unpack_from(data, CONFIG_NAMES_OFFSET)
    contents = CONFIG_TABLE.unpack_from(data, CONFIG_DATA_OFFSET)
    configs = []
    for slot, (name_offset, data_offset) in enumerate(zip(names, contents)):
        if name_offset and data_offset:  # a slot with one of them is an empty one
            name, content = parse_name(buffer, name_offset), parse_blob(buffer, data_offset)
            if name is None or content is None:
                raise FormatError(
                    f"config {slot}: its name or its data is not in the blob buffer",
                    CONFIG_NAMES_OFFSET + 4 * slot,
                )
            configs.append(Config(name, content))
    devices = []
    for dev_id in DEV_IDS:
        name_offset, size = DEV_INFO.unpack_from(data, DEV_INFO_OFFSET + DEV_INFO.size * dev_id)
        name = parse_name(buffer, name_offset) if size else None
        if name is not None:
            devices.append(Device(dev_id, name, size))
    return Header(uuid, ctime, tuple(configs), tuple(devices), len(data), digest)


def parse_blob(buffer: memoryview, offset: int) -> bytes | None:
    """Return the data of the blob at an offset of the blob buffer, None if it is not inside."""
    # Offset 0 stands for no blob; what is sliced behind the buffer's end comes out shorter.
    size = int.from_bytes(buffer[offset : offset + 2], "little")
    data = bytes(buffer[offset + 2 : offset + 2 + size])
    return data if 0 < offset <= len(buffer) - 2 and len(data) == size else None


def parse_name(buffer: memoryview, offset: int) -> str | None:
    """Return the name in the blob at an offset, None if there is none that ends in a NUL."""
    blob = parse_blob(buffer, offset)
    if not blob or blob[-1]:
        return None
    return blob[: blob.index(0)].decode("utf-8", "surrogateescape")


def encode_name(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def name_on_disk(name: str) -> str:
    """Return a name so that the system gets its UTF-8, whatever the locale's encoding is."""
    return os.fsdecode(encode_name(name))


def name_from_disk(name: str) -> str:
    """Return the name that `name_on_disk` has become this one of."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def pack_header(header: Header) -> bytearray:
    """Return a header of header.size bytes at least, its blobs in the order that Proxmox writes.

    Raises VmaError for a blob that is too large.
    """
    data = bytearray(HEADER_FIXED_SIZE + 1)  # the blob buffer's first byte is none of a blob

    def add(blob: bytes) -> int:
        if len(blob) > BLOB_MAX_SIZE:
            raise VmaError(f"{len(blob)} bytes of configuration; a VMA holds up to {BLOB_MAX_SIZE}")
        offset = len(data) - HEADER_FIXED_SIZE
        data.extend(len(blob).to_bytes(2, "little") + blob)
        return offset

    for slot, (name, content) in enumerate(header.configs):
        offsets = add(encode_name(name) + b"\0"), add(content)
        for table, offset in zip((CONFIG_NAMES_OFFSET, CONFIG_DATA_OFFSET), offsets):
            struct.pack_into(">I", data, table + 4 * slot, offset)
    for dev_id, name, size in header.devices:
        offset = add(encode_name(name) + b"\0")
        DEV_INFO.pack_into(data, DEV_INFO_OFFSET + DEV_INFO.size * dev_id, offset, size)
    blob_size = len(data) - HEADER_FIXED_SIZE
    data.extend(bytes(max(header.size - len(data), 0)))
    HEADER.pack_into(
        data, 0, HEADER_MAGIC, 1, header.uuid, header.ctime, bytes(16),
        HEADER_FIXED_SIZE, blob_size, len(data),
    )  # fmt: skip
    data[HEADER_MD5] = md5_without(data, HEADER_MD5)
    return data


def name_fault(name: str) -> str | None:
    """Say why a name from an archive cannot be a file's name, None if it can.

    One rule on every system, so that an archive that is refused on one is refused on all.
    """
    if name in ("", ".", ".."):
        return "is not a file name"
    if re.search(r"[/\\\x00-\x1f\x7f-\x9f]", name):
        return "holds a slash, a backslash or a control character"
    try:
        encoded = encode_name(name)
    except UnicodeEncodeError:
        return "has a character that no file name has"
    if len(encoded) > NAME_MAX_SIZE:
        return f"is longer than {NAME_MAX_SIZE} bytes"
    return None


def check_names(header: Header) -> None:
    """Raise FormatError for a name that is no file's name, or that occurs twice.

    Such an archive does not restore: Proxmox's program fails, or writes outside its target.
    """
    for kind, names, limit in (
        ("config", header.configs, CONFIG_COUNT),
        ("device", header.devices, len(DEV_IDS)),
    ):
        if len(names) > limit:
            raise FormatError(f"{len(names)} {kind}s, an archive holds {limit} at most")
        seen = set()
        for item in names:
            fault = name_fault(item.name)
            if not fault and encode_name(item.name) in seen:
                fault = "occurs twice"
            if fault:
                raise FormatError(f"{kind} name {quote(item.name)} {fault}")
            seen.add(encode_name(item.name))


def parse_extent(data: bytes, offset: int, uuid: bytes) -> Extent:
    """Return the extent header in these 512 bytes, read at an offset of an archive with that uuid.

    Raises FormatError; blockinfo itself is checked by `Index.add`, which knows the devices.
    """
    fields = EXTENT.unpack(data)
    magic, reserved, block_count, extent_uuid, digest = fields[:5]
    # The MD5 comes before the other fields: what is damaged is called damaged, not foreign.
    if magic != EXTENT_MAGIC:
        raise FormatError(f"no extent here: magic {magic!r}, expected {EXTENT_MAGIC!r}", offset)
    if md5_without(data, EXTENT_MD5) != digest:
        raise FormatError("the extent header's MD5 does not match", offset)
    if extent_uuid != uuid:
        raise FormatError(f"extent of another archive: uuid {format_uuid(extent_uuid)}", offset)
    if reserved:
        raise FormatError(f"extent header: reserved field is {reserved}, expected 0", offset)
    return Extent(offset, block_count, fields[5:], digest)


def pack_extent(uuid: bytes, block_count: int, blockinfo: Sequence[int]) -> bytes:
    """Return an extent header with up to 59 blockinfos, the slots behind them empty."""
    unused = (0,) * (EXTENT_SLOTS - len(blockinfo))
    data = EXTENT.pack(EXTENT_MAGIC, 0, block_count, uuid, bytes(16), *blockinfo, *unused)
    digest = md5_without(data, EXTENT_MD5)
    return b"".join((data[: EXTENT_MD5.start], digest, data[EXTENT_MD5.stop :]))


@functools.cache
def mask_size(mask: int) -> int:
    """Return how many bytes the stored blocks of a cluster have."""
    return bin(mask).count("1") * BLOCK_SIZE


def iter_slots(extent: Extent) -> Iterator[Slot]:
    """Yield the used slots of an extent, with where their blocks are in its payload."""
    start = 0
    for info in extent.blockinfo:
        dev_id = info >> 32 & 0xFF
        if dev_id:
            mask = info >> 48
            size = mask_size(mask)
            yield Slot(dev_id, info & 0xFFFFFFFF, mask, start, size)
            start += size


@functools.lru_cache(maxsize=4096)
def block_runs(mask: int) -> tuple[tuple[int, int], ...]:
    """Return (offset in the cluster, size) in bytes of each run of stored blocks, ascending."""
    runs = re.finditer("1+", bin(mask)[:1:-1])  # its bits, the lowest first
    return tuple((run.start() * BLOCK_SIZE, len(run[0]) * BLOCK_SIZE) for run in runs)


def format_uuid(uuid: bytes) -> str:
    return re.sub("(.{8})(.{4})(.{4})(.{4})", r"\1-\2-\3-\4-", uuid.hex())


def format_size(size: float) -> str:
    """Return a number of bytes as people read it: 8.0 GiB."""
    if size < 1024:
        return f"{size:.0f} B"
    power = (int(size).bit_length() - 1) // 10
    return f"{size / (1 << 10 * power):.1f} {'KMGTPEZ'[power - 1]}iB"


def format_time(seconds: int) -> str:
    """Return seconds since the epoch in local time, as ISO 8601."""
    try:
        text = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):  # a 64-bit number that is no date
        return f"{seconds} s since 1970"
    return f"{text[:-2]}:{text[-2:]}"


def parse_size(text: str) -> int:
    """Return the number of bytes that 4096, 128K, 256M or 1G say; raises ValueError."""
    unit = " KMGT".find(text[-1:].upper())
    number = int(text[:-1] if unit > 0 else text)
    return number << 10 * max(unit, 0)


# ---------------------------------------------------------------------------------------------
# Input and output

CHUNK_SIZE = 2 << 20  # what is read, then written at once
BUFFER_COUNT = 3  # one that is read into, one that is written, one in between
ADVICE_GAP = 64 << 10  # bytes between what is read that are not worth a call of their own
WRITE_BEHIND = 4 << 20  # bytes after which the disk is to begin with writing
MAX_LEAD = 4096  # clusters by which extents may be ahead of the disks' order, as in a live backup
LOOK_AHEAD = 32 << 20  # bytes behind an extent that the disk reads meanwhile
READ_AHEAD = 4  # chunks whose reading is announced before it is their turn
BUFFER_SIZE = 16 << 10
PIPE_SIZE = 1 << 20
IOV_MAX = 1024  # parts of one writev; POSIX allows 16, every system in use 1024
TEMPORARY_NAME = "vma-tool-{}.partial"  # no `*.vma*`: nothing may take it for an archive


class Signals:
    """Turns SIGINT, SIGTERM and SIGHUP into `Interrupted`, but not inside `held`."""

    depth = 0
    pending = 0

    @classmethod
    def install(cls) -> None:
        cls.depth = cls.pending = 0
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # What the caller ignores (nohup) stays ignored.
            if number and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, cls._handle)
        sys.unraisablehook = cls._look_at_dropped
        if hasattr(signal, "SIGCHLD"):
            # Ignored, it would hide how a decompressor ended.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    @classmethod
    def _handle(cls, signum: int, _frame: FrameType | None) -> None:
        cls.pending = cls.pending or signum
        if not cls.depth:
            cls._interrupt()

    @classmethod
    def _interrupt(cls) -> NoReturn:
        # What follows is the clean-up: a second signal must not cut that short.
        cls.depth = 1
        raise Interrupted(cls.pending)

    @classmethod
    def _look_at_dropped(cls, dropped: sys.UnraisableHookArgs) -> None:
        """Raise again, a moment later, what came in a callback, where Python drops exceptions."""
        if not isinstance(dropped.exc_value, Interrupted) or not hasattr(signal, "setitimer"):
            sys.__unraisablehook__(dropped)
            return
        cls.depth = 0  # _interrupt has shut the door, for an exception that is lost
        # Raised here, it would be dropped as well.
        signal.signal(signal.SIGALRM, cls._handle)
        signal.setitimer(signal.ITIMER_REAL, 0.001)

    @classmethod
    @contextmanager
    def held(cls) -> Iterator[None]:
        """Put off signals while something exists that is not yet registered for removal."""
        cls.depth += 1
        try:
            yield
        finally:
            cls.depth -= 1
            if cls.pending and not cls.depth:
                cls._interrupt()


class Progress:
    """What is done of a long work: a line on the terminal, or with `verbose` a line per percent.

    The terminal's is redrawn at most ten times a second. `total` is in bytes, 0 if unknown.
    """

    def __init__(self, label: str, quiet: bool = False, verbose: bool = False) -> None:
        self.label = label
        self.total = 0
        self.done = 0
        self._terminal = not quiet and sys.stderr.isatty()
        self._lines = verbose and not self._terminal
        self._percent = 0
        self._start = self._drawn = time.monotonic()

    def advance(self, size: int) -> None:
        self.update(self.done + size)

    def finish(self) -> None:
        """Show that all is done, where total was a guess."""
        self.update(max(self.total, self.done))

    def update(self, done: int) -> None:
        self.done = done
        if self._terminal and time.monotonic() - self._drawn >= 0.1:
            self._draw("")
        elif self._lines and self.total and self._reached() > self._percent:
            self._percent = self._reached()
            seconds = time.monotonic() - self._start
            text = f"progress {self._percent}% (read {done} bytes, duration {seconds:.0f} sec)"
            print(text, file=sys.stderr)

    def _reached(self) -> int:
        # What is read again, to compare, counts no more.
        return min(100, self.done * 100 // self.total)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn > self._start:
            self._draw("\n")

    def _draw(self, end: str) -> None:
        self._drawn = time.monotonic()
        rate = self.done / (self._drawn - self._start or 1)
        text = f"{format_size(self.done)}, {format_size(rate)}/s"
        if self.total:
            left = int(max(self.total - self.done, 0) / rate) if rate and not end else 0
            text = f"{self._reached():3d} %, {text}, {left // 60}:{left % 60:02d} left"
        print(f"\r{self.label}: {text}\x1b[K", end=end, file=sys.stderr, flush=True)


In = TypeVar("In", bound="Input")
file_state = operator.attrgetter("st_dev", "st_ino", "st_size", "st_mtime_ns")


class Input:
    """An archive's bytes in their order, as a pipe or a decompressor gives them: a stream.

    `offset` counts the bytes read. `size` is None, since only its end tells; `FileInput` has one.
    """

    size: int | None = None
    raw: io.FileIO | None = None  # the file, or what is decompressed
    state: os.stat_result | None = None  # of that when it was opened, None for a pipe
    compressed_size = 0  # 0 also for a pipe

    def __init__(self, name: str, file: io.RawIOBase | io.BufferedIOBase) -> None:
        self.name = name
        self.file = file
        self.offset = 0
        self.progress: Progress | None = None

    def __enter__(self: In) -> In:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def close(self, failed: bool = False) -> None:
        """Close; `failed` says that an error is under way, which no other may hide."""
        with suppress(OSError):  # all that was needed has been read
            self.file.close()

    def read(self, size: int) -> bytes:
        """Return the next bytes; fewer than size only at the end."""
        data = bytearray(size)
        count = self.readinto(memoryview(data))
        return bytes(data) if count == size else bytes(data[:count])

    def readinto(self, view: memoryview) -> int:
        """Fill view with the next bytes, and return how many there were before the end."""
        count = 0
        with naming(f"{self.name}: offset 0x{self.offset:x}"):
            while count < len(view) and (got := self.file.readinto(view[count:])):
                count += got
        self._advance(count)
        return count

    def skip(self, size: int) -> int:
        """Pass over bytes, reading them only where that cannot be helped; return how many."""
        view = memoryview(bytearray(min(size, PIPE_SIZE)))
        skipped = 0
        while skipped < size and (count := self.readinto(view[: size - skipped])):
            skipped += count
        return skipped

    @property
    def output_mode(self) -> int:
        """The mode of what is made of it, before the umask: nobody may read more than here."""
        return 0o600 | self.state.st_mode & 0o666 if self.state else 0o666

    def position(self) -> int:
        """Return how far the reading is, in the terms of the progress's total."""
        if self.raw and self.compressed_size:
            with suppress(OSError):  # it is only shown
                return os.lseek(self.raw.fileno(), 0, os.SEEK_CUR)
        return self.offset

    def check_unchanged(self, path: str | None = None) -> None:
        """Raise VmaError if a file was written to since it was opened, or path is another one."""
        if self.raw is None or self.state is None:
            return
        with naming(self.name):
            states = [os.fstat(self.raw.fileno())]
            if path is not None:
                states.append(os.stat(path))
        if any(file_state(now) != file_state(self.state) for now in states):
            raise VmaError(f"{self.name}: the file was changed while it was read")

    def _advance(self, count: int) -> None:
        self.offset += count
        if self.progress:
            self.progress.update(self.position())


class FileInput(Input):
    """A plain file or block device of `size` bytes, which can also be read at any place.

    `progress` follows what is read in order, `copying` what is read elsewhere.
    """

    size: int
    raw: io.FileIO
    state: os.stat_result

    def __init__(self, name: str, file: io.FileIO) -> None:
        super().__init__(name, file)
        self.raw = file
        self.fd = file.fileno()
        with naming(name), ExitStack() as undo:
            undo.callback(file.close)
            self.state = os.fstat(self.fd)
            self.size = self.state.st_size
            if not stat.S_ISREG(self.state.st_mode):  # of a block device, st_size is 0
                self.size = os.lseek(self.fd, 0, os.SEEK_END)
            undo.pop_all()  # close does it
        self.copying: Progress | None = None
        self._window = b""
        self._window_offset = 0
        self._advised = (0, 0)  # from where to where all has been announced
        self._lock = threading.Lock()

    def read(self, size: int) -> bytes:
        """Return the next bytes; fewer than size only at the end."""
        size = min(size, self.size - self.offset)
        at = self.offset - self._window_offset
        if not 0 <= at <= len(self._window) - size:  # not all of it is in the window
            # What follows on what was read is read with more behind it; after a skip, by itself.
            follows = 0 <= at <= len(self._window)
            window = bytearray(
                min(max(size, BUFFER_SIZE), self.size - self.offset) if follows else size
            )
            self._fill([memoryview(window)], self.offset)
            self._window, self._window_offset, at = bytes(window), self.offset, 0
        self._advance(size)
        return self._window[at : at + size]

    def readinto(self, view: memoryview) -> int:
        view = view[: self.size - self.offset]
        self._fill([view], self.offset)
        self._advance(len(view))
        return len(view)

    def skip(self, size: int) -> int:
        size = min(size, self.size - self.offset)
        self.offset += size
        return size

    def read_at(self, wanted: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each view from its offset, neighbours with one read; safe in several threads.

        Raises VmaError if the file cannot be read, or ends before.
        """
        views: list[memoryview] = []
        start = end = 0
        for offset, view in sorted(wanted, key=operator.itemgetter(0)):
            if offset != end and views:
                self._fill(views, start)
                views = []
            if not views:
                start = offset
            views.append(view)
            end = offset + len(view)
        self._fill(views, start)
        if self.copying:
            self.copying.advance(sum(len(view) for _, view in wanted))

    def _fill(self, views: Sequence[memoryview], offset: int) -> None:
        while any(map(len, views)):
            try:
                if hasattr(os, "preadv"):
                    count = os.preadv(self.fd, views[:IOV_MAX], offset)
                else:  # macOS before 11, Windows
                    with self._lock:
                        os.lseek(self.fd, offset, os.SEEK_SET)
                        data = os.read(self.fd, len(views[0]))
                    count = len(data)
                    views[0][:count] = data
            except OSError as error:
                raise VmaError(f"{self.name}: offset 0x{offset:x}: {reason(error)}") from error
            if not count:
                raise VmaError(f"{self.name}: offset 0x{offset:x}: the file became shorter")
            offset += count
            views = behind(views, count)

    def advise(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Tell the system that these, (offset, size), will be read soon; it need not listen."""
        start = end = 0
        for offset, size in sorted(ranges):
            if self._advised[0] <= offset and offset + size <= self._advised[1]:
                continue
            if offset > end + ADVICE_GAP:
                self._advise(start, end)
                start = offset
            end = offset + size
        self._advise(start, end)

    def advise_up_to(self, end: int) -> None:
        """Tell the system that all from where the reading in order is will be read soon."""
        begin, stop = self._advised
        if not begin <= self.offset <= stop:
            begin = stop = self.offset
        self._advise(stop, end)
        self._advised = begin, max(stop, end)

    def _advise(self, start: int, end: int) -> None:
        if start < end:
            with suppress(AttributeError, OSError):
                os.posix_fadvise(self.fd, start, end - start, os.POSIX_FADV_WILLNEED)


def behind(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """Return what is left of views after their first count bytes."""
    first = 0
    while first < len(views) and count >= len(views[first]):
        count -= len(views[first])
        first += 1
    left = list(views[first:])
    if count:
        left[0] = left[0][count:]
    return left


class Codec(NamedTuple):
    """A compression: how its files begin, and what undoes it."""

    name: str
    magics: tuple[bytes, ...]
    programs: tuple[str, ...]
    module: str
    package: str


# A zstd file may also begin with one of sixteen skippable frames, as pzstd's do. pigz is faster
# than gzip, but ignores what is behind the end, and does not tell.
ZSTD_MAGICS = (b"\x28\xb5\x2f\xfd", *(bytes((i, 0x2A, 0x4D, 0x18)) for i in range(0x50, 0x60)))
CODECS = (
    Codec("zstd", ZSTD_MAGICS, ("zstd",), "compression.zstd", "zstd"),
    Codec("gzip", (b"\x1f\x8b",), ("gzip",), "gzip", "gzip"),
    Codec("lzop", (b"\x89LZO\0\r\n\x1a\n",), ("lzop",), "", "lzop"),
    Codec("xz", (b"\xfd7zXZ\0",), ("xz",), "lzma", "xz-utils"),
    Codec("bzip2", (b"BZh",), ("lbzip2", "bzip2"), "bz2", "bzip2"),
)
MAGIC_SIZE = max(len(magic) for codec in CODECS for magic in codec.magics)
# Variables of the environment that add options, meant for the user's own compressing
CODEC_OPTIONS = ("GZIP", "LZOP", "XZ_DEFAULTS", "XZ_OPT", "BZIP", "BZIP2", "ZSTD_CLEVEL")


class RestOfPipe(io.FileIO):
    """A pipe of which the first bytes have been read already.

    Its end is its end: a FIFO goes on when another writer opens it, after bytes that may be lost.
    """

    def __init__(self, start: bytes, fd: int, ended: bool) -> None:
        super().__init__(fd, "rb")
        self._start = start
        self._ended = ended

    def readinto(self, buffer: Any) -> int:
        if self._start:
            data = self._start[: len(buffer)]
            self._start = self._start[len(data) :]
            buffer[: len(data)] = data
            return len(data)
        if self._ended or not len(buffer):
            return 0
        while (count := super().readinto(buffer)) is None:
            wait_for_data(self.fileno())
        self._ended = not count
        return count


def wait_for_data(fd: int) -> None:
    """Wait until there is something to read: who shares a pipe with us may have made it so."""
    import select

    select.select([fd], [], [])


class ModuleInput(Input):
    """The bytes that one of Python's own modules decompresses."""

    def __init__(self, name: str, codec: Codec, raw: io.FileIO) -> None:
        self._buffered = io.BufferedReader(raw, PIPE_SIZE)
        super().__init__(name, importlib.import_module(codec.module).open(self._buffered))
        self._codec = codec
        self.raw = raw

    def readinto(self, view: memoryview) -> int:
        try:
            return super().readinto(view)
        # What the modules raise for damaged data has no common base: zlib.error, lzma.LZMAError ...
        except VmaError:
            raise
        except Exception as error:
            raise VmaError(f"{self.name}: {self._codec.name}: {error}") from error

    def close(self, failed: bool = False) -> None:
        super().close(failed)
        self._buffered.close()


def start_thread(thread: threading.Thread) -> None:
    """Start a thread; raises VmaError where the system allows no more of them."""
    try:
        thread.start()
    except RuntimeError as error:
        raise VmaError(str(error)) from error


class ProgramInput(Input):
    """The bytes that a decompressor, run as a child, makes of a file or pipe."""

    raw: io.FileIO

    def __init__(self, name: str, program: str, raw: io.FileIO, seekable: bool) -> None:
        import subprocess
        import tempfile

        self.raw = raw
        self._seekable = seekable
        self._ended = False
        self._feeding_error: OSError | None = None
        self._program = os.path.basename(program)
        # A file is the child's own standard input. It shares our offset, which tells how far it is.
        with Signals.held(), naming(f"{name}: {self._program}"), ExitStack() as undo:
            self._messages = undo.enter_context(tempfile.TemporaryFile())
            self._process = subprocess.Popen(
                [program, "-dc"],
                stdin=raw.fileno() if seekable else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._messages,
                bufsize=0,
                env={k: value for k, value in os.environ.items() if k not in CODEC_OPTIONS},
            )
            stdout = self._process.stdout
            assert isinstance(stdout, io.FileIO)
            widen_pipe(stdout.fileno())
            super().__init__(name, io.BufferedReader(stdout, BUFFER_SIZE))
            undo.callback(self.close, failed=True)
            if self._process.stdin:
                undo.callback(self._process.stdin.close)
                start_thread(threading.Thread(target=self._feed, daemon=True))
            undo.pop_all()  # close does it

    def _feed(self) -> None:
        """Hand the pipe's bytes on to the child, in a thread of its own."""
        stdin = self._process.stdin
        assert stdin is not None
        try:
            with self.raw, stdin:
                buffer = memoryview(bytearray(BUFFER_SIZE))
                while count := self.raw.readinto(buffer):
                    data = buffer[:count]
                    while data:  # it is not buffered: a write may be short
                        data = data[stdin.write(data) :]
        except BrokenPipeError:
            pass  # the child has ended; its exit status says why
        except OSError as error:
            self._feeding_error = error

    def readinto(self, view: memoryview) -> int:
        count = super().readinto(view)
        if count < len(view) and not self._ended:
            self._ended = True
            self._check(self._process.wait(), expected=(0,))
        return count

    def _check(self, status: int, expected: tuple[int, ...]) -> None:
        if self._feeding_error:
            raise VmaError(f"{self.name}: {reason(self._feeding_error)}")
        self._messages.seek(0)
        text = self._messages.read(1000).decode(errors="replace")
        lines = "; ".join(filter(None, map(str.strip, text.splitlines())))
        # Some programs ignore what is behind the end, and say so.
        if status not in expected or (self._ended and lines):
            raise VmaError(
                f"{self.name}: {self._program}: {escape(lines) or f'ended with status {status}'}"
            )

    def close(self, failed: bool = False) -> None:
        """End and reap the child; if it has failed, by now, in what was not read, say so."""
        import subprocess

        super().close(failed)
        try:
            # The closed pipe ends it, unless it waits for input itself.
            status = self._process.wait(timeout=0.01 if failed or not self._seekable else 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            status = 0
        with self._messages:
            if self._seekable:
                self.raw.close()
            if not self._ended and not failed:
                self._check(status, expected=(0, -getattr(signal, "SIGPIPE", 0)))


def widen_pipe(fd: int) -> None:
    """Give a pipe the room for fewer, larger reads, where the system knows how."""
    with suppress(ImportError, OSError):  # it only saves time
        import fcntl

        fcntl.fcntl(fd, getattr(fcntl, "F_SETPIPE_SZ", 1031), PIPE_SIZE)


@contextmanager
def open_input(path: str) -> Iterator[Input]:
    """Open an archive, plain or compressed, from a path or (`-`) standard input.

    A plain regular file or block device can be read at any place; all else is a stream.
    """
    name = shown(path, "input")
    with ExitStack() as stack:
        with ExitStack() as undo:
            raw, start, size = open_raw(path, name)
            undo.callback(raw.close)
            with naming(name):
                state = os.fstat(raw.fileno())
            codec = next((codec for codec in CODECS if start.startswith(codec.magics)), None)
            with Signals.held():
                if codec is None and size is not None:
                    source: Input = FileInput(name, raw)
                elif codec is None:
                    source = Input(name, io.BufferedReader(raw, BUFFER_SIZE))
                else:
                    source = open_codec(name, codec, raw, seekable=size is not None)
                    if size is not None:
                        source.state, source.compressed_size = state, size
                stack.enter_context(source)
                undo.pop_all()  # the input closes it
        yield source


def open_raw(path: str, name: str) -> tuple[io.FileIO, bytes, int | None]:
    """Open a file or pipe; return it, its first bytes, and its size if it can be read anywhere."""
    with ExitStack() as undo, naming(name):
        # A copy, so that who calls main finds its standard input open afterwards.
        fd = os.dup(0) if path == "-" else open_path(path, os.O_RDONLY)
        undo.callback(os.close, fd)
        refuse_terminal(fd, f"{name} is a terminal: name a file, or pipe an archive in")
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise refused(name, errno.EISDIR)
        # The rest of a file that somebody has begun to read is a stream.
        seekable = is_disk(mode) and not (path == "-" and os.lseek(fd, 0, os.SEEK_CUR))
        if not seekable:
            widen_pipe(fd)
        start = b""
        data = None
        while data != b"" and len(start) < MAGIC_SIZE:
            try:
                data = os.read(fd, MAGIC_SIZE - len(start))
                start += data
            except BlockingIOError:
                wait_for_data(fd)
        size = None
        if seekable:
            size = os.lseek(fd, 0, os.SEEK_END)
            os.lseek(fd, 0, os.SEEK_SET)
        raw = io.FileIO(fd, "rb") if seekable else RestOfPipe(start, fd, ended=data == b"")
        undo.pop_all()
        return raw, start, size


def is_disk(mode: int) -> bool:
    """Say whether this is a file that can be read at any place."""
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def open_codec(name: str, codec: Codec, raw: io.FileIO, seekable: bool) -> Input:
    """Return the decompressed bytes of raw: by a program, which has a processor to itself, or here.

    Raises VmaError where there is nothing that knows the codec.
    """
    import shutil

    program = next(filter(None, map(shutil.which, codec.programs)), None)
    if program:
        return ProgramInput(name, program, raw, seekable)
    try:
        return ModuleInput(name, codec, raw)
    except (ImportError, ValueError):  # ValueError: no module's name at all
        raise VmaError(
            f"{name}: compressed with {codec.name}, which this machine lacks: install the package "
            f"{codec.package}, or decompress it elsewhere: "
            f"{codec.programs[0]} -dc FILE | vma-tool COMMAND -"
        ) from None


class Target:
    """A file, pipe or device that is written, and the name that its errors carry.

    What is not `lasting` need not reach the disk.
    """

    lasting = True

    def __init__(self, fd: int, name: str, seekable: bool) -> None:
        self.fd = fd
        self.name = name
        self.seekable = seekable
        self.position = 0
        self._fresh = (0, 0)  # where what was written lately begins and ends

    def write_at(self, offset: int, parts: Sequence[Buffer]) -> None:
        """Write parts one behind the other; on a pipe, offset can only be where it stands."""
        pending = [memoryview(part) for part in parts if len(part)]
        start = offset
        try:
            while pending:
                if not self.seekable and hasattr(os, "writev"):
                    count = os.writev(self.fd, pending[:IOV_MAX])
                elif self.seekable and hasattr(os, "pwritev"):
                    count = os.pwritev(self.fd, pending[:IOV_MAX], offset)
                else:
                    if self.seekable:
                        os.lseek(self.fd, offset, os.SEEK_SET)
                    count = os.write(self.fd, pending[0])
                if not count:
                    raise OSError(errno.EIO, "nothing could be written")
                offset += count
                pending = behind(pending, count)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise VmaError(f"{self.name}: cannot write: {reason(error)}") from error
        if self.seekable and self.lasting:
            self._write_behind(start, offset)

    def _write_behind(self, start: int, end: int) -> None:
        """Let the disk begin with what was written, so that `sync` has little to wait for."""
        first, last = self._fresh
        if not first <= start <= last + WRITE_BEHIND or last - first >= WRITE_BEHIND:
            # The advice starts the writing of what is not on the disk; only what is there already
            # is dropped. Scattered writes are left to the system, which may find an order for them.
            if last - first >= WRITE_BEHIND // 4:
                with suppress(AttributeError, OSError):
                    os.posix_fadvise(self.fd, first, last - first, os.POSIX_FADV_DONTNEED)
            first = last = start
        self._fresh = first, max(last, end)

    def sync(self, times: os.stat_result | None = None) -> None:
        """Wait until all is on the disk; a new file with the times of another one, if given."""
        with naming(f"{self.name}: cannot write"):
            try:
                os.fsync(self.fd)
            except OSError as error:
                if error.errno != errno.EINVAL:  # a pipe
                    raise

    def append(self, parts: Sequence[Buffer]) -> None:
        """Write parts behind all that was written before."""
        offset = self.position
        self.position += sum(map(len, parts))
        self.write_at(offset, parts)

    def commit(self) -> None:
        """Put a new file, complete as it is now, under its name."""


class Directory:
    """A directory whose files appear under their names when they are complete, not before.

    It is held open: whatever happens to its path, what was checked is what is written. Names in it
    are never followed as symbolic links. What is not committed when it is closed is removed.
    """

    def __init__(self, path: str, follow: bool = True, mode: int = 0o666) -> None:
        self.path = path or "."
        self.mode = mode  # of new files, before the umask
        self._files: list[PartialFile] = []
        self.fd: int | None = None
        if os.open in os.supports_dir_fd:
            flags = os.O_RDONLY | os.O_DIRECTORY | (0 if follow else getattr(os, "O_NOFOLLOW", 0))
            self.fd = open_path(self.path, flags)

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *_: object) -> None:
        with Signals.held():
            for file in self._files:
                # Something has failed before, which is what the user has to read.
                with suppress(OSError):
                    file.close()
                with suppress(OSError):
                    os.unlink(self.at(file.temporary), dir_fd=self.fd)
            self._files.clear()
            if self.fd is not None:
                with suppress(OSError):  # it was only read
                    os.close(self.fd)
                self.fd = None

    def at(self, name: str) -> bytes:
        # Names are bytes on disk, whatever the locale believes.
        return encode_name(name if self.fd is not None else os.path.join(self.path, name))

    def state(self, name: str) -> os.stat_result | None:
        """Return the state of what has that name, also of a dangling symbolic link, or None."""
        with naming(self.full(name)), suppress(FileNotFoundError):
            return os.stat(self.at(name), dir_fd=self.fd, follow_symlinks=False)
        return None

    def require_free(self, names: Iterable[str], replace: bool) -> None:
        """Raise VmaError if there is something of one of the names: a directory if `replace`."""
        for name in names:
            state = self.state(name)
            if state and not replace:
                raise refused(self.full(name), errno.EEXIST)
            if state and stat.S_ISDIR(state.st_mode):
                raise refused(self.full(name), errno.EISDIR)

    def require_empty(self) -> None:
        with naming(escape(self.path)):
            if os.listdir(self.path if self.fd is None else self.fd):
                raise refused(escape(self.path), errno.ENOTEMPTY)

    def full(self, name: str) -> str:
        return escape(os.path.join(self.path, name))

    def create(self, name: str, old: os.stat_result | None = None) -> PartialFile:
        """Return a new file that will be called name after `commit`, in the place of an old one."""
        if len(encode_name(name)) > NAME_MAX_SIZE:
            raise refused(self.full(name), errno.ENAMETOOLONG)
        with Signals.held(), naming(self.full(name)):
            file = PartialFile(self, name, old)
            self._files.append(file)
        return file

    def remove(self, name: str) -> None:
        """Remove a file that was committed."""
        with suppress(OSError):
            os.unlink(self.at(name), dir_fd=self.fd)

    def flush(self) -> None:
        """Wait until all files are on the disk."""
        for file in self._files:
            file.sync()

    def commit(self, replace: bool) -> None:
        """Give all files their names, the last created last, and see that the disk knows them.

        Without `replace`, a name that meanwhile exists is an error. After an error, names that did
        not exist do not exist, and those that were replaced stay replaced.
        """
        # A signal waits: names that are half given would have to be taken back first.
        with ExitStack() as undo, Signals.held():
            undo.enter_context(naming(f"{escape(self.path)}: cannot write"))
            while self._files:
                file = self._files[0]
                exists = self.state(file.final) is not None
                if exists and not replace:
                    raise refused(file.name, errno.EEXIST)
                file.close()
                old, new = self.at(file.temporary), self.at(file.final)
                os.replace(old, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)
                self._files.pop(0)
                if not exists:
                    undo.callback(os.unlink, new, dir_fd=self.fd)
            if self.fd is not None:
                where = escape(self.path)
                undo.enter_context(naming(f"{where}: not flushed, but what was replaced is new"))
                os.fsync(self.fd)
            undo.pop_all()  # from here on, the new names stay


class PartialFile(Target):
    """A file of a `Directory` that has not got its name yet.

    It keeps mode and owner of the old one that it replaces.
    """

    def __init__(self, directory: Directory, final: str, old: os.stat_result | None) -> None:
        self.directory = directory
        self.final = final
        self.old = old
        self.temporary = TEMPORARY_NAME.format(os.urandom(6).hex())
        # Random, and made by us: nobody can have put a link to another file there.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        # Until `sync` gives it the old one's mode, nobody else may read what the old one hid.
        mode = directory.mode if old is None else 0o600
        fd = os.open(directory.at(self.temporary), flags, mode, dir_fd=directory.fd)
        super().__init__(fd, directory.full(final), seekable=True)

    def truncate(self, size: int) -> None:
        """Make the file size bytes long, without writing what is added."""
        with naming(f"{self.name}: cannot write"):
            os.ftruncate(self.fd, size)

    def allocate(self, size: int) -> None:
        """Take size bytes of disk space now, so that a full disk is an error at once.

        Only where the file system does that without writing them.
        """
        with naming(f"{self.name}: cannot take {format_size(size)}"):
            if size and hasattr(os, "posix_fallocate") and allocates_cheaply(self.fd):
                os.posix_fallocate(self.fd, 0, size)

    def read_back(self) -> FileInput:
        """Return what was written."""
        with naming(self.name):
            return FileInput(self.name, io.FileIO(os.dup(self.fd)))

    def sync(self, times: os.stat_result | None = None) -> None:
        with naming(f"{self.name}: cannot keep owner, mode and times"):
            if self.old and hasattr(os, "fchown"):
                own, old = os.fstat(self.fd), self.old
                if (own.st_uid, own.st_gid) != (old.st_uid, old.st_gid):
                    os.fchown(self.fd, old.st_uid, old.st_gid)
                os.fchmod(self.fd, stat.S_IMODE(old.st_mode))
            if times and os.utime in os.supports_fd:
                os.utime(self.fd, ns=(times.st_atime_ns, times.st_mtime_ns))
        super().sync()

    def commit(self) -> None:
        self.directory.commit(replace=self.old is not None)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def allocates_cheaply(fd: int) -> bool:
    """Say whether the file is on a file system known to reserve space without writing it.

    Elsewhere (NFS, CIFS) the C library would write into every block; ZFS compresses, and cannot
    say beforehand what fits.
    """
    device = os.fstat(fd).st_dev
    line = rf"(?m)^\S+ \S+ {os.major(device)}:{os.minor(device)} .*? - (\S+)"
    # Where there is no such list (not on Linux), nothing is known to be cheap.
    with suppress(OSError), open("/proc/self/mountinfo", "rb") as file:
        match = re.search(line.encode(), file.read())
        return match is not None and match[1] in (b"ext4", b"xfs")
    return False


@contextmanager
def open_output(
    path: str, replace: bool = True, mode: int = 0o666, device: Device | None = None
) -> Iterator[Target]:
    """Open a file to be written and then committed, or (`-`) standard output, or what is there.

    A block device only for a `device` that it has room for. A new file gets `mode`, before the
    umask. What is not committed at the end is removed.
    """
    name = shown(path, "output")
    old = None
    with naming(name), suppress(FileNotFoundError):
        old = os.stat(path) if path != "-" else os.fstat(1)
    kind = old.st_mode if old else stat.S_IFREG
    if not path:
        raise refused(quote(path), errno.ENOENT)
    if stat.S_ISDIR(kind) or path.endswith(os.sep):
        raise refused(name, errno.EISDIR)
    if stat.S_ISBLK(kind) and device is None:
        raise VmaError(f"{name}: what a block device holds behind an archive makes it a bad one")
    if path == "-":
        refuse_terminal(1, "standard output is a terminal: redirect it, or name a file")
        yield Target(1, name, seekable=False)
    elif stat.S_ISREG(kind):
        # As cp does: what a symbolic link points to is written, the link stays.
        path = os.path.realpath(path)
        if old:
            now = None
            with naming(name), suppress(FileNotFoundError):
                now = os.stat(path)
            if not now or not os.path.samestat(old, now):  # /dev/fd/3 of a file that was removed
                raise VmaError(f"{name}: the file has no name under which it could be replaced")
        if old and not replace:
            raise VmaError(f"{escape(path)}: {os.strerror(errno.EEXIST)}, --force replaces it")
        with Directory(os.path.dirname(path), mode=mode) as files:
            yield files.create(os.path.basename(path), old)
    else:
        fd = open_path(path, os.O_WRONLY)
        try:
            refuse_terminal(fd, f"{name} is a terminal")
            if stat.S_ISBLK(kind) and device is not None:
                require_room(name, fd, device)
                os.lseek(fd, 0, os.SEEK_SET)
            yield Target(fd, name, seekable=False)
        finally:
            os.close(fd)


def require_room(name: str, fd: int, device: Device, slack: int = sys.maxsize) -> None:
    """Raise VmaError if a file or block device is smaller than a device, or larger by `slack`."""
    with naming(name):
        size = os.lseek(fd, 0, os.SEEK_END)
    if not device.size <= size <= device.size + slack:
        raise VmaError(f"{name}: {size} bytes, device {quote(device.name)} needs {device.size}")


def refuse_terminal(fd: int, message: str) -> None:
    if os.isatty(fd):
        raise VmaError(message)


def open_path(path: str, flags: int) -> int:
    """Return a file descriptor of an existing file; raises VmaError with its name."""
    with naming(escape(path)):
        return os.open(path, flags | getattr(os, "O_BINARY", 0))


T = TypeVar("T")
R = TypeVar("R")


def run_steps(
    items: Iterable[T],
    step: Callable[[T, memoryview], R],
    deliver: Callable[[R], None],
    buffer_size: int = CHUNK_SIZE,
) -> None:
    """Hand what `step` makes of each item to `deliver`, in their order, in a thread of its own.

    A step reads into the buffer that it gets, and may return views of it. Reading and writing
    release the interpreter's lock, so that one processor reads while the other one writes. Two
    threads that both write are slower: the kernel lets only one at a time into a file.
    """
    import queue

    free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    filled: queue.SimpleQueue[tuple[memoryview, R] | None] = queue.SimpleQueue()
    failures: list[BaseException] = []

    def write() -> None:
        while (item := filled.get()) is not None:
            buffer, result = item
            try:
                if not failures:
                    deliver(result)
            except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
                failures.append(error)
            free.put(buffer)

    for _ in range(BUFFER_COUNT):
        free.put(new_buffer(buffer_size))
    writer = threading.Thread(target=write, daemon=True)
    try:
        start_thread(writer)
        for item in items:
            buffer = free.get()
            if failures:
                break
            filled.put((buffer, step(item, buffer)))
        filled.put(None)
        writer.join()
    except BaseException as error:
        failures.append(error)
        filled.put(None)
        if writer.is_alive():
            writer.join(timeout=2)  # it may hang in a pipe that nobody reads
        raise
    if failures:
        raise failures[0]


def new_buffer(size: int) -> memoryview:
    """Return memory for so many bytes in huge pages, if there are: copies are a tenth faster."""
    with suppress(ImportError, AttributeError, OSError):
        import mmap

        memory = mmap.mmap(-1, size)
        memory.madvise(mmap.MADV_HUGEPAGE)
        return memoryview(memory)
    return memoryview(bytearray(size))


# Parts that belong at an offset of a target, one behind the other.
Write = tuple[Target, int, list[Buffer]]


def write_all(writes: Iterable[Write]) -> None:
    for target, offset, parts in writes:
        target.write_at(offset, parts)


# ---------------------------------------------------------------------------------------------
# Reader


def read_header(source: Input) -> Header:
    """Read the header at the beginning of an archive; raises FormatError."""
    with in_archive(source.name):
        start = source.read(HEADER_FIXED_SIZE)
        data = memoryview(bytearray(parse_header_size(start)))
        data[:HEADER_FIXED_SIZE] = start
        count = source.readinto(data[HEADER_FIXED_SIZE:])
        return parse_header(data[: HEADER_FIXED_SIZE + count])


def read_extents(source: Input, header: Header) -> Iterator[Extent]:
    """Yield each extent header, with the source at its payload.

    Read the payload or leave it: what is left is passed over. Raises FormatError, also for bytes
    behind the last extent. `Index.add` checks what an extent says of the clusters.
    """
    with in_archive(source.name):
        while data := source.read(EXTENT_HEADER_SIZE):
            offset = source.offset - len(data)
            if len(data) < EXTENT_HEADER_SIZE:
                raise FormatError(
                    f"the archive ends with {len(data)} bytes that are no whole extent header",
                    offset,
                )
            extent = parse_extent(data, offset, header.uuid)
            end = extent.payload_offset + extent.payload_size
            if source.size is None or end <= source.size:
                yield extent
                source.skip(end - source.offset)
            require_end(source, extent)


def require_end(source: Input, extent: Extent) -> None:
    """Raise FormatError unless the source stands at the end of an extent."""
    if source.offset != extent.payload_offset + extent.payload_size:
        stop = source.offset if source.size is None else source.size
        raise FormatError(
            f"the archive ends inside an extent: {stop - extent.payload_offset} bytes of "
            f"payload, expected {extent.payload_size}",
            extent.offset,
            source.name,
        )


def read_payload(source: Input, extent: Extent, buffer: memoryview) -> memoryview:
    """Read an extent's payload into a buffer of EXTENT_MAX_BLOCKS blocks; raises FormatError."""
    payload = buffer[: extent.payload_size]
    if payload:
        source.readinto(payload)
        # Behind what was read, the buffer still holds what was in the extent before.
        require_end(source, extent)
    return payload


class DeviceIndex:
    """Where the clusters of one device are, 8 bytes a cluster.

    `entries[cluster_num]` is offset << 16 | mask; the offset is that of its first stored block in
    the archive, in bytes, also where none is stored. It is 0 for a cluster not seen yet.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.seen = 0
        self.stored_size = 0
        self.ascending = True
        count = device.cluster_count
        self.last = count - 1  # `Index.add` looks closer at this one, which may be partial
        self.entries: Any  # array and memoryview have no common type that slices to a list
        if device.is_vmstate:
            self.last = -1  # so that each cluster of it is looked at
            self.entries = array.array("Q")  # as many clusters as come, one after the other
        else:
            import mmap

            private = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
            # The kernel gives memory only for what is written to: a device that is announced but
            # not there costs nothing. Huge pages would make each cluster cost 2 MiB.
            try:
                memory = mmap.mmap(-1, 8 * count, **({"flags": private} if private else {}))
            except (OSError, OverflowError, ValueError) as error:
                message = f"device {quote(device.name)}: no memory for its {count} clusters"
                raise FormatError(message) from error
            with suppress(AttributeError, OSError):
                memory.madvise(mmap.MADV_NOHUGEPAGE)
            self.entries = memoryview(memory).cast("Q")

    @property
    def disk_size(self) -> int:
        """How long the restored device is, in bytes."""
        # Proxmox writes a vmstate as long as its clusters, whatever size the header says.
        return self.seen * CLUSTER_SIZE if self.device.is_vmstate else self.device.size

    @property
    def zero_size(self) -> int:
        """How many bytes of the size that the header says no stored block covers."""
        return max(self.device.size - self.stored_size, 0)

    def slice(self, first: int, count: int) -> list[int]:
        """Return the entries of up to count clusters."""
        entries: list[int] = self.entries[first : first + count].tolist()
        return entries

    def first_missing(self) -> int:
        """Return the lowest cluster_num that was not seen."""
        missing = (cluster_num for cluster_num, entry in enumerate(self.entries) if not entry)
        return next(missing, len(self.entries))


class Index:
    """Where every cluster of an archive is; checks each extent against the header's devices.

    `digest` identifies the sequence of extent headers, and with it the archive's layout.
    """

    def __init__(self, header: Header, source: Input) -> None:
        self.name = source.name
        self.digest = hashlib.sha256()
        self.extent_count = 0
        self.devices: dict[int, DeviceIndex] = {}
        with in_archive(self.name):
            clusters = sum(device.cluster_count for device in header.devices)
            if source.size is not None:
                room = (source.size - header.size) // EXTENT_HEADER_SIZE * EXTENT_SLOTS
                if clusters > room:
                    raise FormatError(
                        f"the devices have {clusters} clusters, of which a file of "
                        f"{source.size} bytes holds at most {max(room, 0)}"
                    )
            for device in header.devices:
                if device.cluster_count > MAX_CLUSTERS:
                    raise FormatError(
                        f"device {quote(device.name)}: a size of {device.size} bytes is more than "
                        "the format has cluster numbers for"
                    )
                self.devices[device.dev_id] = DeviceIndex(device)

    def add(self, extent: Extent) -> None:
        """Enter the clusters of an extent; raises FormatError where they cannot be right."""
        self.extent_count += 1
        self.digest.update(extent.md5)
        if not extent.block_count and self._add_zeros(extent):
            return
        position = extent.payload_offset
        current = 0  # dev_id of index
        for info in extent.blockinfo:
            dev_id = info >> 32 & 0xFF
            if not dev_id:
                continue
            if dev_id != current:
                if dev_id not in self.devices:
                    message = f"cluster of device {dev_id}, which the header does not have"
                    self._fail(message, extent.offset)
                index = self.devices[dev_id]
                entries = index.entries
                last = index.last
                current = dev_id
            cluster_num = info & 0xFFFFFFFF
            mask = info >> 48
            if cluster_num >= last or entries[cluster_num]:  # any other one can only be right
                self._check(extent, index, cluster_num, mask)
            entries[cluster_num] = position << 16 | mask
            if cluster_num != index.seen:
                index.ascending = False
            index.seen += 1
            if mask:
                size = mask_size(mask)
                index.stored_size += size
                position += size
        if position != extent.payload_offset + extent.payload_size:
            blocks = (position - extent.payload_offset) // BLOCK_SIZE
            message = f"block_count is {extent.block_count}, its masks have {blocks}"
            self._fail(message, extent.offset)

    def _add_zeros(self, extent: Extent) -> bool:
        """Enter at once an extent of one device that stores no block, as most of a disk's are.

        Return False, with nothing done, if it is anything else, or wrong.
        """
        # With mask 0, a blockinfo is dev_id << 32 | cluster_num: those of a device compare and
        # subtract like cluster numbers, and all others are far behind the device's last one.
        infos = extent.blockinfo
        if 0 in infos:
            infos = tuple(info for info in infos if info)
            if not infos:
                return True
        count = len(infos)
        in_order = infos == tuple(range(infos[0], infos[0] + count))
        base = (infos[0] if in_order else min(infos)) >> 32 << 32
        index = self.devices.get(base >> 32)
        last = infos[-1] if in_order else max(infos)
        if index is None or last - base >= index.last:  # a stored block, another device, ...
            return False
        first = infos[0] - base
        entry = extent.payload_offset << 16  # mask 0
        if in_order:
            if any(index.slice(first, count)):
                return False
            index.entries[first : first + count] = array.array("Q", [entry]) * count
        else:
            cluster_nums = [info - base for info in infos]
            entries = index.entries
            if len(set(cluster_nums)) < count or any(map(entries.__getitem__, cluster_nums)):
                return False
            for cluster_num in cluster_nums:
                entries[cluster_num] = entry
        index.ascending = index.ascending and in_order and first == index.seen
        index.seen += count
        return True

    def _check(self, extent: Extent, index: DeviceIndex, cluster_num: int, mask: int) -> None:
        """Raise FormatError if this cluster may not come here; make room for one of a vmstate."""
        if index.device.is_vmstate:
            if cluster_num == index.seen:
                index.entries.append(0)
                return
            fault = f"is out of order, expected {index.seen}"
        elif cluster_num > index.last:
            fault = f"is behind the device's end, its last one is {index.last}"
        elif index.entries[cluster_num]:
            fault = "occurs twice"
        elif mask & ~(inside := index.device.block_mask(cluster_num)):
            fault = f"has mask 0x{mask:04x}, the device ends behind 0x{inside:04x}"
        else:
            return
        self._fail(f"{index.device.title}: cluster {cluster_num} {fault}", extent.offset)

    def _fail(self, message: str, offset: int | None = None) -> NoReturn:
        raise FormatError(message, offset, self.name)

    def finish(self) -> None:
        """Raise FormatError unless every cluster of every device was there."""
        for index in self.devices.values():
            count = index.device.cluster_count
            if index.seen < count:
                self._fail(
                    f"{index.device.title}: {count - index.seen} of {count} clusters are missing, "
                    f"the first is {index.first_missing()}"
                )


class Range(NamedTuple):
    """Bytes of the source archive, by offset and size, that are to be copied."""

    offset: int
    size: int


Piece = Union[Buffer, Range]


class Span(NamedTuple):
    """Consecutive clusters of one device: their masks, and each one's stored blocks.

    `payload` has None for a cluster that stores none, and is empty if they all do not.
    """

    device: Device
    first: int
    masks: Sequence[int]
    payload: Sequence[Piece | None]


class Contents:
    """An archive's header, and of its clusters as much as was needed until now.

    Extents are read when something asks for clusters that are not known yet. Raises FormatError for
    an archive that Proxmox would not restore completely, at the latest when all have been read.
    """

    def __init__(self, source: Input) -> None:
        self.source = source
        self.header = read_header(source)
        self.index = Index(self.header, source)
        self._extents = read_extents(source, self.header)

    def _enter(self, extent: Extent) -> None:
        """Take note of an extent's clusters, with the source at its payload."""
        self.index.add(extent)

    def _read_extent(self) -> bool:
        """Enter the next extent; at the end, check that all clusters were there."""
        extent = next(self._extents, None)
        if extent is None:
            self.index.finish()
            return False
        self._enter(extent)
        return True

    def payloads(self) -> Iterator[tuple[Extent, memoryview]]:
        """Yield each extent and its payload, in the archive's order; check as `complete` does."""
        buffer = memoryview(bytearray(EXTENT_MAX_BLOCKS * BLOCK_SIZE))
        for extent in self._extents:
            self.index.add(extent)
            yield extent, read_payload(self.source, extent, buffer)
        self.index.finish()

    def complete(self) -> None:
        """Read all extents that were not read yet."""
        while self._read_extent():
            pass

    def entries(self, device: Device, first: int, count: int) -> list[int]:
        """Return the index's entries of so many clusters; fewer at the device's end."""
        index = self.index.devices[device.dev_id]
        while True:
            entries = index.slice(first, count)
            # A vmstate ends where its clusters end: fewer may only mean that more are to be read.
            known = 0 not in entries and (len(entries) == count or not device.is_vmstate)
            if known or not self._read_extent():
                return entries

    def spans(self, clusters: int, chosen: Collection[int] | None = None) -> Iterator[Span]:
        """Yield clusters in canonical order, so many at once; of all devices, or those chosen."""
        for device in canonical_order(self.header.devices, chosen):
            first = 0
            while entries := self.entries(device, first, clusters):
                masks = [entry & FULL_MASK for entry in entries]
                payload = self._payload(device, first, entries) if any(masks) else ()
                yield Span(device, first, masks, payload)
                first += len(entries)
        self.complete()

    def _payload(
        self, device: Device, first: int, entries: Sequence[int]
    ) -> Sequence[Piece | None]:
        """Return each cluster's stored blocks, or where they are."""
        return [
            Range(entry >> 16, mask_size(entry & FULL_MASK)) if entry & FULL_MASK else None
            for entry in entries
        ]


class Archive(Contents):
    """An archive that can be read at any place: any byte of any device, once it is complete.

    `lazy` leaves extents to be read as they are needed.
    """

    source: FileInput

    def __init__(self, source: FileInput, lazy: bool = False) -> None:
        super().__init__(source)
        # By how many clusters what was entered is ahead of what was asked for. From MAX_LEAD on,
        # the file's order says nothing of what is needed next.
        self._lead = 0
        if not lazy:
            self.complete()

    def complete(self) -> None:
        self._lead = MAX_LEAD  # nobody has asked for the payload
        super().complete()

    def _enter(self, extent: Extent) -> None:
        super()._enter(extent)
        self._lead += EXTENT_SLOTS
        if self._lead < MAX_LEAD:
            # Nearly in order: what comes next in the file is needed next.
            self.source.advise_up_to(extent.payload_offset + extent.payload_size + LOOK_AHEAD)

    def entries(self, device: Device, first: int, count: int) -> list[int]:
        entries = super().entries(device, first, count)
        self._lead -= len(entries)
        return entries

    def read(self, dev_id: int, offset: int, size: int) -> bytes:
        """Return bytes of a device, from offset; fewer than size at the device's end."""
        index = self.index.devices[dev_id]
        end = min(offset + size, index.disk_size)
        first = offset // CLUSTER_SIZE
        clusters = bytearray()
        for entry in index.slice(first, -(-end // CLUSTER_SIZE) - first):
            clusters += expand(self.read_stored(entry), entry & FULL_MASK)
        return bytes(clusters[offset - first * CLUSTER_SIZE : end - first * CLUSTER_SIZE])

    def read_stored(self, entry: int) -> bytearray:
        """Return the stored blocks of the cluster that an entry of the index stands for."""
        stored = bytearray(mask_size(entry & FULL_MASK))
        self.source.read_at([(entry >> 16, memoryview(stored))])
        return stored


def expand(stored: Buffer, mask: int) -> bytes:
    """Return a whole cluster, made of its stored blocks and zeros."""
    if mask == FULL_MASK:
        return bytes(stored)
    cluster = bytearray(CLUSTER_SIZE)
    start = 0
    for first, size in block_runs(mask):
        cluster[first : first + size] = stored[start : start + size]
        start += size
    return bytes(cluster)


# ---------------------------------------------------------------------------------------------
# Writer: the canonical layout

CANONICAL_UUID = bytes.fromhex("12345678aabbccddeeffaabbccddeeff")
CANONICAL_MAX_CLUSTERS = 58  # an extent, as Proxmox's own writer has it
ALIGNS = {name: parse_size(name) for name in ("4K", "64K", "128K", "256K", "512K", "1M")}
DEFAULT_ALIGN = "128K"


def canonical_order(
    devices: Iterable[Device], chosen: Collection[int] | None = None
) -> list[Device]:
    """Return the devices by dev_id, a vmstate last; only the chosen dev_ids, if there are some."""
    devices = (device for device in devices if chosen is None or device.dev_id in chosen)
    return sorted(devices, key=lambda device: (device.is_vmstate, device.dev_id))


def clusters_per_extent(align: int) -> int:
    """Return the largest number of clusters whose whole payload is a multiple of align bytes."""
    unit = max(align // CLUSTER_SIZE, 1)
    return CANONICAL_MAX_CLUSTERS // unit * unit


def lay_out_header(header: Header, align: int) -> bytearray:
    """Return the canonical header of an archive.

    It is rounded up to align, so that a configuration that grows a little moves no data.
    """
    header = header._replace(uuid=CANONICAL_UUID, size=0)
    size = -(-len(pack_header(header)) // align) * align
    return pack_header(header._replace(size=size))


def lay_out_extent(
    device: Device, first: int, masks: Sequence[int], align: int
) -> tuple[bytes, Sequence[int]]:
    """Return the header of the extent that holds these clusters, and their masks in it."""
    info = device.dev_id << 32 | first
    if not any(masks):
        return pack_extent(CANONICAL_UUID, 0, range(info, info + len(masks))), masks
    masks, block_count = fill_up(device, first, masks, align // BLOCK_SIZE)
    infos = [mask << 48 | info + i for i, mask in enumerate(masks)]
    return pack_extent(CANONICAL_UUID, block_count, infos), masks


def fill_up(
    device: Device, first: int, masks: Sequence[int], unit: int
) -> tuple[Sequence[int], int]:
    """Set mask bits from the extent's end until its blocks are a multiple of unit.

    Return the masks and the number of blocks. So each extent keeps its place relative to the blocks
    of a file system, however many zero blocks come and go. Blocks behind the device's end stay out.
    """
    block_count = sum(map(mask_size, masks)) // BLOCK_SIZE
    wanted = -block_count % unit
    if not wanted:
        return masks, block_count
    block_count += wanted
    filled = list(masks)
    for i in reversed(range(len(filled))):
        if not wanted:
            break
        zeros = device.block_mask(first + i) & ~filled[i]
        while zeros and wanted:
            highest = 1 << zeros.bit_length() - 1
            zeros ^= highest
            filled[i] |= highest
            wanted -= 1
    return filled, block_count - wanted


def extent_payload(span: Span, masks: Sequence[int]) -> list[Piece]:
    """Return an extent's payload: the span's stored blocks, and zeros where only masks has some."""
    pieces: list[Piece] = []
    for piece, mask, filled in zip(span.payload, span.masks, masks):
        if mask != filled:
            pieces.extend(fill_piece(piece or b"", mask, filled))
        elif piece is not None:
            pieces.append(piece)
    # Where the device ends inside its last block, that is zeros from there on, here if not before.
    device = span.device
    if span.first + len(masks) == device.cluster_count and device.stores_tail(masks[-1]):
        tail = device.tail_size
        pieces[-1:] = [part_of(pieces[-1], 0, piece_size(pieces[-1]) - tail), bytes(tail)]
    return pieces


def piece_size(piece: Piece) -> int:
    return piece.size if isinstance(piece, Range) else len(piece)


def part_of(piece: Piece, start: int, size: int) -> Piece:
    if isinstance(piece, Range):
        return Range(piece.offset + start, size)
    return piece[start : start + size]


def fill_piece(piece: Piece, mask: int, filled: int) -> Iterator[Piece]:
    """Yield a cluster's blocks, with zero blocks put in where filled has bits that mask lacks."""
    start = 0
    for block in range(CLUSTER_BLOCKS):
        if mask >> block & 1:
            yield part_of(piece, start, BLOCK_SIZE)
            start += BLOCK_SIZE
        elif filled >> block & 1:
            yield ZERO_BLOCK


class Layout:
    """A canonical archive in the making: its pieces in their order.

    `digest` grows with the extents; at the end it is that of the `Index` of what was written.
    """

    def __init__(self, header: Header, align: int) -> None:
        self.header = header
        self.align = align
        self.cluster_count = clusters_per_extent(align)
        self.digest = hashlib.sha256()

    def extents(self, spans: Iterable[Span]) -> Iterator[tuple[bytes, Span | None, Sequence[int]]]:
        """Yield each extent's header, with the span that it holds and the masks that it has."""
        for span in spans:
            data, masks = lay_out_extent(span.device, span.first, span.masks, self.align)
            self.digest.update(data[EXTENT_MD5])
            yield data, span, masks
        if not self.header.devices:
            # As Proxmox writes an archive that has only configs.
            data = pack_extent(CANONICAL_UUID, 0, ())
            self.digest.update(data[EXTENT_MD5])
            yield data, None, ()

    def pieces(self, spans: Iterable[Span]) -> Iterator[Piece]:
        """Yield the whole archive: header, extent headers and payload."""
        yield lay_out_header(self.header, self.align)
        for data, span, masks in self.extents(spans):
            yield data
            if span is not None:
                yield from extent_payload(span, masks)


def is_canonical(contents: Contents, align: int) -> bool:
    """Say whether an archive is what optimize would write with this align."""
    header = contents.header
    if header.uuid != CANONICAL_UUID or lay_out_header(header, align)[HEADER_MD5] != header.md5:
        return False
    contents.complete()
    layout = Layout(header, align)
    for _ in layout.extents(contents.spans(layout.cluster_count)):
        pass
    same = layout.digest.digest() == contents.index.digest.digest()
    return same and has_zero_tails(contents)


def has_zero_tails(contents: Contents) -> bool:
    """Say whether what the disks' last blocks hold behind their ends is zeros, as optimize has it.

    Of a stream this cannot be known any more: True.
    """
    source = contents.source
    if not isinstance(source, FileInput):
        return True
    for index in contents.index.devices.values():
        entry = index.entries[-1]
        if index.device.stores_tail(entry & FULL_MASK):
            tail = bytearray(index.device.tail_size)
            end = (entry >> 16) + mask_size(entry & FULL_MASK)
            source.read_at([(end - len(tail), memoryview(tail))])
            if any(tail):
                return False
    return True


# ---------------------------------------------------------------------------------------------
# Reorder: from any order to the canonical one, and to the disks

ZERO_EXTENTS = 1024  # headers of extents without data that are written at once
DEFAULT_MEMORY = 256 << 20
HELD_OVERHEAD = 200  # bytes of memory that a held cluster costs beside its blocks
SPILL_SIZE = 4 << 20  # how much goes to the temporary file at once


def iter_chunks(items: Iterable[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Gather items into lists of up to CHUNK_SIZE bytes, or of one that is larger."""
    chunk: list[T] = []
    size = 0
    for item in items:
        length = size_of(item)
        if size + length > CHUNK_SIZE and chunk:
            yield chunk
            chunk, size = [], 0
        chunk.append(item)
        size += length
    if chunk:
        yield chunk


def copy_pieces(
    source: Input, pieces: Iterable[Piece], deliver: Callable[[Sequence[Buffer]], None]
) -> None:
    """Deliver pieces in their order, a chunk at a time; those that are ranges are read from source.

    `deliver` runs in another thread.
    """

    def step(chunk: list[Piece], buffer: memoryview) -> list[Buffer]:
        parts: list[Buffer] = []
        wanted = []
        start = end = 0  # what of the buffer is not in parts yet
        for piece in chunk:
            if isinstance(piece, Range):
                wanted.append((piece.offset, buffer[end : end + piece.size]))
                end += piece.size
            else:
                parts += (buffer[start:end], piece)
                start = end
        parts.append(buffer[start:end])
        if wanted:
            assert isinstance(source, FileInput), "a stream has no ranges"
            source.read_at(wanted)
        return parts

    run_steps(ahead(iter_chunks(pieces, piece_size), source), step, deliver)


def ahead(chunks: Iterable[list[T]], source: Input) -> Iterator[list[T]]:
    """Pass chunks on a little later, after the system was told what they will read."""
    waiting: collections.deque[list[T]] = collections.deque()
    for chunk in chunks:
        if isinstance(source, FileInput):
            # Of a Range and of a Slot, the last two fields are the offset and the size.
            source.advise([piece[-2:] for piece in chunk if isinstance(piece, (Range, Slot))])
        waiting.append(chunk)
        if len(waiting) > READ_AHEAD:
            yield waiting.popleft()
    yield from waiting


class Spool(Target):
    """An unlinked temporary file of clusters, which `source` reads at any place."""

    lasting = False

    def __init__(self, directory: str) -> None:
        import tempfile

        directory = os.environ.get("TMPDIR") or directory or tempfile.gettempdir()
        name = f"temporary file in {escape(directory)}"
        with naming(name):
            file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - source closes
            self.source = FileInput(name, file)
        super().__init__(self.source.fd, name, seekable=True)


class Reorderer(Contents):
    """The clusters of a stream in canonical order, in one pass.

    A cluster that is next goes straight out. An early one waits in memory; where that would be more
    than `memory` bytes, clusters of the last device wait in an unlinked temporary file.
    """

    def __init__(self, source: Input, memory: int = DEFAULT_MEMORY, directory: str = "") -> None:
        super().__init__(source)
        self.memory = memory
        self.directory = directory
        self._held: dict[int, dict[int, bytes]] = {}  # by dev_id, in canonical order
        self._held_size = 0
        self._spool: Spool | None = None
        self._buffer = memoryview(bytearray(EXTENT_MAX_BLOCKS * BLOCK_SIZE))

    def spans(self, clusters: int, chosen: Collection[int] | None = None) -> Iterator[Span]:
        """Yield as `Contents.spans` does; only once, and what is not chosen is gone."""
        order = canonical_order(self.header.devices, chosen)
        self._held = {device.dev_id: {} for device in order}
        try:
            yield from super().spans(clusters, chosen)
        finally:
            if self._spool is not None:
                self._spool.source.close()

    def _enter(self, extent: Extent) -> None:
        self.index.add(extent)
        payload = read_payload(self.source, extent, self._buffer)
        for slot in iter_slots(extent) if extent.block_count else ():
            if slot.mask and slot.dev_id in self._held:
                data = bytes(payload[slot.start : slot.start + slot.size])
                self._held[slot.dev_id][slot.cluster_num] = data
                self._held_size += slot.size + HELD_OVERHEAD
        if self._held_size > self.memory:
            self._spill()

    def _spill(self) -> None:
        """Write clusters that are needed last to the temporary file until the rest is in bounds."""
        if self._spool is None:
            with Signals.held():
                self._spool = Spool(self.directory)
        # More than had to go, so that not each extent that comes makes a write of its own.
        goal = self.memory - min(SPILL_SIZE, self.memory // 8)
        offset = self._spool.position
        parts: list[bytes] = []
        for dev_id, held in reversed(self._held.items()):
            entries = self.index.devices[dev_id].entries
            while held and self._held_size > goal:
                cluster_num, data = held.popitem()  # the one that came last
                parts.append(data)
                # The place in the stream is of no use any more, that in the file is.
                entries[cluster_num] = offset << 16 | entries[cluster_num] & FULL_MASK
                offset += len(data)
                self._held_size -= len(data) + HELD_OVERHEAD
        self._spool.append(parts)

    def _payload(
        self, device: Device, first: int, entries: Sequence[int]
    ) -> Sequence[Piece | None]:
        held = self._held[device.dev_id]
        payload = []
        spilled = []
        for cluster_num, entry in enumerate(entries, first):
            data: Piece | None = held.pop(cluster_num, None)
            if data is not None:
                self._held_size -= piece_size(data) + HELD_OVERHEAD
            elif entry & FULL_MASK:
                data = memoryview(bytearray(mask_size(entry & FULL_MASK)))
                spilled.append((entry >> 16, data))
            payload.append(data)
        if spilled:
            assert self._spool is not None, "a stored cluster is neither held nor spilled"
            self._spool.source.read_at(spilled)
        return payload


def place(
    slots: Iterable[Sequence[int]],
    buffer: memoryview,
    targets: Mapping[int, Target],
    ends: Mapping[int, int],
) -> list[Write]:
    """Return the writes that bring stored blocks from a buffer to their disks, neighbours as one.

    Slots are as `Slot` has it. Targets are by dev_id, and so are `ends`: nothing is written behind
    them, where a device's last block may reach.
    """
    writes = []
    parts: list[Buffer] = []
    last = end = -1  # the device, and where on it the last run ends
    begin = filled = 0  # where in the buffer neighbours of it begin, and where it ends

    def add() -> None:
        """Add what is in the buffer for the last run, when it is known that nothing follows it."""
        if filled > begin:
            parts.append(buffer[begin : filled - max(end - ends[last], 0)])

    for dev_id, cluster_num, mask, start, _ in slots:
        for first, size in block_runs(mask):
            offset = cluster_num * CLUSTER_SIZE + first
            neighbour = offset == end and dev_id == last
            if not neighbour or start != filled:
                add()
                begin = start
            if not neighbour:
                parts = []
                writes.append((targets[dev_id], offset, parts))
            last, end = dev_id, offset + size
            start += size  # noqa: PLW2901 - where the next run is
            filled = start
    add()
    return writes


def copy_disks(archive: Archive, targets: Mapping[int, Target]) -> None:
    """Write the stored blocks of devices to their targets, by dev_id, each in disk order."""
    ends = {device.dev_id: device.max_size for device in archive.header.devices}

    def step(chunk: list[Slot], buffer: memoryview) -> list[Write]:
        wanted = []
        slots = []
        start = 0
        for dev_id, cluster_num, mask, offset, size in chunk:
            wanted.append((offset, buffer[start : start + size]))
            slots.append((dev_id, cluster_num, mask, start, size))
            start += size
        archive.source.read_at(wanted)
        return place(slots, buffer, targets, ends)

    chunks = iter_chunks(stored_clusters(archive, targets), operator.attrgetter("size"))
    run_steps(ahead(chunks, archive.source), step, write_all)
    if archive.source.copying:
        archive.source.copying.finish()


def stored_clusters(archive: Archive, chosen: Collection[int]) -> Iterator[Slot]:
    """Yield the clusters of devices that store blocks; each one's start is its archive offset."""
    for device in canonical_order(archive.header.devices, chosen):
        first = 0
        while entries := archive.entries(device, first, EXTENT_SLOTS):
            for cluster_num, entry in enumerate(entries, first):
                mask = entry & FULL_MASK
                if mask:
                    yield Slot(device.dev_id, cluster_num, mask, entry >> 16, mask_size(mask))
            first += len(entries)


def stream_disks(stream: Contents, targets: Mapping[int, Target], zeros: Collection[int]) -> None:
    """Write each cluster to its place as it comes, and check at the end that all were there."""
    ends = {device.dev_id: device.max_size for device in stream.header.devices}
    for extent, payload in stream.payloads():
        if not extent.block_count and not zeros:
            continue
        slots = sorted(slot for slot in iter_slots(extent) if slot.dev_id in targets)
        for dev_id, cluster_num, mask, start, size in slots if zeros else ():
            if dev_id in zeros:
                offset = cluster_num * CLUSTER_SIZE
                data = expand(payload[start : start + size], mask)
                targets[dev_id].write_at(offset, [data[: ends[dev_id] - offset]])
        stored = (slot for slot in slots if slot.dev_id not in zeros)
        write_all(place(stored, payload, targets, ends))


def write_disks(
    contents: Contents, targets: Mapping[int, Target], zeros: Collection[int] = ()
) -> None:
    """Write disks to targets by dev_id; those in zeros with their zero blocks, the others without.

    New files become as long as the disks. Of a stream, clusters are written as they come.
    """
    if not isinstance(contents, Archive):
        stream_disks(contents, targets, zeros)
    else:
        copy_disks(contents, {dev_id: targets[dev_id] for dev_id in targets if dev_id not in zeros})
        for dev_id in zeros:
            spans = contents.spans(CANONICAL_MAX_CLUSTERS, {dev_id})
            copy_pieces(contents.source, iter_disk(spans), targets[dev_id].append)
    for dev_id, target in targets.items():
        if isinstance(target, PartialFile):
            target.truncate(contents.index.devices[dev_id].disk_size)


class Disk(NamedTuple):
    """A device to pack, and the file that it is read from.

    `size` is the file's in bytes, `data_size` what of it is not a hole, as far as one can tell.
    """

    device: Device
    source: FileInput
    size: int
    data_size: int


def iter_data(disk: Disk) -> Iterator[tuple[int, int]]:
    """Yield (start, end) in bytes of the blocks that hold data, as far as the file system tells."""
    end = 0
    while end < disk.size:
        start = end
        try:
            data = os.lseek(disk.source.fd, end, os.SEEK_DATA)
            hole = os.lseek(disk.source.fd, data, os.SEEK_HOLE)
            # Holes may be smaller than a block: what of them is in one with data is read as zeros.
            start = data // BLOCK_SIZE * BLOCK_SIZE
            end = min(-(-hole // BLOCK_SIZE) * BLOCK_SIZE, disk.size)
        except (AttributeError, OSError) as error:  # AttributeError: a system without SEEK_DATA
            if getattr(error, "errno", None) == errno.ENXIO:
                return  # a hole up to the end
            end = disk.size
        yield start, end


def stored_masks(buffer: memoryview, parts: Iterable[tuple[int, int]], count: int) -> list[int]:
    """Return the masks of the blocks that are not all zeros, of count clusters in buffer.

    Looks only at parts, (start, end) in bytes, multiples of a block; the rest is zeros.
    """
    flags = bytearray(b"0") * (count * CLUSTER_BLOCKS)
    for start, end in parts:
        for offset in range(start, end, CLUSTER_SIZE):
            group = buffer[offset : min(offset + CLUSTER_SIZE, end)]
            # A block that does not begin with a zero byte needs no second look.
            firsts = bytes(group[::BLOCK_SIZE])
            if not any(firsts) and bytes(group) == ZERO_CLUSTER[: len(group)]:
                continue
            first = offset // BLOCK_SIZE
            flags[first : first + len(firsts)] = b"1" * len(firsts)
            for block, byte in enumerate(firsts if 0 in firsts else b"", first):
                if not byte and bytes(buffer[block * BLOCK_SIZE :][:BLOCK_SIZE]) == ZERO_BLOCK:
                    flags[block] = ord("0")
    return [
        int(flags[i : i + CLUSTER_BLOCKS][::-1], 2) for i in range(0, len(flags), CLUSTER_BLOCKS)
    ]


class Group(NamedTuple):
    """The clusters of one extent to pack, and where their data is, (start, end) on the disk.

    `zero_headers` are those of extents before it that store nothing, so that each step has work.
    """

    disk: Disk
    first: int
    cluster_count: int
    data: Sequence[tuple[int, int]]
    zero_headers: Sequence[bytes]


def iter_groups(layout: Layout, disk: Disk) -> Iterator[Group]:
    """Yield the extents of a disk; those without data only as the headers that they will have."""
    parts = iter_data(disk)
    part = next(parts, None)
    zero_headers: list[bytes] = []
    cluster_count = -(-disk.size // CLUSTER_SIZE)
    for first in range(0, cluster_count, layout.cluster_count):
        count = min(layout.cluster_count, cluster_count - first)
        start, end = first * CLUSTER_SIZE, min((first + count) * CLUSTER_SIZE, disk.size)
        data = []
        while part and part[0] < end:
            data.append((max(part[0], start), min(part[1], end)))
            if part[1] > end:
                break
            part = next(parts, None)
        if data or len(zero_headers) == ZERO_EXTENTS or end == disk.size:
            yield Group(disk, first, count, data, zero_headers)
            zero_headers = []
        else:
            zero_headers.append(lay_out_extent(disk.device, first, [0] * count, layout.align)[0])


def pack_disks(layout: Layout, disks: Iterable[Disk], target: Target) -> None:
    """Write a canonical archive of disks: read what is not a hole, store what is not zero."""

    def step(group: Group, buffer: memoryview) -> tuple[list[bytes], list[Piece]]:
        span = read_group(group, buffer)
        header, masks = lay_out_extent(span.device, span.first, span.masks, layout.align)
        return [*group.zero_headers, header], extent_payload(span, masks)

    def deliver(result: tuple[list[bytes], list[Any]]) -> None:
        headers, payload = result
        for header in headers:
            layout.digest.update(header[EXTENT_MD5])
        target.append([*headers, *payload])

    target.append([lay_out_header(layout.header, layout.align)])
    for data, _, _ in layout.extents(()):  # one, if there are no devices
        target.append([data])
    groups = itertools.chain.from_iterable(iter_groups(layout, disk) for disk in disks)
    run_steps(groups, step, deliver, layout.cluster_count * CLUSTER_SIZE)


def read_group(group: Group, buffer: memoryview) -> Span:
    """Read a group's data to its place in the buffer, and return what of it is not zero."""
    start = group.first * CLUSTER_SIZE
    parts = []
    for data_start, data_end in group.data:
        first, end = data_start - start, data_end - start
        group.disk.source.read_at([(data_start, buffer[first:end])])
        tail = -end % BLOCK_SIZE  # of the disk's last block
        buffer[end : end + tail] = bytes(tail)
        parts.append((first, end + tail))
    masks = stored_masks(buffer, parts, group.cluster_count)
    payload: list[Piece | None] = []
    # A whole cluster is written from where it was read; only of a partial one, blocks are joined.
    for i, mask in enumerate(masks):
        cluster = buffer[i * CLUSTER_SIZE : (i + 1) * CLUSTER_SIZE]
        if mask and mask != FULL_MASK:
            payload.append(b"".join(cluster[at : at + size] for at, size in block_runs(mask)))
        else:
            payload.append(cluster if mask else None)
    return Span(group.disk.device, group.first, masks, payload)


def check_written(output: PartialFile, layout: Layout) -> None:
    """Raise VmaError unless what is on the disk has the extents that were laid out."""
    # What was laid out had all clusters, so that extents need no parsing if they are as laid out:
    # the MD5 of each tells that it is whole, and the digest of these that it is the right one.
    digest = hashlib.sha256()
    with output.read_back() as source:
        header = read_header(source)
        whole = True
        while whole and (data := source.read(EXTENT_HEADER_SIZE)):
            whole = md5_without(data, EXTENT_MD5) == data[EXTENT_MD5]
            digest.update(data[EXTENT_MD5])
            size = int.from_bytes(data[EXTENT_BLOCK_COUNT], "big") * BLOCK_SIZE
            whole = whole and source.skip(size) == size
        expected = bytes(lay_out_header(layout.header, layout.align)[HEADER_MD5])
        if not whole or (header.md5, digest.digest()) != (expected, layout.digest.digest()):
            raise VmaError(f"{source.name}: what was written reads back as something else")


def iter_disk(spans: Iterable[Span]) -> Iterator[Piece]:
    """Yield the contents of one device, zeros and all, in the order of the disk, up to its end."""
    for span in spans:
        size = span.device.max_size - span.first * CLUSTER_SIZE
        for piece, mask in itertools.zip_longest(span.payload, span.masks):
            cluster = piece or ZERO_CLUSTER
            whole = mask in (0, FULL_MASK)
            for part in (cluster,) if whole else fill_piece(cluster, mask, FULL_MASK):
                length = min(piece_size(part), size)
                size -= length
                yield part_of(part, 0, length)


def digest_disks(contents: Contents) -> dict[int, str]:
    """Return the SHA-256 in hex of each device's contents, by dev_id."""
    digests = {}
    spans = contents.spans(CANONICAL_MAX_CLUSTERS)
    for device, group in itertools.groupby(spans, key=lambda span: span.device):
        digest = hashlib.sha256()

        def update(parts: Sequence[Buffer], digest: Any = digest) -> None:
            for part in parts:
                digest.update(part)

        copy_pieces(contents.source, iter_disk(group), update)
        digests[device.dev_id] = digest.hexdigest()
    return digests


def compare_headers(one: Header, other: Header, ignore_ctime: bool = False) -> list[str]:
    """Return how two archives differ in all but the contents of their disks."""
    found = []
    if one.ctime != other.ctime and not ignore_ctime:
        found.append(f"created {format_time(one.ctime)}, the other {format_time(other.ctime)}")
    for kind, differing in (
        ("config", set(one.configs) ^ set(other.configs)),
        ("device", set(one.devices) ^ set(other.devices)),
    ):
        for name, times in sorted(collections.Counter(item.name for item in differing).items()):
            what = "is in one of them only" if times == 1 else "differs"
            found.append(f"{kind} {quote(name)} {what}")
    return found


def compare_disks(contents: Contents, archive: Archive) -> list[str]:
    """Return how the contents differ of those devices that both archives have.

    Of the first archive, only the header has been read; it is read in the order that it has, and
    checked as `Archive` does. A zero block that only one of them stores is no difference.
    """
    others = archive.header.devices
    common = {device.dev_id: device for device in contents.header.devices if device in others}
    counts = dict.fromkeys(common, 0)
    firsts: dict[int, int] = {}
    for extent, payload in contents.payloads():
        for slot in iter_slots(extent):
            if slot.dev_id in common:
                stored = payload[slot.start : slot.start + slot.size]
                difference = compare_cluster(slot, stored, archive)
                if difference is not None:
                    counts[slot.dev_id] += 1
                    firsts[slot.dev_id] = min(firsts.get(slot.dev_id, difference), difference)
    found = [
        f"{common[dev_id].title}: {counts[dev_id]} clusters differ, the first byte that differs is "
        f"{first}"
        for dev_id, first in sorted(firsts.items())
    ]
    for dev_id, device in common.items():
        size, other = (each.index.devices[dev_id].disk_size for each in (contents, archive))
        if size != other:
            found.append(f"{device.title}: {size} bytes, the other {other}")
    return found


def compare_cluster(slot: Slot, stored: memoryview, archive: Archive) -> int | None:
    """Return where on its disk a cluster begins to differ from an archive's, None if nowhere."""
    index = archive.index.devices[slot.dev_id]
    entry = index.entries[slot.cluster_num] if slot.cluster_num < len(index.entries) else 0
    mask = entry & FULL_MASK
    if not slot.mask and not mask:
        return None
    other = archive.read_stored(entry)
    if slot.mask == mask and other == stored:
        return None
    start = slot.cluster_num * CLUSTER_SIZE
    # What the last block holds behind the device's end is restored by nobody.
    end = index.device.max_size - start
    one, two = expand(stored, slot.mask)[:end], expand(other, mask)[:end]
    if one == two:
        return None
    return start + next(i for i, (a, b) in enumerate(zip(one, two)) if a != b)


# ---------------------------------------------------------------------------------------------
# Guest disks: partition tables and file systems, recognised by what they begin with. Nothing in
# them is trusted: numbers only say where to read next, inside the device.

MBR_SIGNATURE = b"\x55\xaa"
MBR_ENTRY = struct.Struct("<B3xB3xII")  # status, type, first sector, sector count
MBR_ENTRIES = slice(446, 510)
MBR_EXTENDED = (0x05, 0x0F, 0x85)
MBR_PROTECTIVE = 0xEE
MBR_TYPES = {
    0x01: "FAT12", 0x04: "FAT16", 0x05: "extended", 0x06: "FAT16", 0x07: "NTFS or exFAT",
    0x0B: "FAT32", 0x0C: "FAT32", 0x0E: "FAT16", 0x0F: "extended", 0x27: "Windows recovery",
    0x82: "Linux swap", 0x83: "Linux", 0x85: "extended", 0x8E: "Linux LVM", 0xA5: "FreeBSD",
    0xEF: "EFI system", 0xFD: "Linux RAID",
}  # fmt: skip
GPT_MAGIC = b"EFI PART"
# UEFI specification, "GPT Header": signature, revision, header size, CRC, reserved, my LBA,
# alternate LBA, first and last usable LBA, disk GUID, entries' LBA, count, size, CRC
GPT_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
GPT_ENTRY = struct.Struct("<16s16sQQQ72s")  # type, GUID, first and last LBA, attributes, name
GPT_MAX_ENTRIES = 1024
GPT_TYPES = {
    "c12a7328-f81f-11d2-ba4b-00a0c93ec93b": "EFI system",
    "21686148-6449-6e6f-744e-656564454649": "BIOS boot",
    "0fc63daf-8483-4772-8e79-3d69d8477de4": "Linux",
    "4f68bce3-e8cd-4db1-96e7-fbcaf984b709": "Linux root",
    "933ac7e1-2eb4-4f13-b844-0e14e2aef915": "Linux home",
    "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f": "Linux swap",
    "e6d6d379-f507-44c2-a23c-238f2a3df928": "Linux LVM",
    "a19d880f-05fc-4d3b-a006-743f0f84911e": "Linux RAID",
    "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7": "Microsoft basic data",
    "e3c9e316-0b5c-4db8-817d-f92df00215ae": "Microsoft reserved",
    "de94bba4-06d1-4d40-a16a-bfd50179d6ac": "Windows recovery",
    "6a898cc3-1dd2-11b2-99a6-080020736631": "ZFS",
}


class FileSystem(NamedTuple):
    """How a file system is recognised: magic at an offset; its label, if it has one."""

    name: str
    offset: int
    magic: bytes
    label_offset: int = 0
    label_size: int = 0
    mountable: bool = True


FILE_SYSTEMS = (
    FileSystem("LUKS", 0, b"LUKS\xba\xbe", mountable=False),
    FileSystem("LVM", 512, b"LABELONE", mountable=False),
    FileSystem("xfs", 0, b"XFSB", 108, 12),
    FileSystem("btrfs", 65600, b"_BHRfS_M", 65835, 256),
    FileSystem("NTFS", 3, b"NTFS    "),
    FileSystem("exFAT", 3, b"EXFAT   "),
    FileSystem("FAT32", 82, b"FAT32   ", 71, 11),
    FileSystem("FAT16", 54, b"FAT16   ", 43, 11),
    FileSystem("FAT12", 54, b"FAT12   ", 43, 11),
    FileSystem("swap", 4086, b"SWAPSPACE2", 1052, 16, mountable=False),
    FileSystem("ext", 1080, b"\x53\xef", 1144, 16),
)
SUPERBLOCK_SIZE = 66 << 10  # as far as btrfs' label


class Partition(NamedTuple):
    """A partition; start and size in bytes. Number 0 is a file system on the whole disk."""

    number: int
    start: int
    size: int
    type: str
    label: str
    file_system: str
    mountable: bool


class Table(NamedTuple):
    """What a disk holds: the kind of its table, its partitions, and what is wrong with it."""

    kind: str
    partitions: Sequence[Partition]
    faults: Sequence[str]


Read = Callable[[int, int], bytes]  # offset, size in bytes


def read_table(read: Read, size: int) -> Table:
    """Return the partition table of a disk of size bytes; raises nothing for what is in it."""
    start = read(0, 512)
    for sector in (512, 4096):
        header = read(sector, GPT_HEADER.size)
        if header.startswith(GPT_MAGIC) and len(header) == GPT_HEADER.size:
            return read_gpt(read, size, sector, header)
    whole = recognise(read, 0, 0, size, "", "")
    if start[510:] == MBR_SIGNATURE and not whole.file_system:
        entries = list(MBR_ENTRY.iter_unpack(start[MBR_ENTRIES]))
        statuses, kinds, _, _ = zip(*entries)
        if any(kinds) and set(statuses) <= {0, 0x80}:
            return read_mbr(read, size, entries)
    return Table("none", [whole] if whole.file_system else [], [])


def read_mbr(read: Read, size: int, entries: Sequence[tuple[int, ...]]) -> Table:
    """Return the table in these four entries, and in the chain of an extended partition."""
    partitions = []
    faults = []

    def add(number: int, kind: int, start: int, count: int) -> None:
        if start >= size:
            faults.append(f"partition {number} begins at {start}, behind the disk's {size}")
            return
        if start + count > size:
            faults.append(f"partition {number} ends at {start + count}, behind the disk's {size}")
        name = MBR_TYPES.get(kind, f"type 0x{kind:02x}")
        partitions.append(recognise(read, number, start, min(count, size - start), name, ""))

    for number, (_, kind, base, length) in enumerate(entries, 1):
        if not kind or not length:
            continue
        if kind == MBR_PROTECTIVE:
            faults.append("a protective MBR, but no GPT header")
            continue
        add(number, kind, base * 512, length * 512)
        if kind not in MBR_EXTENDED:
            continue
        table = base
        seen = set()
        logical = 5
        while table not in seen and table * 512 < size:
            seen.add(table)
            sector = read(table * 512, 512)
            if sector[510:] != MBR_SIGNATURE:
                faults.append(f"no boot record at {table * 512}, where the extended chain goes on")
                break
            pair = MBR_ENTRY.iter_unpack(sector[MBR_ENTRIES][: 2 * MBR_ENTRY.size])
            (_, logical_kind, first, count), (_, next_kind, following, _) = pair
            if logical_kind and count:
                add(logical, logical_kind, (table + first) * 512, count * 512)
                logical += 1
            if not next_kind:
                break
            table = base + following
        else:
            faults.append(
                f"the extended chain leads to {table * 512}, in a circle or behind the end"
            )
    return Table("MBR", partitions, faults)


def read_gpt(read: Read, size: int, sector: int, header: bytes) -> Table:
    """Return the table behind a GPT header; one that is damaged is reported, and not used."""
    import binascii
    import uuid

    _, _, header_size, crc, *_, entries_lba, count, entry_size, entries_crc = GPT_HEADER.unpack(
        header
    )
    if not GPT_HEADER.size <= header_size <= sector:
        return Table("GPT", [], [f"header size {header_size} is out of range"])
    data = read(sector, header_size)
    if binascii.crc32(data[:16] + bytes(4) + data[20:]) != crc:
        return Table("GPT", [], ["the header's CRC does not match"])
    if not 0 < count <= GPT_MAX_ENTRIES or not GPT_ENTRY.size <= entry_size <= 4096:
        return Table("GPT", [], [f"{count} entries of {entry_size} bytes are out of range"])
    table = read(entries_lba * sector, count * entry_size) if entries_lba * sector < size else b""
    if len(table) < count * entry_size or binascii.crc32(table) != entries_crc:
        return Table("GPT", [], ["the entries' CRC does not match"])
    partitions = []
    faults = []
    for number in range(1, count + 1):
        kind, _, first, last, _, name = GPT_ENTRY.unpack_from(table, (number - 1) * entry_size)
        if not any(kind):
            continue
        start, end = first * sector, (last + 1) * sector
        if not start < end <= size:
            faults.append(
                f"partition {number} from {start} to {end} is not inside the disk's {size}"
            )
            continue
        guid = str(uuid.UUID(bytes_le=kind))
        label = name.decode("utf-16-le", "replace").partition("\0")[0]
        type_name = GPT_TYPES.get(guid, guid)
        partitions.append(recognise(read, number, start, end - start, type_name, label))
    return Table("GPT", partitions, faults)


def recognise(
    read: Read, number: int, start: int, size: int, type_name: str, label: str
) -> Partition:
    """Return a partition with the file system that its first bytes show."""
    data = read(start, min(size, SUPERBLOCK_SIZE)) if size > 0 else b""
    for known in FILE_SYSTEMS:
        if data.startswith(known.magic, known.offset):
            name = known.name if known.name != "ext" else ext_version(data)
            end = known.label_offset + known.label_size
            found = data[known.label_offset : end].partition(b"\0")[0].strip()
            own = found.decode("utf-8", "replace")
            if own and own != "NO NAME":
                label = f"{label} / {own}" if label and label != own else own
            return Partition(number, start, size, type_name, label, name, known.mountable)
    return Partition(number, start, size, type_name, label, "", False)


def ext_version(data: bytes) -> str:
    """Return which of ext2, ext3 and ext4 a superblock's features make it."""
    compatible, incompatible = struct.unpack_from("<II", data.ljust(2048, b"\0"), 1024 + 92)
    if incompatible & 0x2C0:  # extents, 64bit, flex_bg
        return "ext4"
    return "ext3" if compatible & 4 else "ext2"  # has_journal


# ---------------------------------------------------------------------------------------------
# Files: what extract and unpack write, what pack and create read

DESCRIPTION_NAME = "vma.json"
DESCRIPTION_FORMAT = 1
DESCRIPTION_MAX_SIZE = 1 << 20
CONFIG_NAME = "qemu-server.conf"
DISK_FILE = r"(?s)disk-(.*)\.raw|(drive-.*|vmstate)|(vmstate)\.bin"
SECTOR_SIZE = 512
DESTINATION_SLACK = 4 << 20
MAP_OPTIONS = ("format=", "throttling.bps=", "throttling.group=", "cache=")


def disk_file_name(device: Device) -> str:
    """Return what Proxmox's own vma extract calls a device's file."""
    return "vmstate.bin" if device.is_vmstate else f"disk-{device.name}.raw"


@contextmanager
def make_directory(path: str, mode: int) -> Iterator[Directory]:
    """Open a directory, made if it is not there; one that was made here goes away on an error.

    Its new files get `mode`, before the umask.
    """
    made = False
    with ExitStack() as undo:
        with Signals.held(), naming(escape(path)), suppress(FileExistsError):
            os.mkdir(path)
            made = True
            undo.callback(remove_directory, path)
        # What was made here is no symbolic link, unless somebody else has put one in its place.
        with Directory(path, follow=not made, mode=mode) as directory:
            yield directory
        undo.pop_all()


def remove_directory(path: str) -> None:
    with suppress(OSError):  # somebody else put something there
        os.rmdir(path)


def describe_for_pack(header: Header) -> bytes:
    """Return vma.json: what the other files cannot say."""
    value = {
        "format": DESCRIPTION_FORMAT,
        "ctime": header.ctime,
        "configs": [config.name for config in header.configs],
        "devices": [device._asdict() for device in header.devices],
    }
    return to_json(value).encode() + b"\n"


def to_json(value: object) -> str:
    import json

    return json.dumps(value, indent=2)


def refuse_twice(where: str, files: Sequence[str]) -> None:
    """Raise VmaError if two files of a directory have the same name."""
    for i, name in enumerate(files):
        if name in files[:i]:
            raise VmaError(f"{where}: two files would be called {quote(name)}")


# What is to be packed: the archive's header, and each device's file, by name
Packing = tuple[Header, Mapping[str, str]]


def read_described(directory: str) -> Packing:
    """Read a directory as vma.json describes it; raises VmaError for anything more or less."""
    import json

    path = os.path.join(directory, DESCRIPTION_NAME)
    where = escape(path)
    text = read_small(path, DESCRIPTION_MAX_SIZE)
    try:
        value = json.loads(text)
        if value["format"] != DESCRIPTION_FORMAT:
            raise VmaError(f"{where}: format {value['format']!r} is not supported")
        ctime = require(value["ctime"], int)
        names = [require(name, str) for name in value["configs"]]
        devices = tuple(
            Device(require(d["dev_id"], int), require(d["name"], str), require(d["size"], int))
            for d in value["devices"]
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise VmaError(f"{where}: not what unpack writes: {escape(repr(error))}") from error
    ids = [device.dev_id for device in devices]
    if len(set(ids)) < len(ids) or not set(ids) <= set(DEV_IDS):
        raise VmaError(f"{where}: a dev_id is there twice, or not from 1 to 254")
    if not -(1 << 63) <= ctime < 1 << 63 or not all(0 < d.size < 1 << 63 for d in devices):
        raise VmaError(f"{where}: a size or the ctime is out of range")
    # Names are checked before they are opened: vma.json may come from anywhere.
    check_names(Header(b"", ctime, tuple(Config(name, b"") for name in names), devices))
    known = [DESCRIPTION_NAME, *names, *(device.name for device in devices)]
    refuse_twice(where, known)
    extra = sorted(set(map(name_from_disk, os.listdir(directory))) - set(known))
    if extra:
        raise VmaError(
            f"{escape(os.path.join(directory, extra[0]))}: not listed in {DESCRIPTION_NAME}: "
            "list it there, or remove one of them"
        )
    paths = {name: os.path.join(directory, name_on_disk(name)) for name in known}
    configs = tuple(Config(name, read_small(paths[name])) for name in names)
    return Header(CANONICAL_UUID, ctime, configs, devices), paths


def require(value: object, kind: type[T]) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def read_undescribed(directory: str) -> Packing:
    """Read a directory by the names of its files; raises VmaError for one that says nothing."""
    configs = []
    devices = {}
    for entry in sorted(os.listdir(directory), key=natural_key):
        path = os.path.join(directory, entry)
        name = name_from_disk(entry)
        if name.endswith((".conf", ".fw")):
            configs.append(Config(name, read_small(path)))
            continue
        match = re.fullmatch(DISK_FILE, name)
        if not match:
            raise VmaError(
                f"{escape(path)}: neither a config (*.conf, *.fw) nor a device (disk-NAME.raw, "
                "drive-*, vmstate): rename or remove it"
            )
        name = match[match.lastindex or 0]
        if name in devices:
            raise VmaError(f"{escape(path)}: a second file for device {quote(name)}")
        devices[name] = path
    if not configs and not devices:
        raise VmaError(f"{escape(directory)}: there is nothing to pack")
    order = sorted(devices, key=lambda name: (name == VMSTATE, natural_key(name)))
    return packing_of(configs, {name: devices[name] for name in order})


def packing_of(configs: Iterable[Config], paths: Mapping[str, str]) -> Packing:
    """Return what becomes a new archive: configs, and disks by name in the order of dev_ids."""
    devices = tuple(Device(dev_id, name, 0) for dev_id, name in enumerate(paths, DEV_IDS[0]))
    return Header(CANONICAL_UUID, int(time.time()), tuple(configs), devices), paths


def natural_key(name: str) -> list[tuple[bool, int, str]]:
    """Return a sort key that puts scsi2 before scsi10."""
    parts = re.findall(r"([0-9]+)|([^0-9]+)", name)
    return [(not number, int(number or 0), number or text) for number, text in parts]


def read_small(path: str, limit: int = BLOB_MAX_SIZE) -> bytes:
    """Return a regular file's contents of up to limit bytes."""
    # Without O_NONBLOCK, a FIFO of that name would keep us waiting.
    fd = open_path(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with naming(escape(path)), os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise VmaError(f"{escape(path)}: not a file")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise VmaError(f"{escape(path)}: more than the {limit} bytes that it may have")
    return data


def open_disk(stack: ExitStack, device: Device, path: str, exact: bool) -> Disk:
    """Open the file or block device of a disk; `exact` if device.size is to be its size."""
    name = escape(path)
    fd = open_path(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with naming(name):
        file = stack.enter_context(os.fdopen(fd, "rb", buffering=0))
        state = os.fstat(fd)
        if not is_disk(state.st_mode):
            raise VmaError(f"{name}: neither a file nor a block device")
        source = FileInput(name, file)
    size = source.size
    if exact:
        # A vmstate restores as long as its clusters.
        padded = device.is_vmstate and size >= device.size and size % CLUSTER_SIZE == 0
        if size != device.size and not padded:
            raise VmaError(
                f"{name}: {size} bytes, expected the {device.size} that {DESCRIPTION_NAME} says"
            )
    else:
        device = device._replace(size=-(-size // SECTOR_SIZE) * SECTOR_SIZE)
    if not device.size:
        raise VmaError(f"{name}: an empty file is no disk")
    if device.cluster_count > MAX_CLUSTERS:
        raise VmaError(f"{name}: {size} bytes are more than the format has cluster numbers for")
    allocated = getattr(state, "st_blocks", 0) * SECTOR_SIZE
    return Disk(device, source, size, min(allocated, size) or size)


def set_options(header: Header, options: Sequence[tuple[str, str]]) -> Header:
    """Return the header with lines of qemu-server.conf replaced or added."""
    configs = dict(header.configs)
    if options and CONFIG_NAME not in configs:
        raise VmaError(f"-u changes {CONFIG_NAME}, which is not there")
    for key, value in options:
        configs[CONFIG_NAME] = set_option(configs[CONFIG_NAME], key, value)
    return header._replace(configs=tuple(map(Config._make, configs.items())))


def set_option(data: bytes, key: str, value: str) -> bytes:
    """Return a configuration with `key: value` in its main section, all else as it was.

    The main section ends at the first line that begins with `[`: a snapshot, or pending changes.
    """
    lines = data.splitlines(keepends=True)
    main = next((i for i, line in enumerate(lines) if line.startswith(b"[")), len(lines))
    new = encode_name(f"{key}: {value}\n")
    known = [
        i for i, line in enumerate(lines[:main])
        if b":" in line and line.partition(b":")[0].strip() == encode_name(key)
    ]  # fmt: skip
    if known:
        lines[known[0]] = new
        for i in reversed(known[1:]):  # of two, the last one would count
            del lines[i]
    else:
        while main and not lines[main - 1].strip():
            main -= 1  # blank lines belong to the section that follows
        if main and not lines[main - 1].endswith(b"\n"):
            lines[main - 1] += b"\n"
        lines.insert(main, new)
    return b"".join(lines)


def require_raw(image_format: str, hint: str) -> None:
    if image_format != "raw":
        what = f"format={escape(image_format)} is not read or written here, only raw"
        raise VmaError(f"{what}: {hint}")


def parse_map(lines: Iterable[str]) -> dict[str, tuple[str, bool] | None]:
    """Return where each device goes by its name, None for nowhere; raises VmaError.

    A path comes with whether zeros are to be written there, where not all is known to be zero.
    A line is `[OPTION=VALUE:]...0|1:NAME=PATH` or `skip=NAME`; `done` or an empty line is the last.
    """
    found: dict[str, tuple[str, bool] | None] = {}
    for line in lines:
        text = line.rstrip("\n")
        if text in ("", "done"):
            break
        if text.startswith("skip="):
            found[text.removeprefix("skip=")] = None
            continue
        rest = text
        while rest.startswith(MAP_OPTIONS):
            option, _, rest = rest.partition(":")
            if option.startswith("format="):
                hint = "extract the disk, then use qemu-img convert"
                require_raw(option.removeprefix("format="), hint)
        name, _, path = rest[2:].partition("=")
        if rest[:2] not in ("0:", "1:") or not name or not path or "\0" in path:
            raise VmaError(
                f"map: {quote(text)} is neither [format=raw:]0|1:NAME=PATH nor skip=NAME"
            )
        found[name] = path, rest[0] == "1"
    return found


@contextmanager
def open_destination(device: Device, path: str) -> Iterator[Target]:
    """Open an existing file or block device to restore a device into."""
    name = escape(path)
    fd = open_path(path, os.O_RDWR)
    try:
        with naming(name):
            if not is_disk(os.fstat(fd).st_mode):
                raise VmaError(f"{name}: neither a file nor a block device")
        # Storages round sizes up; Proxmox demands the same.
        require_room(name, fd, device, DESTINATION_SLACK)
        yield Target(fd, name, seekable=True)
    finally:
        os.close(fd)


def refuse_same(paths: Iterable[str], output: str) -> None:
    """Raise VmaError if what is to be written is one of the files that are read."""
    for path in paths:
        if is_same_file(path, output):
            name = shown(output, "output")
            raise VmaError(f"{name}: is read here, and cannot be written as well")


def is_same_file(path: str, output: str) -> bool:
    """Say whether both are one file, by whatever links, device nodes or (`-`) redirections."""
    states = []
    for name, stream, fd in (path, "input", 0), (output, "output", 1):
        with naming(shown(name, stream)), suppress(FileNotFoundError, NotADirectoryError):
            states.append(os.stat(name) if name != "-" else os.fstat(fd))
    if len(states) < 2:
        return False
    one, other = states
    if stat.S_ISBLK(one.st_mode) and stat.S_ISBLK(other.st_mode):
        return one.st_rdev == other.st_rdev
    return is_disk(one.st_mode) and os.path.samestat(one, other)


# ---------------------------------------------------------------------------------------------
# Commands: each takes the parsed command line and returns the exit status


def print_error(error: object) -> None:
    print(f"vma-tool: {error}", file=sys.stderr)


def cmd_list(args: Namespace) -> int:
    """Print what an archive holds."""
    contents: Contents | None = None
    tables: dict[int, Table] = {}
    with open_input(args.archive) as source:
        if args.partitions:
            if not isinstance(source, FileInput):
                raise VmaError(f"{source.name}: --partitions needs a plain file, not a stream")
            contents = archive = Archive(source)
            for device in archive.header.devices:
                if not device.is_vmstate:
                    read = functools.partial(archive.read, device.dev_id)
                    tables[device.dev_id] = read_table(read, device.size)
        elif args.scan:
            contents = Contents(source)
            contents.complete()
        header = contents.header if contents else read_header(source)
        found = describe(header, contents if args.scan else None, tables)
        source.check_unchanged()
    if args.json:
        print(to_json(found))
    else:
        print_listing(source.name, found)
    # It is shown for what it is, but a script must not take it for an archive that restores.
    check_archive_names(header, source)
    return 0


def describe(
    header: Header, contents: Contents | None, tables: Mapping[int, Table]
) -> dict[str, Any]:
    """Return what list --json prints, with what only a scan can know, if there is."""
    devices = [device._asdict() for device in header.devices]
    for device, item in zip(header.devices, devices):
        if contents:
            index = contents.index.devices[device.dev_id]
            item.update(stored=index.stored_size, zero=index.zero_size, ascending=index.ascending)
        if device.dev_id in tables:
            table = tables[device.dev_id]
            item.update(table=table.kind, faults=table.faults)
            item["partitions"] = [
                {**partition._asdict(), "mount": mount_command(device, partition)}
                for partition in table.partitions
            ]
    result = {
        "uuid": format_uuid(header.uuid),
        "ctime": header.ctime,
        "configs": [{"name": name, "size": len(data)} for name, data in header.configs],
        "devices": devices,
    }
    if contents:
        align = find_align(contents)
        result.update(extents=contents.index.extent_count, canonical=bool(align), align=align)
    return result


def mount_command(device: Device, partition: Partition) -> str | None:
    """Return how to mount a file system of an extracted disk, None for one that does not mount."""
    if not partition.mountable:
        return None
    import shlex

    options = f"ro,loop,offset={partition.start},sizelimit={partition.size}"
    # The name comes from the archive, and this line is made to be pasted into a root shell.
    return f"mount -o {options} {shlex.quote(escape(disk_file_name(device)))} /mnt"


def find_align(contents: Contents) -> str | None:
    """Return the --align with which optimize writes this very archive, None if there is none."""
    names = sorted(ALIGNS, key=lambda name: name != DEFAULT_ALIGN)
    return next((name for name in names if is_canonical(contents, ALIGNS[name])), None)


def print_listing(archive: str, found: Mapping[str, Any]) -> None:
    """Print for people what `describe` returned."""
    print(f"archive  {archive}")
    print(f"uuid     {found['uuid']}")
    print(f"created  {format_time(found['ctime'])}")
    if "align" in found:
        align = found["align"]
        print(f"layout   {f'canonical, --align {align}' if align else 'not canonical'}")
    for config in found["configs"]:
        print(f"config   {escape(config['name'])}  {config['size']} bytes")
    for device in found["devices"]:
        size = f"{format_size(device['size'])}, {device['size']} bytes"
        print(f"device   {device['dev_id']:<3} {escape(device['name'])}  {size}")
        if "stored" in device:
            order = "ascending" if device["ascending"] else "not in order"
            print(f"             {device['stored']} bytes stored, {device['zero']} zero, {order}")
        if "table" in device and not (device["partitions"] or device["faults"]):
            print("             no partition table, and no file system that is known here")
        for fault in device.get("faults", ()):
            print(f"             damaged {device['table']} table: {fault}")
        for part in device.get("partitions", ()):
            kinds = part["type"], part["file_system"], escape(part["label"])
            what = ", ".join(filter(None, kinds))
            place = f"{device['table']} {part['number']}" if part["number"] else "whole disk"
            print(f"             {place}: {part['start']} + {format_size(part['size'])}  {what}")
            if part["mount"]:
                print(f"               {part['mount']}")


def cmd_verify(args: Namespace) -> int:
    """Check archives, one after the other; a bad one does not keep the next from being checked."""
    bad = 0
    for path in args.archive:
        try:
            with open_input(path) as source, progress_of(args, source.name) as progress:
                if args.digest:
                    verify_digest(args, path, source, progress)
                    continue
                source.progress = progress
                progress.total = source.size or source.compressed_size
                if args.against is not None:
                    bad += verify_against(args, path, source)
                else:
                    contents = Contents(source)
                    contents.complete()
                    check_archive_names(contents.header, source)
                    source.check_unchanged()
                    if args.json:
                        description = describe(contents.header, contents, {})
                        print(to_json({"archive": path, "ok": True, **description}))
                    elif not args.quiet:
                        print(summary(contents))
                        print_totals(args, contents.index)
        except VmaError as error:
            bad += 1
            print_error(error)
            if args.json:
                print(to_json({"archive": path, "ok": False, "error": str(error)}))
    return 1 if bad else 0


def verify_against(args: Namespace, path: str, source: Input) -> bool:
    """Compare with another archive, say how they differ, and return whether they do."""
    with open_input(args.against) as other:
        # Either may be a stream. That one is read in its order, and each cluster of it looked up in
        # the other one.
        in_order, file = (source, other) if isinstance(other, FileInput) else (other, source)
        if not isinstance(file, FileInput):
            raise VmaError(f"{source.name} and {other.name}: one of them has to be a plain file")
        archive = Archive(file)
        contents = Contents(in_order)
        check_archive_names(archive.header, file)
        check_archive_names(contents.header, in_order)
        found = compare_headers(contents.header, archive.header, args.ignore_ctime)
        found += compare_disks(contents, archive)
        in_order.check_unchanged()
        file.check_unchanged()
    if args.json:
        result = {"archive": path, "against": args.against, "same": not found}
        print(to_json({**result, "differences": found}))
    elif found:
        for line in found:
            print_error(f"{source.name}: differs from {other.name}: {line}")
    elif not args.quiet:
        print(f"{source.name}: OK, the same as {other.name}")
    return bool(found)


def verify_digest(args: Namespace, path: str, source: Input, progress: Progress) -> None:
    """Print the SHA-256 of each config and disk, under the names that unpack gives them."""
    contents = load(source, progress)
    header = contents.header
    digests = digest_disks(contents)
    progress.finish()
    source.check_unchanged()
    files: list[dict[str, Any]] = []
    for name, data in header.configs:
        digest = hashlib.sha256(data).hexdigest()
        files.append({"name": name, "size": len(data), "sha256": digest})
    for dev_id, index in contents.index.devices.items():
        size = index.disk_size
        files.append({"name": index.device.name, "size": size, "sha256": digests[dev_id]})
    if args.json:
        print(to_json({"archive": path, "ok": True, "files": files}))
    else:
        for file in files:
            print(f"{file['sha256']}  {escape(file['name'])}")


def check_archive_names(header: Header, source: Input) -> None:
    """Raise FormatError for names that do not restore."""
    with in_archive(source.name):
        check_names(header)


def summary(contents: Contents) -> str:
    """Return verify's line on a good archive."""
    devices = contents.header.devices
    stored = sum(index.stored_size for index in contents.index.devices.values())
    align = find_align(contents)
    return (
        f"{contents.source.name}: OK, {len(devices)} device{'s' * (len(devices) != 1)}, "
        f"{format_size(sum(device.size for device in devices))}, {format_size(stored)} stored, "
        + (f"canonical (--align {align})" if align else "not canonical")
    )


def print_totals(args: Namespace, index: Index) -> None:
    """With -v, print what Proxmox's own program prints at its end."""
    if args.verbose:
        zero = sum(device.zero_size for device in index.devices.values())
        total = sum(device.disk_size for device in index.devices.values())
        percent = zero * 100 / total if total else 0
        print(f"total bytes {total}, zero bytes {zero} ({percent:.3g}%)", flush=True)


def progress_of(args: Namespace, name: str) -> Progress:
    return Progress(name, args.quiet, args.verbose)


def cmd_extract(args: Namespace) -> int:
    """Write configs and disks as Proxmox's own `vma extract` does."""
    if args.output is not None:
        return extract_one(args)
    if args.map is not None:
        return extract_mapped(args)
    return restore(args, args.targetdir, for_pack=False)


def choose(header: Header, lists: Sequence[str] | None) -> list[Device]:
    """Return the devices that lists of names, with commas, choose: all, if there are none."""
    known = {device.name: device for device in header.devices}
    chosen = set(known)
    if lists is not None:  # a name may have a comma itself
        chosen = set().union(*([text] if text in known else text.split(",") for text in lists))
    unknown = chosen - known.keys()
    if unknown:
        there = ", ".join(map(quote, known)) or "none"
        raise VmaError(f"no device {quote(min(unknown))}, there are {there}")
    return [device for name, device in known.items() if name in chosen]


def extract_one(args: Namespace) -> int:
    """Write one disk to a file, a block device or standard output."""
    refuse_same([args.archive], args.output)
    with loaded(args) as contents:
        device, *more = choose(contents.header, args.devices)
        if more:
            raise VmaError("-o writes one disk: choose it with -d NAME")
        mode = contents.source.output_mode
        with open_output(args.output, mode=mode, device=device) as output:
            if isinstance(output, PartialFile):
                write_disks(contents, {device.dev_id: output})
            else:
                spans = contents.spans(CANONICAL_MAX_CLUSTERS, {device.dev_id})
                copy_pieces(contents.source, iter_disk(spans), output.append)
            output.sync()
            contents.source.check_unchanged()
            output.commit()
    return 0


def extract_mapped(args: Namespace) -> int:
    """Write configs into a directory, and disks where a map says, as Proxmox's qmrestore does."""
    with ExitStack() as stack:
        contents = stack.enter_context(loaded(args))
        header = contents.header
        states = [disk_file_name(device) for device in header.devices if device.is_vmstate]
        refuse_twice(contents.source.name, [*(config.name for config in header.configs), *states])
        mode = contents.source.output_mode
        directory = stack.enter_context(make_directory(args.targetdir, mode))
        directory.require_empty()
        # Who writes the map into a FIFO reads the configs first, and asks for these lines with -v.
        for config in header.configs:
            directory.create(config.name).append([config.data])
        directory.flush()
        undo = stack.enter_context(ExitStack())
        with Signals.held():
            directory.commit(replace=False)
            for config in header.configs:
                undo.callback(directory.remove, config.name)
        if args.verbose:
            for config in header.configs:
                print(f"CFG: size: {len(config.data)} name: {escape(config.name)}")
            for dev_id, name, size in header.devices:
                print(f"DEV: dev_id={dev_id} size: {size} devname: {escape(name)}")
            print(f"CTIME: {format_time(header.ctime)}", flush=True)
        with naming(escape(args.map)), open(args.map, "rb") as lines:
            places = parse_map(line.decode("utf-8", "surrogateescape") for line in lines)
        targets: dict[int, Target] = {}
        used: list[str] = []
        zeros = set()
        for device in header.devices:
            if device.is_vmstate:
                targets[device.dev_id] = directory.create(disk_file_name(device))
                continue
            if device.name not in places:
                raise VmaError(f"{escape(args.map)}: no line for device {quote(device.name)}")
            place = places[device.name]
            if place is not None:
                path, write_zeros = place
                refuse_same([args.archive], path)
                if any(is_same_file(other, path) for other in used):
                    raise VmaError(f"{escape(path)}: two disks are to go there")
                used.append(path)
                targets[device.dev_id] = stack.enter_context(open_destination(device, path))
                if write_zeros:
                    zeros.add(device.dev_id)
        write_disks(contents, targets, zeros)
        for target in targets.values():
            target.sync()
        contents.source.check_unchanged()
        print_totals(args, contents.index)
        directory.commit(replace=False)
        undo.pop_all()
    return 0


def cmd_unpack(args: Namespace) -> int:
    """Write configs, disks and vma.json, from which pack makes the archive again."""
    return restore(args, args.directory, for_pack=True)


def restore(args: Namespace, path: str, for_pack: bool) -> int:
    """Write an archive's configs and devices into a directory, as unpack does or as extract."""
    with loaded(args) as contents:
        header = contents.header
        if for_pack:
            names = {device.dev_id: device.name for device in header.devices}
            extra = [DESCRIPTION_NAME]
        else:
            devices = choose(header, args.devices)
            names = {device.dev_id: disk_file_name(device) for device in devices}
            extra = []
        files = [*(config.name for config in header.configs), *names.values(), *extra]
        refuse_twice(contents.source.name, files)
        for name in files:
            refuse_same([args.archive], os.path.join(path, name_on_disk(name)))
        with make_directory(path, contents.source.output_mode) as directory:
            if for_pack:
                directory.require_free(files, args.force)
            else:
                directory.require_empty()
            for config in header.configs:
                directory.create(config.name).append([config.data])
            targets = {dev_id: directory.create(name) for dev_id, name in names.items()}
            write_disks(contents, targets)
            if for_pack:
                directory.create(DESCRIPTION_NAME).append([describe_for_pack(header)])
            directory.flush()
            contents.source.check_unchanged()
            print_totals(args, contents.index)
            directory.commit(replace=for_pack and args.force)
    return 0


@contextmanager
def loaded(args: Namespace) -> Iterator[Contents]:
    """Open the archive that a command restores, and `load` it."""
    with open_input(args.archive) as source, progress_of(args, source.name) as progress:
        yield load(source, progress)


def load(
    source: Input,
    progress: Progress,
    memory: int = DEFAULT_MEMORY,
    directory: str = "",
    lazy: bool = False,
) -> Contents:
    """Read and check what can be known before anything is written: of a stream, the header.

    Of a file, that is all; or it is read and checked as it is needed, if `lazy`.
    """
    contents: Contents
    if isinstance(source, FileInput):
        contents = Archive(source, lazy)
        progress.total = source.size
        source.copying = progress
    else:
        source.progress = progress
        progress.total = source.compressed_size
        contents = Reorderer(source, memory, directory)
    check_archive_names(contents.header, source)
    return contents


def cmd_pack(args: Namespace) -> int:
    """Write the canonical archive of what unpack or extract wrote, or of files named like that."""
    described = os.path.lexists(os.path.join(args.directory, DESCRIPTION_NAME))
    with naming(escape(args.directory)):
        names = os.listdir(args.directory)
        refuse_same([os.path.join(args.directory, name) for name in names], args.output)
        header, paths = (read_described if described else read_undescribed)(args.directory)
    write_packed(args, (set_options(header, args.options), paths), exact=described)
    return 0


def write_packed(args: Namespace, packing: Packing, exact: bool, replace: bool = True) -> None:
    """Write an archive of configs and disks, whose sizes are to be `exact`, or are found out."""
    header, paths = packing
    check_names(header)
    with ExitStack() as stack:
        disks = [
            open_disk(stack, device, paths[device.name], exact)
            for device in canonical_order(header.devices)
        ]
        for disk in disks:
            if disk.device.size != disk.size and not exact and not args.quiet:
                print(
                    f"{disk.source.name}: {disk.size} bytes, rounded up to {disk.device.size}, "
                    "as disks have whole sectors",
                    file=sys.stderr,
                )
        header = header._replace(devices=tuple(sorted(disk.device for disk in disks)))
        layout = Layout(header, ALIGNS[args.align])
        output = stack.enter_context(open_output(args.output, replace))
        progress = stack.enter_context(progress_of(args, output.name))
        stack.enter_context(warning_of_partial(output))
        progress.total = sum(disk.data_size for disk in disks)
        for disk in disks:
            disk.source.copying = progress
        pack_disks(layout, disks, output)
        if isinstance(output, PartialFile):
            check_written(output, layout)
        output.sync()
        for disk in disks:
            disk.source.check_unchanged()
        output.commit()


def cmd_create(args: Namespace) -> int:
    """Write an archive of configs and raw disks, named one by one, as Proxmox's vma create does."""
    paths = {}
    for spec in [*args.devices, *args.disks]:
        text = spec
        if text.startswith("format="):
            image_format, _, text = text.removeprefix("format=").partition(":")
            disk = escape(text.partition("=")[2])
            require_raw(image_format, f"first run qemu-img convert -O raw {disk} {disk}.raw")
        name, _, path = text.partition("=")
        if not name or not path or name in paths:
            raise VmaError(f"{quote(spec)} is not NAME=PATH, or the second one of that name")
        paths[name] = path
    refuse_same([*paths.values(), *args.config], args.output)
    configs = [Config(os.path.basename(path), read_small(path)) for path in args.config]
    write_packed(args, packing_of(configs, paths), exact=False, replace=args.force)
    return 0


def cmd_config(args: Namespace) -> int:
    """Print one config, byte for byte, from the header alone."""
    with open_input(args.archive) as source:
        configs = dict(read_header(source).configs)
    data = configs.get(args.config)
    if data is None:
        there = ", ".join(map(quote, configs)) or "none"
        raise VmaError(f"{source.name}: no config {quote(args.config)}, there are {there}")
    Target(1, "standard output", seekable=False).append([data])
    return 0


def cmd_optimize(args: Namespace) -> int:
    """Rewrite an archive in the canonical layout, to another file or in its own place."""
    if args.output == "-":
        refuse_same([args.archive], "-")
    in_place = args.output is None or is_same_file(args.archive, args.output)
    output_path = args.archive if args.output is None else args.output
    align = ALIGNS[args.align]
    with ExitStack() as stack:
        source = stack.enter_context(open_input(args.archive))
        state = require_replaceable(output_path, source) if in_place else None
        progress = stack.enter_context(progress_of(args, source.name))
        contents = load(source, progress, args.memory, directory_beside(output_path), lazy=True)
        layout = Layout(contents.header, align)
        if in_place and is_canonical(contents, align):
            source.check_unchanged(output_path)
            if not args.quiet:
                print(f"{source.name}: is canonical already (--align {args.align})")
            return 0
        output = stack.enter_context(open_output(output_path, mode=source.output_mode))
        file = output if isinstance(output, PartialFile) else None
        if args.check and (file is None or (source.size is None and not source.compressed_size)):
            raise VmaError(f"{source.name}: --check reads both archives again: name two files")
        if source.size is not None:
            if file:
                file.allocate(source.size)
            else:
                contents.complete()  # what is written now cannot be taken back
        stack.enter_context(warning_of_partial(output))
        spans = contents.spans(layout.cluster_count)
        copy_pieces(source, layout.pieces(spans), output.append)
        progress.finish()
        if file:
            file.truncate(file.position)  # more may have been allocated
            check_written(file, layout)
            if args.check or (args.check is None and in_place):
                check_contents(args, contents, file)
        output.sync(state)
        source.check_unchanged(output_path if in_place else None)
        if file and not args.quiet:  # not into an archive on standard output
            size = format_size(file.position)
            # Before the commit: if this cannot be printed, the archive is as it was.
            print(f"{source.name}: optimized (--align {args.align}), {size}", flush=True)
        output.commit()
    return 0


def directory_beside(output: str) -> str:
    """Return where a stream's temporary file may be: beside a file, but not in /dev or /proc."""
    if output == "-" or (os.path.exists(output) and not os.path.isfile(output)):
        return ""
    return os.path.dirname(os.path.realpath(output))


def check_contents(args: Namespace, contents: Contents, output: PartialFile) -> None:
    """Raise VmaError unless the written archive has the same disks as the one it was made of."""
    with output.read_back() as written:
        if isinstance(contents, Archive):
            found = compare_disks(Contents(written), contents)
        else:
            with open_input(args.archive) as source:
                found = compare_disks(Contents(source), Archive(written))
    if found:
        raise VmaError(f"{output.name}: what was written differs: {found[0]}")


@contextmanager
def warning_of_partial(output: Target) -> Iterator[None]:
    """Let an error say that what went into a pipe before it cannot be taken back."""
    try:
        yield
    except VmaError as error:
        if isinstance(output, PartialFile) or not output.position:
            raise
        raise VmaError(f"{error}; what {output.name} got is incomplete, and no archive") from error


def require_replaceable(path: str, source: Input) -> os.stat_result:
    """Return the state of an archive, or raise VmaError if it cannot be optimized in its place."""
    if source.compressed_size:
        root, extension = os.path.splitext(path)
        plain = root if extension not in ("", ".vma") else f"{path}.new"
        raise VmaError(
            f"{source.name}: a compressed archive is not replaced by a plain one: "
            f"vma-tool optimize {escape(path)} {escape(plain)}"
        )
    if not isinstance(source, FileInput) or not stat.S_ISREG(source.state.st_mode):
        raise VmaError(f"{source.name}: only a file can be replaced: name an OUTPUT")
    return source.state


# ---------------------------------------------------------------------------------------------
# Command line

EXAMPLES = """
examples:
  vma-tool optimize vzdump-qemu-100.vma            rewrite it in its place
  zstdcat x.vma.zst | vma-tool unpack - dir/       take it apart
  vma-tool verify *.vma && echo all will restore
"""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help as wide as the terminal, found without shutil: importing that costs each start 3 ms."""

    def __init__(self, prog: str, **options: Any) -> None:
        columns = 0
        with suppress(ValueError, OSError):
            columns = int(os.environ.get("COLUMNS") or os.get_terminal_size(1).columns)
        super().__init__(prog, **{"width": (columns or 80) - 2, **options})


class CommandParser(argparse.ArgumentParser):
    """A parser that takes options also between the positional arguments, as Proxmox's vma does."""

    _intermixed = False

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=HelpFormatter, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._intermixed:  # called by parse_known_intermixed_args itself
            return super().parse_known_args(args, namespace)
        self._intermixed = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixed = False


class Once(argparse.Action):
    """Stores a value, and refuses a second one: argparse would forget the first."""

    def __call__(self, _: Any, namespace: Namespace, values: Any, option: Any = None) -> None:
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "may be given only once")
        setattr(namespace, self.dest, values)


def build_parser() -> argparse.ArgumentParser:  # noqa: PLR0915 - a list, to be read line by line
    """Return the parser; each command sets `func` to the function that runs it."""

    def common(default: Any) -> CommandParser:
        options = CommandParser(add_help=False)
        flag = {"action": "store_true", "default": default}
        options.add_argument("--version", action="version", version=f"vma-tool {__version__}")
        options.add_argument("-q", "--quiet", **flag, help="print errors only")
        options.add_argument("-v", "--verbose", **flag, help="print more")
        return options

    layout = CommandParser(add_help=False)
    layout.add_argument(
        "--align", choices=ALIGNS, default=DEFAULT_ALIGN, type=str.upper, metavar="SIZE",
        help="block size of the storage that deduplicates: 4K, 64K, 128K, 256K, 512K or 1M "
        f"(default {DEFAULT_ALIGN})",
    )  # fmt: skip
    again = common(argparse.SUPPRESS)  # what was said before the command stays said
    parser = argparse.ArgumentParser(
        prog="vma-tool",
        parents=[common(False)],
        description="List, verify, unpack, pack and optimize Proxmox VE backup archives (.vma).",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=CommandParser)

    def add(
        func: Callable[[Namespace], int], text: str, example: str, *parents: Any
    ) -> Callable[..., argparse.Action]:
        name = func.__name__.removeprefix("cmd_")
        command = commands.add_parser(
            name,
            parents=[again, *parents],
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"example:\n  vma-tool {name} {example}",
        )
        command.set_defaults(func=func)
        return command.add_argument

    flag = {"action": "store_true"}
    several = {"action": "append", "default": []}
    text = "a file, plain or compressed, or - for standard input"
    archive = {"dest": "archive", "metavar": "ARCHIVE", "help": text}
    output = {"dest": "output", "help": "a file, or - for standard output"}

    arg = add(cmd_list, "show what an archive holds", "--scan backup.vma")
    arg("--json", **flag, help="print one JSON object, for scripts")
    arg("--partitions", **flag, help="show what the disks hold (of a plain file only)")
    arg("--scan", **flag, help="read all extent headers too: bytes stored, order, layout")
    arg(**archive)

    arg = add(cmd_verify, "check that archives will restore", "a.vma b.vma.zst")
    text = "compare configs and disk contents with this archive"
    arg("--against", action=Once, metavar="OTHER", help=text)
    arg("--ignore-ctime", **flag, help="with --against: the time may differ")
    arg("--digest", **flag, help="print the SHA-256 of each config and disk, as sha256sum does")
    arg("--json", **flag, help="print one JSON object an archive")
    arg(**archive, nargs="+")

    text = "write configs and disks as Proxmox's own vma extract does"
    arg = add(cmd_extract, text, "-d drive-scsi0 backup.vma disks/")
    text = "only these devices (default: all)"
    arg("-d", dest="devices", action="append", metavar="NAME[,NAME...]", help=text)
    text = "write the one disk of -d there (-: to a pipe)"
    arg("-o", dest="output", action=Once, metavar="PATH", help=text)
    text = "write disks into files and devices, by a map"
    arg("-r", dest="map", action=Once, metavar="MAPFILE", help=text)
    arg(**archive)
    arg("targetdir", metavar="TARGETDIR", nargs="?", help="must be new, or empty (none with -o)")

    arg = add(cmd_unpack, "write configs, disks and vma.json, for pack", "- dir/")
    arg("--force", **flag, help="replace files that exist")
    arg(**archive)
    arg("directory", metavar="DIRECTORY")

    arg = add(cmd_config, "print one config of an archive", "backup.vma")
    arg("-c", dest="config", metavar="NAME", default=CONFIG_NAME, help=f"(default {CONFIG_NAME})")
    arg(**archive)

    example = "-c qemu-server.conf new.vma drive-scsi0=disk.raw"
    arg = add(cmd_create, "make an archive of raw disks or block devices", example, layout)
    arg("-c", dest="config", metavar="CONFIG", **several, help="add a config file")
    arg("-d", dest="devices", metavar="[format=raw:]NAME=PATH", **several, help="add a disk")
    arg("--force", **flag, help="replace ARCHIVE if it exists")
    arg(**output, metavar="ARCHIVE")
    arg("disks", metavar="NAME=PATH", nargs="*", help="add a disk")

    arg = add(cmd_pack, "make an archive of what unpack wrote", "dir/ new.vma", layout)
    text = f"set a line of {CONFIG_NAME}, for instance -u name=web2"
    arg("-u", dest="options", metavar="KEY=VALUE", type=parse_option, **several, help=text)
    arg("directory", metavar="DIRECTORY")
    arg(**output, metavar="ARCHIVE")

    arg = add(cmd_optimize, "rewrite an archive in the canonical layout", "a.vma b.vma", layout)
    text = "of a stream, what may wait in memory and not in a temporary file (default 256M)"
    arg("--memory", metavar="SIZE", type=parse_memory, default=DEFAULT_MEMORY, help=text)
    text = "read the written archive back and compare all disks (default in place)"
    arg("--check", action="store_true", default=None, help=text)
    arg("--no-check", dest="check", action="store_false", help="do not")
    arg(**archive)
    output["help"] += " (default: replace ARCHIVE)"
    arg(**output, metavar="OUTPUT", nargs="?")

    arg = add(cmd_completion, "print a shell's completion of this command line", "bash")
    arg("shell", choices=("bash", "zsh"))
    return parser


def parse_args(argv: Sequence[str] | None) -> Namespace:
    parser = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    if "--" in words:
        # The parser of all commands would take it away from that of the command.
        end = words.index("--")
        names = words[end + 1 :]
        words[end:] = [f"./{n}" if n.startswith("-") and n != "-" else n for n in names]
    args = parser.parse_args(words)
    if args.func is cmd_extract:
        if args.output is not None and args.devices is None:
            parser.error("extract: -o writes one disk: choose it with -d NAME")
        if (args.output is None) != (args.targetdir is not None):
            parser.error("extract: name a TARGETDIR, or -o PATH")
        if args.map is not None and args.devices is not None:
            parser.error("extract: the devices are chosen by -d or by -r, not by both")
    if args.func is cmd_verify and args.against is not None and args.digest:
        parser.error("verify: --against or --digest, not both")
    if args.func is cmd_verify and args.against is None and args.ignore_ctime:
        parser.error("verify: --ignore-ctime is of use with --against only")
    if args.func is cmd_optimize and args.archive == "-" and args.output is None:
        parser.error("optimize: standard input cannot be replaced: name an OUTPUT")
    if args.func is cmd_optimize and args.check and "-" in (args.archive, args.output):
        parser.error("optimize: --check reads both archives again: name files")
    return args


def cmd_completion(args: Namespace) -> int:
    """Print a shell's completion of this command line, made from the parser itself."""
    # argparse has no public way to ask a parser for its options.
    actions = build_parser()._actions
    commands = next(a for a in actions if isinstance(a, argparse._SubParsersAction))
    print((complete_bash if args.shell == "bash" else complete_zsh)(commands.choices))
    return 0


def complete_bash(commands: Mapping[str, argparse.ArgumentParser]) -> str:
    cases = []
    for name, command in commands.items():
        words: list[str] = []
        for action in command._actions:
            if action.choices and action.option_strings:
                pattern = "|".join(f"{name}:{option}" for option in action.option_strings)
                cases.append(f"    {pattern}) words='{' '.join(action.choices)}' ;;")
            if action.option_strings:
                words += action.option_strings
            else:
                words = [*(action.choices or ()), *words]
        cases.append(f"    {name}:*) words='{' '.join(words)}' ;;")
    return f"""# bash completion of vma-tool: source this from ~/.bashrc
_vma_tool() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} words=
  if ((COMP_CWORD == 1)); then words='{" ".join(commands)}'; else
    case ${{COMP_WORDS[1]}}:$previous in
{chr(10).join(cases)}
    esac
    if [[ $words == -* && $current != -* ]]; then words=; fi # files, until a dash is typed
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _vma_tool vma-tool vma_tool.py"""


def complete_zsh(commands: Mapping[str, argparse.ArgumentParser]) -> str:
    def escaped(text: str) -> str:
        return re.sub(r"([][:\\])", r"\\\1", text).replace("'", "'\\''")

    descriptions = []
    cases = []
    for name, command in commands.items():
        descriptions.append(f"    '{name}:{escaped(command.description or '')}'")
        specs = []
        for action in command._actions:
            value = ""
            if action.nargs != 0:
                what = f"({' '.join(action.choices)})" if action.choices else "_files"
                value = f":{escaped(str(action.metavar or action.dest))}:{what}"
            specs += [f"'{o}[{escaped(action.help or '')}]{value}'" for o in action.option_strings]
            if action.choices and not action.option_strings:
                specs.append(f"'1{value}'")
        cases.append(f"    {name}) _arguments {' '.join(specs)} '*:file:_files' ;;")
    return f"""#compdef vma-tool vma_tool.py
# zsh completion of vma-tool: save this as _vma-tool in a directory of $fpath
_vma_tool() {{
  local -a commands=(
{chr(10).join(descriptions)}
  )
  if ((CURRENT == 2)); then _describe command commands; return; fi
  shift words; ((CURRENT--))
  case $words[1] in
{chr(10).join(cases)}
  esac
}}
if [[ $funcstack[1] == _vma-tool ]]; then _vma_tool "$@"; else
  compdef _vma_tool vma-tool vma_tool.py
fi"""


def parse_option(text: str) -> tuple[str, str]:
    match = re.fullmatch(r"([^=:[#\n\r \t]+)=([^\n\r]*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{quote(text)} is not KEY=VALUE")
    return match[1], match[2]


def parse_memory(text: str) -> int:
    with suppress(ValueError):
        if (size := parse_size(text)) >= 0:
            return size
    raise argparse.ArgumentTypeError(f"{quote(text)} is no size like 64M or 1G")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status; SystemExit for --help and wrong usage."""
    message = ""
    try:
        try:
            status = run(argv)
        except VmaError as error:
            status, message = 1, str(error)
        except BrokenPipeError:
            status = 128 + 13  # as if SIGPIPE had ended us
            discard_output()
        except OSError as error:
            status, message = 1, reason(error)
            discard_output()
        except MemoryError:
            status, message = 1, "out of memory"
        finally:
            Signals.depth = 1  # from here on, a signal comes too late
    except Interrupted as error:
        status, message = 128 + error.signum, f"ended by {signal.Signals(error.signum).name}"
    if message:
        print_error(message)
    return status


def run(argv: Sequence[str] | None) -> int:
    """Do what the command line says, with nothing caught: `main` makes a line of it."""
    Signals.install()
    occupy_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names, if the locale is not UTF-8
    with Signals.held():  # argparse's parsers do not bear to be interrupted
        args = parse_args(argv)
    status = int(args.func(args))
    if sys.stdout is not None:  # closed by the caller
        sys.stdout.flush()
    return status


def occupy_standard_streams() -> None:
    """Let nothing take the place of a standard stream that the caller has closed.

    A file of ours would get its number, and what is meant for standard error would go to standard
    output, perhaps into an archive.
    """
    streams = ("input", os.O_WRONLY), ("output", os.O_RDONLY), ("error", os.O_RDONLY)
    for fd, (name, flags) in enumerate(streams):
        with naming(f"standard {name}"):
            try:
                os.fstat(fd)
            except OSError as error:
                if error.errno != errno.EBADF:
                    raise
                # What is opened gets the lowest free number. To use it as what it is, still fails.
                os.open(os.devnull, flags)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the end


def discard_output() -> None:
    """Let what standard output still buffers go nowhere, so that the exit does not fail again."""
    fd = os.open(os.devnull, os.O_WRONLY)
    os.dup2(fd, 1)
    os.close(fd)


if __name__ == "__main__":
    gc.freeze()  # what was loaded stays: looking for garbage in it costs time, most at the exit
    sys.exit(main())
