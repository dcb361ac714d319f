"""Every ```python block of README.md and docs/*.md runs, in order, with one namespace per file."""

import re
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python[ \t]*\n(.*?)^```[ \t]*$", flags=re.MULTILINE | re.DOTALL)


def python_blocks(path: Path) -> list[tuple[int, str]]:
    """The code blocks of one file: (line of the first statement, source)."""
    text = path.read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start(1)) + 1, match.group(1)) for match in BLOCK.finditer(text)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what an example writes does not land in the checkout
    namespace: dict[str, object] = {"__name__": "__docs__"}
    name = str(path.relative_to(ROOT))
    for first_line, source in python_blocks(path):
        try:
            exec(
                compile("\n" * (first_line - 1) + source, name, "exec"), namespace
            )  # padded: tracebacks show the file's lines
        except Exception as error:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
            line = lines[-1] if lines else getattr(error, "lineno", first_line)
            pytest.fail(f"{name}:{line}: {type(error).__name__}: {error}", pytrace=True)


def test_a_block_is_found_with_its_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "title\n\n```python\nx = 1\n```\n\n```text\nno code\n```\n\n```python\ny = 2\n```\n", encoding="utf-8"
    )
    assert python_blocks(page) == [(4, "x = 1\n"), (12, "y = 2\n")]
