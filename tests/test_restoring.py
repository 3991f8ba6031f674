"""What Proxmox's qmrestore needs: the lines of `extract -r`, and the map in qemu-server.conf."""

from __future__ import annotations

import os
import random
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

from tests import archives
from tests.archives import CLUSTER, Archive, Device
from tests.checks import CheckedTest, Child, wait_for
from tests.support import Argument, call_tool, golden, manifest, sha256

CONFIG = b"cores: 2\nmemory: 2048\n"


class Lines(CheckedTest):
    """`extract -r MAP` prints configs and devices, flushed, before it opens MAP; always."""

    def setUp(self) -> None:
        super().setUp()
        rng = random.Random(1)
        self.archive = Archive(
            [
                Device(1, "drive-scsi0", archives.disk(rng, 4 * CLUSTER)),
                Device(2, "drive-efidisk0", archives.disk(rng, 540672, "sparse")),
                Device(3, "vmstate", archives.disk(rng, 3 * CLUSTER, "full")),
            ],
            [("qemu-server.conf", CONFIG), ("qemu-server.fw", b"")],
        )
        self.data = archives.build(self.archive, archives.interleaved(self.archive))
        self.fifo, self.target = self.directory / "fifo", self.directory / "configs"
        os.mkfifo(self.fifo)

    def lines_before_the_map(self, child: Child, count: int) -> list[str]:
        """Return the lines that come while nobody has opened the FIFO yet."""
        output = child.process.stdout
        assert output
        text = b""
        while text.count(b"\n") < count:
            ready, _, _ = select.select([output], [], [], 10)
            if not ready:
                self.fail(f"no more lines: {text.decode()}")
            piece = os.read(output.fileno(), 65536)
            if not piece:
                self.fail(f"it ended: {text.decode()}")
            text += piece
        return text.decode().splitlines()

    def drive(self, *args: Argument, stream: bool = False) -> list[str]:
        """Restore as qmrestore does, with what the lines say; return the lines."""
        source = self.file("a.vma", self.data)
        with open(source, "rb") as stdin:
            child = self.start(
                "extract", *args, "-r", self.fifo, "-" if stream else source, self.target,
                stdin=stdin,
            )  # fmt: skip
        lines = self.lines_before_the_map(child, 6)
        # the configs are complete by now: qmrestore reads them before it writes the map
        for name, data in self.archive.configs:
            self.assertEqual((self.target / str(name)).read_bytes(), data)
        with open(self.fifo, "w", encoding="utf-8") as answer:
            for device in self.archive.devices[:2]:
                name = device.raw_name.decode()
                self.file(name, b"\xff" * len(device.data))
                answer.write(f"format=raw:1:{name}={self.directory}/{name}\n")
                answer.flush()
            answer.write("done\n")
        ended = child.answer()
        self.assertEqual(ended.returncode, 0, ended.stderr)
        if "-v" not in args:
            self.assertEqual(ended.stderr, b"")
        for device in self.archive.devices[:2]:
            disk = self.directory / device.raw_name.decode()
            self.assertEqual(sha256(disk), sha256(device.data))
        state = self.target / "vmstate.bin"
        self.assertEqual(sha256(state), sha256(self.archive.devices[2].data))
        return [*lines, *ended.stdout.decode().splitlines()]

    def check(self, lines: list[str]) -> None:
        sizes = [len(device.data) for device in self.archive.devices]
        self.assertEqual(
            lines[:5],
            [
                f"CFG: size: {len(CONFIG)} name: qemu-server.conf",
                "CFG: size: 0 name: qemu-server.fw",
                f"DEV: dev_id=1 size: {sizes[0]} devname: drive-scsi0",
                f"DEV: dev_id=2 size: {sizes[1]} devname: drive-efidisk0",
                f"VMSTATE: dev_id=3 memory: {sizes[2]}",
            ],
        )
        self.assertRegex(lines[5], r"\ACTIME: .*\d")
        kinds = [line.split(":")[0] for line in lines]
        self.assertEqual(kinds.count("CTIME"), 1)
        self.assertEqual(kinds.count("DEV"), 2)

    def test_without_an_option(self) -> None:
        """Seen: nothing was printed without -v, and a script that waited for the lines hung."""
        lines = self.drive()
        self.check(lines)
        self.assertEqual(len(lines), 6)

    def test_from_a_stream(self) -> None:
        self.check(self.drive(stream=True))

    def test_verbose(self) -> None:
        self.check(self.drive("-v"))

    def test_golden_archives(self) -> None:
        """The lines for each, and no other output; also where there is no device at all."""
        lines = self.file("map", b"done\n")
        for name, want in manifest().items():
            self.file("a.vma", golden(name))
            skips = "".join(f"skip={device['name']}\n" for device in want["devices"])
            lines.write_text(skips + "done\n", "utf-8")
            answer = call_tool(
                "extract", "-r", lines, self.directory / "a.vma", self.directory / name
            )
            with self.subTest(name):
                self.assertEqual((answer.returncode, answer.stderr), (0, b""))
                kinds = [line.split(":")[0] for line in answer.stdout.decode().splitlines()]
                states = [d for d in want["devices"] if d["name"] == "vmstate"]
                disks = len(want["devices"]) - len(states)
                expected = ["CFG"] * len(want["configs"]) + ["DEV"] * disks
                self.assertEqual(kinds, [*expected, *["VMSTATE"] * len(states), "CTIME"])

    def test_damaged(self) -> None:
        """A file is checked before anything is announced: no line leads to half a restore."""
        source = self.file("a.vma", self.data[:-1])
        lines = self.file("map", b"done\n")
        self.fails(3, "extract", "-r", lines, source, self.target)

    def test_names(self) -> None:
        """A name has no line feed that could make a line of its own."""
        config = "a\nDEV: dev_id=9 size: 1 devname: x"
        data = archives.build(Archive([], [(config, b"")]), [])
        source, lines = self.file("a.vma", data), self.file("map", b"done\n")
        answer = call_tool("extract", "-r", lines, source, self.target)
        self.assertEqual((answer.returncode, answer.stdout), (3, b""))


class Throttling(CheckedTest):
    """`throttling.*` and `cache=` may come in a map; one notice says that they are not applied."""

    def extract(self, options: str, count: int) -> list[str]:
        source = self.file("a.vma", golden("live-order"))
        lines = []
        for device in manifest()["live-order"]["devices"]:
            path = self.file(device["name"], b"\xff" * device["size"])
            lines.append(f"{options}1:{device['name']}={path}\n")
        path = self.file("map", "".join([*lines, "done\n"]).encode())
        target = self.directory / f"configs{len(options)}"
        notices = self.noticed("extract", "-r", path, source, target, count=count)
        for device in manifest()["live-order"]["devices"]:
            self.assertEqual(sha256(self.directory / device["name"]), device["sha256"])
        return notices

    def test_one_notice(self) -> None:
        """One for all disks."""
        options = "throttling.bps=1048576:throttling.group=drive-0:cache=writeback:"
        (line,) = self.extract(f"{options}format=raw:", 1)
        for word in ("throttling", "cache", "not applied"):
            self.assertIn(word, line)

    def test_one_kind(self) -> None:
        (line,) = self.extract("throttling.bps=1048576:throttling.group=local:", 1)
        self.assertIn("throttling", line)
        (line,) = self.extract("cache=none:", 1)
        self.assertIn("cache", line)

    def test_none(self) -> None:
        self.extract("format=raw:", 0)
        self.extract("", 0)


class Map(CheckedTest):
    """qmrestore needs a `#qmdump#map:` line in qemu-server.conf for each disk."""

    def setUp(self) -> None:
        super().setUp()
        self.disk = self.file("disk", b"\x55" * CLUSTER)
        self.archive = self.directory / "a.vma"

    def create(self, config: bytes, *args: Argument, count: int = 0) -> tuple[list[str], bytes]:
        """Create an archive with three disks; return the notices and its qemu-server.conf."""
        self.archive.unlink(missing_ok=True)
        path = self.file("qemu-server.conf", config)
        names = ("drive-scsi0", "drive-virtio1", "drive-tpmstate0-backup", "vmstate")
        disks = [f"{name}={self.disk}" for name in names]
        notices = self.noticed("create", "-c", path, *args, self.archive, *disks, count=count)
        self.assertEqual(path.read_bytes(), config)
        return notices, call_tool("config", self.archive).stdout

    def test_notice(self) -> None:
        """It names the devices, and the option; the config stays as it is."""
        (line,), config = self.create(CONFIG, count=1)
        self.assertEqual(config, CONFIG)
        for word in ("drive-scsi0", "drive-virtio1", "drive-tpmstate0-backup", "--map"):
            self.assertIn(word, line)
        self.assertNotIn("vmstate", line)

    def test_notice_for_some(self) -> None:
        text = CONFIG + b"#qmdump#map:scsi0:drive-scsi0:local-lvm:raw:\n"
        (line,), config = self.create(text, count=1)
        self.assertEqual(config, text)
        self.assertNotIn("drive-scsi0", line)
        self.assertIn("drive-virtio1", line)

    def test_no_notice(self) -> None:
        """Where each disk has its line, and where there is no such config."""
        text = CONFIG + (
            b"#qmdump#map:scsi0:drive-scsi0:local-lvm:raw:\n"
            b"#qmdump#map:virtio1:drive-virtio1::qcow2:\n"
            b"#qmdump#map:tpmstate0:drive-tpmstate0-backup:local:raw:\n"
        )
        _, config = self.create(text)
        self.assertEqual(config, text)
        # nor does --map add anything to that
        _, config = self.create(text, "--map", "other")
        self.assertEqual(config, text)

    def mapped(self, storage: str) -> bytes:
        return (
            f"#qmdump#map:scsi0:drive-scsi0:{storage}:raw:\n"
            f"#qmdump#map:virtio1:drive-virtio1:{storage}:raw:\n"
            f"#qmdump#map:tpmstate0:drive-tpmstate0-backup:{storage}:raw:\n"
        ).encode()

    def test_map(self) -> None:
        """--map appends the missing lines, and there is nothing left to notice."""
        for storage in ("local-lvm", ""):
            _, config = self.create(CONFIG, "--map", storage)
            self.assertEqual(config, CONFIG + self.mapped(storage))

    def test_map_for_some(self) -> None:
        text = CONFIG + b"#qmdump#map:virtio1:drive-virtio1:ceph:raw:\n"
        _, config = self.create(text, "--map", "local")
        want = [line for line in self.mapped("local").splitlines(True) if b"virtio1" not in line]
        self.assertEqual(config, text + b"".join(want))

    def test_config_without_a_last_line_feed(self) -> None:
        _, config = self.create(b"cores: 2", "--map", "local")
        self.assertEqual(config, b"cores: 2\n" + self.mapped("local"))

    def test_qmrestore_reads_them(self) -> None:
        """With the expression that qmrestore has for them."""
        _, config = self.create(CONFIG, "--map", "")
        found = re.findall(rb"^\#qmdump\#map:(\S+):(\S+):(\S*):(\S*):$", config, re.MULTILINE)
        self.assertEqual(
            found,
            [
                (b"scsi0", b"drive-scsi0", b"", b"raw"),
                (b"virtio1", b"drive-virtio1", b"", b"raw"),
                (b"tpmstate0", b"drive-tpmstate0-backup", b"", b"raw"),
            ],
        )

    def test_pack(self) -> None:
        """What unpack wrote of an archive of `vma create` has none of the lines."""
        source, target = self.file("b.vma", golden("three-disks")), self.directory / "dir"
        self.ok("unpack", source, target)
        (line,) = self.noticed("pack", target, self.archive)
        for device in manifest()["three-disks"]["devices"]:
            self.assertIn(device["name"], line)
        want = manifest()["three-disks"]["optimized_sha256"]["512K"]
        self.assertEqual(sha256(self.archive), want)
        self.noticed("pack", "--force", "--map", "local", target, self.archive, count=0)
        config = call_tool("config", self.archive).stdout.decode()
        for key, name in (
            ("efidisk0", "drive-efidisk0"),
            ("scsi0", "drive-scsi0"),
            ("tpmstate0", "drive-tpmstate0-backup"),
        ):
            self.assertIn(f"\n#qmdump#map:{key}:{name}:local:raw:\n", config)
        self.ok("verify", self.archive)

    def test_lines_that_qmrestore_does_not_read(self) -> None:
        """They only look like it."""
        for line in (
            b"#vzdump#map:scsi0:drive-scsi0:local:raw:\n",
            b" #qmdump#map:scsi0:drive-scsi0:local:raw:\n",
            b"#qmdump#map:scsi0:drive-scsi0:local:raw\n",
            b"#qmdump#map:scsi0:drive-scsi0:local:raw: \n",
            b"#qmdump#map:scsi0:drive-scsi0:local:raw:\r\n",
            b"#qmdump#map:scsi0:drive-scsi0-old:local:raw:\n",
        ):
            (notice,), _ = self.create(CONFIG + line, count=1)
            self.assertIn("'drive-scsi0'", notice)

    def test_long_line(self) -> None:
        """A config that is made to be hard to read takes no time."""
        start = time.monotonic()
        self.create(b"#qmdump#map:" + b"a:" * 30000 + b"a", count=1)
        self.assertLess(time.monotonic() - start, 5)

    def test_bad_storage(self) -> None:
        """A storage that would break the line is refused."""
        path = self.file("qemu-server.conf", CONFIG)
        for storage in ("a:b", "a b", "a\nb"):
            answer = call_tool(
                "create", "-c", path, "--map", storage, self.archive, f"drive-scsi0={self.disk}"
            )
            self.assertIn(answer.returncode, (1, 2), storage)
            self.assertFalse(self.archive.exists())

    def test_no_config(self) -> None:
        """Without a qemu-server.conf nothing is restored by qmrestore, and nothing is noticed."""
        self.noticed("create", self.archive, f"drive-scsi0={self.disk}", count=0)

    def test_quiet(self) -> None:
        path = self.file("qemu-server.conf", CONFIG)
        self.noticed("create", "-q", "-c", path, self.archive, f"drive-scsi0={self.disk}", count=0)


class Leftovers(CheckedTest):
    """A file that a killed run left is mentioned by the next run there; one in use is not."""

    def setUp(self) -> None:
        super().setUp()
        self.data = golden("live-order")
        self.source = self.file("a.vma", self.data)

    def killed(self, *args: Argument) -> list[Path]:
        """Kill a run that writes; return the partial files and directories that it leaves."""
        before = set(self.partial_files())
        child = self.writing(*args)
        child.process.kill()
        child.end()
        left = [path for path in self.partial_files() if path not in before]
        self.assertTrue(left)
        return left

    def writing(self, *args: Argument) -> Child:
        """Return a run that has begun to write, and waits for more of its input."""
        before = set(self.partial_files())
        child = self.start(*args, stdin=subprocess.PIPE)
        pipe = child.process.stdin
        assert pipe
        pipe.write(self.data[:-CLUSTER])
        pipe.flush()
        wait_for(lambda: set(self.partial_files()) - before)
        return child

    def test_mentioned(self) -> None:
        """Once, by its name; the run itself succeeds, and the file stays."""
        (left,) = self.killed("optimize", "-", self.directory / "b.vma")
        (line,) = self.noticed("optimize", self.source, self.directory / "b.vma")
        self.assertIn(left.name, line)
        (line,) = self.noticed("optimize", self.source)
        self.assertIn(left.name, line)
        disk = self.directory / "disk"
        (line,) = self.noticed("extract", "-d", "drive-scsi0", "-o", disk, self.source)
        self.assertIn(left.name, line)
        self.assertTrue(left.exists())
        left.unlink()
        self.noticed("optimize", "--align", "4K", self.source, count=0)

    def test_target_that_is_not_empty(self) -> None:
        """extract wants an empty directory: the notice says what is in the way."""
        target = self.directory / "dir"
        left = self.killed("extract", "-", target)
        answer = call_tool("extract", self.source, target)
        self.assertEqual(answer.returncode, 1)
        notice, error = answer.stderr.decode().splitlines()
        self.assertIn(left[0].name, notice)
        self.assertIn(str(target), error)

    def test_not_mentioned_elsewhere(self) -> None:
        self.killed("optimize", "-", self.directory / "b.vma")
        other = self.directory / "other"
        other.mkdir()
        self.noticed("optimize", self.source, other / "b.vma", count=0)
        self.noticed("verify", self.source, count=0)

    def test_of_a_run_that_goes_on(self) -> None:
        """It is held by a lock while it is written, so that nobody removes it."""
        child = self.writing("optimize", "-", self.directory / "b.vma")
        self.noticed("optimize", self.source, self.directory / "c.vma", count=0)
        pipe = child.process.stdin
        assert pipe
        pipe.write(self.data[-CLUSTER:])
        pipe.close()
        child.process.stdin = None
        self.assertEqual(child.answer().returncode, 0)
        self.assertEqual(sha256(self.directory / "b.vma"), sha256(self.directory / "c.vma"))

    def test_of_a_directory(self) -> None:
        """What unpack was making when it was killed: one line, also where it is several files."""
        target = self.directory / "dir"
        for make_it in (False, True):  # a new directory, and one that is there
            with self.subTest(there=make_it):
                if make_it:
                    target.mkdir()
                left = self.killed("unpack", "-", target)
                (line,) = self.noticed("unpack", self.source, target)
                self.assertTrue(any(path.name in line for path in left), line)
                for path in left:
                    if path.exists():
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                shutil.rmtree(target)

    def test_quiet(self) -> None:
        self.killed("optimize", "-", self.directory / "b.vma")
        self.noticed("optimize", "-q", self.source, self.directory / "b.vma", count=0)

    def test_name_of_others(self) -> None:
        """Files that only look alike are none of ours."""
        for name in ("vma-tool.partial", "x.partial", "vma-tool-x.partial.txt"):
            self.file(name, b"")
        self.noticed("optimize", self.source, self.directory / "b.vma", count=0)
