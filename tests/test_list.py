"""list: what an archive holds, from its header alone or with --scan, for people and for scripts."""

from __future__ import annotations

import itertools
import json
import random
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests import archives
from tests.archives import Archive, Device
from tests.damage import device_damages, extents, good, good_archive, header_damages
from tests.support import BAD, FEW, ToolTest, call_tool, golden, manifest, run_tool


def with_uuid(data: bytes, uuid: bytes) -> bytes:
    """Return an archive with another uuid, in its header and in every extent."""
    for offset in (0, *archives.extent_offsets(data)):
        data = archives.edit(data, offset + 8, uuid)
    return data


class Listing(ToolTest):
    """Sound archives."""

    def json(self, *args: str | Path, **kw: Any) -> dict[str, Any]:
        return dict(json.loads(self.ok("list", "--json", *args, **kw)))

    def test_json_of_golden_archives(self) -> None:
        """--json is the manifest's uuid, ctime, configs and devices, and nothing else."""
        for name, want in manifest().items():
            path = self.file(f"{name}.vma", golden(name))
            configs = archives.parse(golden(name)).configs
            for args in ([path], ["-"]):
                with self.subTest(archive=name, args=args):
                    found = self.json(*args, input=golden(name) if args == ["-"] else None)
                    self.assertEqual(found.pop("uuid").replace("-", ""), want["uuid"])
                    self.assertEqual(
                        found,
                        {
                            "ctime": want["ctime"],
                            "configs": [
                                {"name": config, "size": len(configs[config])}
                                for config in want["configs"]
                            ],
                            "devices": [
                                {"dev_id": d["dev_id"], "name": d["name"], "size": d["size"]}
                                for d in want["devices"]
                            ],
                            "compression": None,
                            "compressed_size": None,
                            "seekable": args != ["-"],
                            "frames": None,
                        },
                    )

    def test_scan_of_golden_archives(self) -> None:
        """--scan adds what each device stores and in which order, and the archive's layout."""
        for name in manifest():
            with self.subTest(archive=name):
                parsed = archives.parse(golden(name))
                found = self.json("--scan", self.file("a.vma", golden(name)))
                self.assertEqual((found["canonical"], found["align"]), (False, None))
                self.assertEqual(found["extents"], len(parsed.extents))
                for device, entry in zip(parsed.archive.devices, found["devices"]):
                    numbers = [num for dev_id, num in parsed.order if dev_id == device.dev_id]
                    masks = [parsed.masks[device.dev_id, num] for num in numbers]
                    stored = sum(bin(mask).count("1") for mask in masks) * archives.BLOCK
                    self.assertEqual(entry["stored"], stored)
                    self.assertEqual(entry["zero"], max(0, device.stated_size - stored))
                    self.assertEqual(entry["ascending"], numbers == sorted(numbers))

    def test_scan_knows_the_layout(self) -> None:
        """The --align with which optimize wrote an archive; none if one block more is stored."""
        odd = archives.parse(golden("odd-size")).archive  # ends inside a block
        for archive, align in itertools.product((good_archive(), odd), archives.ALIGNS):
            with self.subTest(align=align, size=archive.devices[0].stated_size):
                data = archives.canonical(archive, archives.ALIGNS[align])
                path = self.file("a.vma", data)
                found = self.json("--scan", path)
                self.assertEqual((found["canonical"], found["align"]), (True, align))
                self.assertIn(f"canonical, --align {align}\n", self.ok("list", "--scan", path))

    def test_not_canonical(self) -> None:
        """Another uuid, order, header size, cut into extents, or an extent too many."""
        archive = replace(good_archive(), uuid=archives.CANONICAL_UUID, header_size=16384)
        order = archives.in_order(archive)
        data = archives.canonical(good_archive(), 4096)
        for what, other in (
            ("uuid", with_uuid(data, b"x" * 16)),
            ("order", archives.build(archive, archives.reversed_order(archive))),
            ("devices not apart", archives.build(archive, order)),
            ("header size", archives.header_bytes(archive, 16896) + data[16384:]),
            ("an extent more", data + archives.extent_bytes(archive.uuid, [], [])),
        ):
            with self.subTest(what):
                found = self.json("--scan", self.file("a.vma", other))
                self.assertEqual((found["canonical"], found["align"]), (False, None))

    def test_text(self) -> None:
        """One line for each config and device, with exact bytes."""
        path = self.file("a.vma", golden("three-disks"))
        lines = self.ok("list", path).splitlines()
        self.assertEqual(lines[0], f"archive  {path}")
        self.assertIn("uuid     f1cc38f1-2eaf-4cf3-a03d-8a4d483c63ff", lines)
        self.assertRegex("\n".join(lines), r"device +2 +drive-scsi0 +6\.0 MiB, 6291456 bytes")
        self.assertEqual(len(lines), 3 + 2 + 3)
        scanned = self.ok("list", "--scan", path)
        self.assertIn("layout   not canonical\n", scanned)
        self.assertIn("286720 bytes stored, 6004736 zero, ", scanned)

    def test_local_time(self) -> None:
        """Times are local, ISO 8601."""
        path = self.file("a.vma", archives.header_bytes(Archive(ctime=1763600000)))
        for zone, text in (
            ("UTC0", "2025-11-20T00:53:20+00:00"),
            ("IST-5:30", "2025-11-20T06:23:20+05:30"),
            ("NST3:30", "2025-11-19T21:23:20-03:30"),
        ):
            with self.subTest(zone):
                answer = run_tool("list", path, env={"TZ": zone})
                self.assertIn(f"created  {text}\n", self.check_ok(answer))

    def test_any_ctime(self) -> None:
        """64 bits hold more than a calendar does."""
        for ctime in (-(1 << 63), -1, 0, 1 << 40, (1 << 63) - 1):
            with self.subTest(ctime=ctime):
                path = self.file("a.vma", archives.header_bytes(Archive(ctime=ctime)))
                self.assertIn("created  ", self.ok("list", path))
                self.assertEqual(self.json(path)["ctime"], ctime)

    def test_header_alone(self) -> None:
        """Extents are not looked at: they may be cut, damaged or still to come."""
        header = good()[: extents()[0]]
        want = self.ok("list", self.file("a.vma", good()))
        for what, data in (("cut", header), ("damaged", header + b"no extent" * 1000)):
            with self.subTest(what):
                self.assertEqual(self.ok("list", self.file("a.vma", data)), want)
                self.bad("list", "--scan", self.directory / "a.vma")
        endless = itertools.chain([header], itertools.repeat(bytes(1 << 16)))
        self.assertEqual(len(self.json("-", input=endless)["devices"]), 3)

    def test_header_sizes(self) -> None:
        """A header may be larger than it needs, and no multiple of 512."""
        exact = extents()[0]
        for size in (exact - 100, exact, 16384, 20001, 1 << 20, 17 << 20):
            with self.subTest(size=size):
                data = archives.header_bytes(good_archive(), size) + good()[exact:]
                path = self.file("a.vma", data)
                self.assertEqual(len(self.json("--scan", path)["devices"]), 3)

    def test_limits(self) -> None:
        """254 devices, 256 configs of 65535 bytes, and devices of up to 2^64 - 512 bytes."""
        names = [f"drive-scsi{n}" for n in range(1, 255)]
        disks = [Device(n, name, b"", (1 << 64) - 512 * n) for n, name in enumerate(names, 1)]
        configs = [(f"{n}.conf", b"#" * 65535) for n in range(256)]
        path = self.file("a.vma", archives.header_bytes(Archive(disks, list(configs))))
        found = self.json(path)
        self.assertEqual([device["name"] for device in found["devices"]], names)
        self.assertEqual(found["devices"][-1]["size"], (1 << 64) - 512 * 254)
        self.assertEqual({config["size"] for config in found["configs"]}, {65535})
        self.assertIn("16.0 EiB, 18446744073709551104 bytes", self.ok("list", path))


class BadArchives(ToolTest):
    """What a header can be blamed for."""

    def test_header_damages(self) -> None:
        """Every damage of the header is an error that names archive and offset."""
        for damage in header_damages():
            path = self.file("bad.vma", damage.data)
            offset = "" if damage.offset is None else f": offset 0x{damage.offset:x}: "
            for args in ([path], ["--json", path], ["--scan", path]):
                with self.subTest(damage.name, args=args):
                    line = self.bad("list", *args, says=[str(path), offset])
                    self.assertRegex(line, damage.says)
            with self.subTest(damage.name, args="-"):
                line = self.bad("list", "-", input=damage.data, says=["standard input: "])
                self.assertRegex(line, damage.says)

    def test_impossible_devices(self) -> None:
        """A device that is larger than the file is shown, and is an error for --scan."""
        for damage in device_damages():
            with self.subTest(damage.name):
                path = self.file("bad.vma", damage.data)
                self.ok("list", path)
                self.bad("list", "--scan", path, says=[str(path)])

    def test_names(self) -> None:
        """Bad names are shown escaped, and are an error all the same."""
        for name in (b"../x", b"/x", b"a/b", b"a\\b", b"evil\n\x1b[31mX", b"..", b"\xc2\x9b31m"):
            shown = name.decode().replace("\\", "\\\\").replace("\n", "\\n")
            shown = shown.replace("\x1b", "\\x1b").replace("\x9b", "\\x9b")
            for what, archive in (
                ("config", Archive(configs=[(name, b"")])),
                ("device", Archive([Device(1, name, b"", 512)])),
            ):
                with self.subTest(what, name=name):
                    path = self.file("a.vma", archives.header_bytes(archive))
                    answer = call_tool("list", path)
                    self.check_error(answer, f"{what} name '{shown}'", status=BAD)
                    self.assertIn(f"  {shown}  ", answer.stdout.decode())
                    self.assertEqual(
                        re.findall(rb"[\x00-\x09\x0b-\x1f\x7f\x9b]", answer.stdout), []
                    )
                    answer = call_tool("list", "--json", path)
                    self.check_error(answer, status=BAD)
                    found = json.loads(answer.stdout)
                    self.assertEqual(found[f"{what}s"][0]["name"], name.decode())

    def test_names_that_are_no_text(self) -> None:
        """Bytes that are not UTF-8 are surrogates in --json, as Python has file names."""
        device = Device(1, b"drive-\xff", b"", 512)
        path = self.file("a.vma", archives.header_bytes(Archive([device])))
        self.assertIn("drive-\\udcff  512 B", self.ok("list", path))
        self.assertEqual(
            json.loads(self.ok("list", "--json", path))["devices"][0]["name"], "drive-\udcff"
        )

    def test_names_twice(self) -> None:
        disk = Device(1, "drive-scsi0", b"", 512)
        for archive in (
            Archive([disk, replace(disk, dev_id=2)]),
            Archive(configs=[("a.conf", b"1"), ("a.conf", b"2")]),
        ):
            path = self.file("a.vma", archives.header_bytes(archive))
            self.check_error(call_tool("list", path), "occurs twice", status=BAD)

    def test_bad_name_with_its_archive(self) -> None:
        """The message says in which archive the name is."""
        path = self.file("a.vma", archives.header_bytes(Archive(configs=[("../x", b"")])))
        self.check_error(call_tool("list", path), f"{path}: config name '../x'", status=BAD)

    def test_random_headers(self) -> None:
        """Whatever a header holds, the answer is a list or one line."""
        rng = random.Random(5)
        header = archives.header_bytes(good_archive())
        for seed in range(0, 300, FEW):
            data = bytearray(header)
            for _ in range(rng.randint(1, 4)):
                offset = rng.choice([rng.randrange(60), rng.randrange(2044, len(data))])
                new = rng.choice([b"\0", b"\xff", b"\xff" * 4, rng.randbytes(4)])
                data[offset : offset + len(new)] = new
            size = len(data)
            if struct.unpack_from(">I", data, 56) == (size,):
                archives.fix_header_md5(data)
            with self.subTest(seed=seed):
                answer = call_tool("list", self.file("a.vma", bytes(data)))
                if answer.returncode:
                    self.check_error(answer, status=BAD)


class OtherInput(ToolTest):
    """What is no archive at all, and where the answer goes."""

    def test_not_there(self) -> None:
        (self.directory / "dir").mkdir()
        for name, message in (
            ("missing.vma", "No such file or directory"),
            ("dir", "Is a directory"),
            ("new\nline.vma", "new\\nline.vma: No such file or directory"),
        ):
            with self.subTest(name):
                self.refused("list", self.directory / name, says=[message])

    def test_usage(self) -> None:
        """Wrong usage is status 2; help and version are status 0."""
        for args, status in (
            ([], 2), (["list"], 2), (["list", "a", "b"], 2), (["list", "--no-such", "a"], 2),
            (["lst", "a"], 2), (["--help"], 0), (["list", "-h"], 0), (["--version"], 0),
            (["list", "--version"], 0),
        ):  # fmt: skip
            with self.subTest(args=args):
                answer = call_tool(*args)
                self.assertEqual(answer.returncode, status)
                self.assertEqual(bool(answer.stderr), status == 2)
                self.assertEqual(bool(answer.stdout), status == 0)

    def test_full_disk(self) -> None:
        """Standard output that takes nothing is an error, not a traceback."""
        path = self.file("a.vma", good())
        for args in (["list"], ["list", "--json"], ["verify"]):
            with self.subTest(args=args), open("/dev/full", "wb") as full:
                self.check_error(run_tool(*args, path, stdout=full), "No space left on device")

    def test_closed_standard_output(self) -> None:
        """Daemons run programs without one."""
        path = self.file("a.vma", good())
        script = 'exec "$@" >&-'
        for command in ("list", "verify"):
            with self.subTest(command):
                answer = run_tool(command, path, prefix=["sh", "-c", script, "sh"])
                self.assertNotIn("Traceback", answer.stderr.decode())

    def test_standard_output_of_ascii(self) -> None:
        """A name that the terminal's encoding lacks is no traceback."""
        data = archives.header_bytes(Archive([Device(1, "drive-ü", b"", 512)]))
        answer = run_tool("list", self.file("a.vma", data), env={"PYTHONIOENCODING": "ascii"})
        self.assertIn("drive-", self.check_ok(answer))
