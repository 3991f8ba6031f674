"""The README's commands and recipes, taken from README.md itself and run with the real programs.

Stand-ins there are only for `vzdump` and `qmrestore`. The latter reads what it gets with the
tests' own parser. Absolute paths of a recipe are moved into the test's directory.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import vma_tool
from tests import archives
from tests.archives import CLUSTER
from tests.support import (
    BAD,
    ROOT,
    TOOL,
    Answer,
    ToolTest,
    command_lines,
    golden,
    manifest,
    require_program,
    sha256,
    snapshot,
)

# What vzdump gives to a hook, whatever the administrator's shell has.
VZDUMP_PATH = "/sbin:/bin:/usr/sbin:/usr/bin"

VZDUMP = """\
#!/bin/sh
# vzdump TYPE DUMPED TARGET: the phases of a backup, which appears under its name before backup-end
script=$(sed -n 's/^script: *//p' vzdump.conf)
hook() { # PHASE [VARIABLE]: TARGET is there at the end only, for jobs there is no guest
  case $1 in job-*) set -- "$1" ;; *) set -- "$1" snapshot 100 "VMTYPE=$type" "$2" ;; esac
  env -i PATH=$path DUMPDIR="$PWD" STOREID=local HOSTNAME=guest ${4:+"$4"} ${5:+"$5"} \\
    "$script" "$1" ${2:+"$2" "$3"}
}
type=$1 dumped=$2 target=$3
hook job-init && hook job-start && hook backup-start && hook pre-stop && hook pre-restart &&
  hook post-restart || exit 3
cp "$dumped" "$target.dat" && mv "$target.dat" "$target" || exit 3
if hook backup-end "TARGET=$target"; then status=0; else
  echo "ERROR: Backup of VM 100 failed - command '$script' failed: exit code $?" >&2
  hook backup-abort
  status=1
fi
hook log-end "LOGFILE=$PWD/log" && hook job-end || exit 3
exit $status
"""

QMRESTORE = """\
#!{python}
# qmrestore ARCHIVE|- VMID: the disks and configs of a sound archive, into a directory VMID
import gzip, pathlib, re, subprocess, sys

sys.path.insert(0, {root!r})
from tests import archives

archive, vmid = sys.argv[1:]
if archive == "-":
    data = sys.stdin.buffer.read()
elif re.fullmatch(r"vzdump-qemu-[0-9].*[.]vma", pathlib.Path(archive).name):
    data = pathlib.Path(archive).read_bytes()
else:
    sys.exit("unable to determine the archive's type by its name")
parsed = archives.parse(data)
target = pathlib.Path(vmid)
target.mkdir()
for name, content in [*parsed.configs.items(), *parsed.disks.items()]:
    (target / name).write_bytes(content)
"""


@functools.cache
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


@functools.cache
def blocks() -> Mapping[str, str]:
    """Return the marked blocks of the README by their names."""
    found = re.findall(
        r"^<!-- (?:test|ci): ([^\n]+) -->\n```\w*\n(.*?)^```$", readme(), re.M | re.S
    )
    if len({name for name, _ in found}) < len(found):
        raise AssertionError("README.md has two blocks of one name")
    return dict(found)


class RecipeTest(ToolTest):
    """A directory with the tool, the stand-ins, and a backup."""

    day = "live-order"

    def setUp(self) -> None:
        super().setUp()
        self.bin = self.directory / "usr" / "local" / "bin"
        self.bin.mkdir(parents=True)
        self.program("vma-tool", f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {TOOL} "$@"\n')
        self.program("vzdump", VZDUMP.replace("$path", VZDUMP_PATH))
        self.program("qmrestore", QMRESTORE.format(python=sys.executable, root=str(ROOT)))
        self.work = self.directory / "work"
        self.work.mkdir()
        self.env = {
            "PATH": f"{self.bin}:{os.environ['PATH']}:/usr/sbin:/sbin",
            "HOME": str(self.directory),
            "LC_ALL": "C.UTF-8",
            "RESTIC_REPOSITORY": str(self.directory / "restic"),
            "RESTIC_PASSWORD": "secret",
            "BORG_REPO": str(self.directory / "borg"),
            "BORG_BASE_DIR": str(self.directory / "borg-home"),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        }
        # Coverage is measured in the tool's processes, if it is measured at all.
        for name, value in os.environ.items():
            if name.startswith("COVERAGE"):
                self.env[name] = value

    def program(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def put(self, name: str, data: bytes) -> Path:
        """Write a file into the working directory."""
        path = self.work / name
        path.write_bytes(data)
        return path

    def backup(self, day: str, name: str = "backup.vma", plain: bool = True) -> None:
        """Put a day's backup there, compressed with zstd and, unless that is not wanted, plain."""
        path = self.put(name, golden(day))
        zstd = require_program("zstd", "zstd")
        subprocess.run([zstd, "-q", "-f", path], check=True)
        if not plain:
            path.unlink()

    def moved(self, text: str) -> str:
        """Return a block with its absolute paths moved into the test's directory."""
        return re.sub(
            r"(?<![\w/.])/(usr/local|etc|dev/pve|tank)\b", lambda m: f"{self.directory}{m[0]}", text
        )

    def bash(self, script: str, errexit: bool = True) -> Answer[bytes]:
        """Run a script in the working directory; with errexit, any command that fails ends it."""
        return subprocess.run(
            ["bash", "-euc" if errexit else "-uc", self.moved(script)], cwd=self.work, env=self.env,
            stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False,
        )  # fmt: skip

    def recipe(self, name: str) -> str:
        """Run a block of the README, which must succeed; return its standard output."""
        answer = self.bash(blocks()[name])
        self.assertEqual(answer.returncode, 0, answer.stderr.decode())
        return answer.stdout.decode()

    def check_disks(self, directory: Path, form: str = "{}", day: str = "") -> None:
        """Check the configs and disks in a directory; `form` is what a disk's file is called."""
        want = manifest()[day or self.day]
        for name, digest in want["configs"].items():
            self.assertEqual(sha256(directory / name), digest)
        for device in want["devices"]:
            self.assertEqual(sha256(directory / form.format(device["name"])), device["sha256"])

    def check_optimized(self, path: Path, day: str = "", align: str = "128K") -> None:
        want = manifest()[day or self.day]["optimized_sha256"][align]
        self.assertEqual(sha256(path), want)


class Readme(RecipeTest):
    """The README as a whole."""

    def test_each_block_is_run(self) -> None:
        """A block of commands is marked and tested, but for those that would change the system."""
        unmarked = re.findall(
            r"^(?!<!-- (?:test|ci): )[^\n]*\n```(?:sh|python)\n(.*?)^```$", readme(), re.M | re.S
        )
        for block in unmarked:
            self.assertRegex(block, r"\A(install|zfs create) .*\n\Z")
        source = Path(__file__).read_text(encoding="utf-8")
        for name in blocks():
            self.assertIn(f'"{name}"', source)

    def test_each_command_line(self) -> None:
        """Also what stands in a sentence is a command line that the parser takes."""
        texts = [*blocks().values(), *re.findall(r"`([^`\n]+)`", readme())]
        seen = set()
        for text in texts:
            for words in command_lines(text.replace("\\\n", " ").replace(" -- ", "\n")):
                if words[1:] and words[0] != "COMMAND":
                    with self.subTest(words=words):
                        vma_tool.parse_args(words)
                    seen.add(words[0])
        commands = re.findall(r"^    (\w+)  ", self.ok("--help"), re.M)
        self.assertEqual(seen, set(commands))

    def test_links(self) -> None:
        """A link within the README leads to a heading."""
        anchors = {
            re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", readme(), re.M)
        }
        for target in re.findall(r"\]\(#([^)]*)\)", readme()):
            self.assertIn(target, anchors)

    def test_version(self) -> None:
        """The changelog's first entry is this version's."""
        changelog = readme().partition("\n## Changelog\n")[2]
        self.assertNotIn("\n## ", changelog)
        (first, *_) = re.findall(r"^### (\S+)", changelog, re.M)
        self.assertEqual(first, vma_tool.__version__)

    def test_main_job(self) -> None:
        """In a checkout, with nothing but Python."""
        checkout = self.directory / "checkout"
        (checkout / "tests" / "data").mkdir(parents=True)
        shutil.copy(TOOL, checkout)
        shutil.copy(ROOT / "tests" / "data" / "live-order.vma", checkout / "tests" / "data")
        self.program("python3", f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        self.work = checkout
        text = self.recipe("main job")
        self.check_optimized(checkout / "optimized.vma")
        self.assertEqual(text.count(": OK"), 2)

    def test_python(self) -> None:
        """The example for Python runs, and prints what it says."""
        self.put("backup.vma", golden("live-order"))
        answer = subprocess.run(
            [sys.executable, "-c", blocks()["python"]], cwd=self.work,
            env={**self.env, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        self.assertEqual((answer.returncode, answer.stderr), (0, ""))
        want = [
            f"{device['name']} {device['size']} False" for device in manifest()[self.day]["devices"]
        ]
        self.assertEqual(answer.stdout.splitlines(), want)


class Tasks(RecipeTest):
    """A command for each task."""

    def setUp(self) -> None:
        super().setUp()
        self.backup("live-order")

    def test_look(self) -> None:
        text = self.recipe("look")
        start = text.index("{\n")
        header, end = json.JSONDecoder().raw_decode(text[start:])
        self.assertEqual(header["uuid"].replace("-", ""), manifest()[self.day]["uuid"])
        self.assertIn("not canonical", text)
        config = archives.parse(golden(self.day)).configs["qemu-server.conf"]
        self.assertEqual(text[start + end + 1 :], config.decode())

    def test_check(self) -> None:
        self.put("optimized.vma", archives.canonical(archives.parse(golden(self.day)).archive))
        text = self.recipe("check")
        self.assertIn("optimized.vma: OK", text)
        self.assertIn("optimized.vma: OK, the same as backup.vma", text)
        names = [
            *manifest()[self.day]["configs"],
            *(d["name"] for d in manifest()[self.day]["devices"]),
        ]
        for name in names:
            self.assertIn(f"{name}: OK\n", text)
        digests = {}
        for line in (self.work / "backup.sha256").read_text().splitlines():
            digest, name = line.split("  ", 1)
            digests[name] = digest
        self.assertEqual(sorted(digests), sorted(names))
        for device in manifest()[self.day]["devices"]:
            self.assertEqual(digests[device["name"]], device["sha256"])

    def test_check_finds_a_changed_bit(self) -> None:
        """What verify alone cannot see, as the README says, the other two do."""
        data = bytearray(golden(self.day))
        data[archives.extent_offsets(golden(self.day))[0] + 600] ^= 1
        self.put("optimized.vma", bytes(data))
        self.recipe_line("vma-tool verify *.vma")
        answer = self.bash("vma-tool verify --against backup.vma optimized.vma")
        self.assertEqual(answer.returncode, BAD)
        self.assertIn(b"differs", answer.stderr)
        self.recipe_line("vma-tool verify --digest backup.vma >backup.sha256")
        answer = self.bash(
            "vma-tool unpack optimized.vma dir; cd dir; sha256sum -c ../backup.sha256"
        )
        self.assertEqual(answer.returncode, 1)
        self.assertEqual(answer.stdout.count(b": FAILED"), 1)

    def recipe_line(self, line: str) -> None:
        answer = self.bash(line)
        self.assertEqual((answer.returncode, answer.stderr), (0, b""))

    def test_extract(self) -> None:
        text = self.recipe("extract")
        self.check_disks(self.work / "disks", "disk-{}.raw")
        two = {path.name for path in (self.work / "two").glob("*.raw")}
        self.assertEqual(two, {"disk-drive-scsi0.raw", "disk-drive-efidisk0.raw"})
        digest = manifest()[self.day]["devices"][1]["sha256"]
        self.assertEqual(sha256(self.work / "scsi0.raw"), digest)
        self.assertEqual(text.split()[-2:], [digest, "-"])

    def test_map(self) -> None:
        pve = self.directory / "dev" / "pve"
        pve.mkdir(parents=True)
        efi, disk, _ = manifest()[self.day]["devices"]
        (pve / "vm-100-disk-0").write_bytes(bytes(efi["size"]))
        (pve / "vm-100-disk-1").write_bytes(b"\xff" * (disk["size"] + (4 << 20)))
        self.recipe("map")
        self.assertEqual(sha256(pve / "vm-100-disk-0"), efi["sha256"])
        with open(pve / "vm-100-disk-1", "rb") as file:
            self.assertEqual(sha256(file.read(disk["size"])), disk["sha256"])
        configs = {path.name for path in (self.work / "configs").iterdir()}
        self.assertEqual(configs, set(manifest()[self.day]["configs"]))

    def test_make(self) -> None:
        parsed = archives.parse(golden(self.day))
        self.put("qemu-server.conf", parsed.configs["qemu-server.conf"])
        self.put("scsi0.raw", parsed.disks["drive-scsi0"])
        self.recipe("make")
        new = archives.parse((self.work / "new.vma").read_bytes())
        want = parsed.configs["qemu-server.conf"].replace(b"name: golden", b"name: web2")
        self.assertEqual(new.configs["qemu-server.conf"], want)
        self.assertEqual(new.disks, parsed.disks)
        fresh = archives.parse((self.work / "fresh.vma").read_bytes())
        self.assertEqual(fresh.disks, {"drive-scsi0": parsed.disks["drive-scsi0"]})
        self.assertEqual(list(fresh.configs), ["qemu-server.conf"])

    def test_optimize(self) -> None:
        text = self.recipe("optimize")
        self.check_optimized(self.work / "backup.vma")
        self.check_optimized(self.work / "optimized.vma")
        self.assertEqual(text.split()[-2:], [manifest()[self.day]["optimized_sha256"]["1M"], "-"])

    def test_completion(self) -> None:
        for name in ("etc/bash_completion.d", "usr/local/share/zsh/site-functions"):
            (self.directory / name).mkdir(parents=True)
        self.recipe("completion")
        script = self.directory / "etc" / "bash_completion.d" / "vma-tool"
        subprocess.run(["bash", "-euc", 'source "$1"', "bash", script], check=True)
        function = self.directory / "usr" / "local" / "share" / "zsh" / "site-functions"
        subprocess.run([require_program("zsh", "zsh"), "-n", function / "_vma-tool"], check=True)


class Hook(RecipeTest):
    """The hook script that vzdump calls."""

    def setUp(self) -> None:
        super().setUp()
        self.hook = self.program("vma-tool-hook", self.moved(blocks()["hook"]))
        self.put("vzdump.conf", self.moved(blocks()["vzdump.conf"]).encode())
        self.target = self.work / "vzdump-qemu-100-2025_11_20-02_00_00.vma"

    def vzdump(self, kind: str, data: bytes, target: Path) -> Answer[bytes]:
        """Let the stand-in dump this and call the hook at each phase."""
        dumped = self.file("dumped", data)
        return self.bash(f"vzdump {kind} {dumped} {target}")

    def test_backup(self) -> None:
        """Canonical afterwards, with the mode that it had; the log says so."""
        answer = self.vzdump("qemu", golden("live-order"), self.target)
        self.assertEqual((answer.returncode, answer.stderr), (0, b""))
        self.assertIn(b"optimized", answer.stdout)
        self.assertEqual(answer.stdout.count(b"\n"), 1)
        self.check_optimized(self.target)
        self.assertEqual(sorted(os.listdir(self.work)), sorted([self.target.name, "vzdump.conf"]))
        answer = self.bash(f"qmrestore {self.target} 101")
        self.assertEqual((answer.returncode, answer.stderr), (0, b""))
        self.check_disks(self.work / "101")

    def test_a_name_with_blanks(self) -> None:
        target = self.work / "a directory; with 'blanks' $HOME.vma"
        shutil.copy(self.file("dumped", golden("live-order")), target)
        answer = self.run_hook(["backup-end", "snapshot", "100"], VMTYPE="qemu", TARGET=str(target))
        self.assertEqual((answer.returncode, answer.stderr), (0, b""))
        self.check_optimized(target)

    def run_hook(self, args: list[str], **variables: str) -> Answer[bytes]:
        return subprocess.run(
            [self.hook, *args], cwd=self.work, env={"PATH": VZDUMP_PATH, **variables},
            stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False,
        )  # fmt: skip

    def cases(self) -> Iterator[tuple[str, list[str], dict[str, str]]]:
        """Yield how the hook is called where it has nothing to do."""
        plain = {"VMTYPE": "qemu", "TARGET": str(self.target)}
        guest = ["snapshot", "100"]
        for phase in (
            "backup-start", "pre-stop", "pre-restart", "post-restart", "backup-abort", "log-end"
        ):  # fmt: skip
            yield phase, [phase, *guest], plain
        for phase in ("job-init", "job-start", "job-end", "job-abort"):
            yield phase, [phase], {}
        yield "no arguments", [], {}
        yield "a container", ["backup-end", *guest], {**plain, "VMTYPE": "lxc"}
        for suffix in (".zst", ".gz", ".lzo", ".tar", "x"):
            target = f"{self.target}{suffix}"
            yield suffix, ["backup-end", *guest], {**plain, "TARGET": target}
        backup_server = {"VMTYPE": "qemu", "TARGET": "vm/100/2025-11-20T02:00:00Z"}
        yield "Proxmox Backup Server", ["backup-end", *guest], backup_server
        yield "standard output", ["backup-end", *guest], {"VMTYPE": "qemu"}

    def test_nothing_to_do(self) -> None:
        """Other phases, containers, compressed backups: exit status 0, and no file is touched."""
        shutil.copy(self.file("dumped", golden("live-order")), self.target)
        for suffix in (".zst", ".gz", ".lzo", ".tar", "x"):
            self.put(self.target.name + suffix, gzip.compress(golden("live-order")))
        before = snapshot(self.work)
        for title, args, variables in self.cases():
            with self.subTest(title):
                answer = self.run_hook(args, **variables)
                self.assertEqual((answer.returncode, answer.stdout, answer.stderr), (0, b"", b""))
                self.assertEqual(snapshot(self.work), before)

    def test_compressed_and_containers(self) -> None:
        """All phases of such a backup, in a row."""
        for kind, name in (("qemu", "vzdump-qemu-100.vma.zst"), ("lxc", "vzdump-lxc-100.tar")):
            answer = self.vzdump(kind, b"whatever this is", self.work / name)
            self.assertEqual((answer.returncode, answer.stdout, answer.stderr), (0, b"", b""))
            self.assertEqual((self.work / name).read_bytes(), b"whatever this is")

    def test_damaged(self) -> None:
        """The backup stays as it is, and vzdump learns that something is wrong."""
        data = golden("live-order")
        extent = archives.extent_offsets(data)[1]
        for title, damaged in (
            ("cut", data[:-1000]),
            ("a cluster is missing", data[:extent]),
            ("a bit", archives.edit(data, extent + 50, b"\xff", fix_md5=False)),
            ("empty", b""),
        ):
            with self.subTest(title):
                answer = self.vzdump("qemu", damaged, self.target)
                self.assertEqual(answer.returncode, 1)
                lines = answer.stderr.decode().splitlines()
                self.assertEqual(len(lines), 2, lines)
                self.assertRegex(lines[0], r"^vma-tool: .*vzdump-qemu-100-.*\.vma")
                self.assertIn("exit code 3", lines[1])
                self.assertEqual(self.target.read_bytes(), damaged)
                self.assertEqual(
                    sorted(os.listdir(self.work)), sorted([self.target.name, "vzdump.conf"])
                )

    def test_settings(self) -> None:
        """The block is what vzdump.conf takes: one setting a line; plain archives."""
        settings = dict(line.split(": ") for line in blocks()["vzdump.conf"].splitlines())
        self.assertEqual(settings["compress"], "0")
        self.assertEqual(Path(settings["script"]).name, self.hook.name)


class Repositories(RecipeTest):
    """restic and borg, two days and back."""

    def check_days(self, name: str, restored: str) -> None:
        """Back up two days with a recipe; restore the second with another one."""
        for day in ("live-order", "live-order-day2"):
            self.backup(day, plain=False)
            time.sleep(1)  # a borg archive may be named by the second in which it is made
            self.recipe(name)
            shutil.rmtree(self.work / "100", ignore_errors=True)
            self.recipe(restored)
            self.check_disks(self.work / "100", day=day)

    def damaged(self) -> None:
        self.put("backup.vma", golden("live-order")[:-4096])
        zstd = require_program("zstd", "zstd")
        subprocess.run([zstd, "-q", "-f", "--rm", self.work / "backup.vma"], check=True)

    def test_restic(self) -> None:
        require_program("restic", "restic")
        self.bash("restic init")
        self.check_days("restic", "restic-restore")
        # A damaged backup is noticed before there is a snapshot of it.
        self.damaged()
        answer = self.bash(blocks()["restic"], errexit=False)
        self.assertEqual(answer.returncode, BAD)
        self.assertEqual(self.snapshots(), 2)

    def snapshots(self) -> int:
        return len(json.loads(self.bash("restic snapshots --json").stdout))

    def test_borg(self) -> None:
        require_program("borg", "borgbackup")
        self.bash("borg init --encryption none")
        self.check_days("borg", "borg-restore")
        self.damaged()
        answer = self.bash(blocks()["borg"], errexit=False)
        self.assertNotEqual(answer.returncode, 0)
        self.assertEqual(len(self.bash("borg list --short").stdout.split()), 2)

    def test_fixed_blocks(self) -> None:
        """ZFS: the second day has the records of the first, but for the header and the changes."""
        (self.directory / "tank" / "backup").mkdir(parents=True)
        known: set[str] = set()
        new = []
        for day in ("live-order", "live-order-day2"):
            self.backup(day, plain=False)
            self.recipe("zfs")
            (path,) = (self.directory / "tank" / "backup").iterdir()
            self.check_optimized(path, day)
            data = path.read_bytes()
            path.unlink()  # each day has a name of its own
            records = {
                sha256(data[at : at + 2 * CLUSTER]) for at in range(0, len(data), 2 * CLUSTER)
            }
            new.append(len(records - known))
            known |= records
        self.assertLess(new[1], new[0])


class Differences(RecipeTest):
    """xdelta3 and rdiff, there and back."""

    def setUp(self) -> None:
        super().setUp()
        for name, day in (("monday", "live-order"), ("tuesday", "live-order-day2")):
            data = archives.canonical(archives.parse(golden(day)).archive)
            self.put(f"{name}.vma", data)

    def test_xdelta3(self) -> None:
        require_program("xdelta3", "xdelta3")
        self.recipe("xdelta3")
        self.check_disks(self.work / "disks", "disk-{}.raw", "live-order-day2")

    def test_rdiff(self) -> None:
        """Each line on its machine, which here is a directory."""
        require_program("rdiff", "rdiff")
        there, here = self.work / "there", self.work / "here"
        there.mkdir()
        here.mkdir()
        shutil.move(str(self.work / "monday.vma"), there)
        shutil.move(str(self.work / "tuesday.vma"), here)
        for line in blocks()["rdiff"].splitlines():
            self.work = there if line.endswith("# there") else here
            answer = self.bash(line)
            self.assertEqual(answer.returncode, 0, answer.stderr)
            for file in self.work.iterdir():  # the line between them
                if file.suffix in (".signature", ".delta"):
                    shutil.copy(file, here if self.work is there else there)
        self.assertEqual(sha256(there / "tuesday.vma"), sha256(here / "tuesday.vma"))


class Restore(RecipeTest):
    """With Proxmox, and without."""

    def test_qmrestore(self) -> None:
        name = "vzdump-qemu-100-2025_11_20-02_00_00.vma"
        self.backup("live-order", name)
        answer = self.bash(f"vma-tool optimize {name}")
        self.assertEqual(answer.returncode, 0)
        self.recipe("qmrestore")
        self.check_disks(self.work / "100")
        self.check_disks(self.work / "101")

    def test_convert(self) -> None:
        """Each image has the disk's contents, says qemu-img."""
        qemu_img = require_program("qemu-img", "qemu-utils")
        self.put("backup.vma", golden("live-order"))
        self.recipe("convert")
        disks = self.work / "disks"
        for image_format in ("qcow2", "vdi", "vmdk"):
            with self.subTest(format=image_format):
                image = disks / f"scsi0.{image_format}"
                info = subprocess.run(
                    [qemu_img, "info", "--output=json", image],
                    capture_output=True, text=True, check=True,
                )  # fmt: skip
                self.assertEqual(json.loads(info.stdout)["format"], image_format)
                subprocess.run(
                    [qemu_img, "compare", "-f", "raw", "-F", image_format,
                     disks / "disk-drive-scsi0.raw", image],
                    check=True, stdout=subprocess.DEVNULL,
                )  # fmt: skip

    def test_mount(self) -> None:
        """The listing in the README is what such a disk is listed as."""
        for program, package in (("sfdisk", "fdisk"), ("mke2fs", "e2fsprogs")):
            if not shutil.which(program, path=self.env["PATH"]):
                require_program(program, package)
        script = textwrap.dedent("""
            truncate -s 64M disk
            echo 'label: gpt
            start=2048, size=126976' | sfdisk -q disk
            mke2fs -q -F -t ext4 -L root -E offset=1048576 disk 62M
            vma-tool create backup.vma drive-scsi0=disk
            vma-tool list --partitions backup.vma
        """)
        answer = self.bash(script)
        self.assertEqual((answer.returncode, answer.stderr), (0, b""))
        self.assertTrue(answer.stdout.decode().endswith(blocks()["mount"]), answer.stdout.decode())
