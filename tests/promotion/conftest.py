from tests.reporting.conftest import made_up, unchanged

__all__ = ["made_up", "unchanged"]
