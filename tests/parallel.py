"""All tests in as many processes as the machine has processors.

`python3 -m unittest` calls `load_tests`. The tests of a module that is named run in one process.
"""

from __future__ import annotations

import multiprocessing
import os
import unittest
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, NamedTuple

from tests.support import compiled_tool

PROCESSES = int(os.environ.get("VMA_TOOL_PROCESSES", os.cpu_count() or 1))

Tests = list[unittest.TestCase]


class Outcome(NamedTuple):
    """What a test reported, other than success."""

    method: str  # of a TestResult, that takes it
    test: str  # its id
    text: str  # a reason, or a traceback


class OtherProcessError(Exception):
    """Stands for an exception in another process; its text is that one's traceback."""


class Parallel(unittest.TestSuite):
    """Runs the tests of each class in one process, and those of several at the same time."""

    def run(self, result: Any, debug: bool = False) -> Any:
        del debug
        classes = by_class(self)
        compiled_tool()  # once, for all
        context = multiprocessing.get_context("fork")
        before = _classes[:]  # not empty in a process of another one, which has more to run
        with ProcessPoolExecutor(PROCESSES, context) as pool:
            try:
                # The processes are forked by the first call, so they have the tests.
                _classes[:] = classes
                running = {pool.submit(run_class, n): tests for n, tests in enumerate(classes)}
                for future in as_completed(running):
                    tests, error = running[future], future.exception()
                    if error:
                        outcomes = [Outcome("addError", t.id(), repr(error)) for t in tests]
                    else:
                        outcomes = future.result()
                    report(result, tests, outcomes)
                    if result.shouldStop:
                        break
            finally:
                pool.shutdown(cancel_futures=True)
                _classes[:] = before
        return result


_classes: list[Tests] = []


def run_class(number: int) -> list[Outcome]:
    """Run the tests of one class; return what did not succeed."""
    tests = _classes[number]
    result = unittest.TestResult()
    unittest.TestSuite(tests).run(result)
    # Some versions of Python do not count a test that is skipped before it begins.
    if result.testsRun + len(result.skipped) < len(tests):
        raise AssertionError(f"{result.testsRun} of {len(tests)} tests ran: {result.errors}")
    kinds = (
        ("addError", result.errors),
        ("addFailure", result.failures),
        ("addSkip", result.skipped),
    )
    outcomes = []
    for method, found in kinds:
        for test, text in found:
            # Of a subtest, the name has the parameters.
            told = text if method == "addSkip" else f"{test}\n{text}"
            outcomes.append(Outcome(method, getattr(test, "test_case", test).id(), told))
    return outcomes


def report(result: unittest.TestResult, tests: Tests, outcomes: list[Outcome]) -> None:
    """Tell a TestResult about the tests of a class, as if they had run in this process."""
    for test in tests:
        result.startTest(test)
        own = [outcome for outcome in outcomes if outcome.test == test.id()]
        for method, _, text in own:
            if method == "addSkip":
                result.addSkip(test, text)
            else:
                error = OtherProcessError, OtherProcessError(text), None
                getattr(result, method)(test, error)
        if not own:
            result.addSuccess(test)
        result.stopTest(test)


def by_class(suite: unittest.TestSuite) -> list[Tests]:
    """Return the tests of a suite and of all suites in it, a list for each class."""
    classes: dict[type, Tests] = {}
    for test in flat(suite):
        classes.setdefault(type(test), []).append(test)
    return list(classes.values())


def flat(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    """Yield the tests of a suite and of all suites in it."""
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from flat(test)
        else:
            yield test


def load_tests(loader: unittest.TestLoader, tests: Any, pattern: str | None) -> unittest.TestSuite:
    """Return all tests; unittest calls this when it finds the package."""
    del tests  # none are in tests/__init__.py
    found = loader.discover(os.path.dirname(__file__), pattern or "test*.py")
    if PROCESSES > 1 and "fork" in multiprocessing.get_all_start_methods():
        return Parallel([found])
    return found
