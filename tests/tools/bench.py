#!/usr/bin/env python3
"""Measure how fast vma_tool.py is beside cp, cat, python3 and, where there is one, Proxmox's vma.

Makes its own archives, and removes them. Each row of a table runs two commands in turn (A B A B
...) in one directory, with warm caches: noise only ever adds time, so that the ratio is that of
the two minima. Peaks of memory are those that the kernel accounts to a finished process. The tool
runs with the Python that runs this, in an environment without packages, as they may cost each
start more than Python itself.

    python3 tests/tools/bench.py  against cp, on tmpfs
    python3 tests/tools/bench.py --dir /var/tmp  also on that file system, against cp and sync
    python3 tests/tools/bench.py streams  optimize - against cat, temporary bytes
    python3 tests/tools/bench.py startup  list and --help against python3 -c pass
    python3 tests/tools/bench.py mount  a mounted archive against cat and zstd -dc; needs root
    python3 tests/tools/bench.py compressed  .vma.zst against zstd
    python3 tests/tools/bench.py rescue  against extract, and searching against cat
    python3 tests/tools/bench.py diff  against sha256sum
    python3 tests/tools/bench.py --before OLD.py  against another version of the tool
    python3 tests/tools/bench.py --cold --dir /var/tmp  bytes read from the disk; needs root
    python3 tests/tools/bench.py --size 64M --zeros 16G --runs 2

For Linux, by hand; no test runs it. A figure in brackets is the goal, for ratios only on tmpfs.
Exit status: 0, also where a goal is missed; 1 if a command failed or wrote other bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import mmap
import multiprocessing
import os
import platform
import py_compile
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests import archives, frames
from tests.archives import MIB

TOOL = Path(__file__).resolve().parents[2] / "vma_tool.py"
SHM = Path("/dev/shm")
SHARING = ("btrfs", "xfs", "zfs", "bcachefs")  # where a plain cp may copy no data at all
LARGE_SIZE = 256 << 30  # of a compressed archive whose data are one byte, repeated
SHORT = 5  # a command of some milliseconds runs so many times as often
ORDERS = ("in-order", "live", "interleaved", "random", "reversed", "vmstate-first")
DEFAULT_MEMORY = 256 * MIB  # of optimize --memory
MEMORIES = {"256M (default)": ([], DEFAULT_MEMORY), "64M": (["--memory", "64M"], 64 * MIB)}

Argv = Sequence["str | Path"]


class BenchError(Exception):
    """A command failed, or wrote other bytes than it should."""


class Source(NamedTuple):
    """An archive, and how many clusters it has."""

    path: Path
    cluster_count: int

    def memory(self, budget: int = 0) -> int:
        """Return the bytes that the tool may need for it, with a stream's budget."""
        return budget + 64 * MIB + 8 * self.cluster_count


class Command(NamedTuple):
    """What is run; `memory` is the peak that it should not exceed, in bytes."""

    title: str
    argv: Argv
    memory: int = 0


class Row(NamedTuple):
    """Two commands to compare; `goal` is a ratio, or what else is to be reached."""

    command: Command
    reference: Command
    goal: str = ""
    repeat: int = 1


class Run(NamedTuple):
    """What a finished command took: seconds, of processors too, and bytes of memory at its peak."""

    seconds: float
    cpu: float
    peak: int


# ---- running ------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Tell on standard error how far the measurement is; standard output is for the tables."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def shell(script: str, *words: str | Path) -> Argv:
    """Return a command line of the shell, which sees the words as $1, $2 ..."""
    return ["sh", "-c", script, "sh", *words]


# The kernel counts the memory of the process that starts a command towards the command's peak, so
# commands are started, timed and waited for by the smallest process that can do it.
LAUNCHER = """
import os, sys, time
silence = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
started = time.perf_counter()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=silence)
_, status, usage = os.wait4(pid, 0)
seconds = time.perf_counter() - started
cpu = usage.ru_utime + usage.ru_stime
print(seconds, cpu, usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status))
"""


def run(argv: Argv, directory: Path) -> Run:
    """Run a command to its end in a directory; raise BenchError if it fails."""
    words = [str(word) for word in argv]
    launcher = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", LAUNCHER, *words],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        answer, errors = launcher.communicate()
    except BaseException:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
        raise
    seconds, cpu, peak_size, status = (answer or "0 0 0 -1").split()
    if int(status):
        raise BenchError(f"{' '.join(words)}: exit status {status}: {errors.strip()[-500:]}")
    return Run(float(seconds), float(cpu), int(peak_size))


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(MIB):
            digest.update(piece)
    return digest.hexdigest()


# ---- a directory to measure in ------------------------------------------------------------------


class Place:
    """A new directory on one file system, removed with all that is in it at the end.

    All that a measured command writes is in `out`, which is emptied before the next one. `code` is
    the tool, of which the directory gets a copy: one that is being edited is measured as it was.
    """

    def __init__(self, directory: Path, options: argparse.Namespace, code: bytes) -> None:
        self.file_system = file_system(directory)
        self.options = options
        self.on_tmpfs = self.file_system == "tmpfs"
        free = shutil.disk_usage(directory).free
        if free < 4.5 * options.size:
            raise BenchError(f"{directory}: {free / MIB:.0f} MiB free, 4.5 times --size needed")
        self.work = Path(tempfile.mkdtemp(prefix="vma-tool-bench-", dir=directory)).resolve()
        self.out = self.work / "out"
        self.script = self.work / "tool" / "vma_tool.py"
        self.script.parent.mkdir()
        self.script.write_bytes(code)
        self.before = self.work / "before" / "vma_tool.py"
        if options.before:
            self.before.parent.mkdir()
            shutil.copyfile(options.before, self.before)
        venv.create(self.work / "python", symlinks=True)
        self.python = self.work / "python" / "bin" / "python3"

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.work, ignore_errors=True)

    def tool(self, *words: str | Path) -> Argv:
        return [self.python, self.script, *words]

    def copy_of(self, source: Source) -> Command:
        """Return the command that everything is compared with: cp, which a disk adds sync to."""
        copy = self.out / "copy.vma"
        if self.on_tmpfs:
            return Command("cp", ["cp", source.path, copy])
        cp = "cp --reflink=never" if self.file_system in SHARING else "cp"
        return Command(f"{cp}, sync", shell(f'{cp} "$1" "$2" && sync "$2"', source.path, copy))

    def make(self, name: str, order: str, size: int, data_size: int) -> Source:
        """Write an archive of a disk of size bytes with data_size bytes of data."""
        say(f"making an archive: {name}")
        path = self.work / f"{name}.vma"
        large = archives.write_large(path, size=size, data_bytes=data_size, order=order)
        os.sync()
        return Source(path, sum(len(masks) for _, _, _, masks in large.devices))

    def make_disk(self, order: str) -> Source:
        """Write an archive of --size bytes of data, 1.5 GiB of 8 as the default is."""
        size = self.options.size * 16 // 3 // archives.CLUSTER * archives.CLUSTER
        return self.make(order, order, size, self.options.size)

    def make_zeros(self, name: str, size: int) -> Source:
        """Write an archive of a disk with 8 MiB of data for each TiB."""
        return self.make(name, "in-order", size, size >> 17)

    def optimize(self, source: Source, name: str) -> Path:
        """Write what the tool makes of an archive; with --before, what that one makes as well."""
        path = self.work / name
        run(self.tool("optimize", "-q", source.path, path), self.work)
        if self.options.before:
            theirs = self.before.parent / name
            run([self.python, self.before, "optimize", "-q", source.path, theirs], self.work)
        return path

    def clear(self) -> None:
        """Remove what the last command wrote, down to the disk."""
        if self.out.exists():
            shutil.rmtree(self.out)
            os.sync()
        self.out.mkdir()

    def run(self, command: Command) -> Run:
        self.clear()
        return run(command.argv, self.work)

    def by_other_version(self, row: Row) -> Row:
        """Return a row that compares the command with the same one by the tool of --before.

        Each reads what it has optimized itself, as their layouts may differ.
        """

        def other(word: str | Path) -> str | Path:
            if word == self.script:
                return self.before
            theirs = self.before.parent / Path(word).name
            return theirs if isinstance(word, Path) and theirs.exists() else word

        argv = [other(word) for word in row.command.argv]
        return row._replace(reference=Command("before", argv), goal="1.05")

    def compare(self, row: Row) -> tuple[list[Run], list[Run]]:
        """Run the two commands in turn; return the command's runs and the reference's."""
        say(f"{row.command.title}: beside {row.reference.title}")
        runs: list[Run] = []
        references: list[Run] = []
        for _ in range(self.options.runs * row.repeat):
            references.append(self.run(row.reference))
            runs.append(self.run(row.command))
        self.clear()
        return runs, references


def file_system(directory: Path) -> str:
    """Return the type of the file system, as mount calls it."""
    command = ["df", "--output=fstype", os.path.join(directory, "")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(done.stderr.strip())
    return done.stdout.split()[-1]


# ---- speed: against cp --------------------------------------------------------------------------


def speed_rows(place: Place) -> Iterator[Row]:
    out = place.out
    live = place.make_disk("live")
    cp, memory = place.copy_of(live), live.memory()
    disks = place.work / "disks"

    optimize = place.tool("optimize", "-q", live.path, out / "new.vma")
    yield Row(Command("optimize, live order", optimize, memory), cp, "1.0")
    unpack = place.tool("unpack", "-q", live.path, out / "disks")
    yield Row(Command("unpack", unpack, memory), cp, "1.0")
    extract = place.tool("extract", "-q", live.path, out / "disks")
    yield Row(Command("extract", extract, memory), cp, "1.0")
    run(place.tool("unpack", "-q", live.path, disks), place.work)
    pack = place.tool("pack", "-q", disks, out / "new.vma")
    yield Row(Command("pack", pack, memory), cp, "1.2")
    verify = place.tool("verify", "-q", live.path)
    cat = Command("cat", ["cat", live.path])
    yield Row(Command("verify", verify, memory), cat, "1.1 + start")
    verify = place.tool("verify", "-q", "--quick", live.path)
    yield Row(Command("verify --quick", verify, memory), cat)
    optimized = place.optimize(live, "optimized.vma")
    extract = place.tool("extract", "-q", optimized, out / "disks")
    yield Row(Command("extract, optimized", extract, memory), cp)
    verify = place.tool("verify", "-q", optimized)
    yield Row(Command("verify, optimized", verify, memory), Command("cat", ["cat", optimized]))

    if shutil.which("vma"):
        config, image = disks / "qemu-server.conf", f"drive-scsi0={disks / 'drive-scsi0'}"
        yield Row(Command("Proxmox's vma verify", ["vma", "verify", live.path]), cp)
        yield Row(Command("Proxmox's vma extract", ["vma", "extract", live.path, out / "vma"]), cp)
        create: Argv = ["vma", "create", out / "new.vma", "-c", config, image]
        yield Row(Command("Proxmox's vma create", create), cp)

    shutil.rmtree(disks)
    live.path.unlink()
    optimized.unlink()
    random = place.make_disk("random")
    optimize = place.tool("optimize", "-q", random.path, out / "new.vma")
    command = Command("optimize, random order", optimize, random.memory())
    yield Row(command, place.copy_of(random), "1.5")
    random.path.unlink()


def zeros_rows(place: Place) -> Iterator[Row]:
    """Compare an archive of zeros with one of half as many clusters: the ratio is to be 2."""
    size = place.options.zeros
    whole = place.make_zeros("zeros", size)
    half = place.make_zeros("half", size // 2)
    outputs: dict[str, list[Path]] = {"verify": [], "optimize": [place.out / "new.vma"]}
    for name, output in outputs.items():
        command = place.tool(name, "-q", whole.path, *output)
        reference = place.tool(name, "-q", half.path, *output)
        yield Row(
            Command(f"{name}, a disk of {size >> 30} GiB of zeros", command, whole.memory()),
            Command("half of it", reference),
            "10 s, 2.0",
        )
    whole.path.unlink()
    half.path.unlink()


def startup_rows(place: Place) -> Iterator[Row]:
    """Compare whole processes: the script, compiled at each start, and the installed module."""
    source = place.make("small", "live", 64 * MIB, 8 * MIB)
    packages = next(place.work.glob("python/lib/*/site-packages"))
    module = shutil.copyfile(place.script, packages / "vma_tool.py")
    py_compile.compile(str(module), doraise=True)
    nothing = Command("python3 -c pass", [place.python, "-c", "pass"])
    for how, start in (
        ("vma_tool.py", place.tool()),
        ("python3 -m vma_tool", [place.python, "-m", "vma_tool"]),
    ):
        for words in (["--help"], ["list", source.path]):
            title = f"{how} {words[0]}"
            yield Row(Command(title, [*start, *words], source.memory()), nothing, "2.0", SHORT)
    source.path.unlink()


# ---- compressed, rescue, diff -------------------------------------------------------------------


def usr_files() -> Iterator[Path]:
    """Yield the files of this machine's /usr, in the order of their names."""
    for folder, _, names in sorted(os.walk("/usr")):
        for path in sorted(Path(folder, name) for name in names):
            if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK):
                yield path


def make_files(place: Place, name: str) -> Source:
    """Write an archive of a disk of --size bytes at most, filled with files as a guest has them."""
    say(f"making an archive: {name}")
    disk = place.work / "disk"
    with open(disk, "wb") as output:
        for path in usr_files():
            data = path.read_bytes()[: place.options.size - output.tell()]
            output.write(data + bytes(-len(data) % archives.BLOCK))
    size = disk.stat().st_size
    path = place.work / f"{name}.vma"
    run(place.tool("create", "-q", path, f"drive-scsi0={disk}"), place.work)
    disk.unlink()
    return Source(path, -(-size // archives.CLUSTER))


def compressed_rows(place: Place) -> Iterator[Row]:
    """Compare with the program zstd, on files as a guest has them."""
    plain = make_files(place, "files")
    out, memory = place.out, plain.memory()
    frame = place.work / "frame.vma.zst"
    run(["zstd", "-q", "-3", plain.path, "-o", frame], place.work)
    seekable = place.optimize(plain, "seekable.vma.zst")
    target = out / "new.vma.zst"
    yield Row(
        Command(
            "optimize a.vma b.vma.zst", place.tool("optimize", "-q", plain.path, target), memory
        ),
        Command("zstd -T0 -3", ["zstd", "-q", "-T0", "-3", plain.path, "-o", target]),
        "1.1",
    )
    yield Row(
        Command("optimize frame.vma.zst b.vma.zst", place.tool("optimize", "-q", frame, target), 0),
        Command(
            "zstd -dc, zstd -T0 -3",
            shell('zstd -dc "$1" | zstd -q -T0 -3 -o "$2"', frame, target),
        ),
        "1.2",
    )
    yield Row(
        Command("extract", place.tool("extract", "-q", seekable, out / "disks"), memory),
        Command("zstd -dc, cat", shell('zstd -dc "$1" | cat >"$2"', frame, out / "plain")),
        "0.75",
    )
    yield Row(
        Command("verify", place.tool("verify", "-q", seekable), memory),
        Command("zstd -t", ["zstd", "-q", "-t", frame]),
        "0.65",
    )
    zeros = place.make_zeros("zeros", place.options.zeros)
    zeros_seekable = place.optimize(zeros, "zeros.vma.zst")
    for words in (["verify", "-q", "--quick"], ["list", "--scan"]):
        for what, source, archive in (
            ("files", plain, seekable),
            (f"{place.options.zeros >> 30} GiB of zeros", zeros, zeros_seekable),
        ):
            title = f"{' '.join(word for word in words if word != '-q')}, {what}"
            yield Row(
                Command(title, place.tool(*words, archive), source.memory()),
                Command("the plain archive", place.tool(*words, source.path)),
                "1.5",
            )
    large = place.work / "large.vma.zst"
    large.write_bytes(frames.repeated_archive(LARGE_SIZE))
    limit = 64 * MIB + (LARGE_SIZE >> 13) + 16 * (LARGE_SIZE >> 18)  # two frames for 512 KiB
    for words in (["list", "--scan"], ["verify", "-q", "--quick"]):
        title = f"{' '.join(word for word in words if word != '-q')}, 256 GiB of data"
        yield Row(
            Command(title, place.tool(*words, large), limit),
            Command("--version", place.tool("--version")),
            "start + 2 s" if words[0] == "list" else "",
        )
    read = read_by(place.tool("list", "--scan", large), place)
    print(f"\nread by list --scan of 256 GiB of data: {read / MIB:.1f} MiB (32)")
    size = seekable.stat().st_size / frame.stat().st_size
    print(f"\nsize: {seekable.stat().st_size / MIB:.1f} MiB, {size:.3f} of one zstd frame (1.03)")


def read_by(argv: Argv, place: Place) -> int:
    """Return how many bytes a command reads by its calls, without what Python reads of itself."""
    counts = []
    for words in (argv, place.tool("--version")):
        with subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL) as child:
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            lines = Path(f"/proc/{child.pid}/io").read_text().splitlines()
            counts.append(int(lines[0].split()[1]))  # rchar
    return counts[0] - counts[1]


def rescue_rows(place: Place) -> Iterator[Row]:
    """Compare with extract of the same archive; a search, with reading alone."""
    plain = make_files(place, "files")
    memory = plain.memory()
    seekable = place.work / "seekable.vma.zst"
    run(place.tool("optimize", "-q", plain.path, seekable), place.work)
    for title, path in (("plain", plain.path), (".vma.zst", seekable)):
        rescue = place.tool("rescue", "-q", path, place.out / "new")
        yield Row(
            Command(f"rescue, {title}", rescue, memory),
            Command("extract", place.tool("extract", "-q", path, place.out / "new")),
            "1.2",
        )
    # Without its extents' headers, all of it is searched.
    size = plain.path.stat().st_size
    with open(plain.path, "r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        found = view.find(b"VMAE")
        while found >= 0:
            view[found : found + archives.EXTENT_HEADER] = bytes(archives.EXTENT_HEADER)
            found = view.find(b"VMAE", found)
    rescue = place.tool("rescue", "-q", plain.path, place.out / "new")
    yield Row(
        Command("rescue, all searched", shell('"$@"; [ $? = 3 ]', *rescue), memory),
        Command("cat", ["cat", plain.path]),
        f"{size / 500e6:.1f} s: 500 MB/s",
    )


def diff_rows(place: Place) -> Iterator[Row]:
    """Compare with sha256sum of what is read, both archives at once."""
    base = make_files(place, "base")
    disk, new = place.work / "disk", place.work / "new.vma"
    run(place.tool("extract", "-q", "-d", "drive-scsi0", "-o", disk, base.path), place.work)
    rng = random.Random(3)
    with open(disk, "r+b") as file:
        for _ in range(200):
            file.seek(rng.randrange(place.options.size // 2))
            file.write(rng.randbytes(200_000))
    run(place.tool("create", "-q", new, f"drive-scsi0={disk}"), place.work)
    disk.unlink()
    difference = place.work / "new.vmad"
    run(place.tool("diff", "-q", base.path, new, difference), place.work)
    both = shell('sha256sum "$1" & sha256sum "$2"; wait', base.path, new)
    yield Row(
        Command(
            "diff", place.tool("diff", "-q", base.path, new, place.out / "d"), 2 * base.memory()
        ),
        Command("sha256sum of both", both),
        "1.3",
    )
    extract = "extract", "-q", "--base", base.path, difference, place.out / "disks"
    yield Row(
        Command("extract --base", place.tool(*extract), 2 * base.memory()),
        Command("sha256sum", ["sha256sum", new]),
        "1.2",
    )


def compare_all(place: Place, rows: Iterable[Row]) -> None:
    """Run rows, and print each as soon as it is measured."""
    print_heading(
        "", SECONDS, "CPU", "compared with", SECONDS, "CPU", "ratio (goal)", "peak MiB (limit)"
    )
    for row in map(place.by_other_version, rows) if place.options.before else rows:
        try:
            runs, references = place.compare(row)
        except BenchError as error:
            if not place.options.before:
                raise
            say(f"left out, as the other version does not have it: {error}")
            continue
        seconds, others = [r.seconds for r in runs], [r.seconds for r in references]
        goal = f" ({row.goal})" if row.goal and place.on_tmpfs else ""
        print_cells(
            row.command.title,
            spread(seconds),
            number(min(r.cpu for r in runs)),
            row.reference.title,
            spread(others),
            number(min(r.cpu for r in references)),
            f"{min(seconds) / min(others):.2f}{goal}",
            peak(runs, row.command.memory),
        )


# ---- a mounted archive --------------------------------------------------------------------------

RANDOM_READS = 10_000


def measure_mount(place: Place) -> None:
    """Compare reading a mounted disk, for the first time, with reading the archive itself."""
    plain = place.make_disk("in-order")
    zeros = place.make_zeros("zeros", place.options.zeros)
    say("making an archive: compressed")
    text, compressed = place.work / "text.vma", place.work / "text.vma.zst"
    write_text(place.work / "disk", place.options.size)
    run(place.tool("create", "-q", text, f"drive-scsi0={place.work / 'disk'}"), place.work)
    run(place.tool("optimize", "-q", text, compressed), place.work)
    whole = place.work / "whole.zst"
    run(shell('zstd -q -T0 -3 -o "$2" "$1"', text, whole), place.work)
    (place.work / "disk").unlink()
    print_heading("mounted", "what", SECONDS, "compared with", SECONDS, "MB/s: ratio (goal)")
    disk = plain.cluster_count * archives.CLUSTER
    rows: tuple[tuple[Path, str, Argv, int, str], ...] = (
        (plain.path, "cat ARCHIVE", ["cat", plain.path], plain.path.stat().st_size, "0.5"),
        (text, "cat ARCHIVE", ["cat", text], text.stat().st_size, "0.5"),
        (compressed, "zstd -dc", ["zstd", "-dc", whole], text.stat().st_size, "1.0"),
    )
    for path, title, reference, size, goal in rows:
        seconds, others = [], []
        for _ in range(place.options.runs):
            others.append(timed(reference))
            with mounted(place, path) as file:
                seconds.append(timed(["cat", file]))
                length = file.stat().st_size
        ratio = length / min(seconds) / (size / min(others))
        cells = spread(seconds), title, spread(others), f"{ratio:.2f} ({goal})"
        print_cells(path.name, "cat of the disk", *cells)
    with mounted(place, plain.path) as file, open(file, "rb", buffering=0) as opened:
        rng = random.Random(1)
        delays = []
        for _ in range(RANDOM_READS):
            offset = rng.randrange(disk // archives.BLOCK) * archives.BLOCK
            start = time.perf_counter()
            os.pread(opened.fileno(), archives.BLOCK, offset)
            delays.append(time.perf_counter() - start)
    median = statistics.median(delays) * 1000
    print(f"{RANDOM_READS} times 4 KiB at random places: median {median:.3f} ms (0.25)")
    for source in (plain, zeros):
        words = "-c", "1", place.work / "mnt" / "disk-drive-scsi0.raw"
        first = place.tool("mount", "-q", source.path, place.work / "mnt", "--", "head", *words)
        pairs = [
            (
                run(first, place.work),
                run(place.tool("verify", "-q", "--quick", source.path), place.work),
            )
            for _ in range(place.options.runs)
        ]
        seconds, others = [a.seconds for a, _ in pairs], [b.seconds for _, b in pairs]
        more = f"{min(seconds) - min(others):+.2f} s (+0.2)"
        cells = spread(seconds), "verify --quick", spread(others), more
        print_cells(source.path.name, "to the first byte", *cells)


def write_text(path: Path, size: int) -> None:
    """Write a file that compresses as a guest's files do, to about a third."""
    rng = random.Random(2)
    words = [rng.randbytes(rng.randrange(2, 9)) for _ in range(5000)]
    pool = b" ".join(rng.choices(words, k=4 << 20))
    with open(path, "wb") as file:
        for _ in range(0, size, archives.CLUSTER):
            start = rng.randrange(len(pool) - archives.CLUSTER)
            file.write(pool[start : start + archives.CLUSTER])


def timed(argv: Argv) -> float:
    start = time.monotonic()
    subprocess.run(argv, stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - start


@contextlib.contextmanager
def mounted(place: Place, archive: Path) -> Iterator[Path]:
    """Mount an archive, of which nothing is in the page cache then; yield its disk."""
    point = place.work / "mnt"
    point.mkdir(exist_ok=True)
    subprocess.run(place.tool("mount", archive, point), check=True)
    try:
        yield point / "disk-drive-scsi0.raw"
    finally:
        subprocess.run(["umount", "--lazy", point], check=True)


# ---- streams: against cat -----------------------------------------------------------------------


def optimize_stream(place: Place, source: Source, *options: str) -> Argv:
    script = 'archive=$1; shift; cat "$archive" | "$@"'
    output = place.out / "new.vma"
    return shell(script, source.path, *place.tool("optimize", "-q", *options, "-", output))


def stream_rows(place: Place) -> Iterator[Row]:
    for order in ORDERS:
        source = place.make_disk(order)
        title, script = "cat", 'cat "$1" | cat > "$2"'
        if not place.on_tmpfs:
            title, script = "cat, sync", script + ' && sync "$2"'
        yield Row(
            Command(order, optimize_stream(place, source), source.memory(DEFAULT_MEMORY)),
            Command(title, shell(script, source.path, place.out / "copy.vma")),
            "2.0",
        )
        source.path.unlink()


def temporary_size(place: Place, source: Source, options: Sequence[str]) -> int:
    """Return how long the temporary file of `optimize -` became, in bytes.

    It is unlinked, so the tool runs in a fork of this process, which keeps the file open.
    """

    def work() -> None:
        temporary_file = tempfile.TemporaryFile
        kept: list[int] = []

        def keep(*args: Any, **keywords: Any) -> Any:
            file = temporary_file(*args, **keywords)
            kept.append(os.dup(file.fileno()))
            return file

        vars(tempfile)["TemporaryFile"] = keep
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(place.script.parent))
        main = importlib.import_module(place.script.stem).main
        with subprocess.Popen(["cat", source.path], stdout=subprocess.PIPE) as cat:
            assert cat.stdout is not None, "it was asked for"
            os.dup2(cat.stdout.fileno(), 0)
            status = main(["optimize", "-q", *options, "-", str(place.out / "new.vma")])
        if status == 0:
            sender.send(sum(os.fstat(fd).st_size for fd in kept))

    place.clear()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with receiver:
        process = context.Process(target=work)
        process.start()
        sender.close()
        try:
            size: int = receiver.recv()
        except EOFError:
            raise BenchError(f"optimize - of {source.path} failed") from None
        finally:
            process.join()
    return size


def measure_memory(place: Place) -> None:
    """Print memory and temporary bytes of `optimize -`; raise BenchError if its output differs."""
    print_heading("", "--memory", "peak MiB (limit)", "temporary MiB", "output")
    output = place.out / "new.vma"
    for order in ORDERS:
        source = place.make_disk(order)
        place.run(Command("", place.tool("optimize", "-q", source.path, output)))
        expected = sha256(output)
        for name, (options, budget) in MEMORIES.items():
            say(f"{order}: --memory {name}")
            done = place.run(Command("", optimize_stream(place, source, *options)))
            if sha256(output) != expected:
                raise BenchError(f"{order}, --memory {name}: not what optimize writes from a file")
            size = temporary_size(place, source, options)
            allowed = source.memory(budget)
            same = "as from the file"
            print_cells(order, name, peak([done], allowed), f"{size / MIB:.1f}", same)
        source.path.unlink()


# ---- cold: what is read from the disk -----------------------------------------------------------


def cold_commands(place: Place) -> Iterator[tuple[Source, Command]]:
    out = place.out
    live = place.make_disk("live")
    yield live, place.copy_of(live)
    yield live, Command("verify", place.tool("verify", "-q", live.path))
    yield live, Command("unpack", place.tool("unpack", "-q", live.path, out / "disks"))
    optimize = place.tool("optimize", "-q", live.path, out / "new.vma")
    yield live, Command("optimize, live order", optimize)
    live.path.unlink()
    random = place.make_disk("random")
    optimize = place.tool("optimize", "-q", random.path, out / "new.vma")
    yield random, Command("optimize, random order", optimize)
    random.path.unlink()


def measure_cold(place: Place) -> None:
    """Print what commands read from the disk after the page cache was dropped."""
    print_heading("", "read / size of archive: min / median / max", SECONDS)
    for source, command in cold_commands(place):
        say(f"{command.title}: cold")
        size = source.path.stat().st_size
        shares, seconds = [], []
        for _ in range(place.options.runs):
            place.clear()
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3\n")
            run(place.tool("--help"), place.work)  # what Python reads of itself does not count
            before = read_bytes()
            seconds.append(run(command.argv, place.work).seconds)
            shares.append((read_bytes() - before) / size)
        print_cells(command.title, spread(shares), spread(seconds))
    place.clear()


def read_bytes() -> int:
    """Return what this process and its finished children have read from disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


# ---- tables -------------------------------------------------------------------------------------


SECONDS = "seconds: min / median / max"


def number(value: float) -> str:
    return f"{value:.{4 if value < 0.1 else 3 if value < 1 else 2}f}"


def spread(values: Sequence[float]) -> str:
    return " / ".join(map(number, (min(values), statistics.median(values), max(values))))


def peak(runs: Sequence[Run], allowed: int) -> str:
    text = f"{max(r.peak for r in runs) / MIB:.0f}"
    return f"{text} ({allowed / MIB:.0f})" if allowed else text


def print_cells(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def print_heading(*cells: str) -> None:
    print()
    print_cells(*cells)
    print_cells(*(["---"] * len(cells)))


def machine() -> str:
    done = subprocess.run(["cp", "--version"], capture_output=True, text=True, check=False)
    cores = len(os.sched_getaffinity(0))
    python = f"{platform.python_implementation()} {platform.python_version()}"
    cp = (done.stdout.splitlines() or ["cp"])[0]
    return f"{cores} cores, {platform.system()} {platform.release()}, {python}, {cp}"


# ---- command line -------------------------------------------------------------------------------


ROWS = {"compressed": compressed_rows, "rescue": rescue_rows, "diff": diff_rows}


def parse_size(text: str) -> int:
    shift = {"K": 10, "M": 20, "G": 30, "T": 40}.get(text[-1:].upper(), 0)
    try:
        size = int(text[:-1] if shift else text) << shift
    except ValueError:
        size = 0
    if size < MIB:
        raise argparse.ArgumentTypeError(f"{text!r} is no size like 64M or 1G")
    return size


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure vma_tool.py beside cp, cat and python3.")
    parser.add_argument(
        "what",
        nargs="?",
        choices=["speed", "streams", "startup", "mount", *ROWS],
        default="speed",
        help="default: speed, against cp",
    )
    parser.add_argument(
        "--size", type=parse_size, default="1536M", help="data in an archive; default: 1536M"
    )
    parser.add_argument(
        "--zeros", type=parse_size, default="1T", help="size of the disk of zeros; default: 1T"
    )
    parser.add_argument("--runs", type=int, default=8, help="of each command; default: 8")
    parser.add_argument(
        "--dir",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help=f"measure here too; may be repeated (always, if it is a tmpfs: {SHM})",
    )
    parser.add_argument(
        "--cold",
        action="store_true",
        help="instead, measure what is read from each DIR's disk after the page cache was dropped",
    )
    parser.add_argument(
        "--tool", type=Path, metavar="FILE", default=TOOL, help="vma_tool.py to use"
    )
    parser.add_argument(
        "--before", type=Path, metavar="FILE", help="compare with this vma_tool.py instead"
    )
    args = parser.parse_args()
    if args.runs < 1:
        parser.error("--runs has to be 1 or more")
    if args.cold and args.what != "speed":
        parser.error("--cold goes with speed only")
    if args.cold and os.geteuid() != 0:
        parser.error("--cold needs root, to drop the page cache")
    if args.what == "mount" and (os.geteuid() != 0 or not os.path.exists("/dev/fuse")):
        parser.error("mount needs root and /dev/fuse")
    return args


def choose_directories(args: argparse.Namespace) -> list[Path]:
    """Return where to measure: on tmpfs first; what is cold is on a disk."""
    directories = [SHM, *args.dir] if SHM.is_dir() else args.dir
    systems = {directory: file_system(directory) for directory in directories}
    if systems.get(SHM) != "tmpfs" and SHM not in args.dir:
        systems.pop(SHM, None)
    chosen = [place for place, system in systems.items() if not (args.cold and system == "tmpfs")]
    if not chosen:
        raise BenchError(f"nowhere to measure: name a --dir{' on a disk' if args.cold else ''}")
    return chosen


def measure(args: argparse.Namespace) -> None:
    directories = choose_directories(args)
    code: bytes = args.tool.read_bytes()
    print(f"{machine()}; {args.size / MIB:.0f} MiB of data, {args.runs} runs")
    for directory in directories[:1] if args.what == "startup" else directories:
        with Place(directory, args, code) as place:
            print(f"\n{directory}: {place.file_system}")
            if args.cold:
                measure_cold(place)
            elif args.what == "streams":
                compare_all(place, stream_rows(place))
                measure_memory(place)
            elif args.what == "mount":
                measure_mount(place)
            elif args.what in ROWS:
                compare_all(place, ROWS[args.what](place))
            elif args.what == "speed":
                compare_all(place, speed_rows(place))
            # What the disk has no part in is measured once.
            if directory == directories[0] and not args.cold and args.what == "speed":
                compare_all(place, zeros_rows(place))
            if directory == directories[0] and not args.cold and args.what in ("speed", "startup"):
                compare_all(place, startup_rows(place))


def main() -> int:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        measure(args)
    except (BenchError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
