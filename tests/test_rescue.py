"""rescue: what is left of a damaged archive, and what it says of the rest.

An oracle of its own reads damaged archives by the rules, byte by byte and with no regard to speed.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import random
import shutil
import signal
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import vma_tool
from tests import archives, frames
from tests.archives import BLOCK, CLUSTER, EXTENT_HEADER, Archive, Cluster, Device
from tests.faults import in_frames
from tests.support import (
    ALL,
    STEP,
    Answer,
    ProcessTest,
    ToolTest,
    call_tool,
    golden,
    require_program,
    require_root,
    run_measured,
    sha256,
    skip,
    tool_command,
)

# ---- the oracle ---------------------------------------------------------------------------------


@dataclass
class Found:
    """What the rules give: contents of clusters, and which of them are doubtful."""

    clusters: dict[Cluster, bytes] = field(default_factory=dict)
    doubtful: set[Cluster] = field(default_factory=set)
    cut: set[Cluster] = field(default_factory=set)  # found where the archive ends inside an extent


@dataclass
class Extent:
    """A whole extent header: its clusters and where their blocks are in the archive."""

    clusters: list[tuple[Cluster, int, int, int]]  # cluster, mask, start, end
    start: int
    end: int


def whole_extent(data: bytes, at: int, archive: Archive, seen: set[Cluster]) -> Extent | None:
    """Return the extent at an offset if its header is whole and its clusters are new."""
    header = data[at : at + EXTENT_HEADER]
    if len(header) < EXTENT_HEADER or header[:6] != b"VMAE\0\0" or header[8:24] != archive.uuid:
        return None
    if hashlib.md5(header[:24] + bytes(16) + header[40:]).digest() != header[24:40]:
        return None
    counts = {device.dev_id: device.cluster_count for device in archive.devices}
    position = start = at + EXTENT_HEADER
    found = []
    new: set[Cluster] = set()
    for _, mask, dev_id, number in archives.slots(data, at):
        if dev_id:
            if number >= counts.get(dev_id, 0) or (dev_id, number) in seen | new:
                return None
            new.add((dev_id, number))
            end = position + bin(mask).count("1") * BLOCK
            found.append(((dev_id, number), mask, position, end))
            position = end
    (block_count,) = struct.unpack_from(">H", header, 6)
    return Extent(found, start, position) if position == start + block_count * BLOCK else None


def next_extent(
    data: bytes, start: int, stop: int, archive: Archive, seen: set[Cluster]
) -> int | None:
    """Return where the first whole extent begins from start on and before stop."""
    while 0 <= (start := data.find(b"VMAE", start)) < stop:
        if whole_extent(data, start, archive, seen):
            return start
        start += 1
    return None


def oracle(data: bytes, header_size: int, archive: Archive) -> Found:
    """Read a damaged archive, whose header is whole, by the rules."""
    found = Found()
    at = header_size
    while at < len(data):
        seen = set(found.clusters)
        extent = whole_extent(data, at, archive, seen)
        if extent is None:
            following = next_extent(data, at + 1, len(data), archive, seen)
            at = len(data) if following is None else following
            continue
        start, end = extent.start, extent.end
        seen.update(cluster for cluster, *_ in extent.clusters)
        marked = data[end : end + 4] == b"VMAE" or data[end + 8 : end + 24] == archive.uuid
        in_place = end == len(data) or (end < len(data) and marked)
        inside = None if in_place else next_extent(data, start, end, archive, seen)
        cut = end > len(data) and inside is None
        for cluster, mask, first, last in extent.clusters:
            if mask and cut and last > len(data):
                continue
            content = bytearray(CLUSTER)
            bits = [bit for bit in range(16) if mask >> bit & 1]
            for bit, at_block in zip(bits, range(first, last, BLOCK)):
                block = data[at_block : at_block + BLOCK]
                content[bit * BLOCK : bit * BLOCK + len(block)] = block
            found.clusters[cluster] = bytes(content)
            if mask and not in_place and not cut:
                found.doubtful.add(cluster)
            if cut:
                found.cut.add(cluster)
        at = end if inside is None else inside
    return found


# ---- damaging -----------------------------------------------------------------------------------


@dataclass
class Damaged:
    """A damaged archive; `overwritten` are the places in the whole one whose bytes were changed."""

    data: bytes
    what: list[str]
    overwritten: list[tuple[int, int]]


def damage(data: bytes, rng: random.Random, count: int) -> Damaged:
    """Damage an archive behind its header at `count` places, from the last to the first."""
    (header_size,) = struct.unpack_from(">I", data, 56)
    extents = archives.extent_offsets(data)
    what = []
    overwritten = []
    sizes = rng.sample([1, 2, 37, 521, 4099, 65537, rng.randrange(1, 300000)], count)
    places = []
    for _ in range(count):
        at = rng.randrange(header_size, len(data))
        if rng.random() < 0.5:  # where it hurts
            at = rng.choice(extents) + rng.randrange(-8, 520)
        places.append(max(header_size, min(at, len(data) - 1)))
    for at in sorted(places, reverse=True):
        # Nobody can tell that something is missing if the next header is where it must be. So
        # these sizes are not those of blocks or headers, and none is there twice.
        size = sizes.pop()
        kind = rng.choice(["overwrite", "zeros", "delete", "insert", "cut", "twice"])
        if kind in ("delete", "insert") and at >= extents[-1]:
            kind = "cut"  # missing bytes and a cut look alike at the end
        what.append(f"{kind} {size} at {at}")
        if kind == "overwrite":
            data = data[:at] + rng.randbytes(min(size, len(data) - at)) + data[at + size :]
        elif kind == "zeros":
            data = data[:at] + bytes(min(size, len(data) - at)) + data[at + size :]
        elif kind == "delete":
            data = data[:at] + data[at + size :]
        elif kind == "insert":
            data = data[:at] + rng.randbytes(size) + data[at:]
        elif kind == "twice":
            data = data[: at + size] + data[at:]
        elif rng.random() < 0.3:  # not all of them end early
            data = data[:at]
        if kind in ("overwrite", "zeros"):
            overwritten.append((at, at + size))
    return Damaged(data, what, overwritten)


def stored_ranges(data: bytes) -> Iterator[tuple[Cluster, int, int]]:
    """Yield each cluster of a whole archive, and where its blocks are."""
    for at in archives.extent_offsets(data):
        position = at + EXTENT_HEADER
        for _, mask, dev_id, number in archives.slots(data, at):
            if dev_id:
                end = position + bin(mask).count("1") * BLOCK
                yield (dev_id, number), position, end
                position = end


def told(report: dict[str, Any], key: str) -> set[Cluster]:
    """Return the clusters that a report calls lost, or doubtful."""
    return {
        (device["dev_id"], number)
        for device in report["devices"]
        for offset, size in device[key]
        for number in range(offset // CLUSTER, -(-(offset + size) // CLUSTER))
    }


def every_cluster(archive: Archive) -> set[Cluster]:
    return {(d.dev_id, number) for d in archive.devices for number in range(d.cluster_count)}


class RescueTest(ToolTest):
    """A test that rescues archives into directories of its own."""

    count = 0

    def rescue(
        self, data: bytes | Path, status: int | None = None, **kw: Any
    ) -> tuple[dict[str, Any], Path]:
        """Rescue an archive, and return the report and the directory."""
        self.count += 1
        target = self.directory / f"disks{self.count}"
        path = self.file("broken.vma", data) if isinstance(data, bytes) else data
        answer: Answer[bytes] = call_tool("rescue", "--json", path, target, **kw)
        self.assertIn(answer.returncode, (0, 3), answer.stderr)
        report: dict[str, Any] = json.loads(answer.stdout)
        self.assertEqual(json.loads((target / "rescue.json").read_text()), report)
        wrong = [d for d in report["devices"] if d["lost"] or d["doubtful"]]
        self.assertEqual(answer.returncode, 3 if report["damage"] or wrong else 0)
        if status is not None:
            self.assertEqual(answer.returncode, status, report)
        return report, target

    def contents(self, archive: Archive, target: Path) -> dict[Cluster, bytes]:
        """Return the clusters of the disks that were written."""
        found = {}
        for device in archive.devices:
            data = (target / f"disk-{device.raw_name.decode()}.raw").read_bytes()
            self.assertEqual(len(data), device.stated_size)
            for number in range(device.cluster_count):
                part = data[number * CLUSTER : (number + 1) * CLUSTER]
                found[device.dev_id, number] = part.ljust(CLUSTER, b"\0")
        return found


def truth(archive: Archive) -> dict[Cluster, bytes]:
    """Return the clusters of an archive's disks."""
    return {
        (d.dev_id, n): d.data[n * CLUSTER : (n + 1) * CLUSTER].ljust(CLUSTER, b"\0")
        for d in archive.devices
        for n in range(d.cluster_count)
    }


class RulesTest(RescueTest):
    """Random damage: exactly what the rules say is lost or doubtful, and the rest is right."""

    def check(self, archive: Archive, data: bytes, damaged: Damaged) -> None:
        (header_size,) = struct.unpack_from(">I", data, 56)
        expected = oracle(damaged.data, header_size, archive)
        report, target = self.rescue(damaged.data)
        lost, doubtful = told(report, "lost"), told(report, "doubtful")
        allowed = every_cluster(archive) - set(expected.clusters)
        if "twice" in " ".join(damaged.what):  # what is there twice may be whole the second time
            self.assertLessEqual(lost | doubtful, allowed | expected.doubtful)
        else:
            self.assertEqual((lost, doubtful), (allowed, expected.doubtful))
        whole = truth(archive)
        hit = {
            cluster
            for cluster, start, end in stored_ranges(data)
            for first, last in damaged.overwritten
            if start < last and first < end
        }
        ends = {device.dev_id: device.stated_size for device in archive.devices}
        for cluster, content in self.contents(archive, target).items():
            if cluster in lost:
                self.assertEqual(content, bytes(CLUSTER), cluster)
            elif cluster not in doubtful:
                inside = ends[cluster[0]] - cluster[1] * CLUSTER
                if cluster not in expected.doubtful:
                    found = expected.clusters[cluster][:inside].ljust(CLUSTER, b"\0")
                    self.assertEqual(content, found, cluster)
                if cluster not in hit | expected.cut:
                    self.assertEqual(content, whole[cluster], cluster)

    def test_random_damage(self) -> None:
        for seed in range(0, 160, STEP):
            rng = random.Random(seed)
            archive = archives.three_disks(rng)
            order = rng.choice(
                [
                    archives.in_order(archive),
                    archives.live_order(archive, rng),
                    archives.interleaved(archive),
                    archives.shuffled(archive, rng),
                ]
            )
            data = archives.build(
                archive, order, slots=rng.choice([1, 3, 7, 58, 59]), empty_extents=seed % 3 == 0
            )
            damaged = damage(data, rng, rng.choice([1, 1, 1, 2, 3, 5]))
            with self.subTest(seed=seed, what=damaged.what):
                self.check(archive, data, damaged)


def single_damages(
    data: bytes, extents: list[int], i: int, rng: random.Random
) -> Iterator[tuple[str, bytes, set[Cluster], set[Cluster]]]:
    """Yield a name, the damaged archive, and which clusters are lost and doubtful."""
    at = extents[i]
    (block_count,) = struct.unpack_from(">H", data, at + 6)
    end = at + EXTENT_HEADER + block_count * BLOCK
    here = {(s.dev_id, s.cluster_num) for s in archives.slots(data, at) if s.dev_id}
    stored = {(s.dev_id, s.cluster_num) for s in archives.slots(data, at) if s.dev_id and s.mask}
    before: set[Cluster] = set()
    if i:
        slots = archives.slots(data, extents[i - 1])
        before = {(s.dev_id, s.cluster_num) for s in slots if s.dev_id and s.mask}
    none: set[Cluster] = set()
    yield "header", data[: at + 60] + b"\xff\xee\xdd" + data[at + 63 :], here, none
    yield "magic", data[:at] + b"XXXX" + data[at + 4 :], here, none
    shorter = data[: at + 300] + data[at + 337 :]
    if shorter[at : at + EXTENT_HEADER] != data[at : at + EXTENT_HEADER]:  # not zeros for zeros
        yield "37 bytes of the header gone", shorter, here, none
    yield "garbage before it", data[:at] + rng.randbytes(10007) + data[at:], none, before
    if end - at > 9000 and end < len(data):
        middle = at + EXTENT_HEADER + 4096
        yield "a block gone", data[:middle] + data[middle + 4096 :], none, stored
        yield "a byte more", data[:middle] + b"x" + data[middle:], none, stored
        yield "a byte more at the end", data[:end] + b"x" + data[end:], none, stored


class NestedTest(RescueTest):
    """Archives in a guest's disk are its data, also where headers are searched for."""

    def check(
        self, archive: Archive, data: bytes, rng: random.Random, canonical: bool = False
    ) -> None:
        """Damage each extent; of a canonical archive, the others tell what a header was."""
        extents = archives.extent_offsets(data)
        whole = truth(archive)
        for i in range(len(extents)):
            for what, damaged, lost, doubtful in single_damages(data, extents, i, rng):
                is_known = canonical and what in ("header", "magic") and i + 1 < len(extents)
                missing = set() if is_known else lost
                with self.subTest(extent=i, of=len(extents), what=what):
                    report, target = self.rescue(damaged, status=3)
                    self.assertEqual(told(report, "lost"), missing)
                    self.assertEqual(told(report, "doubtful"), doubtful)
                    for cluster, content in self.contents(archive, target).items():
                        if cluster not in missing | doubtful:
                            self.assertEqual(content, whole[cluster], cluster)

    def nested(self, rng: random.Random, same: bool) -> Archive:
        """Return a guest whose system disk holds canonical archives of two guests like it."""
        inner = [archives.three_disks(rng) for _ in range(2)]
        first, second = (archives.canonical(guest, 4096) for guest in inner)
        data = first + bytes(-len(first) % BLOCK) + bytes(CLUSTER) + second
        outer = archives.three_disks(rng)
        if same:
            outer.uuid = archives.CANONICAL_UUID
        outer.devices[1].data = data + bytes(-len(data) % BLOCK)
        return outer

    def test_canonical(self) -> None:
        rng = random.Random(1)
        archive = self.nested(rng, same=True)
        self.check(archive, archives.canonical(archive), rng, canonical=True)

    def test_live_order(self) -> None:
        rng = random.Random(2)
        archive = self.nested(rng, same=True)
        self.check(archive, archives.build(archive, archives.live_order(archive, rng)), rng)

    def test_interleaved(self) -> None:
        rng = random.Random(3)
        archive = self.nested(rng, same=True)
        data = archives.build(archive, archives.interleaved(archive), slots=59)
        self.check(archive, data, rng)

    def test_devices_in_reverse(self) -> None:
        # The clusters that the nested archives name come later.
        rng = random.Random(4)
        archive = self.nested(rng, same=True)
        data = archives.build(archive, archives.reversed_order(archive), slots=40)
        self.check(archive, data, rng)

    def test_two_damages(self) -> None:
        """Nothing wrong is taken for right, wherever headers are destroyed."""
        for seed in range(0, 40, STEP):
            rng = random.Random(seed)
            archive = self.nested(rng, same=True)
            data = bytearray(archives.canonical(archive))
            extents = archives.extent_offsets(bytes(data))
            for at in rng.sample(extents, 2):
                size = rng.choice([24, 200, 512])
                data[at : at + size] = bytes(size)
            whole = truth(archive)
            with self.subTest(seed=seed):
                report, target = self.rescue(bytes(data))
                unsure = told(report, "lost") | told(report, "doubtful")
                for cluster, content in self.contents(archive, target).items():
                    if cluster not in unsure:
                        self.assertEqual(content, whole[cluster], cluster)


class Whole(RescueTest):
    """An archive that is whole gives what extract gives, and status 0."""

    def test_golden(self) -> None:
        for name in ("three-disks", "vmstate", "odd-size", "config-only", "no-config",
                     "live-order", "legal-oddities", "interleaved", "full-mask"):  # fmt: skip
            data = golden(name)
            for how, source in (("file", data), ("frames", in_frames(data))):
                with self.subTest(name, how=how):
                    path = self.file("whole", source)
                    report, target = self.rescue(path, status=0)
                    self.assertEqual(report["damage"], [])
                    extracted = self.directory / f"extracted{self.count}"
                    self.ok("extract", path, extracted)
                    files = {f.name: sha256(f) for f in target.iterdir() if f.name != "rescue.json"}
                    self.assertEqual(files, {f.name: sha256(f) for f in extracted.iterdir()})

    def test_every_compression(self) -> None:
        archive, data = some_archive(1)
        for name, compress in COMPRESSIONS.items():
            packed = compress(data)
            with self.subTest(name):
                _, target = self.rescue(self.file(f"a.vma.{name}", packed), status=0)
                self.assertEqual(self.contents(archive, target), truth(archive))
                _, target = self.rescue(Path("-"), status=0, input=packed)
                self.assertEqual(self.contents(archive, target), truth(archive))

    def test_longer_than_its_views(self) -> None:
        """Each part of an archive is seen through two views in turn, of up to 8 MiB."""
        path = self.directory / "large.vma"
        archives.write_large(path, size=80 << 20, data_bytes=20 << 20)
        plain = path.read_bytes()
        seekable = self.directory / "seekable.vma.zst"
        self.ok("optimize", "-q", path, seekable)
        self.ok("extract", "-q", path, self.directory / "extracted")
        wanted = sha256(self.directory / "extracted" / "disk-drive-scsi0.raw")
        names = COMPRESSIONS if ALL else ("zst", "gz", "lzo")  # the others take seconds
        packed = {name: COMPRESSIONS[name](plain) for name in names}
        packed.update({"plain": plain, "seekable.zst": seekable.read_bytes()})
        for name, data in packed.items():
            with self.subTest(name):
                _, target = self.rescue(self.file(f"a.vma.{name}", data), status=0)
                self.assertEqual(sha256(target / "disk-drive-scsi0.raw"), wanted)

    def test_mode(self) -> None:
        path = self.file("a.vma", golden("odd-size"))
        path.chmod(0o600)
        _, target = self.rescue(path, status=0)
        self.assertEqual({stat.S_IMODE(f.stat().st_mode) for f in target.iterdir()}, {0o600})


def some_archive(seed: int, slots: int = 10) -> tuple[Archive, bytes]:
    """Return an archive of some megabytes in live order, most of which does not compress."""
    rng = random.Random(seed)
    archive = archives.three_disks(rng)
    return archive, archives.build(archive, archives.live_order(archive, rng), slots=slots)


def program(*command: str, data: bytes) -> bytes:
    require_program(command[0], command[0])
    return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout


def pieces(data: bytes) -> list[bytes]:
    return [data[at : at + 1000003] for at in range(0, len(data), 1000003)]


# Ways to compress an archive, by file suffix
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "zst": lambda data: program("zstd", "-qc", data=data),
    "frames.zst": lambda data: b"".join(
        program("zstd", "-qc", data=piece) for piece in pieces(data)
    ),
    "gz": lambda data: gzip.compress(data, 1),
    "members.gz": lambda data: b"".join(gzip.compress(piece, 1) for piece in pieces(data)),
    "lzo": lambda data: program("lzop", "-c", data=data),
    "xz": lambda data: lzma.compress(data, preset=0),
    "blocks.xz": lambda data: program("xz", "-0", "--block-size=1MiB", "-T2", "-c", data=data),
    "bz2": lambda data: bz2.compress(data, 1),
}


class Compressed(RescueTest):
    """What damage to compressed archives costs, and what is right nevertheless."""

    def check(self, archive: Archive, data: bytes, name: str) -> tuple[int, int]:
        """Check that everything not reported is right; return how much is lost and doubtful."""
        report, target = self.rescue(self.file(name, data), status=3)
        lost, doubtful = told(report, "lost"), told(report, "doubtful")
        self.check_contents(archive, target, lost, doubtful)
        return len(lost), len(doubtful)

    def check_contents(
        self, archive: Archive, target: Path, lost: set[Cluster], doubtful: set[Cluster]
    ) -> None:
        whole = truth(archive)
        for cluster, content in self.contents(archive, target).items():
            if cluster in lost:
                self.assertEqual(content, bytes(CLUSTER), cluster)
            elif cluster not in doubtful:
                self.assertEqual(content, whole[cluster], cluster)

    def frames_of(self, archive: Archive) -> tuple[list[bytes], bytes, bytes, list[set[Cluster]]]:
        """Return frames, what follows them, the plain archive, and each frame's clusters."""
        plain = archives.canonical(archive)
        packed = in_frames(plain)
        parts = frames.split(packed).frames
        places = [place for place in stored_ranges(plain) if place[1] < place[2]]
        owners, at = [], 0
        for size in frames.cuts(plain):
            owners.append({c for c, start, end in places if start < at + size and at < end})
            at += size
        return parts, packed[sum(map(len, parts)) :], plain, owners

    def test_frames(self) -> None:
        """Each damaged frame costs its own clusters, with or without a seek table."""
        archive, _ = some_archive(2)
        parts, tail, plain, owners = self.frames_of(archive)
        headers = {i for i, size in enumerate(frames.cuts(plain)) if size == EXTENT_HEADER}
        damages: dict[str, Callable[[bytes, int], bytes]] = {
            "a bit": lambda f, half: f[:half] + bytes([f[half] ^ 16]) + f[half + 1 :],
            "the beginning": lambda f, half: bytes(8) + f[8:],
            "the checksum": lambda f, half: f[:-1] + bytes([f[-1] ^ 1]),
            "all zeros": lambda f, half: bytes(len(f)),
            "a byte gone": lambda f, half: f[:half] + f[half + 1 :],
            "gone": lambda f, half: b"",
        }
        cases = [
            (table, end, what, i)
            for table, end in (("table", tail), ("no table", b""), ("cut table", tail[:-30]))
            for what in damages
            for i in range(1, len(parts))
            if what != "gone" or end == tail  # else nobody knows how much that was
        ]
        for table, end, what, i in cases[:: 1 if ALL else 3]:
            with self.subTest(table, what=what, frame=i):
                changed = damages[what](parts[i], len(parts[i]) // 2)
                data = b"".join((*parts[:i], changed, *parts[i + 1 :], end))
                report, target = self.rescue(data, status=3)
                lost, doubtful = told(report, "lost"), told(report, "doubtful")
                self.check_contents(archive, target, lost, doubtful)
                if i not in headers and owners[i]:
                    self.assertEqual(lost | doubtful, owners[i])
                elif i in headers and i < max(
                    headers
                ):  # the index or its neighbours know what it said
                    self.assertEqual(lost | doubtful, set())

    def test_a_sector_over_two_frames(self) -> None:
        """Without a seek table that fits, nobody knows how many bytes are missing."""
        archive, _ = some_archive(3)
        parts, tail, _, _ = self.frames_of(archive)
        packed = b"".join((*parts, tail))
        for end in list(itertools.accumulate(map(len, parts)))[1 : -1 : 1 if ALL else 3]:
            damaged = packed[: end - 2048] + bytes(4096) + packed[end + 2048 :]
            for how in ("pipe", "torn tail"):
                with self.subTest(end=end, how=how):
                    if how == "pipe":
                        report, target = self.rescue(Path("-"), status=3, input=damaged)
                    else:
                        path = self.file("a.vma.zst", damaged[:-9])
                        report, target = self.rescue(path, status=3)
                    lost, doubtful = told(report, "lost"), told(report, "doubtful")
                    self.check_contents(archive, target, lost, doubtful)

    def test_random_damage_to_frames(self) -> None:
        archive, _ = some_archive(3)
        parts, tail, _, _ = self.frames_of(archive)
        packed = b"".join(parts)
        for seed in range(0, 60, STEP):
            rng = random.Random(seed)
            at = rng.randrange(len(parts[0]), len(packed))
            size = rng.choice([1, 20, 3000, 200000])
            kept = packed[at + (size if seed % 3 < 2 else 0) :]
            new = rng.randbytes(min(size, len(packed) - at)) if seed % 3 != 1 else b""
            with self.subTest(seed=seed, at=at, size=size):
                data = packed[:at] + new + kept
                if data != packed:
                    self.check(archive, data + tail, "a.vma.zst")

    def test_up_to_the_damage(self) -> None:
        """What is before a cut, or behind an overwritten part, is right or reported."""
        archive, data = some_archive(4)
        for name, compress in COMPRESSIONS.items():
            packed = compress(data)
            for seed in range(0, 20, STEP):
                rng = random.Random(seed)
                at = rng.randrange(len(packed) // 2, len(packed) * 4 // 5)  # not the last frame
                with self.subTest(name, seed=seed, at=at, what="cut"):
                    self.check(archive, packed[:at], f"a.vma.{name}")
                size = rng.choice([1, 100, 5000])
                damaged = packed[:at] + rng.randbytes(size) + packed[at + size :]
                # Of one frame or block, only a checksum at the end may tell, and not where.
                if damaged != packed and name not in ("zst", "xz"):
                    with self.subTest(name, seed=seed, at=at, size=size):
                        self.check(archive, damaged, f"a.vma.{name}")

    def test_one_frame(self) -> None:
        """A checksum that does not match may be all that is wrong with one frame; it is told."""
        archive, data = some_archive(5)
        packed = COMPRESSIONS["zst"](data)
        for seed in range(0, 40, STEP):
            rng = random.Random(seed)
            at = rng.randrange(len(packed) // 2, len(packed) - 9000)
            size = rng.choice([1, 100, 5000])
            new = rng.randbytes(size) if seed % 2 else b""
            damaged = packed[:at] + new + packed[at + size :]
            if damaged == packed:
                continue
            with self.subTest(seed=seed, at=at, size=size):
                report, target = self.rescue(self.file("a.vma.zst", damaged), status=3)
                if not any("checksum" in flaw["text"] for flaw in report["damage"]):
                    lost, doubtful = told(report, "lost"), told(report, "doubtful")
                    self.check_contents(archive, target, lost, doubtful)

    def test_checksum_at_the_end(self) -> None:
        """What it covers is doubtful, as nothing tells whether only the checksum is damaged."""
        archive, data = some_archive(6)
        stored = {c for c, start, end in stored_ranges(data) if end > start}
        places = {"zst": (1, 4), "frames.zst": (1, 4), "gz": (1, 5, 8)}
        for name, ends in places.items():
            packed = COMPRESSIONS[name](data)
            for place in ends:
                damaged = bytearray(packed)
                damaged[-place] ^= 1
                with self.subTest(name, place=place):
                    report, target = self.rescue(self.file(f"a.vma.{name}", bytes(damaged)), 3)
                    self.assertEqual(told(report, "lost"), set())
                    doubtful = told(report, "doubtful")
                    self.check_contents(archive, target, set(), set())
                    self.assertEqual(len(report["damage"]), 1)
                    if name == "frames.zst":  # the other frames have their own
                        self.assertLess(len(doubtful), len(stored) // 2)
                    else:
                        self.assertEqual(doubtful, stored)

    def test_damaged_skippable_frame(self) -> None:
        """Its size is wrong: the frames that it would leap over are found, and it is told."""
        archive, _ = some_archive(12)
        parts, tail, _, _ = self.frames_of(archive)
        half = len(parts) // 2
        for change in (1, 5000, 1 << 30):
            skippable = struct.pack("<II", 0x184D2A51, 100 + change) + bytes(100)
            size = int.from_bytes(tail[4:8], "little") + change
            with self.subTest(change=change, where="between frames"):
                data = b"".join((*parts[:half], skippable, *parts[half:], tail))
                self.assertEqual(self.check(archive, data, "a.vma.zst"), (0, 0))
            with self.subTest(change=change, where="the index"):
                data = b"".join((*parts, tail[:4], size.to_bytes(4, "little"), tail[8:]))
                self.assertEqual(self.check(archive, data, "a.vma.zst"), (0, 0))

    def test_empty_frames(self) -> None:
        """A frame without content, whole or damaged, ends nothing."""
        archive, _ = some_archive(14)
        parts, tail, _, _ = self.frames_of(archive)
        empty = COMPRESSIONS["zst"](b"")
        half = len(parts) // 2
        for end in (tail, b""):
            data = b"".join((*parts[:half], empty, *parts[half:], end))
            report, target = self.rescue(self.file("a.vma.zst", data), status=0)
            self.assertEqual(report["damage"], [])
            self.check_contents(archive, target, set(), set())
        broken = empty[:-1] + bytes([empty[-1] ^ 1])
        data = b"".join((*parts[:half], broken, *parts[half:]))
        self.assertEqual(self.check(archive, data, "a.vma.zst"), (0, 0))

    def test_gzip_cut_in_its_size(self) -> None:
        """The bytes that are missing are zeros, and must not pass for those that were there."""
        archive, data = some_archive(13)
        packed = COMPRESSIONS["gz"](data)
        self.assertEqual(packed[-1], 0)
        report, target = self.rescue(self.file("a.vma.gz", packed[:-1]), status=3)
        self.assertEqual(["checksum" in flaw["text"] for flaw in report["damage"]], [True])
        self.check_contents(archive, target, set(), set())

    def test_gzip_with_wrong_bytes(self) -> None:
        """Its checksum tells that something is wrong, not what: everything stored is doubtful."""
        _, data = some_archive(7)
        packed = bytearray(COMPRESSIONS["gz"](data))
        packed[len(packed) // 2] ^= 4
        report, _ = self.rescue(self.file("a.vma.gz", bytes(packed)), status=3)
        stored = {c for c, start, end in stored_ranges(data) if end > start}
        self.assertGreaterEqual(told(report, "lost") | told(report, "doubtful"), stored)

    def test_behind_the_damage(self) -> None:
        """Where blocks or frames are independent, it goes on with the next of them."""
        archive, data = some_archive(8)
        last = archives.slots(data, archives.extent_offsets(data)[-1])
        for name in ("frames.zst", "lzo", "bz2"):
            packed = COMPRESSIONS[name](data)
            at = len(packed) // 2
            damaged = packed[:at] + random.Random(1).randbytes(40) + packed[at + 40 :]
            with self.subTest(name):
                report, _ = self.rescue(self.file(f"a.vma.{name}", damaged), status=3)
                unsure = told(report, "lost") | told(report, "doubtful")
                self.assertFalse({(s.dev_id, s.cluster_num) for s in last} & unsure)
                self.assertLess(len(unsure), len(every_cluster(archive)) * 2 // 3)

    def test_a_window_too_large(self) -> None:
        """Nothing is damaged: the way out is told."""
        _, data = some_archive(9)
        packed = program("zstd", "-qc", "--long=30", "--zstd=wlog=30", data=data)
        path = self.file("a.vma.zst", packed)
        self.refused("rescue", path, self.directory / "new", says=["--long=31"])
        self.assertFalse((self.directory / "new").exists())

    def test_header_of_lzop(self) -> None:
        """It says hardly anything: the blocks are found without it."""
        archive, data = some_archive(9)
        packed = COMPRESSIONS["lzo"](data)
        for place in (2, 10, 15, 18, 22, 30, 36):
            damaged = bytearray(packed)
            damaged[place] ^= 4
            with self.subTest(place=place):
                report, target = self.rescue(self.file("a.vma.lzo", bytes(damaged)), status=3)
                self.assertIn("header", report["damage"][0]["text"])
                self.assertEqual(self.contents(archive, target), truth(archive))

    def test_missing_decompressor(self) -> None:
        _, data = some_archive(9)
        for name, hidden, package in (
            ("lzo", mock.patch("shutil.which", lambda name: None), "lzop"),
            ("zst", mock.patch.object(vma_tool.Zstd, "load", lambda: None), "libzstd1"),
        ):
            path = self.file(f"a.vma.{name}", COMPRESSIONS[name](data))
            with self.subTest(name), hidden:
                self.refused("rescue", path, self.directory / "new", says=[path.name, package])
                self.assertFalse((self.directory / "new").exists())

    def test_named_by_its_suffix(self) -> None:
        """The first bytes of a compressed file are gone, and with them the header."""
        archive, _ = some_archive(10)
        packed = in_frames(archives.canonical(archive))
        path = self.file("a.vma.zst.dat", bytes(3) + packed[3:])
        report, target = self.rescue(path, status=3)
        self.assertEqual([d["name"] for d in report["devices"]], ["dev1", "dev2", "dev3"])
        for device in archive.devices:
            data = (target / f"disk-dev{device.dev_id}.raw").read_bytes()
            self.assertEqual(data, device.data.ljust(len(data), b"\0"))


class Slots(RescueTest):
    """A whole extent header is used slot by slot, and a cluster that is there twice is compared."""

    def setUp(self) -> None:
        super().setUp()
        disk = Device(1, "x", archives.disk(random.Random(15), 9 * CLUSTER, "full"))
        self.archive = Archive([disk], [("qemu-server.conf", b"")], uuid=bytes(range(16)))

    def extents(self, *extents: list[int]) -> bytes:
        """Return an archive whose extents hold these clusters, a negative one with other bytes."""
        device = self.archive.devices[0]
        data = archives.header_bytes(self.archive)
        for numbers in extents:
            blocks = [
                device.block(number * 16 + bit) if number >= 0 else b"\x55" * BLOCK
                for number in numbers
                for bit in range(16)
            ]
            infos = [(0xFFFF, 1, abs(number)) for number in numbers]
            data += archives.extent_bytes(self.archive.uuid, infos, blocks)
        return data

    def check(self, data: bytes, lost: set[int], doubtful: set[int], says: str = "") -> None:
        report, target = self.rescue(data, status=3 if says else 0)
        self.assertEqual(told(report, "lost"), {(1, number) for number in lost})
        self.assertEqual(told(report, "doubtful"), {(1, number) for number in doubtful})
        self.assertIn(says, " ".join(flaw["text"] for flaw in report["damage"]))
        found = self.contents(self.archive, target)
        for cluster, content in truth(self.archive).items():
            if cluster[1] not in lost | doubtful:
                self.assertEqual(found[cluster], content, cluster)

    def test_behind_the_end(self) -> None:
        data = self.extents([0, 1, 2, 3], [4, 5, 6, 7, 8])
        at = archives.extent_offsets(data)[1]
        slot = archives.slots(data, at)[1]
        new = struct.pack(">BI", 1, 9)
        self.check(
            archives.edit(data, slot.offset + 3, new), {5}, set(), "no cluster can be number 9"
        )
        new = struct.pack(">BI", 7, 0)
        self.check(archives.edit(data, slot.offset + 3, new), {5}, set(), "device 7")

    def test_twice_in_an_extent(self) -> None:
        self.check(self.extents([0, 1, 2, 3], [4, 5, 6, 7, 8, 8]), set(), set(), "occurs twice")
        self.check(self.extents([0, 1, 2, 3], [4, 5, 6, 7, 8, -8]), set(), {8}, "other bytes")

    def test_twice(self) -> None:
        self.check(self.extents([0, 1, 2, 3], [4, 5, 6, 7, 8], [3, 4]), set(), set())
        self.check(self.extents([0, 1, 2, -3], [3, 4, 5, 6, 7, 8]), set(), {3}, "other bytes")

    def test_of_an_optimized_archive(self) -> None:
        """One odd slot says nothing against the others, nor against the order."""
        disk = Device(1, "x", archives.disk(random.Random(16), 20 * CLUSTER, "full"))
        self.archive = Archive([disk], [("qemu-server.conf", b"")])
        data = archives.canonical(self.archive)
        slot = archives.slots(data, archives.extent_offsets(data)[1])[2]
        new = struct.pack(">BI", 1, 99)
        self.check(archives.edit(data, slot.offset + 3, new), {10}, set(), "number 99")

    def test_block_count(self) -> None:
        data = self.extents([0, 1, 2, 3], [4, 5, 6, 7, 8])
        at = archives.extent_offsets(data)[0]
        self.check(archives.edit(data, at + 6, struct.pack(">H", 63)), set(), set(), "block_count")


class ExtentHeaders(RescueTest):
    """Damaged extent headers that are known all the same."""

    def test_one_bit(self) -> None:
        """In any archive, the MD5 tells which."""
        archive, data = some_archive(21)
        rng = random.Random(21)
        for at in archives.extent_offsets(data):
            bit = rng.randrange(EXTENT_HEADER * 8)
            damaged = bytearray(data)
            damaged[at + bit // 8] ^= 1 << bit % 8
            with self.subTest(at=at, bit=bit):
                report, target = self.rescue(bytes(damaged), status=3)
                self.assertEqual(told(report, "lost") | told(report, "doubtful"), set())
                self.assertEqual(self.contents(archive, target), truth(archive))
                self.assertIn("one bit", report["damage"][0]["text"])

    def optimized(self) -> tuple[Archive, bytes]:
        rng = random.Random(22)
        data = archives.disk(rng, 20 * CLUSTER, "full") + bytes(200 * CLUSTER)
        disks = [data + archives.disk(rng, 21 * CLUSTER + 512, "full"), data[: 9 * CLUSTER]]
        archive = Archive([Device(i, f"d{i}", disk) for i, disk in enumerate(disks, 1)])
        return archive, archives.canonical(archive)

    def test_any_of_an_optimized_archive(self) -> None:
        archive, plain = self.optimized()
        packed = in_frames(plain)
        parts = frames.split(packed)
        starts = list(itertools.accumulate(map(len, parts.frames), initial=0))
        sizes = list(frames.cuts(plain))
        places = {
            "plain": (plain, [(at, EXTENT_HEADER) for at in archives.extent_offsets(plain)[:-1]]),
            "frames": (
                packed,
                [
                    (start, len(frame))
                    for start, frame, size in list(zip(starts, parts.frames, sizes))[1:-2]
                    if size == EXTENT_HEADER
                ],
            ),
        }
        for name, (data, headers) in places.items():
            for at, size in headers:
                for how in ("file", "pipe"):
                    damaged = data[:at] + random.Random(at).randbytes(size) + data[at + size :]
                    with self.subTest(name, at=at, how=how):
                        path = Path("-") if how == "pipe" else self.file("a.vma", damaged)
                        report, target = self.rescue(
                            path, status=3, **({"input": damaged} if how == "pipe" else {})
                        )
                        self.assertEqual(told(report, "lost") | told(report, "doubtful"), set())
                        self.assertEqual(self.contents(archive, target), truth(archive))

    def test_several_in_a_row(self) -> None:
        archive, data = self.optimized()
        extents = archives.extent_offsets(data)
        for first in range(len(extents) - 3):
            damaged = bytearray(data)
            for at in extents[first : first + 2]:
                damaged[at : at + EXTENT_HEADER] = bytes(EXTENT_HEADER)
            stored = [bool(data[at + 7] | data[at + 6]) for at in extents[first : first + 2]]
            with self.subTest(first=first, stored=stored):
                report, target = self.rescue(bytes(damaged), status=3)
                unsure = told(report, "lost") | told(report, "doubtful")
                # One that stores all and one that stores nothing: in which order, nobody knows.
                if stored[0] == stored[1]:
                    self.assertEqual(unsure, set())
                for cluster, content in self.contents(archive, target).items():
                    if cluster not in unsure:
                        self.assertEqual(content, truth(archive)[cluster], cluster)
        page = bytearray(data)
        zeros = next(at for at in extents if not page[at + 6] | page[at + 7])
        page[zeros + 512 : zeros + 4608] = bytes(4096)
        report, _ = self.rescue(bytes(page), status=3)
        self.assertEqual(told(report, "lost") | told(report, "doubtful"), set())

    def test_an_extent_gone_from_the_middle(self) -> None:
        """The next header is where one must be, but it is not the next one in the order."""
        archive, data = self.optimized()
        extents = archives.extent_offsets(data)
        size = extents[1] - extents[0]
        at = extents[0] + size // 2
        report, target = self.rescue(data[:at] + data[at + size :], status=3)
        unsure = told(report, "lost") | told(report, "doubtful")
        for cluster, content in self.contents(archive, target).items():
            if cluster not in unsure:
                self.assertEqual(content, truth(archive)[cluster], cluster)


class Headers(RescueTest):
    """A damaged header is used as far as it can be read."""

    def setUp(self) -> None:
        super().setUp()
        self.archive, self.data = some_archive(11)

    def check(self, data: bytes, named: bool = True) -> list[str]:
        report, target = self.rescue(data, status=3)
        self.assertEqual(told(report, "lost") | told(report, "doubtful"), set())
        for device in self.archive.devices:
            name = device.raw_name.decode() if named else f"dev{device.dev_id}"
            found = (target / f"disk-{name}.raw").read_bytes()
            size = len(device.data) if named else -(-len(device.data) // CLUSTER) * CLUSTER
            self.assertEqual(found, device.data.ljust(size, b"\0"))
        self.assertEqual(report["damage"][0]["offset"], 0)
        self.assertIn("header", report["damage"][0]["text"])
        return [config["name"] for config in report["configs"]]

    def edited(self, at: int, new: bytes) -> bytes:
        return self.data[:at] + new + self.data[at + len(new) :]

    def test_md5_wrong(self) -> None:
        names = [name for name, _ in self.archive.configs]
        for at, new in ((33, b"xx"), (9, b"xx"), (0, b"XXXX"), (56, bytes(4))):
            with self.subTest(at=at):  # MD5, uuid, magic, header_size
                self.assertEqual(self.check(self.edited(at, new)), names)

    def test_first_sector_gone(self) -> None:
        self.check(self.edited(0, bytes(512)))
        self.check(self.edited(0, bytes(4096)))

    def test_nothing_of_it_left(self) -> None:
        size = archives.extent_offsets(self.data)[0]
        self.assertEqual(self.check(self.edited(0, bytes(size)), named=False), [])
        self.assertEqual(self.check(self.data[size:], named=False), [])
        self.assertEqual(self.check(b"garbage" + self.data[size:], named=False), [])

    def test_its_uuid_counts(self) -> None:
        """Also if the header is damaged, and an extent of another archive comes first."""
        at = archives.extent_offsets(self.data)[0]
        infos = [(0xFFFF, 1, 0)]
        foreign = archives.extent_bytes(b"another archive!", infos, [b"x" * BLOCK] * 16)
        for damaged in (self.data, self.edited(33, b"xx")):
            report, target = self.rescue(damaged[:at] + foreign + damaged[at:], status=3)
            self.assertEqual(told(report, "lost") | told(report, "doubtful"), set())
            self.assertEqual(self.contents(self.archive, target), truth(self.archive))

    def test_a_device_gone(self) -> None:
        """The header has it no more, but its extents are there."""
        report, target = self.rescue(self.edited(4096 + 32 * 2, bytes(32)), status=3)
        found = (target / "disk-dev2.raw").read_bytes()
        self.assertEqual(found, self.archive.devices[1].data.ljust(len(found), b"\0"))
        self.assertEqual({d["dev_id"] for d in report["devices"]}, {1, 2, 3})

    def test_a_size_wrong(self) -> None:
        for size in (1 << 62, 65536, 12345):
            with self.subTest(size=size):
                _, target = self.rescue(self.edited(4096 + 64 + 8, struct.pack(">Q", size)), 3)
                found = (target / "disk-drive-scsi0.raw").read_bytes()
                self.assertEqual(found, self.archive.devices[1].data.ljust(len(found), b"\0"))

    def test_no_archive(self) -> None:
        for data in (b"", b"hello world\n" * 3000, bytes(100000), gzip.compress(b"x" * 9999)):
            with self.subTest(data[:5]):
                line = self.bad("rescue", self.file("a.vma", data), self.directory / "new")
                self.assertIn("a.vma", line)
                self.assertFalse((self.directory / "new").exists())


class Names(RescueTest):
    """Names that are no file's names do not keep anything else from being rescued."""

    def test_hostile(self) -> None:
        rng = random.Random(12)
        for name in ("../evil", "/tmp/evil", "a\nb", "x" * 250, "scsi0"):
            archive = archives.three_disks(rng)
            archive.devices[1].name = name
            archive.devices[2].name = "scsi0"
            archive.configs = [(name, b"evil"), ("qemu-server.conf", b"good")]
            with self.subTest(name=name):
                report, target = self.rescue(archives.build(archive), status=3)
                files = {path.name for path in target.iterdir()}
                wanted = {"qemu-server.conf", "rescue.json", "disk-drive-efidisk0.raw"}
                self.assertLess(wanted | {"disk-scsi0.raw"}, files)
                self.assertEqual(len(files), 5 if name != "scsi0" else 6)
                self.assertEqual(told(report, "lost"), set())
                for flaw in report["damage"]:
                    self.assertIn("name", flaw["text"])

    def test_report_is_no_config(self) -> None:
        archive = archives.three_disks(random.Random(13))
        archive.configs.append(("rescue.json", b"not the report"))
        report, _ = self.rescue(archives.build(archive), status=3)
        self.assertEqual(len(report["configs"]), len(archive.configs) - 1)


class Unreadable(RescueTest):
    """Places that cannot be read are damage like any other."""

    def test_pages(self) -> None:
        archive, data = some_archive(14)
        extents = archives.extent_offsets(data)
        whole = truth(archive)
        for seed in range(0, 40, STEP):
            rng = random.Random(seed)
            at = rng.choice([rng.randrange(12800, len(data)), rng.choice(extents)])
            at = max(at // 4096, 4) * 4096
            end = min(at + 4096 * rng.choice([1, 1, 2, 16, 200]), len(data))

            class Failing(io.FileIO):
                def readinto(self, buffer: Any, /, start: int = at, end: int = end) -> int:
                    here = self.tell()
                    if start <= here < end:
                        raise OSError(errno.EIO, os.strerror(errno.EIO))
                    room = start - here if here < start else len(buffer)
                    return super().readinto(memoryview(buffer)[:room]) or 0

            with self.subTest(seed=seed, at=at, end=end):
                path = self.file("a.vma", data)
                with mock.patch("io.FileIO", Failing):
                    report, target = self.rescue(path, status=3)
                places = stored_ranges(data)
                hit = {c for c, start, last in places if start < last and start < end and at < last}
                zeroed = data[:at] + bytes(end - at) + data[end:]
                for extent in extents:
                    header = slice(extent, extent + EXTENT_HEADER)
                    if zeroed[header] != data[header]:  # else nothing of it is lost
                        hit |= {(s.dev_id, s.cluster_num) for s in archives.slots(data, extent)}
                hit.discard((0, 0))
                self.assertEqual(told(report, "lost"), hit)
                self.assertEqual(told(report, "doubtful"), set())
                for cluster, content in self.contents(archive, target).items():
                    self.assertEqual(content, bytes(CLUSTER) if cluster in hit else whole[cluster])
                places_told = [flaw["offset"] for flaw in report["damage"]]
                self.assertIn(at, places_told)

    def test_other_errors(self) -> None:
        """Of a disk that is gone, nothing more can be read."""

        class Gone(io.FileIO):
            def readinto(self, buffer: Any, /) -> int:
                if self.tell() > 100000:
                    raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
                return super().readinto(memoryview(buffer)[:50000]) or 0

        path = self.file("a.vma", some_archive(15)[1])
        with mock.patch("io.FileIO", Gone):
            self.refused("rescue", path, self.directory / "new", says=[os.strerror(errno.ENXIO)])
        self.assertFalse((self.directory / "new").exists())

    def test_first_bytes(self) -> None:
        """Then the file's name shows how it is compressed."""
        archive, data = some_archive(14)
        path = self.file("a.vma.zst", in_frames(data))
        with mock.patch("os.read", side_effect=OSError(errno.EIO, os.strerror(errno.EIO))):
            _, target = self.rescue(path, status=0)
        self.assertEqual(self.contents(archive, target), truth(archive))

    def test_where_the_next_frame_begins(self) -> None:
        """What only looks ahead may fail: the frames themselves can be read."""
        archive, data = some_archive(14)
        path = self.file("a.vma.zst", in_frames(data))
        with mock.patch("os.pread", side_effect=OSError(errno.EIO, os.strerror(errno.EIO))):
            _, target = self.rescue(path, status=0)
        self.assertEqual(self.contents(archive, target), truth(archive))

    def test_nothing_is_read_after_the_end(self) -> None:
        """The file's descriptor is then that of the next file that this process opens."""

        class Slow(io.FileIO):
            reading = 0

            def readinto(self, buffer: Any, /) -> int:
                Slow.reading += 1
                time.sleep(0.05)
                count = super().readinto(buffer) or 0
                Slow.reading -= 1
                return count

        path = self.file("a.vma", some_archive(15)[1])
        with mock.patch("io.FileIO", Slow), vma_tool.open_salvage(os.fspath(path)) as (_, window):
            window.peek(0, 1)
        self.assertEqual(Slow.reading, 0)

    def test_real_file_system(self) -> None:
        """A mounted archive answers EIO where its frame is damaged; an archive is its disk."""
        require_root()
        if not Path("/dev/fuse").exists():
            skip("no /dev/fuse")
        archive, inner = some_archive(16)
        outer = Archive([archives.Device(1, "disk", inner + bytes(-len(inner) % 512))])
        packed = in_frames(archives.canonical(outer))
        table = frames.split(packed)
        number = next(i for i, size in enumerate(table.sizes) if i > 3 and size > 100000)
        at = sum(map(len, table.frames[:number])) + len(table.frames[number]) // 2
        path = self.file("outer.vma.zst", packed[:at] + bytes([packed[at] ^ 8]) + packed[at + 1 :])
        mount = self.directory / "mount"
        mount.mkdir()
        subprocess.run(tool_command("mount", path, mount), check=True)
        try:
            report, target = self.rescue(mount / "disk-disk.raw", status=3)
        finally:
            subprocess.run(["umount", str(mount)], check=True)
        unsure = told(report, "lost") | told(report, "doubtful")
        self.assertTrue(unsure)
        self.assertLess(len(unsure), 100)
        self.assertTrue(any("read" in flaw["text"] for flaw in report["damage"]))
        for cluster, content in self.contents(archive, target).items():
            if cluster not in unsure:
                self.assertEqual(content, truth(archive)[cluster], cluster)


class Surroundings(RescueTest, ProcessTest):
    """The target directory, the report, memory, signals."""

    def test_target_must_be_empty(self) -> None:
        path = self.file("a.vma", golden("odd-size"))
        target = self.directory / "full"
        target.mkdir()
        (target / "file").touch()
        self.refused("rescue", path, target, says=[os.strerror(errno.ENOTEMPTY)])
        self.assertEqual([p.name for p in target.iterdir()], ["file"])
        (target / "file").unlink()
        self.ok("rescue", "-q", path, target)

    def test_nothing_is_written_after_an_error(self) -> None:
        """The descriptors are closed then, and could be those of other files."""
        path = self.directory / "large.vma"
        archives.write_large(path, size=64 << 20, data_bytes=30 << 20)
        writing = os.pwritev
        times: list[float] = []

        def failing(fd: int, *args: Any) -> int:
            if threading.current_thread() is threading.main_thread():
                return writing(fd, *args)
            times.append(time.monotonic())
            if len(times) in (2, 3):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            time.sleep(0.05 if times[1:] else 0.5)  # others queue up behind the first one
            return writing(fd, *args)

        with mock.patch("os.pwritev", failing):
            self.refused("rescue", path, self.directory / "new", says=[os.strerror(errno.ENOSPC)])
            end = time.monotonic()
            time.sleep(0.4)
        self.assertGreater(len(times), 3)
        self.assertLess(max(times), end)
        self.assertFalse((self.directory / "new").exists())

    def test_table(self) -> None:
        _, data = some_archive(17)
        at = archives.extent_offsets(data)[3]
        path = self.file("a.vma", data[: at + 50] + b"xx" + data[at + 52 :])
        answer = call_tool("rescue", path, self.directory / "new")
        self.assertEqual((answer.returncode, answer.stderr), (3, b""))
        text = answer.stdout.decode()
        self.assertIn(f"offset 0x{at:x}: the extent header's MD5 does not match", text)
        report = json.loads((self.directory / "new" / "rescue.json").read_text())
        for word in ("certain", "unsure", "next"):
            self.assertIn(f"\n{word} ", text)
        for device in report["devices"]:
            self.assertIn(device["name"], text)
            for offset, size in device["lost"]:
                self.assertIn(f"{offset} + {size}", text)

    def test_neighbours_are_one_range(self) -> None:
        archive, _ = some_archive(18)
        data = archives.build(archive, archives.in_order(archive))
        report, _ = self.rescue(data[: archives.extent_offsets(data)[1]], status=3)
        for device in report["devices"]:
            self.assertLessEqual(len(device["lost"]), 1)
        self.assertEqual(report["devices"][2]["lost"], [[0, 4 << 20]])

    def test_memory(self) -> None:
        """As for extract; a little more where damage makes it look ahead."""
        path = self.directory / "large.vma"
        archives.write_large(path, size=8 << 30, data_bytes=100 << 20)
        _, extracting = run_measured("extract", "-q", path, self.directory / "extracted")
        answer, memory = run_measured("rescue", "-q", path, self.directory / "new")
        self.assertEqual(answer.returncode, 0, answer.stderr)
        self.assertLess(memory, extracting + (4 << 20))
        with path.open("r+b") as file:
            for at in range(20 << 20, 90 << 20, 10 << 20):
                file.seek(at)
                file.write(bytes(4 << 20))
        answer, memory = run_measured("rescue", "-q", path, self.directory / "new2")
        self.assertEqual(answer.returncode, 3, answer.stderr)
        self.assertLess(memory, extracting + (24 << 20))

    def test_memory_of_what_is_announced(self) -> None:
        """13 KB that announce hundreds of TiB take no memory, and no time."""
        for count, size in ((1, 1 << 40), (254, 1 << 40), (254, 1 << 47)):
            archive = Archive([Device(i + 1, f"d{i}", b"", size=size) for i in range(count)])
            infos = [(0, i % count + 1, (size >> 16) - 1) for i in range(59)]
            data = archives.header_bytes(archive) + archives.extent_bytes(archive.uuid, infos, [])
            with self.subTest(count=count, size=size):
                path = self.file("a.vma", data)
                target = self.directory / f"announced-{count}-{size}"
                start = time.monotonic()
                answer, memory = run_measured("rescue", "-q", path, target)
                self.assertEqual(answer.returncode, 3, answer.stderr)
                self.assertLess(memory, 100 << 20)
                self.assertLess(time.monotonic() - start, 20)
                shutil.rmtree(target)

    def test_memory_of_zeros(self) -> None:
        """A whole archive takes no more than extract, and 16 MiB."""
        path = self.directory / "zeros.vma"
        archives.write_large(path, size=128 << 30, data_bytes=1 << 20)
        _, extracting = run_measured("extract", "-q", path, self.directory / "extracted")
        answer, memory = run_measured("rescue", "-q", path, self.directory / "new")
        self.assertEqual(answer.returncode, 0, answer.stderr)
        self.assertLess(memory, extracting + (16 << 20))

    def test_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            process = self.start("rescue", "-", self.directory / "new", stdin=subprocess.PIPE)
            assert process.stdin is not None
            process.stdin.write(some_archive(19)[1][: 2 << 20])
            process.stdin.flush()
            self.wait_for(lambda: list((self.directory / "new").glob("*.partial")))
            process.send_signal(number)
            answer = self.answer(process)
            self.assertEqual(answer.returncode, 128 + number)
            self.assertFalse((self.directory / "new").exists())
