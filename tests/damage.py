"""Damaged archives, as a table: each has one fault, and what must be said of it.

`good()` is the archive that the others are made of: three devices, one of them with a partial last
cluster and one the RAM state, in the order of a live backup, eight clusters an extent.
"""

from __future__ import annotations

import functools
import random
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tests import archives
from tests.archives import CLUSTER, Archive, Device, Slot


class Damage(NamedTuple):
    """An archive with one fault: what its message must say, and the offset where it is, if any.

    `says` is a regular expression; in it, and in the message, names are in single quotes.
    """

    name: str
    data: bytes
    says: str
    offset: int | None = None


EFI, DISK, VMSTATE = 1, 2, 3
EFI_LAST = 8  # its last cluster, of which it has four blocks
DISK_CLUSTERS = 24


@functools.cache
def good_archive() -> Archive:
    rng = random.Random(3)
    full, sparse = (
        archives.disk(rng, 4 * CLUSTER, "full"),
        archives.disk(rng, 8 * CLUSTER, "sparse"),
    )
    return Archive(
        [
            Device(EFI, "drive-efidisk0", archives.disk(rng, EFI_LAST * CLUSTER + 16384, "sparse")),
            Device(DISK, "drive-scsi0", full + bytes(12 * CLUSTER) + sparse),
            Device(VMSTATE, "vmstate", archives.disk(rng, 5 * CLUSTER, "sparse")),
        ],
        [("qemu-server.conf", b"cores: 2\n"), ("qemu-server.fw", b"")],
    )


@functools.cache
def good() -> bytes:
    """Return the archive without a fault."""
    order = archives.live_order(good_archive(), random.Random(4))
    return archives.build(good_archive(), order, slots=8)


def extents() -> list[int]:
    return archives.extent_offsets(good())


def find(wanted: Callable[[Slot], bool]) -> tuple[int, Slot]:
    """Return the first used slot of that kind, with the offset of its extent."""
    return next(
        (at, slot)
        for at in extents()
        for slot in archives.slots(good(), at)
        if slot.dev_id and wanted(slot)
    )


def cluster_of(dev_id: int, cluster_num: int) -> tuple[int, Slot]:
    return find(lambda slot: (slot.dev_id, slot.cluster_num) == (dev_id, cluster_num))


def without_extent(number: int) -> bytes:
    bounds = [*extents(), len(good())]
    return good()[: bounds[number]] + good()[bounds[number + 1] :]


def moved(slot: Slot, dev_id: int, cluster_num: int) -> bytes:
    """Return the archive with a slot that says to be another cluster."""
    return archives.edit(good(), slot.offset + 3, struct.pack(">BI", dev_id, cluster_num))


def header_damages() -> Iterator[Damage]:
    """Yield what `list` has to see as well."""
    data = good()

    def field(offset: int, number: int, form: str = ">I") -> bytes:
        return archives.edit(data, offset, struct.pack(form, number), fix_md5=offset != 56)

    yield Damage("empty file", b"", "not a VMA archive(, but an empty file)?")
    yield Damage("text", b"hello world\n" * 3000, "not a VMA archive")
    yield Damage("short text", b"hello", "not a VMA archive")
    yield Damage("cut in the magic", data[:3], "not a VMA archive")
    for size in (4, 5000, 12287, 12288, 12300):
        yield Damage(
            f"cut after {size} bytes", data[:size], f"ends inside its header, after {size} bytes"
        )
    yield Damage("another magic", archives.edit(data, 0, b"VMB\0"), "not a VMA archive")
    for version in (0, 2, 0x01000000):
        yield Damage(
            f"version {version}", field(4, version), f"version {version} is not supported", 4
        )
    for offset, what in (
        (8, "uuid"), (31, "ctime"), (40, "md5"), (2044, "config"), (4200, "device"),
        (12290, "blob"),
    ):  # fmt: skip
        flipped = bytes([data[offset] ^ 0x10])
        yield Damage(
            f"{what} changed, MD5 not",
            archives.edit(data, offset, flipped, fix_md5=False),
            "header's MD5 does not match",
            32,
        )
    for size in (0, 512, 12287, 12288, (64 << 20) + 1, 0xFFFFFE00, 0xFFFFFFFF):
        yield Damage(f"header_size {size}", field(56, size), f"header_size is {size}", 56)
    yield Damage(
        "header_size behind the file's end", field(56, 16 << 20), "ends inside its header, after"
    )
    for offset, what in ((48, "offset"), (52, "size")):
        for number in (1 << 30, 0xFFFFFFFF):
            yield Damage(
                f"blob buffer: {what} {number}",
                field(offset, number),
                "the blob buffer is at",
                48,
            )
    for number in (0, 12287):
        yield Damage(
            f"blob buffer: offset {number}", field(48, number), "the blob buffer is at", 48
        )
    for table, what in ((2044, "name"), (3068, "data")):
        (offset,) = struct.unpack_from(">I", data, table + 4)
        for number in (0x100000, 0xFFFFFFFF, len(data), offset - 1, offset + 1):
            yield Damage(
                f"config 1: {what} offset {number}",
                field(table + 4, number),
                "config 1: its name or its data is no blob of the header",
                2048,
            )
    # the last byte of the blob buffer is that of no length field
    (blob_size,) = struct.unpack_from(">I", data, 52)
    yield Damage(
        "config 0: name at the buffer's last byte",
        field(2044, blob_size - 1),
        "config 0: its name or its data is no blob of the header",
        2044,
    )
    for dev_id, size in ((DISK, DISK_CLUSTERS * CLUSTER + 1), (VMSTATE, 511), (EFI, (1 << 64) - 1)):
        at = 4096 + 32 * dev_id + 8
        yield Damage(
            f"device {dev_id} of {size} bytes",
            field(at, size, ">Q"),
            f"a size of {size} bytes is no multiple of 512",
            at,
        )


def device_damages() -> Iterator[Damage]:
    """Yield headers whose devices cannot be those of the extents."""
    data = good()
    size_at = 4096 + 32 * DISK + 8

    def sized(size: int) -> bytes:
        return archives.edit(data, size_at, struct.pack(">Q", size))

    for size in (1 << 62, (1 << 64) - 512, 1 << 48, 1 << 40):
        yield Damage(
            f"device of {size} bytes",
            sized(size),
            r"the devices have \d+ clusters|'drive-scsi0'.* cluster(s| numbers)",
        )
    missing = "'drive-scsi0'.* 1 of 25 clusters are missing, the first is 24"
    yield Damage("device one sector too long", sized(DISK_CLUSTERS * CLUSTER + 512), missing)
    at, _ = cluster_of(DISK, DISK_CLUSTERS - 1)
    yield Damage(
        "device one cluster too short",
        sized((DISK_CLUSTERS - 1) * CLUSTER),
        "'drive-scsi0'.* cluster 23 is behind the device's end, its last one is 22",
        at,
    )
    at, _ = find(lambda slot: slot.dev_id == DISK)
    unknown = "device 2, which the header does not have"
    yield Damage("device of size 0", sized(0), unknown, at)
    (name_offset,) = struct.unpack_from(">I", data, 4096 + 32 * DISK)
    for what, offset in (("behind the buffer", 1 << 20), ("inside a blob", name_offset + 1)):
        yield Damage(
            f"device name {what}",
            archives.edit(data, 4096 + 32 * DISK, struct.pack(">I", offset)),
            unknown,
            at,
        )


def extent_damages() -> Iterator[Damage]:
    data = good()
    first, second, last = extents()[0], extents()[1], extents()[-1]

    def field(offset: int, new: bytes) -> bytes:
        return archives.edit(data, offset, new)

    yield Damage("extent magic", field(second + 3, b"F"), "no extent here: magic", second)
    yield Damage("extent reserved", field(second + 4, b"\0\1"), "reserved field is 1", second)
    yield Damage(
        "extent uuid",
        field(second + 8, b"another archive!"),
        "extent of another archive: uuid 616e6f74-6865-7220-6172-636869766521",
        second,
    )
    for offset, what in ((24, "md5"), (44, "blockinfo"), (511, "last byte")):
        yield Damage(
            f"extent {what}, MD5 not",
            archives.edit(data, last + offset, bytes([data[last + offset] ^ 1]), fix_md5=False),
            "extent header's MD5 does not match",
            last,
        )
    (count,) = struct.unpack_from(">H", data, first + 6)
    for wrong in (0, count - 1, count + 1, 0xFFFF):
        yield Damage(
            f"block_count {wrong} for {count}",
            field(first + 6, struct.pack(">H", wrong)),
            f"block_count is {wrong}, its masks have {count}"
            "|ends inside an extent: .* expected 268431360",
            first,
        )
    at, slot = find(lambda slot: slot.mask not in (0, 0xFFFF))
    yield Damage(
        "a mask with one block more",
        field(slot.offset, struct.pack(">H", slot.mask | slot.mask + 1)),
        "block_count is .*, its masks have ",
        at,
    )


def cluster_damages() -> Iterator[Damage]:
    at, slot = find(lambda slot: slot.dev_id == DISK)
    other = DISK_CLUSTERS - 1 if slot.cluster_num != DISK_CLUSTERS - 1 else 0
    where = cluster_of(DISK, other)[0]
    yield Damage(
        "cluster twice",
        moved(slot, DISK, other),
        f"'drive-scsi0' .dev_id 2.: cluster {other} occurs twice",
        max(at, where),
    )
    for what, wanted in (
        ("with data", lambda slot: slot.dev_id == DISK and slot.mask),
        ("of zeros", lambda slot: slot.dev_id == DISK and not slot.mask),
    ):  # type: tuple[str, Callable[[Slot], bool]]
        at, slot = find(wanted)
        for number in (DISK_CLUSTERS, DISK_CLUSTERS + 1, 1 << 31, 0xFFFFFFFF):
            yield Damage(
                f"cluster {number} {what}",
                moved(slot, DISK, number),
                f"'drive-scsi0' .dev_id 2.: cluster {number} is behind the device's end,"
                " its last one is 23",
                at,
            )
        for dev_id in (4, 77, 254, 255):
            yield Damage(
                f"cluster {what} of device {dev_id}",
                moved(slot, dev_id, 0),
                f"device {dev_id}, which the header does not have",
                at,
            )
    at, slot = cluster_of(EFI, EFI_LAST)
    for mask in (0x0010, 0x8000, 0xFFFE, 0x7FFF):  # a full one is not damage
        yield Damage(
            f"last cluster with mask {mask:04x}",
            archives.edit(good(), slot.offset, struct.pack(">H", mask)),
            f"'drive-efidisk0' .dev_id 1.: cluster 8 has mask 0x{mask:04x},"
            " the device ends behind 0x000f",
            at,
        )
    at, slot = cluster_of(VMSTATE, 0)
    yield Damage(
        "vmstate out of order",
        moved(slot, VMSTATE, 1),
        "'vmstate' .dev_id 3.: cluster 1 is out of order, expected 0",
        at,
    )
    at, slot = cluster_of(VMSTATE, 4)
    yield Damage(
        "vmstate twice",
        moved(slot, VMSTATE, 3),
        "'vmstate' .dev_id 3.: cluster 3 is out of order, expected 4",
        at,
    )


def missing_damages() -> Iterator[Damage]:
    """Yield what is shorter or longer than it should be."""
    data = good()
    bounds = extents()
    first, last = bounds[0], bounds[-1]
    lacking = r"clusters are missing, the first is \d+"
    yield Damage("header only", data[:first], r"the devices have 33 clusters, .*|" + lacking)
    yield Damage("last extent missing", data[:last], lacking)
    yield Damage("first extent missing", without_extent(0), lacking + "|is out of order")
    yield Damage("an extent missing", without_extent(2), lacking + "|is out of order")
    for dev_id, cluster_num, what in (
        (EFI, 0, "1 of 9 clusters are missing, the first is 0"),
        (EFI, EFI_LAST, "1 of 9 clusters are missing, the first is 8"),
        (DISK, 17, "1 of 24 clusters are missing, the first is 17"),
    ):
        name = archives.parse(data).archive.devices[dev_id - 1].raw_name.decode()
        yield Damage(
            f"cluster {cluster_num} of {name} missing",
            lacking_cluster(dev_id, cluster_num),
            f"'{name}' .dev_id {dev_id}.: {what}",
        )
    # A vmstate may have more clusters than its size says, but never fewer, wherever they are cut.
    for kept in (0, 1, 4):
        order = [c for c in archives.parse(data).order if c[0] != VMSTATE or c[1] < kept]
        for slots in (1, 8, 58):
            yield Damage(
                f"{kept} clusters of vmstate, {slots} an extent",
                archives.build(good_archive(), order, slots=slots),
                f"'vmstate' .dev_id 3.: {5 - kept} of 5 clusters are missing, the first is {kept}",
            )
    yield Damage("an extent twice", data + data[last:], "occurs twice|out of order", len(data))
    for size in (1, 300, 511):
        yield Damage(
            f"cut after {size} bytes of an extent header",
            data[: last + size],
            f"the archive ends with {size} bytes that are no whole extent header",
            last,
        )
    for what, size in (
        ("after an extent header", last + 512),
        ("one block short", len(data) - 4096),
        ("one byte short", len(data) - 1),
    ):
        yield Damage(
            f"cut: {what}",
            data[:size],
            f"ends inside an extent(: {size - last - 512} bytes of payload, expected "
            f"{len(data) - last - 512})?",
            last,
        )
    for size in (1, 100, 511):
        yield Damage(
            f"{size} zeros behind",
            data + bytes(size),
            f"ends with {size} bytes that are no whole extent header",
            len(data),
        )
    for size in (512, 4096):
        yield Damage(f"{size} zeros behind", data + bytes(size), "no extent here: magic", len(data))
    foreign = archives.extent_bytes(b"x" * 16, [], [])
    yield Damage(
        "an extent of another archive behind",
        data + foreign,
        "another archive: uuid 78787878-",
        len(data),
    )


def lacking_cluster(dev_id: int, cluster_num: int) -> bytes:
    """Return the archive built without a cluster."""
    order = archives.parse(good()).order
    order.remove((dev_id, cluster_num))
    return archives.build(good_archive(), order, slots=8)


def damages() -> tuple[Damage, ...]:
    """Return all of them."""
    return (
        *header_damages(),
        *device_damages(),
        *extent_damages(),
        *cluster_damages(),
        *missing_damages(),
    )
