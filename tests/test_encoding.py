"""Every file of text that the product reads or writes is UTF-8, whatever the locale says."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = [
    ROOT / "train.py",
    *(p for name in ("celo2", "configs", "data", "launch", "models") for p in (ROOT / name).rglob("*.py")),
]


def without_encoding(source: str) -> list[int]:
    """Lines that open a file as text without saying its encoding."""
    lines = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        method = call.func.attr if isinstance(call.func, ast.Attribute) else None
        name = method or getattr(call.func, "id", None)
        module = getattr(getattr(call.func, "value", None), "id", None)  # os.open and so on are not about text
        if name not in ("open", "read_text", "write_text") or module in ("os", "gzip", "Image"):
            continue
        if method is None and name != "open":  # a function of the project with this name
            continue
        words = [a.value for a in [*call.args, *(k.value for k in call.keywords)] if isinstance(a, ast.Constant)]
        binary = any(isinstance(word, str) and "b" in word and len(word) <= 3 for word in words)
        if not binary and not any(keyword.arg == "encoding" for keyword in call.keywords):
            lines.append(call.lineno)
    return lines


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_text_is_utf8(path):
    assert without_encoding(path.read_text(encoding="utf-8")) == []


def test_the_search_finds_what_lacks_an_encoding():
    source = 'open(p)\np.open("a")\np.read_text()\np.write_text(t)\nopen(p, "rb")\np.read_text(encoding="utf-8")\nos.open(p, 0)'
    assert without_encoding(source) == [1, 2, 3, 4]
