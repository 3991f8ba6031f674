"""Archives that version 2.0.0 has optimized: everything reads them, and optimize rewrites them.

Its layout had up to 58 clusters an extent, filled to 128 KiB, and unused slots of zeros; its frames
held 1 MiB of an extent at most, and every header was compressed. The fixtures are what it made of
`archives.build(source())` in source.vma, and of `archives.build(next_day())` in next.vma:

    vma-tool optimize source.vma v2.vma.zst
    vma-tool optimize source.vma v2.vma
    vma-tool diff v2.vma next.vma v2.vmad
    gzip -9n v2.vma
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import subprocess
from pathlib import Path

from tests import archives, frames
from tests.archives import BLOCK, CLUSTER, Archive, Device
from tests.support import (
    DATA,
    Answer,
    ToolTest,
    call_tool,
    require_program,
    require_root,
    run_tool,
    sha256,
    skip,
    snapshot,
)


@functools.cache
def source() -> Archive:
    """Return what the fixtures hold: odd sizes, holes longer than an extent, RAM state."""

    def content(size: int, *places: int) -> bytes:
        """Return a disk with text in these blocks."""
        data = bytearray(size)
        for number in places:
            text = b"block %5d of a disk of %9d bytes\n" % (number, size) * (BLOCK // 39 + 1)
            data[number * BLOCK : (number + 1) * BLOCK] = text[:BLOCK]
        return bytes(data[:size])

    return Archive(
        [
            Device(1, "drive-efidisk0", content(540672, 0, 33, 130)),
            Device(2, "vmstate", content(3 * CLUSTER, 0, 5, 47), 2 * CLUSTER + 512),
            Device(3, "drive-scsi0", content(8192000, 0, 1, 500, 941, 950, 1999)),
            Device(7, "drive-tpmstate0-backup", bytes(59 * CLUSTER)),
        ],
        [("qemu-server.conf", b"cores: 2\nmemory: 2048\n"), ("qemu-server.fw", b"")],
        ctime=1763600000,
    )


@functools.cache
def next_day() -> Archive:
    """Return another archive: a block more, one less, the end of a disk, RAM state, a config."""
    devices = [*source().devices]
    system = bytearray(devices[2].data)
    system[600 * BLOCK : 601 * BLOCK] = b"x" * BLOCK
    system[941 * BLOCK : 942 * BLOCK] = bytes(BLOCK)
    system[-512:] = b"y" * 512
    devices[1] = Device(2, "vmstate", b"z" * CLUSTER, 512)
    devices[2] = Device(3, "drive-scsi0", bytes(system))
    configs: list[archives.Config] = [("qemu-server.conf", b"cores: 3\nmemory: 2048\n")]
    return Archive(devices, configs, ctime=source().ctime + 86400)


@functools.cache
def plain() -> bytes:
    return gzip.decompress((DATA / "v2.vma.gz").read_bytes())


@functools.cache
def rewritten() -> bytes:
    """Return what optimize has to make of the fixtures: what is stored stays stored."""
    return archives.canonical(source(), stored=archives.parse(plain()).masks)


class Version2(ToolTest):
    def setUp(self) -> None:
        super().setUp()
        self.plain = self.file("v2.vma", plain())
        self.compressed = self.file("v2.vma.zst", (DATA / "v2.vma.zst").read_bytes())
        self.source = self.file("source.vma", archives.build(source()))

    def said(self, *args: str | Path) -> tuple[str, str]:
        """Call the tool, which must succeed; return standard output, and both together."""
        answer = call_tool(*args)
        text, notes = answer.stdout.decode(), answer.stderr.decode()
        self.assertEqual(answer.returncode, 0, notes)
        return text, text + notes

    def files(self, directory: Path) -> dict[str, str]:
        return {path.name: sha256(path) for path in directory.iterdir()}

    def test_fixtures(self) -> None:
        """They are what they are said to be."""
        parsed = archives.parse(plain())
        self.assertEqual(parsed.disks, {d.raw_name.decode(): d.data for d in source().devices})
        self.assertEqual(parsed.archive.configs, source().configs)
        used = [
            sum(slot.dev_id != 0 for slot in archives.slots(plain(), at)) for at in parsed.extents
        ]
        self.assertEqual(used, [9, 58, 58, 9, 58, 1, 3])
        packed = frames.split(self.compressed.read_bytes())
        self.assertEqual(sum(packed.sizes), len(plain()))
        stored = [piece.stored for piece in frames.pieces(plain())]
        headers = [len(frame) for frame, is_header in zip(packed.frames, stored) if is_header]
        self.assertTrue(headers)
        self.assertLess(max(headers), 300, "headers are compressed")
        program = require_program("zstd", "zstd")
        answer = subprocess.run([program, "-dc", self.compressed], capture_output=True, check=True)
        self.assertEqual(answer.stdout, plain())

    def test_reading(self) -> None:
        """list, verify, config, extract, unpack and diff find what is in the source."""
        wanted = self.directory / "wanted"
        self.ok("extract", self.source, wanted)
        for path in (self.plain, self.compressed):
            with self.subTest(path.name):
                for args in (["list"], ["config"], ["verify", "--digest"]):
                    want = self.ok(*args, self.source).replace(str(self.source), str(path))
                    found = self.said(*args, path)[0]
                    if args == ["list"]:  # the uuid is that of all canonical archives
                        found, want = (text.partition("created")[2] for text in (found, want))
                    for line in want.splitlines():
                        self.assertIn(line, found)
                self.assertRegex(self.said("verify", path)[0], ": OK, .* not canonical")
                self.said("verify", "--quick", path)
                self.said("verify", self.source, "--against", path)
                self.said("verify", path, "--against", self.source)
                for command in ("extract", "unpack"):
                    self.said(command, path, self.directory / f"{command} {path.name}")
                files = self.files(self.directory / f"extract {path.name}")
                self.assertEqual(files, self.files(wanted))
                self.said("pack", self.directory / f"unpack {path.name}", self.directory / "p.vma")
                self.assertEqual(
                    sha256(self.directory / "p.vma"), sha256(archives.canonical(source()))
                )
                (self.directory / "p.vma").unlink()
                answer = call_tool("extract", "-d", "drive-scsi0", "-o", "-", path)
                self.assertEqual(answer.stdout, source().devices[2].data)
                self.said("rescue", path, self.directory / f"rescued {path.name}")
                files = self.files(self.directory / f"rescued {path.name}")
                self.assertLessEqual(self.files(wanted).items(), files.items())

    def test_differences(self) -> None:
        """Those of now, and the one that 2.0.0 has made; its base may be rewritten meanwhile."""
        new = self.file("next.vma", archives.build(next_day()))
        old = self.file("v2.vmad", (DATA / "v2.vmad").read_bytes())
        want = sha256(archives.canonical(next_day()))
        output = self.directory / "o.vma"
        again = self.file("again.vma", rewritten())
        for base in (self.plain, self.compressed, again, self.source):
            made = self.directory / f"{base.name}.vmad"
            self.said("diff", base, new, made)
            for difference in (old, made):
                with self.subTest(base=base.name, difference=difference.name):
                    self.said("verify", "--base", base, difference)
                    self.said("optimize", "--force", "--base", base, difference, output)
                    self.assertEqual(sha256(output), want)

    def test_listing(self) -> None:
        """--scan says that it is not canonical, and of the compressed one, that it is a stream."""
        for path, seekable in ((self.plain, True), (self.compressed, False)):
            with self.subTest(path.name):
                self.assertIn("not canonical", self.said("list", "--scan", path)[0])
                found = json.loads(self.said("list", "--scan", "--json", path)[0])
                self.assertEqual((found["canonical"], found["seekable"]), (False, seekable))

    def test_note(self) -> None:
        """verify of the compressed one says that optimize makes it readable at any place again."""
        again = self.directory / "again.vma.zst"
        self.said("optimize", self.compressed, again)
        for path, noted in ((self.compressed, True), (self.plain, False), (again, False)):
            with self.subTest(path.name):
                self.assertEqual("optimize" in self.said("verify", path)[1], noted)

    def test_optimize(self) -> None:
        """To a file, in place, from a pipe: the bytes of the layout of now."""
        output = self.directory / "o"
        want = rewritten()
        for path in (self.plain, self.compressed):
            for target in (f"{output}.vma", f"{output}.vma.zst"):
                with self.subTest(path.name, to=target):
                    self.said("optimize", "--force", path, target)
                    self.check_rewritten(Path(target), want)
            with self.subTest(path.name, to="a pipe"):
                answer = call_tool("optimize", "-", "-", input=path.read_bytes())
                self.assertEqual((answer.returncode, sha256(answer.stdout)), (0, sha256(want)))
            with self.subTest(path.name, to="its own place"):
                self.assertNotIn("already", self.said("optimize", path)[0])
                self.check_rewritten(path, want)
                before = snapshot(self.directory)
                self.assertIn("is canonical already", self.ok("optimize", path))
                self.assertEqual(snapshot(self.directory), before)

    def check_rewritten(self, path: Path, want: bytes) -> None:
        """Check a plain or compressed archive, which must be canonical."""
        data = path.read_bytes()
        self.assertIn("canonical (--align 512K)", self.ok("verify", path))
        if path.suffix == ".zst":
            found = frames.split(data)
            pieces = list(frames.pieces(want))
            self.assertEqual(found.sizes, [len(piece.data) for piece in pieces])
            for frame, piece in zip(found.frames, pieces):
                if piece.stored:
                    self.assertEqual(frame, frames.header_frame(piece.data))
            answer: Answer[bytes] = call_tool("optimize", path, "-")
            self.assertEqual(answer.returncode, 0)
            data = answer.stdout
        self.assertEqual(sha256(data), sha256(want))

    def test_same_cuts(self) -> None:
        """Small disks, with the align of now: only the frames of the headers are other ones.

        In place comes all the same what elsewhere comes.
        """
        program = require_program("zstd", "zstd")
        archive = Archive([Device(1, "drive-scsi0", source().devices[0].data[: 8 * CLUSTER])])
        canonical = self.file("c.vma", archives.canonical(archive))
        want, path = self.directory / "want.vma.zst", self.directory / "c.vma.zst"
        self.ok("optimize", canonical, want)
        found = frames.split(want.read_bytes())
        header = next(
            n for n, piece in enumerate(frames.pieces(canonical.read_bytes())) if piece.stored
        )
        command = [program, "-q", "-3", "--check", "-c"]
        content = canonical.read_bytes()[sum(found.sizes[:header]) :][:512]
        found.frames[header] = subprocess.run(
            command, input=content, stdout=subprocess.PIPE, check=True
        ).stdout
        path.write_bytes(frames.join(found))
        self.ok("verify", path)
        self.ok("optimize", path)
        self.assertEqual(sha256(path), sha256(want))

    def test_mount(self) -> None:
        """The plain one; the compressed one is refused, with the command that helps."""
        mount = self.directory / "mount"
        mount.mkdir()
        self.check_error(call_tool("mount", self.compressed, mount), "optimize")
        require_root()
        if not os.path.exists("/dev/fuse"):
            skip("no /dev/fuse")
        require_program("umount", "mount")
        answer = run_tool("mount", "-q", self.plain, mount)
        self.assertEqual(answer.returncode, 0, answer.stderr)
        try:
            found = {path.name: sha256(path) for path in mount.iterdir()}
        finally:
            subprocess.run(["umount", str(mount)], check=True)
        self.ok("extract", self.source, self.directory / "wanted")
        self.assertEqual(found, self.files(self.directory / "wanted"))
