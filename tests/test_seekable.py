"""The compressed canonical archive: what writes it, what reads it, and files that lie."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests import archives, frames
from tests.archives import BLOCK, CLUSTER, Archive, Device
from tests.support import (
    FEW,
    ToolTest,
    call_tool,
    compress,
    golden,
    manifest,
    require_program,
    run_tool,
    sha256,
    snapshot,
)

ALIGNS = ("4K", "128K", "512K", "1M")


def program(*options: str, data: bytes) -> bytes:
    """Return what the zstd program makes of data."""
    command = [require_program("zstd", "zstd"), "-q", "-c", *options]
    return subprocess.run(command, input=data, check=True, stdout=subprocess.PIPE).stdout


def seekable() -> tuple[Archive, bytes]:
    """Return an archive with three disks, and its canonical form."""
    rng = random.Random(17)
    archive = Archive(
        [
            Device(1, "drive-efidisk0", archives.disk(rng, 528 << 10, "sparse")),
            Device(2, "drive-scsi0", archives.disk(rng, 150 * CLUSTER)),
            Device(5, "drive-scsi1", archives.disk(rng, 75 * CLUSTER, "full")),
        ],
        [("qemu-server.conf", b"cores: 2\n")],
    )
    return archive, archives.canonical(archive)


class SeekableTest(ToolTest):
    def check_frames(self, data: bytes, plain: bytes) -> None:
        """Check that data is the compressed form of a plain canonical archive."""
        found = frames.split(data)
        pieces = list(frames.pieces(plain))
        self.assertEqual(found.sizes, [len(piece.data) for piece in pieces])
        self.assertEqual(program("-d", data=data), plain)
        self.assertEqual(program("-d", data=found.masks), frames.masks(plain))
        for frame, stored in (*zip(found.frames, pieces), (found.masks, None)):
            if stored and stored.stored:
                self.assertEqual(frame, frames.header_frame(stored.data))
            else:
                self.assertTrue(frame[4] & 4, "a checksum")
                self.assertTrue(frame[4] & 0xE0, "a content size")

    def fails(self, status: int, *args: Any, says: tuple[str, ...] = (), **kw: Any) -> str:
        """Call the tool, which must fail with one line that says all of this."""
        answer = call_tool(*args, **kw)
        line = answer.stderr.decode()
        self.assertEqual(answer.returncode, status, line)
        self.assertRegex(line, r"\Avma-tool: [^\n]+\n\Z")
        for part in says:
            self.assertIn(part, line)
        return line


class Writing(SeekableTest):
    def test_golden_archives(self) -> None:
        """The frames are where they must be; back comes the plain archive."""
        output = self.directory / "o.vma.zst"
        for name, want in manifest().items():
            source = self.file("a.vma", golden(name))
            for align in ALIGNS:
                with self.subTest(archive=name, align=align):
                    self.ok("optimize", "--force", "--align", align, source, output)
                    answer = call_tool("optimize", "--align", align, output, "-")
                    self.check_ok(answer)
                    self.assertEqual(sha256(answer.stdout), want["optimized_sha256"][align])
                    self.check_frames(output.read_bytes(), answer.stdout)

    def test_roads(self) -> None:
        """From a file, a pipe or any compressed form, or in place, the same bytes come."""
        place = self.directory / "p.vma.zst"
        for name in (*manifest(),)[::FEW]:
            source = self.file("a.vma", golden(name))
            single = self.file("single.vma.zst", compress("zstd", golden(name)))
            zipped = self.file("a.vma.gz", gzip.compress(golden(name), 1))
            output = self.directory / f"{name}.vma.zst"
            self.ok("optimize", source, output)
            data = output.read_bytes()
            with self.subTest(archive=name):
                for road in (single, zipped, output):
                    self.ok("optimize", "--force", road, place)
                    self.assertEqual(place.read_bytes(), data, road)
                for given in (golden(name), data, single.read_bytes()):
                    answer = call_tool("optimize", "--compress", "zstd", "-", "-", input=given)
                    self.assertEqual((answer.returncode, answer.stdout), (0, data))
                shutil.copy(single, place)
                self.ok("optimize", place)
                self.assertEqual(place.read_bytes(), data)

    def test_pack_and_create(self) -> None:
        _, plain = seekable()
        source = self.file("a.vma", plain)
        output = self.directory / "o.vma.zst"
        packed = self.directory / "p.vma.zst"
        self.ok("optimize", source, output)
        for archive in (source, output):
            unpacked = self.directory / "u"
            self.ok("unpack", archive, unpacked)
            self.ok("pack", "-q", unpacked, packed)
            self.assertEqual(packed.read_bytes(), output.read_bytes())
            answer = call_tool("pack", "-q", "--compress", "zstd", unpacked, "-")
            self.assertEqual(answer.stdout, output.read_bytes())
            shutil.rmtree(unpacked)
            packed.unlink()
        disk = self.file("disk.raw", archives.disk(random.Random(1), 70 * CLUSTER))
        config = self.file("100.conf", b"cores: 1\n")
        made = self.directory / "c.vma.zst"
        self.ok("create", "-q", made, "-c", config, f"drive-scsi0={disk}")
        data = made.read_bytes()
        self.check_frames(data, program("-d", data=data))
        self.ok("optimize", made, notice="")
        self.assertEqual(made.read_bytes(), data)

    def test_options(self) -> None:
        """--compress decides, else the output's name."""
        require_program("zstd", "zstd")
        _, plain = seekable()
        source = self.file("a.vma", plain)
        sizes = {}
        for option in ("none", "zstd", "zstd:1", "zstd:3", "zstd:19"):
            for name in ("o.vma", "o.vma.zst"):
                with self.subTest(option, name=name):
                    output = self.directory / name
                    self.ok("optimize", "--compress", option, source, output)
                    data = output.read_bytes()
                    if option == "none":
                        self.assertEqual(data, plain)
                    else:
                        self.check_frames(data, plain)
                    sizes[option] = len(data)
                    output.unlink()
        self.assertEqual(sizes["zstd"], sizes["zstd:3"])
        self.assertLess(sizes["zstd:19"], sizes["zstd:1"])
        for option in ("", "gzip", "zstd:", "zstd:0", "zstd:23", "zstd:x", "zstd:-1", "none:1"):
            with self.subTest(option):
                answer = call_tool("optimize", "--compress", option, source, "-")
                self.assertEqual((answer.returncode, answer.stdout), (2, b""))
                self.assertIn(b"--compress", answer.stderr)

    def test_in_place(self) -> None:
        """Mode, owner and time stay; a second run does nothing."""
        for what, data in (
            ("one frame", compress("zstd", golden("live-order"))),
            ("plain under a compressed name", golden("live-order")),
            ("another align", self.compressed("live-order", "4K")),
        ):
            with self.subTest(what):
                path = self.file("x.vma.zst", data)
                os.chmod(path, 0o640)
                os.utime(path, ns=(1700000000123456789, 1700000001987654321))
                before = path.stat()
                self.ok("optimize", path)
                self.assertEqual(path.read_bytes(), self.compressed("live-order", "512K"))
                after = path.stat()
                for field in ("st_mode", "st_uid", "st_gid", "st_mtime_ns"):
                    self.assertEqual(getattr(after, field), getattr(before, field), field)
                self.assertEqual(os.listdir(self.directory), ["x.vma.zst"])
                state = snapshot(self.directory)
                self.assertIn("is canonical already", self.ok("optimize", path))
                self.assertEqual(snapshot(self.directory), state)

    def compressed(self, name: str, align: str) -> bytes:
        source = self.file("source", golden(name))
        output = self.directory / "output"
        self.ok("optimize", "--align", align, "--compress", "zstd", source, output)
        data = output.read_bytes()
        source.unlink()
        output.unlink()
        return data

    def test_other_compressions_in_place(self) -> None:
        """They are refused, with the command that makes a .vma.zst beside them."""
        for name, command in (
            ("x.vma.gz", ["gzip"]),
            ("x.vma.lzo", ["lzop"]),
            ("x.vma.bz2", ["bzip2"]),
            ("x.vma.xz", ["xz"]),
        ):
            with self.subTest(name):
                if not shutil.which(command[0]):
                    self.skipTest(f"no {command[0]}")
                data = subprocess.run(
                    [*command, "-c"], input=golden("odd-size"), stdout=subprocess.PIPE, check=True
                ).stdout
                path = self.file(name, data)
                before = snapshot(self.directory)
                self.fails(
                    1, "optimize", path, says=(f"vma-tool optimize {path} {path.parent}/x.vma.zst",)
                )
                self.assertEqual(snapshot(self.directory), before)
                path.unlink()


class Runs(SeekableTest):
    """Headers of extents that store nothing share frames, which end at every 1,024th."""

    def archive(self, *counts: int, stores: Iterable[tuple[int, int]] = ()) -> bytes:
        """Return a canonical archive of disks of so many extents, that store nothing.

        But for these (dev_id, number of an extent), which store a block.
        """
        archive = Archive(
            [
                Device(n, f"drive-scsi{n}", bytes(count * 8 * CLUSTER))
                for n, count in enumerate(counts, 1)
            ]
        )
        masks = {(n, number): 0 for n, count in enumerate(counts, 1) for number in range(8 * count)}
        masks.update(((dev_id, 8 * number + 5), 4) for dev_id, number in stores)
        return archives.canonical(archive, stored=masks)

    def compressed(self, plain: bytes) -> frames.Seekable:
        """Compress an archive from a file and from a stream; return the frames."""
        source, output = self.file("a.vma", plain), self.directory / "a.vma.zst"
        self.ok("optimize", "-q", "--force", source, output)
        data = output.read_bytes()
        self.check_frames(data, plain)
        answer = call_tool("optimize", "--compress", "zstd", "-", "-", input=plain)
        self.assertEqual((answer.returncode, sha256(answer.stdout)), (0, sha256(data)))
        self.ok("optimize", "-q", output)
        self.assertEqual(sha256(output), sha256(data))
        self.assertIn("canonical (--align 512K)", self.ok("verify", output))
        return frames.split(data)

    def test_lengths(self) -> None:
        """Less than 1,024, as many, and more; each device counts its own."""
        header = [archives.ALIGNS["512K"]]
        for counts, runs in (
            ((1023,), [1023]),
            ((1024,), [1024]),
            ((1025,), [1024, 1]),
            ((2049,), [1024, 1024, 1]),
            ((1023, 2), [1023, 2]),
            ((1024, 1), [1024, 1]),
            ((3, 1025, 1), [3, 1024, 1, 1]),
        ):
            with self.subTest(counts=counts):
                found = self.compressed(self.archive(*counts))
                self.assertEqual(found.sizes, header + [512 * count for count in runs])

    def test_change(self) -> None:
        """An extent that gets data changes the frames of its run, and no others."""
        counts = (2049, 1025)
        before = self.compressed(self.archive(*counts))
        self.assertEqual([n // 512 for n in before.sizes[1:]], [1024, 1024, 1, 1024, 1])
        # Where it is, the run it is in, and how many of that run are left before and behind it
        for place, run, left, right in (
            ((1, 0), 0, 0, 1023),
            ((1, 600), 0, 600, 423),
            ((1, 1023), 0, 1023, 0),
            ((1, 1024), 1, 0, 1023),
            ((1, 2048), 2, 0, 0),
            ((2, 1), 3, 1, 1022),
            ((2, 1024), 4, 0, 0),
        ):
            with self.subTest(place=place):
                after = self.compressed(self.archive(*counts, stores=[place]))
                changed = [512 * left] * (left > 0) + [512, 512 << 10] + [512 * right] * (right > 0)
                same = 1 + run  # frames in front of it: the header's, and those of other runs
                self.assertEqual(after.frames[:same], before.frames[:same])
                self.assertEqual(after.sizes[same : same + len(changed)], changed)
                self.assertEqual(after.frames[same + len(changed) :], before.frames[same + 1 :])


class Reading(SeekableTest):
    def setUp(self) -> None:
        super().setUp()
        self.archive, plain = seekable()
        self.plain = self.file("a.vma", plain)
        self.path = self.directory / "a.vma.zst"
        self.ok("optimize", self.plain, self.path)

    def test_every_command(self) -> None:
        """A compressed archive answers what the plain one does."""
        for args in (
            ["list"],
            ["list", "--partitions"],
            ["verify"],
            ["verify", "--quick"],
            ["verify", "--digest"],
            ["config"],
        ):
            with self.subTest(args):
                plain, found = (self.ok(*args, path) for path in (self.plain, self.path))
                self.assertEqual(found.replace(str(self.path), str(self.plain)), plain)
        for one, other in ((self.plain, self.path), (self.path, self.plain)):
            self.ok("verify", "--against", one, other)
        for command in ("extract", "unpack"):
            for path, name in ((self.plain, "1"), (self.path, "2")):
                self.ok(command, path, self.directory / f"{command}{name}")
            files, wanted = (
                {p.name: p.read_bytes() for p in (self.directory / f"{command}{n}").iterdir()}
                for n in "12"
            )
            self.assertEqual(files, wanted)
        for disk in self.archive.devices:
            answer = call_tool("extract", "-d", str(disk.name), "-o", "-", self.path)
            self.assertEqual(answer.stdout, disk.data)

    def test_listing(self) -> None:
        """--scan and --json tell how it is compressed."""
        single = self.file("single.vma.zst", compress("zstd", self.plain.read_bytes()))
        count = len(frames.split(self.path.read_bytes()).frames)
        for path, want in (
            (self.plain, (None, True, None)),
            (self.path, ("zstd", True, count)),
            (single, ("zstd", False, None)),
        ):
            with self.subTest(path.name):
                found = json.loads(self.ok("list", "--scan", "--json", path))
                self.assertEqual((found["compression"], found["seekable"], found["frames"]), want)
                size = path.stat().st_size if want[0] else None
                self.assertEqual(found["compressed_size"], size)
        self.assertIn(f"{count} frames", self.ok("list", "--scan", self.path))

    def test_one_disk(self) -> None:
        """Of the frames of other disks, nothing is read."""
        found = frames.split(self.path.read_bytes())
        data = bytearray(self.path.read_bytes())
        last = sum(map(len, found.frames))
        for i in range(last - len(found.frames[-1]), last):
            data[i] = 0
        path = self.file("b.vma.zst", bytes(data))
        answer = call_tool("extract", "-d", "drive-scsi0", "-o", "-", path)
        self.assertEqual(answer.stdout, self.archive.devices[1].data)
        self.fails(3, "verify", path, says=("drive-scsi1",))

    def test_damaged_frames(self) -> None:
        """Each damage is one error; it tells the place in the plain archive, and the clusters."""
        good = self.path.read_bytes()
        found = frames.split(good)
        start = at = 0
        for i, frame in enumerate(found.frames):
            data = bytearray(good)
            data[start + len(frame) - 6] ^= 0x55
            path = self.file("b.vma.zst", bytes(data))
            with self.subTest(frame=i):
                line = self.fails(3, "verify", path)
                if i:
                    self.assertRegex(line, rf"offset 0x{at:x}\b.*'drive-[a-z0-9]+'.*clusters? \d+")
                before = snapshot(self.directory)
                self.fails(3, "extract", path, self.directory / "x")
                self.fails(3, "optimize", path, self.directory / "o.vma")
                self.fails(3, "optimize", "--align", "4K", path)
                self.assertEqual(snapshot(self.directory), before)
            start += len(frame)
            at += found.sizes[i]


def lies(good: bytes, plain: bytes) -> Iterator[tuple[str, bytes, bool]]:
    """Yield files with whole frames, but a wrong table or index; and whether zstd reads them."""
    found = frames.split(good)
    sizes, pieces = found.sizes, found.frames
    index = frames.skippable(0x184D2A5D, b"VMAINDEX" + found.masks)
    table = frames.seek_table(pieces, sizes)
    body = b"".join(pieces)
    other = [*sizes]
    other[-1] += 1
    moved = [*sizes]
    moved[1], moved[2] = moved[2], moved[1]
    masks = frames.masks(plain)
    swapped = bytes(reversed(masks))
    yield "no table", body + index, True
    yield "no index", body + table, True
    yield "neither", body, True
    yield "index twice", body + index + index + table, True
    yield "table twice", body + index + table + table, True
    yield "a skippable frame in the middle", pieces[0] + index + body[len(pieces[0]) :], True
    yield "something behind it", good + frames.skippable(0x184D2A50, b"x"), True
    yield "another program's table", body + frames.seek_table(pieces, sizes, 0x80), True
    yield "another size", body + index + frames.seek_table(pieces, other), True
    yield "sizes exchanged", body + index + frames.seek_table(pieces, moved), True
    yield "a frame less", body + index + frames.seek_table(pieces[:-1], sizes[:-1]), True
    yield "a frame more", body + index + frames.seek_table([*pieces, b"x"], [*sizes, 1]), True
    huge = [*sizes]
    huge[3] = 9 << 20
    yield "a frame of 9 MiB", body + index + frames.seek_table(pieces, huge), True
    for what, other_masks in (
        ("masks reversed", swapped),
        ("a mask less", masks[:-2]),
        ("a mask more", masks + b"\0\0"),
        ("no mask", b""),
    ):
        yield what, frames.join(found._replace(masks=frames.raw_frame(other_masks))), True
    damaged = bytearray(good)
    damaged[len(body) + 30] ^= 0xFF
    yield "index damaged", bytes(damaged), True
    yield "a frame missing", good[len(pieces[0]) :], False
    yield "a frame twice", pieces[0] + good, False
    yield "cut", good[:-100], False
    yield "cut in the frames", good[: len(body) // 2], False
    header = program("-d", data=pieces[3])  # of an extent with data
    for what, frame, whole in (
        ("a frame that holds more", frames.raw_frame(header + bytes(BLOCK)), False),
        ("a header that has changed", frames.header_frame(header[:-1] + b"\1"), False),
        ("a header in a frame of another kind", frames.raw_frame(header), True),
        ("a compressed header", program("--check", data=header), True),
    ):
        yield what, frames.join(found._replace(frames=[*pieces[:3], frame, *pieces[4:]])), whole


class Lies(SeekableTest):
    def test_lies(self) -> None:
        """Where the frames are whole, the archive is read; otherwise it is an error."""
        archive, plain = seekable()
        source = self.file("a.vma", plain)
        path = self.directory / "a.vma.zst"
        self.ok("optimize", source, path)
        good = path.read_bytes()
        for what, data, whole in lies(good, plain):
            path = self.file("b.vma.zst", data)
            with self.subTest(what):
                if whole:
                    self.ok("verify", path)
                    self.ok("optimize", path, self.directory / "o.vma")
                    self.assertEqual(sha256(self.directory / "o.vma"), sha256(source))
                    (self.directory / "o.vma").unlink()
                    answer = call_tool("extract", "-d", "drive-scsi0", "-o", "-", path)
                    self.assertEqual(answer.stdout, archive.devices[1].data)
                else:
                    before = snapshot(self.directory)
                    for args in (["verify"], ["optimize"]):
                        self.assertIn(call_tool(*args, path).returncode, (1, 3))
                    self.assertNotEqual(
                        call_tool("optimize", path, self.directory / "o.vma").returncode, 0
                    )
                    self.assertEqual(snapshot(self.directory), before)

    def test_said(self) -> None:
        """verify says that a table or an index is damaged, and nothing of one that is not there."""
        _, plain = seekable()
        source = self.file("a.vma", plain)
        path = self.directory / "a.vma.zst"
        self.ok("optimize", source, path)
        for what, data, whole in lies(path.read_bytes(), plain):
            if whole:
                path = self.file("b.vma.zst", data)
                with self.subTest(what):
                    quiet = what in ("neither", "no table", "another program's table")
                    quiet = quiet or what == "a skippable frame in the middle"
                    quiet = quiet or what == "something behind it"
                    self.assertEqual("as a stream: " in self.ok("verify", path), not quiet)


def hidden() -> dict[str, str]:
    """Return an environment in which Python finds no zstd library."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent / "data" / "without_zstd")}


class NoLibrary(SeekableTest):
    def test_without(self) -> None:
        """Reading goes by the program, writing is an error that names the package."""
        require_program("zstd", "zstd")
        _, plain = seekable()
        source = self.file("a.vma", plain)
        path = self.directory / "a.vma.zst"
        self.ok("optimize", source, path)
        before = snapshot(self.directory)
        for args in (["list"], ["verify"], ["list", "--scan"], ["config"]):
            answer = run_tool(*args, path, env=hidden())
            self.assertEqual(answer.returncode, 0, answer.stderr)
        for names in (
            [str(source), f"{self.directory}/o.vma.zst"],
            [str(path)],
            ["--compress", "zstd", str(path), "-"],
        ):
            answer = run_tool("optimize", *names, env=hidden())
            self.assertEqual((answer.returncode, answer.stdout), (1, b""))
            self.assertIn(b"libzstd1", answer.stderr)
            self.assertEqual(snapshot(self.directory), before)
        answer = run_tool("optimize", path, self.directory / "o.vma", env=hidden())
        self.assertEqual(answer.returncode, 0, answer.stderr)
        self.assertEqual(sha256(self.directory / "o.vma"), sha256(source))
