"""--help, --version, and how wrong usage ends."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import vma_tool
from tests.support import (
    COMMANDS,
    TOOL,
    ToolTest,
    call_tool,
    command_lines,
    options_of,
    temporary_directory,
)


class Help(ToolTest):
    """--help, --version, and how wrong usage ends."""

    def help(self, *args: str) -> str:
        with mock.patch.dict(os.environ, {"COLUMNS": "80"}):
            return self.ok(*args, "--help")

    def test_fits_a_terminal(self) -> None:
        for args in ([], *([command] for command in COMMANDS)):
            with self.subTest(args=args):
                for line in self.help(*args).splitlines():
                    self.assertLessEqual(len(line), 80)

    def test_each_command_is_listed(self) -> None:
        text = self.help()
        self.assertEqual(sorted(re.findall(r"(?m)^  ([a-z]+)  ", text)), sorted(COMMANDS))

    def test_groups(self) -> None:
        """Each command is in one group, by what it is for."""
        groups = {}
        for paragraph in self.help().split("\n\n"):
            title, _, lines = paragraph.partition(":\n")
            if names := re.findall(r"(?m)^  ([a-z]+)  ", lines):
                groups[title] = names
        want = {
            "look": ["list", "config"],
            "check": ["verify"],
            "get data out": ["extract", "mount", "unpack", "rescue"],
            "make": ["create", "pack"],
            "rewrite": ["optimize", "diff"],
            "shell": ["completion"],
        }
        self.assertEqual(list(groups.items()), list(want.items()))

    def test_title(self) -> None:
        """The line of a command in the list is the first sentence of its own help."""
        for command, title in re.findall(r"(?m)^  ([a-z]+) {2,}([a-z].*)", self.help()):
            with self.subTest(command=command):
                first = " ".join(self.help(command).split("\n\n")[1].split())
                self.assertEqual(first, f"{title[0].upper()}{title[1:]}.")

    def test_each_option_is_explained(self) -> None:
        """Each option has a text; sizes name their unit, and a default is said."""
        for command in COMMANDS:
            with self.subTest(command=command):
                entries = re.split(r"\n  (?=-)", "\n" + options_of(command).rstrip())
                self.assertGreater(len(entries), 3)
                for entry in entries[1:]:
                    self.assertRegex(entry, r"(?s)^-\S.*?(  +|\n +)\S")
        for command in ("create", "pack", "optimize"):
            self.assertRegex(options_of(command), r"(?s)--align.*default 512K")
        self.assertRegex(options_of("optimize"), r"(?s)--memory.*default 256M")

    def test_examples_are_valid(self) -> None:
        """There is one for each command, and the parser takes it."""
        for args in ([], *([command] for command in COMMANDS)):
            with self.subTest(args=args):
                examples = list(command_lines(self.help(*args).partition("example")[2]))
                self.assertTrue(examples)
                for words in examples:
                    if args:
                        self.assertEqual(words[0], args[0])
                    with contextlib.redirect_stderr(None):
                        vma_tool.parse_args(words)

    def test_version(self) -> None:
        for args in (["--version"], *([command, "--version"] for command in COMMANDS)):
            self.assertEqual(self.ok(*args), f"vma-tool {vma_tool.__version__}\n")

    def test_wrong_usage(self) -> None:
        """Exit status 2 and the usage, on standard error."""
        for args in (
            [], ["nonsense"], ["list"], ["verify"], ["optimize"], ["config"], ["create"],
            ["pack", "dir"], ["unpack", "a.vma"], ["list", "--nonsense", "a.vma"],
            ["optimize", "--align", "2K", "a.vma"], ["optimize", "--memory", "much", "a.vma"],
            ["pack", "-u", "name", "dir", "a.vma"],
            ["list", "a.vma", "b.vma"],
        ):  # fmt: skip
            with self.subTest(args=args):
                answer = call_tool(*args)
                self.assertEqual((answer.returncode, answer.stdout), (2, b""))
                self.assertIn(b"usage: vma-tool", answer.stderr)
                self.assertNotIn(b"Traceback", answer.stderr)

    def test_options_that_do_not_go_together(self) -> None:
        """Exit status 2 and one line that says which."""
        for args in (
            ["verify", "--digest", "--against", "a", "b"], ["verify", "--quick", "--digest", "a"],
            ["verify", "--ignore-ctime", "a"], ["extract", "-o", "a", "b"], ["extract", "a"],
            ["extract", "-d", "a", "-r", "b", "c", "d"], ["optimize", "-"],
            ["optimize", "--check", "a", "-"],
        ):  # fmt: skip
            with self.subTest(args=args):
                answer = call_tool(*args)
                self.assertEqual((answer.returncode, answer.stdout), (2, b""))
                self.assertRegex(answer.stderr.decode(), rf"\Avma-tool: {args[0]}: [^\n]+\n\Z")

    def test_runs_as_it_is(self) -> None:
        """The file itself can be executed; with Python -I and -S too."""
        directory = temporary_directory(self)
        copy = directory / "vma-tool"
        shutil.copy(TOOL, copy)
        copy.chmod(0o755)
        for command in ([copy], [sys.executable, "-I", "-S", copy]):
            env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
            answer = subprocess.run(
                [*command, "--version"], capture_output=True, text=True, check=True, env=env
            )
            self.assertEqual(answer.stdout, f"vma-tool {vma_tool.__version__}\n")
        self.assertEqual(os.listdir(directory), ["vma-tool"])
