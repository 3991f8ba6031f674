"""What every test file needs: the tool, the golden archives, outside programs.

The tool runs as a child (`run_tool`), or in this process (`call_tool`), which is faster. Nothing
here knows the format.
"""

from __future__ import annotations

import atexit
import bz2
import contextlib
import functools
import gzip
import hashlib
import importlib
import io
import json
import lzma
import os
import py_compile
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypedDict, Union, cast
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "vma_tool.py"
DATA = ROOT / "tests" / "data"

# Where a test tries thousands of cases, it takes every eleventh; of fewer that take long, every
# third. With VMA_TOOL_TESTS=all it takes all of them; with few, of the latter a third as many.
_AMOUNT = os.environ.get("VMA_TOOL_TESTS")
ALL = _AMOUNT == "all"
STEP, FEW = (1, 1) if ALL else (11, 9 if _AMOUNT == "few" else 3)

# In the background, or under nohup, a run ignores these, and so would the tools that it starts:
# what their caller ignores stays ignored.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGQUIT, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

# Exit statuses: an operation that failed, and an archive that is bad or differs from another.
FAILED, BAD = 1, 3

Argument = Union[str, "os.PathLike[str]"]
Answer = subprocess.CompletedProcess  # of bytes: returncode, stdout, stderr


class GoldenDevice(TypedDict):
    """One disk of a golden archive; sha256 is that of the whole disk, holes read as zeros."""

    dev_id: int
    name: str
    size: int
    sha256: str


class Golden(TypedDict):
    """What manifest.json says of one golden archive; every digest is a SHA-256 in hex.

    uuid has no dashes; configs maps names to digests, optimized_sha256 `--align` to the digest
    of the whole canonical archive.
    """

    sha256: str
    size: int
    ctime: int
    uuid: str
    written_by: str
    configs: dict[str, str]
    devices: list[GoldenDevice]
    optimized_sha256: dict[str, str]


# The golden archives


@functools.cache
def manifest() -> dict[str, Golden]:
    """Return the manifest of the golden archives, by their names."""
    return cast("dict[str, Golden]", json.loads((DATA / "manifest.json").read_text("utf-8")))


@functools.cache
def golden(name: str) -> bytes:
    """Return the golden archive of that name, uncompressed and checked against the manifest."""
    data = gzip.decompress((DATA / f"{name}.vma.gz").read_bytes())
    if sha256(data) != manifest()[name]["sha256"]:
        raise AssertionError(f"tests/data/{name}.vma.gz is not the archive of manifest.json")
    return data


def sha256(source: bytes | os.PathLike[str]) -> str:
    """Return the SHA-256 in hex of bytes, or of the file at a path."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    digest = hashlib.sha256()
    with open(source, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# The tool, and where it works


def unmeasured() -> dict[str, str]:
    """Return the environment for a tool whose coverage is not measured.

    The measuring takes memory, writes a file, and waits forever where a signal ends its middle.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}


def run_tool(
    *args: Argument, input: bytes | None = None, prefix: Iterable[str] = (), **kw: Any
) -> Answer[bytes]:
    """Run vma_tool.py with the Python that runs the tests, and return what it answered.

    Standard input is `input`, or empty; output and errors are captured as bytes. Further keywords
    go to subprocess.run and replace these settings; the tool has 60 s unless `timeout` says more.
    `prefix` is a command that runs it, such as `prlimit`.
    """
    settings: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "timeout": 60,
    }
    if input is not None:
        settings["input"] = input
    elif "stdin" not in kw:
        settings["stdin"] = subprocess.DEVNULL
    settings.update(kw)
    return subprocess.run([*prefix, *tool_command(*args)], check=False, **settings)


@functools.cache
def compiled_tool() -> str:
    """Return the path of the tool's bytecode: a script would be compiled at each of its starts."""
    directory = tempfile.mkdtemp(prefix="vma-tool-test-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    os.chmod(directory, 0o755)  # for the tests that go on as another user
    path = os.path.join(directory, "bytecode", "vma_tool.pyc")
    py_compile.compile(str(TOOL), path, doraise=True)
    return path


def tool_command(*args: Argument) -> list[str]:
    """Return the command line of a child that runs the tool."""
    return [sys.executable, compiled_tool(), *(os.fspath(argument) for argument in args)]


# Between the tests, which may be large, and the tool: what a child's peak memory begins with is
# that of the process that starts it.
MEASURE = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(child.pid, 0)
with open(sys.argv[1], "w") as file:
    file.write(str(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)))
child.returncode = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
sys.exit(child.returncode)
"""


def run_measured(*args: Argument, **kw: Any) -> tuple[Answer[bytes], int]:
    """Run the tool as `run_tool` does; return its answer and its peak memory in bytes."""
    with tempfile.NamedTemporaryFile("r") as report:
        prefix = [sys.executable, "-c", MEASURE, report.name]
        kw.setdefault("env", unmeasured())
        return run_tool(*args, prefix=prefix, **kw), int(report.read())


def call_tool(*args: Argument, input: bytes | Iterable[bytes] | None = None) -> Answer[bytes]:
    """Call vma_tool.main, and return what it answered as `run_tool` does.

    Standard input is a pipe that gets `input` (in one piece, or piece by piece), else /dev/null;
    standard output is a file. An exception that main lets out is the test's error.
    """
    import vma_tool

    errors = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_kept_signals())
        # What a call leaves open is a test of its own, not a line among the tool's.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", ResourceWarning)
        output = stack.enter_context(tempfile.TemporaryFile())
        stack.enter_context(_standard_input(input))
        stack.enter_context(_redirected(1, output.fileno()))
        text = stack.enter_context(open(1, "w", encoding="utf-8", closefd=False))
        stack.enter_context(contextlib.redirect_stdout(text))
        stack.enter_context(contextlib.redirect_stderr(errors))
        try:
            status = vma_tool.main([os.fspath(argument) for argument in args])
        except SystemExit as exit:  # argparse: --help, wrong usage
            status = exit.code if isinstance(exit.code, int) else 1
        text.flush()
        output.seek(0)
        return Answer(args, status, output.read(), errors.getvalue().encode())


@contextlib.contextmanager
def _kept_signals() -> Iterator[None]:
    """Check that signals keep the handlers that they had: `main` leaves them alone."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGUSR1)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    if [signal.getsignal(number) for number in numbers] != handlers:
        raise AssertionError("main has changed how this process handles signals")


@contextlib.contextmanager
def _redirected(fd: int, other: int) -> Iterator[None]:
    """Let a file descriptor stand for another one for a while."""
    kept = os.dup(fd)
    os.dup2(other, fd)
    try:
        yield
    finally:
        os.dup2(kept, fd)
        os.close(kept)


@contextlib.contextmanager
def _standard_input(input: bytes | Iterable[bytes] | None) -> Iterator[None]:
    """Make standard input a pipe that a thread writes to, or empty."""
    if input is None:
        with open(os.devnull, "rb") as nothing, _redirected(0, nothing.fileno()):
            yield
        return
    pieces = [input] if isinstance(input, bytes) else input
    reading, writing = os.pipe()

    def feed() -> None:
        # whoever stops reading early breaks the pipe
        with contextlib.suppress(BrokenPipeError), open(writing, "wb", buffering=0) as pipe:
            for piece in pieces:
                pipe.write(piece)

    feeder = threading.Thread(target=feed)
    try:
        with _redirected(0, reading):
            os.close(reading)
            feeder.start()
            yield
    finally:
        feeder.join()


def fork_tool(*args: Argument, input: bytes | None = None, timeout: int = 60) -> Answer[bytes]:
    """Run the tool in a fork of this process: what is patched here is patched there.

    It handles signals as the program does, and may be ended by one: `returncode` is -N if signal
    N killed it. Nothing that it started may be left. Standard input is a pipe with `input`, or
    empty.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.setsid()
                signal.alarm(timeout)
                os.dup2(output.fileno(), 1)
                os.dup2(errors.fileno(), 2)
                with _standard_input(input), _standard_texts():
                    status = _call_script(args)
            except BaseException:  # noqa: BLE001 - the child ends here, whatever happened
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        wait_for_group(pid)
        output.seek(0)
        errors.seek(0)
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        return Answer(args, code, output.read(), errors.read())


def _call_script(args: Iterable[Argument]) -> int:
    """Call what the program calls: the function that handles signals, unlike `main`."""
    import vma_tool

    sys.argv = ["vma-tool", *(os.fspath(argument) for argument in args)]
    try:
        vma_tool.script()
    except SystemExit as exit:
        status = exit.code
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return status if isinstance(status, int) else int(bool(status))


@contextlib.contextmanager
def _standard_texts() -> Iterator[None]:
    """Let what is printed go to file descriptors 1 and 2."""
    with (
        open(1, "w", encoding="utf-8", closefd=False) as output,
        open(2, "w", encoding="utf-8", closefd=False) as errors,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        yield


def wait_for_group(group: int, timeout: float = 10) -> None:
    """Wait until no process of a group runs; AssertionError if one goes on.

    One that has ended, but was not waited for, does not count: its parent is gone, or is not us.
    """
    end = time.monotonic() + timeout
    while running := _group_members(group):
        if time.monotonic() > end:
            raise AssertionError(f"processes are left: {running}")
        time.sleep(0.002)


def _group_members(group: int) -> list[str]:
    """Return the processes of a group that have not ended, as /proc describes them."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return []
    except PermissionError:  # macOS, of zombies
        return []
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = path.read_text(errors="replace")
            state, _, member_of = text[text.rindex(")") + 2 :].split()[:3]
            if int(member_of) == group and state not in "ZX":
                found.append(text.strip())
    return found if os.path.exists("/proc/self/stat") else ["?"]


class ToolTest(unittest.TestCase):
    """A test with a directory of its own, that calls the tool and looks at what it answers.

    What the tool flushes in this process is not waited for, as a busy disk takes seconds.
    """

    def setUp(self) -> None:
        self.directory = temporary_directory(self)
        no_wait = mock.patch("os.fsync")
        no_wait.start()
        self.addCleanup(no_wait.stop)

    def file(self, name: str, data: bytes) -> Path:
        """Write a file into the test's directory, and return its path."""
        path = self.directory / name
        path.write_bytes(data)
        return path

    def check_ok(self, answer: Answer[bytes], notice: str = "") -> str:
        """Check that the tool succeeded, and that `notice` and no more is on standard error.

        Return its standard output.
        """
        self.assertEqual((answer.returncode, answer.stderr.decode()), (0, notice))
        return answer.stdout.decode(errors="replace")

    def check_error(self, answer: Answer[bytes], *says: str, status: int = FAILED) -> str:
        """Check that the tool failed with one line that says all of this; return the line."""
        line = answer.stderr.decode()
        self.assertEqual(answer.returncode, status, line)
        self.assertRegex(line, r"\Avma-tool: [^\n]+\n\Z")
        for part in says:
            self.assertIn(part, line)
        return line

    def ok(self, *args: Argument, notice: str = "", **kw: Any) -> str:
        """Call the tool, which must succeed; return its standard output."""
        return self.check_ok(call_tool(*args, **kw), notice)

    def refused(
        self, *args: Argument, says: Iterable[str] = (), status: int = FAILED, **kw: Any
    ) -> str:
        """Call the tool, which must fail with one line that says all of `says`; return the line."""
        answer = call_tool(*args, **kw)
        self.assertEqual(answer.stdout, b"")
        return self.check_error(answer, *says, status=status)

    def bad(self, *args: Argument, **kw: Any) -> str:
        """Call the tool, which must find an archive bad, else as `refused`."""
        return self.refused(*args, status=BAD, **kw)


class ProcessTest(ToolTest):
    """A test that also starts the tool and lets it run."""

    def start(self, *args: Argument, **kw: Any) -> subprocess.Popen[bytes]:
        """Start the tool in a session of its own; the test's end ends it."""
        settings: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "start_new_session": True,
            "env": unmeasured(),
        }
        settings.update(kw)
        process = subprocess.Popen(tool_command(*args), **settings)
        self.addCleanup(self.end, process)
        return process

    @staticmethod
    def end(process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                # what stdin still buffers for a reader that is gone
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def answer(self, process: subprocess.Popen[bytes], timeout: float = 20) -> Answer[bytes]:
        """Wait for a tool that was started; nothing that it started itself may be left."""
        assert process.stderr
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.end(process)
            self.fail(f"it hangs: {process.args!r}")
        wait_for_group(process.pid)
        output = process.stdout.read() if process.stdout and not process.stdout.closed else b""
        return Answer([], status, output, process.stderr.read())

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until something has come about."""
        deadline = time.monotonic() + 20
        while not condition():
            self.assertLess(time.monotonic(), deadline, "it did not come about")
            time.sleep(0.001)

    def wait_until_ready(self, process: subprocess.Popen[bytes], *signals: int) -> None:
        """Wait until a tool that was started handles signals: before, it is only Python."""
        status = Path(f"/proc/{process.pid}/status")
        bits = sum(1 << number - 1 for number in signals or (signal.SIGTERM, signal.SIGHUP))

        def handles_signals() -> bool:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            return int(fields["SigCgt"], 16) & bits == bits

        if status.exists():
            self.wait_for(lambda: process.poll() is not None or handles_signals())
        else:
            time.sleep(1)

    def no_children(self) -> None:
        """Check that calls in this process left no child."""
        with self.assertRaises(ChildProcessError, msg="a child process is left"):
            os.waitpid(-1, os.WNOHANG)


def snapshot(directory: Path) -> dict[str, tuple[str, int, int, int]]:
    """Return what is in a directory and below: content, mode, inode and time by relative path.

    Two snapshots are equal if nothing was written, replaced, left or removed.
    """
    found = {}
    for path in [directory, *directory.rglob("*")]:
        state = path.lstat()
        content = ""
        if path.is_symlink():
            content = os.readlink(path)
        elif stat.S_ISREG(state.st_mode):
            content = sha256(path)
        time = state.st_mtime_ns if content else 0
        found[str(path.relative_to(directory))] = (content, state.st_mode, state.st_ino, time)
    return found


def temporary_directory(test: unittest.TestCase) -> Path:
    """Return a new directory that goes away, with all that is in it, when the test has ended."""
    path = Path(tempfile.mkdtemp(prefix="vma-tool-test-"))
    test.addCleanup(shutil.rmtree, path, ignore_errors=True)
    return path


# Compression

# name, program, Debian package, how it compresses, how Python does (None: it does not)
COMPRESSIONS: tuple[tuple[str, str, list[str], Callable[[bytes], bytes] | None], ...] = (
    ("zstd", "zstd", ["-q", "-1"], None),
    ("lzop", "lzop", ["-1"], None),
    ("gzip", "gzip", ["-1"], functools.partial(gzip.compress, compresslevel=1)),
    ("xz", "xz-utils", ["-0"], functools.partial(lzma.compress, preset=0)),
    ("bzip2", "bzip2", ["-1"], functools.partial(bz2.compress, compresslevel=1)),
)


@functools.lru_cache(maxsize=64)
def compress(name: str, data: bytes) -> bytes:
    """Compress with the real program."""
    _, package, options, _ = next(entry for entry in COMPRESSIONS if entry[0] == name)
    program = require_program(name, package)
    command = [program, *options, "-c"]
    return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout


def hidden_programs() -> contextlib.AbstractContextManager[object]:
    """Return a context in which the machine has no program at all."""
    return mock.patch.dict(os.environ, PATH="/nowhere")


def both_ways() -> Iterator[tuple[str, contextlib.AbstractContextManager[object]]]:
    """Yield a context with the decompressors' programs, and one without."""
    yield "program", contextlib.nullcontext()
    yield "module", hidden_programs()


# The command line

COMMANDS = (
    "list", "verify", "extract", "unpack", "config", "mount", "rescue", "create", "pack",
    "optimize", "diff", "completion",
)  # fmt: skip


def options_of(command: str) -> str:
    """Return the part of a command's --help that lists its options."""
    text = call_tool(command, "--help").stdout.decode()
    return text.partition("\noptions:\n" if "\noptions:" in text else "\noptional arguments:\n")[
        2
    ].partition("\nexample")[0]


def command_lines(text: str) -> Iterator[list[str]]:
    """Yield the words behind each vma-tool in lines of a shell, without comments and files."""
    for line in text.splitlines():
        for part in re.split(r"\|\||&&|[|;]|  +", line):
            words = shlex.split(re.sub(r" >\S+", "", part), comments=True)
            if words and words[0] == "vma-tool":
                yield words[1:]


# What a machine may lack. In CI (VMA_TOOL_CI=1) nothing may be lacking: a skipped test proves
# nothing, and there it would go unnoticed.


def skip(reason: str) -> NoReturn:
    """Skip the running test and print why; under VMA_TOOL_CI=1 fail it instead."""
    if os.environ.get("VMA_TOOL_CI") == "1":
        raise AssertionError(f"{reason}; with VMA_TOOL_CI=1 that is a failure")
    _notice(f"skipped: {reason}")
    raise unittest.SkipTest(reason)


@functools.cache
def _notice(line: str) -> None:
    """Print a line on standard error, each line only once a run."""
    print(line, file=sys.stderr, flush=True)


def require_program(name: str, package: str) -> str:
    """Return the path of a program, or skip; `package` is the Debian package that holds it."""
    path = shutil.which(name)
    if path is None:
        skip(f"{name} is not installed (Debian package: {package})")
    return path


def require_module(name: str, distribution: str) -> ModuleType:
    """Return an imported module, or skip; `distribution` is its name on PyPI."""
    try:
        return importlib.import_module(name)
    except ImportError:
        skip(f"Python module {name} is not installed (PyPI: {distribution})")


def require_root() -> None:
    """Skip unless the tests run as root, as mounting a small file system needs."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        skip("needs root")


def small_file_system(test: unittest.TestCase, size: int) -> Path:
    """Return where a new file system of so many bytes is mounted until the test has ended."""
    require_root()
    path = temporary_directory(test)
    _run_or_skip("mount", "-t", "tmpfs", "-o", f"size={size}", "vma-tool-test", str(path))
    test.addCleanup(subprocess.run, ["umount", "--lazy", str(path)], check=True)
    return path


def make_read_only(test: unittest.TestCase, path: Path) -> None:
    """Let nothing in a `small_file_system` be changed any more."""
    _run_or_skip("mount", "-o", "remount,ro", str(path))


def loop_device(test: unittest.TestCase, path: Path, *options: str) -> Path:
    """Return a block device with the content of a file, there until the test has ended.

    `options` are losetup's.
    """
    require_root()
    device = _run_or_skip("losetup", "--find", "--show", *options, str(path)).strip()
    test.addCleanup(subprocess.run, ["losetup", "--detach", device], check=True)
    return Path(device)


def _run_or_skip(*command: str) -> str:
    """Run a command that a container may forbid even to root; return its standard output."""
    require_program(command[0], "mount")
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        skip(f"{' '.join(command)}: {answer.stderr.strip()}")
    return answer.stdout


# A system that lacks calls, or on which they fail


class OsProxy:
    """Stands for the module `os` in vma_tool: lacks what `hidden` names, and calls `before`.

    `before(name)` is called ahead of each call of a function of `watched`, and may raise.
    """

    def __init__(
        self,
        hidden: Iterable[str] = (),
        watched: Iterable[str] = (),
        before: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._hidden = frozenset(hidden)
        self._wrappers = {name: self._wrap(name, before) for name in watched if hasattr(os, name)}
        # These sets hold functions, for which the wrappers stand.
        for name in ("supports_dir_fd", "supports_fd", "supports_follow_symlinks"):
            known = getattr(os, name)
            wrapped = {self._wrappers[n] for n in self._wrappers if getattr(os, n) in known}
            setattr(self, name, known | wrapped)

    @staticmethod
    def _wrap(name: str, before: Callable[[str], None]) -> Callable[..., Any]:
        function = getattr(os, name)

        @functools.wraps(function)
        def wrapper(*args: Any, **kw: Any) -> Any:
            before(name)
            return function(*args, **kw)

        return wrapper

    def __getattr__(self, name: str) -> Any:
        if name in self._hidden:
            raise AttributeError(f"this system has no os.{name}")
        return self._wrappers.get(name) or getattr(os, name)
