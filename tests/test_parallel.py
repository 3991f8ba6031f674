"""The tests' own processes: what fails in one of them fails."""

from __future__ import annotations

import os
import unittest

from tests import parallel
from tests.parallel import Parallel


class Examples(unittest.TestCase):
    def succeeding(self) -> None:
        pass

    def failing(self) -> None:
        self.fail("a failure")

    def failing_in_part(self) -> None:
        for number in range(3):
            with self.subTest(number=number):
                self.assertNotEqual(number, 1)

    def wrong(self) -> None:
        raise ValueError("an error")

    def skipped(self) -> None:
        self.skipTest("a reason")


class EndedExamples(unittest.TestCase):
    def ended(self) -> None:
        os._exit(0)


class UnpreparedExamples(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        raise OSError("not prepared")

    def succeeding(self) -> None:
        pass


def outcomes(*tests: unittest.TestCase) -> tuple[int, dict[str, list[str]], dict[str, list[str]]]:
    """Run tests; return how many ran, and by method's name what each reported: bad, skipped."""
    result = unittest.TestResult()
    Parallel(tests).run(result)
    reports: list[dict[str, list[str]]] = []
    for pairs in (result.errors + result.failures, result.skipped):
        by_name: dict[str, list[str]] = {}
        for test, text in pairs:
            by_name.setdefault(test.id().rpartition(".")[2], []).append(text)
        reports.append(by_name)
    return result.testsRun, reports[0], reports[1]


class ParallelTest(unittest.TestCase):
    def test_each_outcome(self) -> None:
        names = ("succeeding", "failing", "failing_in_part", "wrong", "skipped")
        ran, bad, skipped = outcomes(*(Examples(name) for name in names))
        self.assertEqual(ran, len(names))
        self.assertEqual(set(bad), {"failing", "failing_in_part", "wrong"})
        self.assertIn("a failure", bad["failing"][0])
        self.assertIn("number=1", bad["failing_in_part"][0])
        self.assertIn("ValueError: an error", bad["wrong"][0])
        self.assertEqual(skipped, {"skipped": ["a reason"]})

    def test_run_inside_a_run(self) -> None:
        """As these tests are: the outer run's classes are those that come next in this process."""
        before = list(parallel._classes)
        outcomes(Examples("succeeding"))
        self.assertEqual(parallel._classes, before)

    def test_process_that_ends(self) -> None:
        ran, bad, _ = outcomes(EndedExamples("ended"))
        self.assertEqual((ran, set(bad)), (1, {"ended"}))

    def test_class_that_is_not_prepared(self) -> None:
        ran, bad, _ = outcomes(UnpreparedExamples("succeeding"))
        self.assertEqual((ran, set(bad)), (1, {"succeeding"}))
        self.assertIn("not prepared", bad["succeeding"][0])


if __name__ == "__main__":
    unittest.main()
