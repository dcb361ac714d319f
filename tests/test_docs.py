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


MAX_WIDTH = 120
# but for the page that examples/paper/report.py writes
PAGES = [*(path for path in FILES if path.name != "paper.md"), ROOT / "CONTRIBUTING.md"]


def long_lines(text: str) -> list[int]:
    """Numbers of the lines of prose that are too long: not of tables, of code, or of words that cannot break."""
    found, code = [], False
    for number, line in enumerate(text.splitlines(), start=1):
        code ^= line.lstrip().startswith("```")
        breakable = " " in line.strip()[3:]  # behind the mark of a list
        if len(line) > MAX_WIDTH and breakable and not code and not line.lstrip().startswith(("|", "<", "![", "$$")):
            found.append(number)
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_of_prose_are_short(path: Path) -> None:
    found = long_lines(path.read_text(encoding="utf-8"))
    assert not found, f"{path.relative_to(ROOT)}: longer than {MAX_WIDTH} characters are the lines {found[:20]}"


def test_long_lines_are_found_in_prose_alone() -> None:
    long = "word " * 30
    text = f"{long}\n\n| {long} |\n\n```text\n{long}\n```\n\n* {'x' * 130}\n\n{long}\n"
    assert long_lines(text) == [1, 11]


# What these pages and the docstrings mean by these words is not in a dictionary.
OWN_WORDS = ["active set", "certificate", "kink", "lane", "lanes as one", "matvec", "polish", "record", "warm start"]


@pytest.mark.parametrize("word", OWN_WORDS)
def test_words_of_our_own_are_in_the_glossary(word: str) -> None:
    assert f"**{word.capitalize()}.**" in (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")


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


def test_badges_say_what_the_package_says_of_itself() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    minors = sorted(int(minor) for minor in re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', text))
    torch = re.search(r'"torch>=([\d.]+)"', text)
    terms = re.search(r'^license = "(.+)"', text, flags=re.MULTILINE)
    assert torch is not None and terms is not None
    true = {
        "python": f"Python: 3.{minors[0]} to 3.{minors[-1]}",
        "torch": f"PyTorch: {torch[1]} or newer",
        "license": f"license: {terms[1]}",
    }
    shown = dict(re.findall(r"!\[([^\]]*)\]\(docs/images/badge-(\w+)\.svg\)", (ROOT / "README.md").read_text("utf-8")))
    assert {name: words for words, name in shown.items()} == true
    for name, words in true.items():
        assert f'aria-label="{words}"' in (ROOT / "docs" / "images" / f"badge-{name}.svg").read_text("utf-8")
