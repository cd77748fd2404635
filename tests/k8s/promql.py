"""Names of metrics in PromQL expressions."""

import re

KEYWORDS = {
    "and",
    "or",
    "unless",
    "bool",
    "offset",
    "by",
    "without",
    "on",
    "ignoring",
    "group_left",
    "group_right",
    "inf",
    "nan",
}
GROUPING = r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)"
NAME = r"[A-Za-z_:][A-Za-z0-9_:]*"


def find_metrics(expression: str) -> set[str]:
    """Names of the series that an expression reads; of a histogram `…_bucket`, `_sum` and `_count` as they stand."""
    bare = re.sub(r"#.*", "", expression)
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", bare)
    for pattern in (r"\{[^}]*\}", r"\[[^\]]*\]", r"\$\w+", GROUPING, r"\b\d[\w.]*"):
        bare = re.sub(pattern, " ", bare)
    bare = re.sub(rf"({NAME})\s*\(", "(", bare)  # functions
    return {name for name in re.findall(NAME, bare) if name.lower() not in KEYWORDS}
