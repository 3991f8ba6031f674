from tests.parallel import load_tests as load_tests
