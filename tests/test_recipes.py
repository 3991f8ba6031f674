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
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import vma_tool
from tests import archives
from tests.archives import CLUSTER
from tests.support import (
    BAD,
    COMMANDS,
    ROOT,
    TOOL,
    Answer,
    ToolTest,
    command_lines,
    golden,
    manifest,
    require_program,
    require_root,
    sha256,
    small_file_system,
    snapshot,
    tool_command,
)

WORDS = 1200  # outside of what is collapsed

# What vzdump gives to a hook, whatever the administrator's shell has.
VZDUMP_PATH = "/sbin:/bin:/usr/sbin:/usr/bin"

VZDUMP = """\
#!/bin/sh
# vzdump TYPE DUMPED TARGET: the phases of a backup, which appears under its name before backup-end
# vzdump GUEST --stdout: what `dumped` holds, and a status of 1 where `fails` is
if [ "$2" = --stdout ]; then cat dumped || exit; [ ! -e fails ]; exit; fi
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
        # They are shell scripts: a run under one version of Python is enough.
        if os.environ.get("VMA_TOOL_RECIPES") == "no":
            self.skipTest("the recipes run under another Python")
        super().setUp()
        self.bin = self.directory / "usr" / "local" / "bin"
        self.bin.mkdir(parents=True)
        tool = shlex.join(tool_command())
        self.program("vma-tool", f'#!/bin/sh\nexec {tool} "$@"\n')
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
            r"(?<![\w/.])/(usr/local|etc|dev/pve|tank|mnt|var/lib/vz)\b",
            lambda m: f"{self.directory}{m[0]}",
            text,
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

    def check_optimized(self, path: Path, day: str = "", align: str = "512K") -> None:
        want = manifest()[day or self.day]["optimized_sha256"][align]
        self.assertEqual(sha256(path), want)


class Readme(RecipeTest):
    """The README as a whole."""

    def test_each_block_is_run(self) -> None:
        """A block of commands is marked and tested, but for those that would change the system."""
        unmarked = re.findall(
            r"^(?!<!-- (?:test|ci): )[^\n]*\n```(?:sh|bash|python)\n(.*?)^```$",
            readme(),
            re.M | re.S,
        )
        for block in unmarked:
            self.assertRegex(block, r"\A(install|zfs create) .*\n\Z")
        source = Path(__file__).read_text(encoding="utf-8")
        for name in blocks():
            self.assertIn(f'"{name}"', source)

    def test_words(self) -> None:
        """An administrator reads it in three minutes; the rest is collapsed."""
        shown = re.sub(r"<details>.*?</details>", "", readme(), flags=re.S)
        self.assertNotIn("details>", shown)
        self.assertLessEqual(len(shown.split()), WORDS)

    def test_each_command_line(self) -> None:
        """Also what stands in a sentence is a command line that the parser takes."""
        texts = [*blocks().values(), *re.findall(r"`([^`\n]+)`", readme())]
        seen = set()
        for text in texts:
            # What another shell is given within quotes is run by the test of its recipe.
            shown = re.sub(r"bash -c '[^']*'", "", text.replace("\\\n", " "))
            for words in command_lines(shown.replace(" -- ", "\n")):
                if words[1:] and words[0] != "COMMAND":
                    with self.subTest(words=words):
                        vma_tool.parse_args(words)
                    seen.add(words[0])
        self.assertEqual(seen, set(COMMANDS))

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
        changelog = readme().partition("<b>Changelog</b>")[2]
        self.assertNotIn("<summary>", changelog)
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
        self.put("broken.vma.zst", (self.work / "backup.vma").read_bytes()[:-1000])
        text = self.recipe("extract")
        self.assertIn("not whole", text)
        self.assertTrue((self.work / "rescued" / "rescue.json").exists())
        self.check_disks(self.work / "disks", "disk-{}.raw")
        two = {path.name for path in (self.work / "two").glob("*.raw")}
        self.assertEqual(two, {"disk-drive-scsi0.raw", "disk-drive-efidisk0.raw"})
        digest = manifest()[self.day]["devices"][1]["sha256"]
        self.assertEqual(sha256(self.work / "scsi0.raw"), digest)
        self.assertIn(f"{digest}  -\n", text)

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
        self.put("new.vma", golden("live-order-day2"))
        text = self.recipe("optimize")
        zstd = require_program("zstd", "zstd")
        with subprocess.Popen(
            [zstd, "-dc", self.work / "small.vma.zst"], stdout=subprocess.PIPE
        ) as process:
            self.assertEqual(
                sha256(process.communicate()[0]), manifest()[self.day]["optimized_sha256"]["512K"]
            )
        self.assertEqual((self.work / "new.vmad").read_bytes()[:4], b"\x28\xb5\x2f\xfd")
        self.check_optimized(self.work / "backup.vma")
        self.check_optimized(self.work / "optimized.vma")
        self.assertIn(f"{manifest()[self.day]['optimized_sha256']['1M']}  -\n", text)

    def test_completion(self) -> None:
        for name in ("etc/bash_completion.d", "usr/local/share/zsh/site-functions"):
            (self.directory / name).mkdir(parents=True)
        self.recipe("completion")
        script = self.directory / "etc" / "bash_completion.d" / "vma-tool"
        subprocess.run(["bash", "-euc", 'source "$1"', "bash", script], check=True)
        function = self.directory / "usr" / "local" / "share" / "zsh" / "site-functions"
        subprocess.run([require_program("zsh", "zsh"), "-n", function / "_vma-tool"], check=True)


class ScriptTest(RecipeTest):
    """The README's scripts, each run as it is printed, with what it needs."""

    def setUp(self) -> None:
        super().setUp()
        for name in ("etc", "mnt/backup", "mnt/disk"):
            (self.directory / name).mkdir(parents=True)
        self.password = self.directory / "etc" / "restic-password"
        self.password.write_text("secret\n")
        (self.directory / "etc" / "vma-tool.env").write_text(self.moved(blocks()["env"]))
        self.env["RESTIC_REPOSITORY"] = str(self.directory / "mnt" / "restic")
        self.target = self.work / "vzdump-qemu-100-2025_11_20-02_00_00.vma"

    def script(self, name: str, *args: str | Path) -> Answer[bytes]:
        """Run a script of the README with these arguments."""
        path = self.file(f"{name}.sh", self.moved(blocks()[name]).encode())
        path.chmod(0o755)
        return subprocess.run(
            [path, *args], cwd=self.work, env=self.env, stdin=subprocess.DEVNULL,
            capture_output=True, timeout=60, check=False,
        )  # fmt: skip

    def script_ok(self, name: str, *args: str | Path) -> str:
        answer = self.script(name, *args)
        self.assertEqual(answer.returncode, 0, answer.stderr.decode())
        return answer.stdout.decode()

    def compressed(self, data: bytes) -> bytes:
        zstd = require_program("zstd", "zstd")
        return subprocess.run([zstd, "-q"], input=data, capture_output=True, check=True).stdout

    def restic(self, *args: str) -> bytes:
        restic = require_program("restic", "restic")
        env = {**self.env, "RESTIC_PASSWORD": "secret"}
        done = subprocess.run([restic, "-q", *args], env=env, capture_output=True, check=True)
        return done.stdout

    def snapshots(self) -> int:
        return len(json.loads(self.restic("snapshots", "--json")))

    def use_borg(self, password: str = "secret") -> None:
        """Make a borg repository, or keep the one that is there, and let the scripts know it."""
        borg = require_program("borg", "borgbackup")
        self.env["BORG_PASSPHRASE"] = "secret"
        if not (self.directory / "borg").exists():
            subprocess.run(
                [borg, "init", "-e", "repokey"], env=self.env, capture_output=True, check=True
            )
        names = "BORG_REPO", "BORG_BASE_DIR"
        lines = [f"export {name}={self.env[name]}\n" for name in names]
        lines.append(f"export BORG_PASSPHRASE={password}\n")
        (self.directory / "etc" / "vma-tool.env").write_text("".join(lines))

    def borg_archives(self) -> int:
        answer = subprocess.run(
            ["borg", "list", "--short"], env=self.env, capture_output=True, check=True
        )
        return len(answer.stdout.split())

    def missing(self, *names: str) -> None:
        """Let the scripts find all programs but these."""
        farm = self.directory / "farm"
        farm.mkdir()
        for directory in reversed(self.env["PATH"].split(":")[1:]):
            for entry in os.scandir(directory) if os.path.isdir(directory) else ():
                (farm / entry.name).unlink(missing_ok=True)
                if entry.name not in names:
                    (farm / entry.name).symlink_to(entry.path)
        self.env["PATH"] = f"{self.bin}:{farm}"


class Hook(ScriptTest):
    """The scripts that vzdump calls."""

    def setUp(self) -> None:
        super().setUp()
        self.put("vzdump.conf", self.moved(blocks()["vzdump.conf"]).encode())
        self.install("hook-restic")

    def install(self, name: str) -> None:
        self.hook = self.program("vma-tool-hook", self.moved(blocks()[name]))

    def vzdump(self, kind: str, data: bytes, target: Path, path: str = "") -> Answer[bytes]:
        """Let the stand-in dump this and call the hook at each phase."""
        text = VZDUMP.replace("$path", path or VZDUMP_PATH)
        self.program("vzdump", text)
        return self.bash(f"vzdump {kind} {self.file('dumped', data)} {target}")

    def run_hook(self, args: list[str], **variables: str) -> Answer[bytes]:
        env = {"PATH": self.env["PATH"], "HOME": str(self.directory), **variables}
        return subprocess.run(
            [self.hook, *args], cwd=self.work, env=env,
            stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False,
        )  # fmt: skip

    def backup_end(self, target: Path, **variables: str) -> Answer[bytes]:
        return self.run_hook(
            ["backup-end", "snapshot", "100"], VMTYPE="qemu", TARGET=str(target), **variables
        )

    def test_restic(self) -> None:
        """Plain and compressed, in the repository and back."""
        self.restic("init")
        for number, (day, suffix) in enumerate(
            (("live-order", ""), ("live-order-day2", ".zst")), 1
        ):
            target = Path(f"{self.target}{suffix}")
            data = golden(day)
            answer = self.vzdump("qemu", self.compressed(data) if suffix else data, target)
            self.assertEqual(answer.returncode, 0, answer.stderr.decode())
            self.assertIn(b"optimized", answer.stdout)
            self.assertEqual(self.snapshots(), number)
            self.ok("verify", "--against", self.file("day", data), target)
            self.assertIn("canonical (--align 512K)", self.ok("verify", target))
            self.script_ok("restic-restore", "100", str(100 + number))
            self.check_disks(self.work / str(100 + number), day=day)

    def test_borg(self) -> None:
        self.use_borg()
        self.install("hook-borg")
        for number, suffix in enumerate(("", ".zst"), 1):
            target = Path(f"{self.target}{suffix}")
            data = golden("live-order")
            answer = self.vzdump("qemu", self.compressed(data) if suffix else data, target)
            self.assertEqual(answer.returncode, 0, answer.stderr.decode())
            self.assertEqual(self.borg_archives(), number)
            self.script_ok("borg-restore", "100", str(100 + number))
            self.check_disks(self.work / str(100 + number))
            time.sleep(1)  # an archive is named by the second in which it is made

    def test_bad_archive(self) -> None:
        """It stays as it is, vzdump learns of it, and nothing goes into the repository."""
        self.restic("init")
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
                self.assertEqual(set(os.listdir(self.work)), {self.target.name, "vzdump.conf"})
        self.assertEqual(self.snapshots(), 0)

    def test_each_step_fails(self) -> None:
        """Disk full, wrong password, no repository, no program: a status, and no snapshot."""
        data = golden("live-order")
        self.restic("init")
        small = small_file_system(self, len(data) + (64 << 10)) / self.target.name
        small.write_bytes(data)
        answer = self.backup_end(small)
        self.assertEqual((answer.returncode, small.read_bytes()), (1, data))
        self.assertEqual(os.listdir(small.parent), [small.name])
        self.put(self.target.name, data)
        self.password.write_text("wrong\n")
        self.assertNotIn(self.backup_end(self.target).returncode, (0, 3))
        self.password.write_text("secret\n")
        self.assertEqual(self.snapshots(), 0)
        os.rename(self.directory / "mnt" / "restic", self.directory / "mnt" / "away")
        self.assertNotEqual(self.backup_end(self.target).returncode, 0)
        os.rename(self.directory / "mnt" / "away", self.directory / "mnt" / "restic")
        self.missing("restic")
        self.assertEqual(self.backup_end(self.target).returncode, 127)
        self.check_optimized(self.target)

    def test_each_step_fails_with_borg(self) -> None:
        self.use_borg()
        self.install("hook-borg")
        self.put(self.target.name, golden("live-order")[:-1000])
        self.assertEqual(self.backup_end(self.target).returncode, BAD)
        self.put(self.target.name, golden("live-order"))
        self.use_borg(password="wrong")
        self.assertEqual(self.backup_end(self.target).returncode, 2)
        self.assertEqual(self.borg_archives(), 0)
        self.missing("borg")
        self.assertEqual(self.backup_end(self.target).returncode, 127)

    def test_a_name_with_blanks(self) -> None:
        self.restic("init")
        target = self.work / "a directory; with 'blanks' $HOME.vma"
        shutil.copy(self.file("dumped", golden("live-order")), target)
        answer = self.backup_end(target)
        self.assertEqual(answer.returncode, 0, answer.stderr.decode())
        self.check_optimized(target)

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
        for suffix in (".gz", ".lzo", ".tar", "x"):
            target = f"{self.target}{suffix}"
            yield suffix, ["backup-end", *guest], {**plain, "TARGET": target}
        backup_server = {"VMTYPE": "qemu", "TARGET": "vm/100/2025-11-20T02:00:00Z"}
        yield "Proxmox Backup Server", ["backup-end", *guest], backup_server
        yield "standard output", ["backup-end", *guest], {"VMTYPE": "qemu"}

    def test_nothing_to_do(self) -> None:
        """Other phases, containers, other compressions: exit status 0, no file is touched."""
        shutil.copy(self.file("dumped", golden("live-order")), self.target)
        for suffix in (".gz", ".lzo", ".tar", "x"):
            self.put(self.target.name + suffix, gzip.compress(golden("live-order")))
        before = snapshot(self.work)
        for name in ("hook-restic", "hook-borg", "hook-diff"):
            self.install(name)
            for title, args, variables in self.cases():
                with self.subTest(title, hook=name):
                    answer = self.run_hook(args, **variables)
                    self.assertEqual(
                        (answer.returncode, answer.stdout, answer.stderr), (0, b"", b"")
                    )
                    self.assertEqual(snapshot(self.work), before)

    def test_settings(self) -> None:
        """The block is what vzdump.conf takes, and leaves vzdump's compression alone."""
        settings = dict(line.split(": ") for line in blocks()["vzdump.conf"].splitlines())
        self.assertEqual(list(settings), ["script"])
        self.assertEqual(Path(settings["script"]).name, self.hook.name)

    def test_differences(self) -> None:
        """Full on Sunday, differences on Monday and Tuesday, full on the next Sunday."""
        require_program("zstd", "zstd")
        self.install("hook-diff")
        name = "vzdump-qemu-100-2025_11_{}-02_00_00"
        self.put("vzdump-qemu-101-2025_11_23-03_00_00.vma", golden("interleaved"))  # another guest
        for day, source, suffix, kept in (
            (23, "live-order", ".vma.zst", ".vma.zst"),
            (24, "live-order-day2", ".vma.zst", ".vmad"),
            (25, "live-order-day2", ".vma", ".vmad"),
            (30, "live-order-day2", ".vma.zst", ".vma.zst"),
        ):
            with self.subTest(day=day):
                data = golden(source)
                target = self.put(
                    name.format(day) + suffix, self.compressed(data) if "z" in suffix else data
                )
                answer = self.backup_end(target)
                self.assertEqual(answer.returncode, 0, answer.stderr.decode())
                (found,) = self.work.glob(f"{name.format(day)}.*")
                self.assertEqual(found.name, name.format(day) + kept)
        monday = self.work / f"{name.format(24)}.vmad"
        sunday = self.work / f"{name.format(23)}.vma.zst"
        self.script_ok("restore-diff", sunday, monday, "102")
        self.check_disks(self.work / "102", day="live-order-day2")
        other = self.work / "vzdump-qemu-101-2025_11_23-03_00_00.vma"
        answer = self.script("restore-diff", other, monday, "103")
        self.assertEqual(answer.returncode, BAD)
        self.assertFalse((self.work / "103").exists())

    def test_differences_fail(self) -> None:
        """The full archive of that day stays, and no difference."""
        self.install("hook-diff")
        self.put("vzdump-qemu-100-2025_11_23-02_00_00.vma", golden("live-order"))
        target = self.work / "vzdump-qemu-100-2025_11_24-02_00_00.vma"
        for title, data, line, status in (
            ("bad", golden("live-order-day2")[:-1000], "", BAD),
            ("full", golden("live-order-day2"), "ulimit -f 4", 1),
            ("no tool", golden("live-order-day2"), "vma-tool() { return 127; }", 127),
            ("verify", golden("live-order-day2"),
             'vma-tool() { [[ $1 != verify ]] && command vma-tool "$@"; }', 1),
        ):  # fmt: skip
            with self.subTest(title):
                self.put(target.name, data)
                before = set(os.listdir(self.work))
                start = self.file("start", f"{line}\n".encode())
                answer = self.backup_end(target, BASH_ENV=str(start))
                self.assertEqual(answer.returncode, status, answer.stderr.decode())
                self.assertEqual(set(os.listdir(self.work)), before)
                self.assertEqual(target.read_bytes(), data)


class Streams(ScriptTest):
    """Without a local copy."""

    def test_restic(self) -> None:
        self.restic("init")
        self.env["RESTIC_PASSWORD"] = "secret"
        for data in (golden("live-order"), self.compressed(golden("live-order"))):
            self.put("dumped", data)
            self.script_ok("stream-restic", "100")
        self.assertEqual(self.snapshots(), 2)
        self.script_ok("restic-restore", "100", "101")
        self.check_disks(self.work / "101")
        for title, data, fails, status in (
            ("cut", golden("live-order")[:-1000], False, BAD),
            ("vzdump fails", golden("live-order"), True, 1),
        ):
            with self.subTest(title):
                self.put("dumped", data)
                if fails:
                    self.put("fails", b"")
                self.assertEqual(self.script("stream-restic", "100").returncode, status)
                self.assertEqual(self.snapshots(), 2)  # the snapshot of what came is forgotten
        (self.work / "fails").unlink()
        self.env["RESTIC_PASSWORD"] = "wrong"
        self.assertNotEqual(self.script("stream-restic", "100").returncode, 0)
        self.env["RESTIC_PASSWORD"] = "secret"
        self.env["TMPDIR"] = "/nowhere"
        self.assertEqual(self.snapshots(), 2)
        del self.env["TMPDIR"]
        self.missing("restic")
        self.assertNotEqual(self.script("stream-restic", "100").returncode, 0)

    def test_borg(self) -> None:
        self.use_borg()
        self.put("dumped", golden("live-order"))
        self.script_ok("stream-borg", "100")
        self.script_ok("borg-restore", "100", "101")
        self.check_disks(self.work / "101")
        self.put("fails", b"")
        self.assertNotEqual(self.script("stream-borg", "100").returncode, 0)
        (self.work / "fails").unlink()
        self.put("dumped", golden("live-order")[:-1000])
        self.assertNotEqual(self.script("stream-borg", "100").returncode, 0)
        self.env["BORG_PASSPHRASE"] = "wrong"
        self.assertNotEqual(self.script("stream-borg", "100").returncode, 0)
        self.env["BORG_PASSPHRASE"] = "secret"
        self.assertEqual(self.borg_archives(), 1)


class Copies(ScriptTest):
    """ZFS, rsync, rdiff, S3."""

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

    def test_rsync(self) -> None:
        require_program("rsync", "rsync")
        nas = self.directory / "vm100.vma"
        for day in ("live-order", "live-order-day2"):
            self.put("a.vma", golden(day))
            self.script_ok("rsync", "a.vma", nas)
            self.check_optimized(nas, day)
        before = nas.read_bytes()
        self.put("a.vma", golden("live-order")[:-1000])
        self.assertEqual(self.script("rsync", "a.vma", nas).returncode, BAD)
        self.assertEqual(nas.read_bytes(), before)
        self.put("a.vma", golden("live-order"))
        self.assertNotEqual(self.script("rsync", "a.vma", "/no/where/x.vma").returncode, 0)

    def test_rdiff(self) -> None:
        """Each line on its machine, which here is a directory."""
        require_program("rdiff", "rdiff")
        there, here = self.work / "there", self.work / "here"
        for directory, name, day in (
            (there, "monday.vma", "live-order"), (here, "tuesday.vma", "live-order-day2")
        ):  # fmt: skip
            directory.mkdir()
            data = archives.canonical(archives.parse(golden(day)).archive)
            (directory / name).write_bytes(data)
        for line in blocks()["rdiff"].splitlines():
            self.work = there if line.endswith("# there") else here
            answer = self.bash(line)
            self.assertEqual(answer.returncode, 0, answer.stderr)
            for file in self.work.iterdir():  # the line between them
                if file.suffix in (".signature", ".delta"):
                    shutil.copy(file, here if self.work is there else there)
        self.assertEqual(sha256(there / "tuesday.vma"), sha256(here / "tuesday.vma"))

    def test_s3(self) -> None:
        """rclone's remote is a directory here."""
        require_program("rclone", "rclone")
        self.env["RCLONE_CONFIG_S3_TYPE"] = "alias"
        self.env["RCLONE_CONFIG_S3_REMOTE"] = str(self.directory / "s3")
        self.backup("live-order", plain=False)
        self.script_ok("rclone", "backup.vma.zst")
        self.script_ok("rclone-restore", "backup.vma.zst", "100")
        self.check_disks(self.work / "100")
        self.put("bad.vma", golden("live-order")[:-1000])
        self.assertEqual(self.script("rclone", "bad.vma").returncode, BAD)
        self.assertNotEqual(self.script("rclone-restore", "bad.vma", "101").returncode, 0)
        self.assertEqual(os.listdir(self.directory / "s3" / "backup"), ["backup.vma.zst"])
        self.missing("rclone")
        self.assertEqual(self.script("rclone", "backup.vma.zst").returncode, 127)


class Restore(ScriptTest):
    """With Proxmox, and without."""

    def guest(self, name: str, **files: bytes) -> Path:
        """Make an archive of a disk with an ext4 file system in its first partition."""
        for program, package in (("sfdisk", "fdisk"), ("mke2fs", "e2fsprogs")):
            if not shutil.which(program, path=self.env["PATH"]):
                require_program(program, package)
        root = self.directory / "root"
        (root / "etc").mkdir(parents=True, exist_ok=True)
        for file, data in files.items():
            (root / "etc" / file).write_bytes(data)
        answer = self.bash(f"""
            rm -f disk; truncate -s 64M disk
            echo 'label: gpt
            start=2048, size=126976' | sfdisk -q disk
            mke2fs -q -F -t ext4 -b 4096 -L root -d {root} -E offset=1048576 disk 62M
            vma-tool create {name} drive-scsi0=disk
            vma-tool list --partitions {name}
        """)
        self.assertEqual((answer.returncode, answer.stderr), (0, b""))
        self.listing = answer.stdout.decode()
        return self.work / name

    def unmount(self) -> None:
        for name in ("disk", "backup"):
            point = self.directory / "mnt" / name
            if os.path.ismount(point):
                subprocess.run(["umount", "-l", point], check=True)

    def test_quick_start(self) -> None:
        require_root()
        self.addCleanup(self.unmount)
        (self.directory / "var" / "lib").mkdir(parents=True)
        shutil.copy(TOOL, self.work)
        self.program("python3", f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        self.restic("init")
        dump = self.directory / "var" / "lib" / "vz" / "dump"
        dump.mkdir(parents=True)
        for day in ("monday", "tuesday"):
            self.guest("a.vma", hostname=f"{day}\n".encode())
            (dump / f"{day}.vma.zst").write_bytes(
                self.compressed((self.work / "a.vma").read_bytes())
            )
            (self.work / "a.vma").unlink()
        text = self.recipe("quick start")
        self.assertEqual(text.splitlines()[-1], "tuesday")
        self.assertEqual(text.count("Added to the repo"), 2)
        self.assertEqual(self.snapshots(), 2)

    def test_qmrestore(self) -> None:
        name = "vzdump-qemu-100-2025_11_20-02_00_00.vma"
        self.backup("live-order", name)
        answer = self.bash(f"vma-tool optimize {name}; vma-tool optimize {name}.zst")
        self.assertEqual(answer.returncode, 0)
        self.recipe("qmrestore")
        self.check_disks(self.work / "100")
        self.check_disks(self.work / "101")

    def test_partitions(self) -> None:
        """The listing in the README is what such a disk is listed as."""
        self.guest("backup.vma")
        self.assertTrue(self.listing.endswith(blocks()["partitions"]), self.listing)

    def test_one_file(self) -> None:
        require_root()
        self.addCleanup(self.unmount)
        self.guest("a.vma", hostname=b"guest\n")
        self.ok("optimize", self.work / "a.vma", self.work / "a.vma.zst")
        for archive in ("a.vma", "a.vma.zst"):
            self.script_ok("one-file", archive, "etc/hostname")
            self.assertEqual((self.work / "hostname").read_bytes(), b"guest\n")
            (self.work / "hostname").unlink()
        self.assertEqual(self.script("one-file", "a.vma", "no/file").returncode, 1)
        self.put("plain.vma.zst", self.compressed((self.work / "a.vma").read_bytes()))
        self.assertEqual(self.script("one-file", "plain.vma.zst", "etc/hostname").returncode, 1)
        self.put("bad.vma", (self.work / "a.vma").read_bytes()[:-4096])
        self.assertEqual(self.script("one-file", "bad.vma", "etc/hostname").returncode, BAD)
        for name in ("backup", "disk"):
            self.assertFalse(os.path.ismount(self.directory / "mnt" / name))

    def test_convert(self) -> None:
        """Each image has the disk's contents, says qemu-img; the overlay is one of it."""
        require_root()
        self.addCleanup(self.unmount)
        qemu_img = require_program("qemu-img", "qemu-utils")
        self.put("backup.vma", golden("live-order"))
        self.recipe("convert")
        self.ok("extract", "-d", "scsi0", "-o", self.work / "raw", self.work / "backup.vma")
        self.recipe("overlay")
        for name, image_format in (
            ("scsi0.qcow2", "qcow2"), ("scsi0.vdi", "vdi"), ("scsi0.vmdk", "vmdk"),
            ("overlay.qcow2", "qcow2"),
        ):  # fmt: skip
            with self.subTest(name):
                subprocess.run(
                    [qemu_img, "compare", "-f", "raw", "-F", image_format,
                     self.work / "raw", self.work / name],
                    check=True, stdout=subprocess.DEVNULL,
                )  # fmt: skip

    def test_rescue(self) -> None:
        """A file is hit; the recipe says which, and the file system is checked."""
        require_program("ddrescue", "gddrescue")
        archive = self.guest("a.vma", hostname=b"guest\n", blob=bytes(range(1, 256)) * 40000)
        self.script_ok("rescue", archive)
        shutil.rmtree(self.work / "rescued")
        for path in self.work.glob("broken.*"):
            path.unlink()
        data = bytearray(archive.read_bytes())
        start = archives.extent_offsets(bytes(data))[7]
        del data[start : start + 5000]  # a header and more: the clusters of this extent are lost
        self.put("a.vma", bytes(data))
        answer = self.script("rescue", archive)
        self.assertEqual(answer.returncode, 0, answer.stderr.decode())
        found = json.loads((self.work / "rescued" / "rescue.json").read_text())
        self.assertTrue(found["devices"][0]["lost"])
        self.assertNotEqual(self.script("rescue", "nothing.vma").returncode, 0)
        # The block of the README's example is one of the large file.
        shutil.copy(self.work / "disk", self.work / "work.raw")
        where_answer = self.bash("debugfs -R 'blocks etc/blob' 'work.raw?offset=1048576'")
        where = where_answer.stdout.split()
        hit = blocks()["hit"].replace("5242880", str(int(where[len(where) // 2]) * 4096 + 1048576))
        answer = self.bash(hit)
        self.assertIn(b"/etc/blob", answer.stdout)
