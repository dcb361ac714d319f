"""Every ```python block of README.md and docs/*.md runs, in order, with one namespace per file.

A block whose first line is ``# needs: cvxpy, scipy`` (names to import) is left out where one of them is missing; the
others run, and the test is then reported as skipped, with what was left out and why.
"""

import importlib.util
import re
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python[ \t]*\n(.*?)^```[ \t]*$", flags=re.MULTILINE | re.DOTALL)
NEEDS = re.compile(r"\A# needs: (.+)$", flags=re.MULTILINE)


def python_blocks(path: Path) -> list[tuple[int, str]]:
    """The code blocks of one file: (line of the first statement, source)."""
    text = path.read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start(1)) + 1, match.group(1)) for match in BLOCK.finditer(text)]


def missing_packages(source: str) -> list[str]:
    """What a block needs and is not installed here."""
    needs = NEEDS.search(source)
    names = [] if needs is None else [name.strip() for name in needs.group(1).split(",")]
    return [name for name in names if importlib.util.find_spec(name) is None]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what an example writes does not land in the checkout
    namespace: dict[str, object] = {"__name__": "__docs__"}
    name = str(path.relative_to(ROOT))
    left_out: list[str] = []
    for first_line, source in python_blocks(path):
        missing = missing_packages(source)
        if missing:
            left_out.append(f"the block at line {first_line} needs {', '.join(missing)}")
            continue
        try:
            exec(
                compile("\n" * (first_line - 1) + source, name, "exec"), namespace
            )  # padded: tracebacks show the file's lines
        except Exception as error:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
            line = lines[-1] if lines else getattr(error, "lineno", first_line)
            pytest.fail(f"{name}:{line}: {type(error).__name__}: {error}", pytrace=True)
    if left_out:
        pytest.skip(f"{name} ran, but {'; '.join(left_out)}: not installed")


def test_a_block_is_found_with_its_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "title\n\n```python\nx = 1\n```\n\n```text\nno code\n```\n\n```python\ny = 2\n```\n", encoding="utf-8"
    )
    assert python_blocks(page) == [(4, "x = 1\n"), (12, "y = 2\n")]


def test_a_block_that_needs_a_missing_package_is_told_from_the_others() -> None:
    assert missing_packages("# needs: torch, no_such_package\nimport torch\n") == ["no_such_package"]
    assert missing_packages("# needs: torch\n") == []
    assert missing_packages("x = 1\n# needs: no_such_package\n") == []  # the first line only


LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)(?:#[^)\s]*)?\)")
PAGES = [*FILES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs" / "reference").glob("*.md"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file(path: Path) -> None:
    """Anchors and what the site makes of the links are checked by ``make docs``."""
    targets = LINK.findall(path.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (path.parent / target).exists()]
    assert not missing, f"{path.name} links to {missing}"


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = set(re.findall(r"[\w/]+\.md", navigation))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert listed == pages | {"index.md", "contributing.md", "security.md"}  # these three: docs/_site/hooks.py


def test_the_readme_of_an_index_page_has_absolute_links_to_files_of_the_repository() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11 and later
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    repository = project["project"]["urls"]["Repository"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for change in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(change["pattern"], change["replacement"], text)
    assert not LINK.findall(text)
    paths = re.findall(rf"\]\({re.escape(repository)}/(?:blob|raw)/main/([^)#]+)", text)
    assert len(paths) == len(LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))) > 0
    assert all((ROOT / path).exists() for path in paths)


def test_the_address_of_the_repository_is_the_same_everywhere() -> None:
    tomllib = pytest.importorskip("tomllib")
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    assert all(url.startswith(urls["Repository"]) for url in urls.values())
    assert f"repo_url: {urls['Repository']}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert f'repository-code: "{urls["Repository"]}"\n' in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
