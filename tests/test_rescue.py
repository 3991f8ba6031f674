"""rescue: what is left of a damaged archive, and what it says of the rest.

An oracle of its own reads damaged archives by the rules, byte by byte and with no regard to speed.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import archives
from tests.archives import BLOCK, CLUSTER, EXTENT_HEADER, Archive, Cluster
from tests.support import STEP, Answer, ToolTest, call_tool

MIB = 1 << 20


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
        before = {(s.dev_id, s.cluster_num) for s in archives.slots(data, extents[i - 1]) if s.mask}
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

    def check(self, archive: Archive, data: bytes, rng: random.Random) -> None:
        extents = archives.extent_offsets(data)
        whole = truth(archive)
        for i in range(len(extents)):
            for what, damaged, lost, doubtful in single_damages(data, extents, i, rng):
                with self.subTest(extent=i, of=len(extents), what=what):
                    report, target = self.rescue(damaged)
                    self.assertEqual(told(report, "lost"), lost)
                    self.assertEqual(told(report, "doubtful"), doubtful)
                    for cluster, content in self.contents(archive, target).items():
                        if cluster not in lost | doubtful:
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
        self.check(archive, archives.canonical(archive), rng)

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
