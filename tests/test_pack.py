"""pack: an archive of what unpack wrote, or of files that are named like that."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

from tests import archives
from tests.archives import CLUSTER, MIB, Archive, Device
from tests.faults import forked
from tests.support import (
    FEW,
    Argument,
    ToolTest,
    call_tool,
    golden,
    loop_device,
    manifest,
    run_measured,
    sha256,
    snapshot,
)

CONF = "qemu-server.conf"


class PackTest(ToolTest):
    """A test with a directory to pack."""

    def setUp(self) -> None:
        super().setUp()
        self.source = self.directory / "dir"
        self.source.mkdir()
        self.output = self.directory / "out.vma"

    def put(self, **files: bytes) -> None:
        """Write files into the directory; in their names, __ stands for a dot and _ for a dash."""
        for name, data in files.items():
            (self.source / name.replace("__", ".").replace("_", "-")).write_bytes(data)

    def pack(self, *args: Argument, notice: str = "") -> archives.Parsed:
        """Pack the directory, and return what an independent reader finds in the archive."""
        quiet = [] if notice else ["-q"]
        args = (*quiet, "--force", *args, self.source, self.output)
        self.assertEqual(self.ok("pack", *args, notice=notice), "")
        return archives.parse(self.output.read_bytes())

    def refuse(self, *says: str, args: list[str] | None = None) -> None:
        """Check that the directory is not packed, with one line that says all of this."""
        before = snapshot(self.directory)
        line = self.refused("pack", *(args or []), self.source, self.output, says=says)
        self.assertTrue(line.rstrip("\n").isprintable(), line)
        self.assertEqual(snapshot(self.directory), before)


class WithDescription(PackTest):
    """A directory with the vma.json that unpack wrote."""

    def describe(self, **changes: Any) -> None:
        """Write a vma.json for the config and the disk that are there, with some changes."""
        self.put(a__conf=b"text", drive_scsi0=b"x" * 1024)
        value: dict[str, Any] = {
            "format": 1,
            "ctime": 7,
            "configs": ["a.conf"],
            "devices": [{"dev_id": 1, "name": "drive-scsi0", "size": 1024}],
        }
        value.update(changes)
        (self.source / "vma.json").write_text(json.dumps(value), encoding="utf-8")

    def test_golden_archives(self) -> None:
        """pack makes of what unpack wrote the bytes that optimize makes, for each alignment.

        Except where the archive stores zero blocks: files cannot say that.
        """
        archive = self.directory / "a.vma"
        for name, want in manifest().items():
            archive.write_bytes(golden(name))
            target = self.directory / name
            self.ok("unpack", archive, target)
            for align, digest in want["optimized_sha256"].items():
                with self.subTest(archive=name, align=align):
                    self.ok("pack", "-q", "--force", "--align", align, target, self.output)
                    data = self.output.read_bytes()
                    if name not in ("legal-oddities", "full-mask"):
                        self.assertEqual(sha256(data), digest)
                    archive_again = archives.parse(golden(name)).archive
                    size = archives.ALIGNS[align]
                    self.assertEqual(sha256(data), sha256(archives.canonical(archive_again, size)))
                    self.check_ok(answer := call_tool("pack", "-q", "--align", align, target, "-"))
                    self.assertEqual(answer.stdout, data)

    def test_random_archives(self) -> None:
        """Any disks, with any dev_ids, and a vmstate that is longer than its size."""
        for seed in range(0, 15, FEW):
            rng = random.Random(seed)
            ids = rng.sample(range(1, 255), 4)
            sizes = [512, 3584, 4608, CLUSTER, 59 * CLUSTER, rng.randrange(512, 40 * CLUSTER, 512)]
            disks = [
                Device(dev_id, f"drive-scsi{dev_id}", archives.disk(rng, rng.choice(sizes)))
                for dev_id in sorted(ids[:3])
            ]
            vmstate = archives.disk(rng, rng.randint(1, 3) * CLUSTER, "sparse")
            devices = sorted(
                [*disks, Device(ids[3], "vmstate", vmstate, rng.randrange(512, CLUSTER, 512))],
                key=lambda device: device.dev_id,
            )
            archive = Archive(devices, [("b.conf", b"\0"), ("a.conf", b"")], ctime=-seed)
            align = rng.choice(list(archives.ALIGNS))
            with self.subTest(seed=seed, align=align):
                data = archives.build(archive, archives.shuffled(archive, rng))
                target = self.directory / f"{seed}"
                self.ok("unpack", self.file("a.vma", data), target)
                self.ok("pack", "-q", "--force", "--align", align, target, self.output)
                want = archives.canonical(archive, archives.ALIGNS[align])
                self.assertEqual(sha256(self.output), sha256(want))

    def test_changed_file(self) -> None:
        """A config may have another length, a disk other content of the same size."""
        self.describe()
        self.put(a__conf=b"a longer text", drive_scsi0=b"y" * 1024)
        parsed = self.pack()
        self.assertEqual(parsed.configs, {"a.conf": b"a longer text"})
        self.assertEqual(parsed.disks, {"drive-scsi0": b"y" * 1024})
        self.assertEqual(parsed.archive.ctime, 7)

    def test_missing_file(self) -> None:
        for name in ("a.conf", "drive-scsi0"):
            with self.subTest(name):
                self.describe()
                (self.source / name).unlink()
                self.refuse(str(self.source / name), "No such file or directory")

    def test_disk_of_another_size(self) -> None:
        for size in (0, 512, 1023, 1025, 4096, CLUSTER):
            with self.subTest(size=size):
                self.describe()
                self.put(drive_scsi0=b"x" * size)
                self.refuse("drive-scsi0", f"{size} bytes, expected 1024 as")

    def test_vmstate_of_another_size(self) -> None:
        """A vmstate may be longer than its size says, if it is whole clusters."""
        devices = [{"dev_id": 1, "name": "vmstate", "size": 1024}]
        for size, good in (
            (1024, True), (CLUSTER, True), (2 * CLUSTER, True), (0, False), (512, False),
            (1025, False), (CLUSTER + 512, False),
        ):  # fmt: skip
            with self.subTest(size=size):
                self.describe(devices=devices)
                (self.source / "drive-scsi0").unlink()
                self.put(vmstate=b"x" * size)
                if good:
                    parsed = self.pack()
                    self.assertEqual(parsed.archive.devices[0].size, 1024)
                    self.assertEqual(parsed.disks["vmstate"].rstrip(b"\0"), b"x" * size)
                    self.output.unlink()
                else:
                    self.refuse("vmstate", f"{size} bytes, expected 1024 as")

    def test_file_that_is_not_listed(self) -> None:
        """A file that vma.json does not list is not silently left out."""
        for name in ("notes.txt", "b.conf", "drive-scsi1", ".hidden"):
            with self.subTest(name):
                self.describe()
                extra = self.source / name
                extra.write_bytes(b"")
                self.refuse(str(extra))
                extra.unlink()

    def test_order_of_configs(self) -> None:
        """It is the one that vma.json says."""
        self.describe(configs=["z.conf", "a.conf"])
        self.put(z__conf=b"")
        self.assertEqual([name for name, _ in self.pack().archive.configs], ["z.conf", "a.conf"])

    def test_bad_descriptions(self) -> None:
        """vma.json may come from anywhere: what is wrong in it is one line, and no more."""
        disk = {"dev_id": 1, "name": "drive-scsi0", "size": 1024}
        outside = self.file("outside", b"secret" * 100)
        table: dict[str, dict[str, Any]] = {
            "another format": {"format": 2},
            "a format that is text": {"format": "1"},
            "no ctime": {"ctime": None},
            "a ctime that is text": {"ctime": "7"},
            "a ctime that is no integer": {"ctime": 7.5},
            "a ctime of more than 64 bits": {"ctime": 1 << 63},
            "configs that are no list": {"configs": 5},
            "a config that is no text": {"configs": [5]},
            "a config twice": {"configs": ["a.conf", "a.conf"]},
            "a config outside": {"configs": ["a.conf", "../outside"]},
            "an absolute config": {"configs": ["a.conf", str(outside)]},
            "a config that is a directory": {"configs": ["a.conf", "."]},
            "a config name that no file has": {"configs": ["a.conf", "\ud800"]},
            "a config name with NUL": {"configs": ["a.conf", "\0"]},
            "257 configs": {"configs": [f"{n}.conf" for n in range(257)]},
            "devices that are no list": {"devices": {"dev_id": 1}},
            "a device without a name": {"devices": [{"dev_id": 1, "size": 1024}]},
            "a device without a size": {"devices": [{"dev_id": 1, "name": "drive-scsi0"}]},
            "dev_id 0": {"devices": [{**disk, "dev_id": 0}]},
            "dev_id 255": {"devices": [{**disk, "dev_id": 255}]},
            "dev_id -1": {"devices": [{**disk, "dev_id": -1}]},
            "a dev_id that is text": {"devices": [{**disk, "dev_id": "1"}]},
            "a dev_id that is true": {"devices": [{**disk, "dev_id": True}]},
            "a dev_id twice": {"devices": [disk, {**disk, "name": "vmstate"}]},
            "a device twice": {"devices": [disk, {**disk, "dev_id": 2}]},
            "a device outside": {"devices": [{**disk, "name": "../outside"}]},
            "a device of negative size": {"devices": [{**disk, "size": -1}]},
            "a vmstate of negative size": {"devices": [{**disk, "name": "vmstate", "size": -1}]},
            "a vmstate of size 0": {"devices": [{**disk, "name": "vmstate", "size": 0}]},
            "a device of 2^70 bytes": {"devices": [{**disk, "size": 1 << 70}]},
            "a size that is no integer": {"devices": [{**disk, "size": 1024.0}]},
            "a device name that no file has": {"devices": [{**disk, "name": "\udfff"}]},
            "a device name that is too long": {"devices": [{**disk, "name": "x" * 256}]},
            "a device that is a list": {"devices": [[1, 2, 3]]},
            "a format for a terminal": {"format": "\x1b[2J"},
        }
        for what, changes in table.items():
            with self.subTest(what):
                self.describe(**changes)
                if "vmstate" in what:
                    self.put(vmstate=b"x" * CLUSTER)
                    (self.source / "drive-scsi0").unlink()
                for n in range(257) if what == "257 configs" else ():
                    (self.source / f"{n}.conf").write_bytes(b"")
                if what == "257 configs":
                    (self.source / "a.conf").unlink()
                self.refuse()
                for path in self.source.iterdir():
                    path.unlink()

    def test_descriptions_that_are_no_json(self) -> None:
        for what, text in {
            "empty": b"",
            "text": b"hello",
            "cut": b'{"format": 1',
            "list": b"[]",
            "number": b"1",
            "null": b"null",
            "no UTF-8": b'{"format": "\xff"}',
            "deep": b"[" * 100000,
            "deep objects": b'{"a":' * 100000,
            "NaN": b'{"format": NaN}',
            "large": b" " * (64 * MIB),
            "long number": b"1" * 5000,
        }.items():
            with self.subTest(what):
                self.describe()
                self.put(vma__json=text)
                self.refuse("vma.json")

    def test_names_that_meet(self) -> None:
        """What pack takes, unpack takes."""
        # Two texts for the same bytes
        other = "é.conf".encode().decode("ascii", "surrogateescape")
        device = {"dev_id": 1, "name": "same", "size": 512}
        for configs, devices, says in (
            (["é.conf", other], [], "occurs twice"),
            (["same"], [device], "two files would be called 'same'"),
            (["vma.json"], [device], "two files would be called 'vma.json'"),
        ):
            for name in configs or ["same"]:
                (self.source / name).write_bytes(b"x" * 512)
            value = {"format": 1, "ctime": 5, "configs": configs, "devices": devices}
            (self.source / "vma.json").write_text(json.dumps(value))
            self.refuse(says)


class WithoutDescription(PackTest):
    """A directory without vma.json: the names say what the files are."""

    def test_names(self) -> None:
        """Configs by suffix, devices by prefix, in natural order, the RAM state last."""
        self.put(
            qemu_server__conf=b"cores: 1\n", qemu_server__fw=b"[OPTIONS]\n",
            drive_scsi10=b"a" * 512, drive_scsi2=b"b" * 512, drive_efidisk0=b"c" * 1024,
            disk_drive_scsi9__raw=b"d" * 512, disk_x__raw=b"e" * 512, vmstate=b"f" * CLUSTER,
        )  # fmt: skip
        start = int(time.time())
        parsed = self.pack()
        self.assertEqual(
            [(d.dev_id, d.name, d.data[:1]) for d in parsed.archive.devices],
            [
                (1, "drive-efidisk0", b"c"), (2, "drive-scsi2", b"b"), (3, "drive-scsi9", b"d"),
                (4, "drive-scsi10", b"a"), (5, "x", b"e"), (6, "vmstate", b"f"),
            ],
        )  # fmt: skip
        self.assertEqual(
            parsed.archive.configs, [(CONF, b"cores: 1\n"), ("qemu-server.fw", b"[OPTIONS]\n")]
        )
        self.assertLessEqual(start, parsed.archive.ctime)
        self.assertLessEqual(parsed.archive.ctime, int(time.time()))
        self.assertEqual(
            sha256(self.output), sha256(archives.canonical(parsed.archive, stored=parsed.masks))
        )

    def test_natural_order(self) -> None:
        names = ["drive-ide0", "drive-sata1", "drive-scsi0", "drive-scsi2", "drive-scsi10",
                 "drive-scsi100", "drive-virtio1", "drive-virtio01", "drive-virtio11"]  # fmt: skip
        for name in random.Random(1).sample(names, len(names)):
            (self.source / name).write_bytes(b"x" * 512)
        found = [device.name for device in self.pack().archive.devices]
        self.assertEqual(found[:6], names[:6])
        self.assertEqual(set(found[6:8]), {"drive-virtio1", "drive-virtio01"})
        self.assertEqual(found[8], "drive-virtio11")

    def test_what_extract_wrote(self) -> None:
        """The disks and configs of an extracted archive come back."""
        path = self.file("a.vma", golden("vmstate"))
        self.ok("extract", path, self.source)
        parsed = self.pack()
        want = {d["name"]: d["sha256"] for d in manifest()["vmstate"]["devices"]}
        self.assertEqual({name: sha256(data) for name, data in parsed.disks.items()}, want)

    def test_files_that_say_nothing(self) -> None:
        """Any other file is an error that names it."""
        self.put(qemu_server__conf=b"", drive_scsi0=b"x" * 512)
        for name in (
            "notes.txt",
            "disk-x",
            "x.raw",
            "scsi0",
            ".hidden",
            "a\nb",
            "disk.raw",
            "lost",
        ):
            with self.subTest(name):
                extra = self.source / name
                extra.write_bytes(b"x" * 512)
                self.refuse(str(self.source), name.replace("\n", "\\n"))
                extra.unlink()
        (self.source / "lost+found").mkdir()
        self.refuse("lost+found")

    def test_two_files_for_one_device(self) -> None:
        for one, two in (
            ("drive-scsi0", "disk-drive-scsi0.raw"), ("vmstate", "vmstate.bin"),
            ("vmstate", "disk-vmstate.raw"),
        ):  # fmt: skip
            with self.subTest(one):
                for name in (one, two):
                    (self.source / name).write_bytes(b"x" * CLUSTER)
                self.refuse("a second file for device '")
                for name in (one, two):
                    (self.source / name).unlink()

    def test_odd_sizes(self) -> None:
        """A size that is no multiple of 512 is rounded up, as Proxmox does, with a notice."""
        for size, rounded in ((1, 512), (511, 512), (513, 1024), (4097, 4608), (65537, 66048)):
            with self.subTest(size=size):
                self.put(drive_scsi0=b"x" * size)
                path = self.source / "drive-scsi0"
                text = f"{size} bytes, rounded up to {rounded}, as disks have whole sectors"
                notice = f"vma-tool: {path}: {text}\n"
                parsed = self.pack(notice=notice)
                self.assertEqual(parsed.disks["drive-scsi0"], (b"x" * size).ljust(rounded, b"\0"))
                self.pack("-q")
        self.put(drive_scsi0=b"x" * 512)
        self.pack()

    def test_empty_disk(self) -> None:
        self.put(drive_scsi0=b"")
        self.refuse("drive-scsi0", "empty")

    def test_limits(self) -> None:
        """What the format has no room for is refused: more devices, more or longer configs."""
        for count, good in ((254, True), (255, False), (256, False), (300, False)):
            for n in range(count):
                (self.source / f"drive-scsi{n}").write_bytes(b"x" * 512)
            with self.subTest(devices=count):
                if good:
                    self.assertEqual(len(self.pack().archive.devices), count)
                    self.output.unlink()
                else:
                    self.refuse("device")
        for path in self.source.iterdir():
            path.unlink()
        for count, good in ((256, True), (257, False), (300, False)):
            for n in range(count):
                (self.source / f"{n}.conf").write_bytes(b"%d" % n)
            with self.subTest(configs=count):
                if good:
                    self.assertEqual(len(self.pack().configs), count)
                    self.output.unlink()
                else:
                    self.refuse("config")
        for path in self.source.iterdir():
            path.unlink()
        self.put(a__conf=b"#" * 65535)
        self.pack()
        self.output.unlink()
        self.put(a__conf=b"#" * 65536)
        self.refuse("a.conf", "65535 bytes")

    def test_directory_that_cannot_be(self) -> None:
        self.file("file", b"")
        for name, message in (
            ("missing", "No such file or directory"),
            ("file", "Not a directory"),
        ):
            with self.subTest(name):
                self.refused("pack", self.directory / name, self.output, says=[message])

    def test_empty_directory(self) -> None:
        """An archive of nothing would restore nothing: that is a mistake."""
        self.refuse(str(self.source))


class Files(PackTest):
    """What may be a disk, and how it is read."""

    def test_zeros_and_holes(self) -> None:
        """Neither is stored, blocks that hold one byte are; wherever the data begins and ends."""
        content = bytearray(200 * CLUSTER)
        for offset in (
            0,
            4095,
            9 * CLUSTER,
            10 * CLUSTER - 1,
            20 * CLUSTER + 4096,
            200 * CLUSTER - 1,
        ):
            content[offset] = 1
        content[30 * CLUSTER : 33 * CLUSTER] = b"x" * (3 * CLUSTER)
        path = self.source / "drive-scsi0"
        want: dict[int, int] = {
            0: 1,
            9: 0x8001,
            20: 2,
            30: 0xFFFF,
            31: 0xFFFF,
            32: 0xFFFF,
            199: 0x8000,
        }
        for what in ("written zeros", "holes"):
            with self.subTest(what):
                path.unlink(missing_ok=True)
                with open(path, "wb") as file:
                    for cluster in range(200):
                        data = content[cluster * CLUSTER : (cluster + 1) * CLUSTER]
                        if what == "holes" and not any(data):
                            file.seek(CLUSTER, os.SEEK_CUR)
                        else:
                            file.write(data)
                parsed = self.pack("--align", "4K")
                found = {num: mask for (_, num), mask in parsed.masks.items() if mask}
                self.assertEqual(found, want)
                self.assertEqual(parsed.disks["drive-scsi0"], content)

    def test_large_sparse_file(self) -> None:
        """Holes are skipped, not read: 64 GiB take a moment, and little memory."""
        with open(self.source / "drive-scsi0", "wb") as file:
            for offset in (0, 12345 * CLUSTER, (64 << 30) - 4096):
                file.seek(offset)
                file.write(b"x" * 4096)
        start = time.monotonic()
        answer, peak = run_measured("pack", "--align", "4K", self.source, self.output)
        self.check_ok(answer)
        self.assertLess(time.monotonic() - start, 30)
        self.assertLess(peak, 96 * MIB)
        size = (64 << 30) // (8 * CLUSTER) * 512 + MIB  # a header for each 512 KiB
        self.assertLess(self.output.stat().st_size, size)
        self.assertLess(self.output.stat().st_blocks * 512, size)
        self.assertIn("64.0 GiB, 12.0 KiB stored", self.ok("verify", self.output))

    def test_symbolic_link(self) -> None:
        """A disk or config may be a link to a file elsewhere."""
        disk, config = self.file("disk.img", b"x" * 1024), self.file("text", b"cores: 1\n")
        (self.source / "drive-scsi0").symlink_to(disk)
        (self.source / CONF).symlink_to(config)
        parsed = self.pack()
        self.assertEqual(parsed.disks, {"drive-scsi0": b"x" * 1024})
        self.assertEqual(parsed.configs, {CONF: b"cores: 1\n"})

    def test_block_device(self) -> None:
        """A block device's size is found by seeking; it is a link in the directory, or itself."""
        content = archives.disk(random.Random(3), 3 * MIB + 512, "sparse")
        device = loop_device(self, self.file("disk.img", content))
        (self.source / "drive-scsi0").symlink_to(device)
        self.assertEqual(sha256(self.pack().disks["drive-scsi0"]), sha256(content))
        described = {
            "format": 1,
            "ctime": 7,
            "configs": [],
            "devices": [{"dev_id": 1, "name": "drive-scsi0", "size": len(content)}],
        }
        self.put(vma__json=json.dumps(described).encode())
        self.assertEqual(sha256(self.pack().disks["drive-scsi0"]), sha256(content))

    def make_odd(self, path: Path, kind: str) -> None:
        """Put something that is no file under a path."""
        path.unlink(missing_ok=True)
        if kind == "directory":
            path.mkdir()
        elif kind == "FIFO":
            os.mkfifo(path)
        else:
            path.symlink_to(path if kind == "loop" else kind)

    def test_what_is_no_file(self) -> None:
        """It is refused at once, where it could keep the tool waiting for good."""
        archive = self.file("a.vma", golden("three-disks"))
        for described in (False, True):
            for name in ("drive-scsi0", CONF, "vma.json"):
                for kind in ("directory", "FIFO", "/dev/zero", "/dev/tty", "loop", "missing"):
                    with self.subTest(name, kind=kind, described=described):
                        shutil.rmtree(self.source)
                        self.ok("unpack" if described else "extract", archive, self.source)
                        path = self.source / name
                        self.make_odd(path, kind)
                        # in a child, which a hang ends
                        answer = forked(
                            functools.partial(call_tool, "pack", self.source, self.output)
                        )
                        self.check_error(answer, *([] if kind == "loop" else [str(path)]))
                        self.assertFalse(self.output.exists())

    def test_existing_output(self) -> None:
        """With --force it is replaced by a complete archive, and only by one."""
        self.put(drive_scsi0=b"x" * 512)
        self.output.write_bytes(b"old")
        self.refuse("out.vma: File exists: --force")
        self.put(notes__txt=b"")
        self.refuse("notes.txt", args=["--force"])
        self.assertEqual(self.output.read_bytes(), b"old")
        (self.source / "notes.txt").unlink()
        self.assertEqual(self.pack().disks, {"drive-scsi0": b"x" * 512})

    def test_verifies(self) -> None:
        self.put(qemu_server__conf=b"cores: 1\n", drive_scsi0=b"x" * (3 * CLUSTER))
        for align in archives.ALIGNS:
            with self.subTest(align=align):
                self.pack("--align", align)
                self.assertIn(f"canonical (--align {align})", self.ok("verify", self.output))


class Options(PackTest):
    """-u changes a line of qemu-server.conf."""

    TEXT = (
        b"# a: comment\n#name: old\nboot: order=scsi0\nname: web1\nnet0: virtio=AA,bridge=vmbr0\n"
        b"\n[snap1]\nname: web1\nparent: x\n\n[PENDING]\nname: web3\n"
    )

    def changed(self, text: bytes, *options: str) -> bytes:
        """Pack a directory with this configuration, and return the one in the archive."""
        self.put(qemu_server__conf=text, drive_scsi0=b"x" * 512)
        args = [arg for option in options for arg in ("-u", option)]
        data = self.pack(*args).configs[CONF]
        self.assertEqual((self.source / CONF).read_bytes(), text)
        return data

    def test_replace(self) -> None:
        """Only the line in the main section changes; not comments, snapshots, pending changes."""
        want = self.TEXT.replace(b"\nname: web1\nnet0", b"\nname: web2\nnet0")
        self.assertEqual(self.changed(self.TEXT, "name=web2"), want)

    def test_add(self) -> None:
        """A new line comes at the end of the main section, in front of the blank line."""
        want = self.TEXT.replace(b"\n\n[snap1]", b"\ncores: 4\n\n[snap1]")
        self.assertEqual(self.changed(self.TEXT, "cores=4"), want)

    def test_table(self) -> None:
        for what, text, options, want in (
            ("nothing there", b"", ["a=1"], b"a: 1\n"),
            ("no line end", b"b: 2", ["a=1"], b"b: 2\na: 1\n"),
            ("no line end, replaced", b"a: 2", ["a=1"], b"a: 1\n"),
            ("sections only", b"[snap]\na: 2\n", ["a=1"], b"a: 1\n[snap]\na: 2\n"),
            ("several", b"a: 2\nb: 2\n", ["b=1", "a=1", "c=1"], b"a: 1\nb: 1\nc: 1\n"),
            ("the last one counts", b"a: 2\n", ["a=1", "a=3"], b"a: 3\n"),
            ("value with = and :", b"a: 2\n", ["a=x=1:2,y"], b"a: x=1:2,y\n"),
            ("empty value", b"a: 2\n", ["a="], b"a: \n"),
            ("a longer key", b"ab: 2\n", ["a=1"], b"ab: 2\na: 1\n"),
            ("a shorter key", b"a: 2\n", ["ab=1"], b"a: 2\nab: 1\n"),
            ("key only in a value", b"b: a: 2\n", ["a=1"], b"b: a: 2\na: 1\n"),
            ("key only in a comment", b"#a: 2\n", ["a=1"], b"#a: 2\na: 1\n"),
            ("spaces", b"a:   2\nb:3\n", ["a=1", "b=1"], b"a: 1\nb: 1\n"),
            ("not ASCII", "n: ü\nm: 1\n".encode(), ["m=ä"], "n: ü\nm: ä\n".encode()),
            ("not UTF-8", b"n: \xff\nm: 1\n", ["m=2"], b"n: \xff\nm: 2\n"),
            ("no options", b"a: 1\r\nb", [], b"a: 1\r\nb"),
        ):
            with self.subTest(what):
                self.assertEqual(self.changed(text, *options), want)

    def test_with_description(self) -> None:
        """-u works on what unpack wrote just as well."""
        archive = self.file("a.vma", golden("three-disks"))
        self.ok("unpack", archive, self.source)
        before = (self.source / CONF).read_bytes()
        parsed = self.pack("-u", "name=web2")
        self.assertIn(b"name: web2\n", parsed.configs[CONF])
        self.assertEqual((self.source / CONF).read_bytes(), before)
        others = {name: sha256(data) for name, data in parsed.disks.items()}
        want = {d["name"]: d["sha256"] for d in manifest()["three-disks"]["devices"]}
        self.assertEqual(others, want)

    def test_no_configuration(self) -> None:
        """Without a qemu-server.conf there is nothing to change."""
        self.put(drive_scsi0=b"x" * 512, other__conf=b"a: 1\n")
        self.refuse(CONF, args=["-u", "a=1"])

    def test_too_long(self) -> None:
        """A configuration that outgrows the format is an error."""
        self.put(qemu_server__conf=b"#" * 65530 + b"\n", drive_scsi0=b"x" * 512)
        self.refuse(args=["-q", "-u", "a=123456"])

    def test_usage(self) -> None:
        """What is not KEY=VALUE on one line is wrong usage."""
        self.put(qemu_server__conf=b"", drive_scsi0=b"x" * 512)
        for option in (
            "a",
            "=1",
            "",
            "a b=1",
            "a:b=1",
            "[a=1",
            "#a=1",
            "a=1\nb: 2",
            "a\n=1",
            "a=1\r",
        ):
            with self.subTest(option):
                answer = call_tool("pack", "-u", option, self.source, self.output)
                self.assertEqual(answer.returncode, 2)
                self.assertFalse(self.output.exists())
        self.assertEqual(call_tool("pack", self.source).returncode, 2)

    def test_set_twice(self) -> None:
        """Of two equal lines the last one counts, so that none may stay."""
        text = b"name: a\ncores: 2\nname: b\n[snap]\nname: c\n"
        want = b"name: web\ncores: 2\n[snap]\nname: c\n"
        self.assertEqual(self.changed(text, "name=web"), want)
