import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))


def pytest_terminal_summary(terminalreporter):
    """Says what passed unseen, so that nobody takes it for checked."""
    from tools import WITHOUT_SCHEMA

    terminalreporter.line(f"NOT CHECKED against a schema, for there is none in a registry: {', '.join(sorted(WITHOUT_SCHEMA))}")
