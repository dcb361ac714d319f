"""The shape of the project: imports point down, public names are complete and documented, files stay short."""

import ast
import cProfile
import gc
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import implicitlayer as il

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "implicitlayer"

# What each room may import from inside the package, besides itself. "base" includes the files on top of the package.
LAYERS: dict[str, set[str]] = {"base": {"base"}}
LAYERS["linear"] = {"base", "linear"}
LAYERS["sets"] = {"base", "sets"}
LAYERS["equation"] = {"base", "linear", "equation"}
LAYERS["programs"] = {"base", "linear", "programs"}
LAYERS["layer"] = {"base", "linear", "equation", "layer"}
LAYERS["constrained"] = {"base", "linear", "sets", "equation", "programs", "layer", "constrained"}
LAYERS["api"] = {*LAYERS["constrained"], "solvers", "api"}
LAYERS["compiled"] = {"base", "linear", "equation", "layer", "sets", "constrained", "compiled"}
LAYERS["explain"] = {*LAYERS["api"], "explain"}
# solvers never import a layer: a solver does not know how its answer is differentiated
LAYERS["solvers"] = {"base", "linear", "sets", "equation", "programs", "solvers"}
LAYERS["fewshot"] = {"base", "fewshot"}
LAYERS["outer"] = {*LAYERS["api"], "solvers", "outer"}
LAYERS["meta"] = {*LAYERS["api"], "solvers", "meta"}
# and nobody imports testing
LAYERS["testing"] = {*LAYERS["explain"], "solvers", "fewshot", "meta", "testing"}
MAX_LINES = 400  # of a file
MAX_WORDS = 20  # of the first sentence of a docstring
MAX_PACKAGE_LINES = 38_403
MAX_FUNCTION_LINES = 60  # without docstring and blank lines
# The plain path of a layer; wanted are 14 files.
MAX_CALLS, MAX_FILES = 250, 20  # three calls fewer where the gradient at the answer is rounded to zero, as on some CPUs


def tracked_files() -> list[Path]:
    """The files of the project: what git lists, or every file where there is no git (an unpacked release)."""
    try:
        listing = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
        )
        files = [ROOT / name for name in listing.stdout.decode().splitlines()]
    except (OSError, subprocess.CalledProcessError):
        files = [p for p in ROOT.rglob("*") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)]
    return sorted(path for path in files if path.is_file())


def python_files() -> list[Path]:
    return [path for path in tracked_files() if path.suffix == ".py"]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def layer_of(module: str) -> str | None:
    """`implicitlayer.linear._cg` -> "linear"; `implicitlayer._errors` -> "base"; `implicitlayer` -> None."""
    parts = module.split(".")
    if len(parts) == 1:
        return None
    return parts[1] if parts[1] in LAYERS else "base"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Every module of the package that a file imports, also inside functions: (line, absolute name)."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (
                (node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "implicitlayer"
            )
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            if source.split(".")[0] != "implicitlayer":
                continue
            for alias in (
                node.names
            ):  # `from implicitlayer import linear` names a module, `from ..linear import cg` a name in it
                is_module = (ROOT.joinpath(*source.split("."), alias.name)).with_suffix(".py").exists()
                is_package = ROOT.joinpath(*source.split("."), alias.name, "__init__.py").exists()
                yield node.lineno, f"{source}.{alias.name}" if is_module or is_package else source


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=relative)
def test_imports_point_down(path: Path) -> None:
    layer = layer_of(module_name(path))
    if layer is None or path.name == "__main__.py":
        return  # the facade gathers all layers, and the command stands on it
    for line, target in imported_modules(path):
        where = f"{relative(path)}:{line} ({layer}/) imports {target}"
        assert layer_of(target) is not None, (
            f"{where}: import the module itself, not the facade, or imports run in a circle"
        )
        assert layer_of(target) in LAYERS[layer], f"{where}; {layer}/ may import {sorted(LAYERS[layer])}"


def public_packages() -> list[str]:
    import implicitlayer

    names = [m.name for m in pkgutil.iter_modules(implicitlayer.__path__) if m.ispkg and not m.name.startswith("_")]
    return ["implicitlayer", *(f"implicitlayer.{name}" for name in names)]


@pytest.mark.parametrize("name", public_packages())
def test_all_is_complete(name: str) -> None:
    package = importlib.import_module(name)
    listed = list(package.__all__)
    assert len(listed) == len(set(listed)), f"{name}.__all__ names something twice"
    missing = [entry for entry in listed if not hasattr(package, entry)]
    assert not missing, f"{name}.__all__ lists names that do not exist: {missing}"
    public = {
        entry
        for entry, value in vars(package).items()
        if not entry.startswith("_") and not isinstance(value, types.ModuleType) and entry != "annotations"
    }
    assert public <= set(listed), f"public names of {name} that are not in __all__: {sorted(public - set(listed))}"


@pytest.mark.parametrize("name", public_packages())
def test_every_public_name_is_documented(name: str) -> None:
    package = importlib.import_module(name)
    assert package.__doc__, f"{name} has no docstring"
    for entry in package.__all__:
        value = getattr(package, entry)
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        doc = inspect.getdoc(value) or ""
        generated = inspect.isclass(value) and doc.startswith(f"{value.__name__}(")  # what a dataclass writes by itself
        assert doc and not generated, f"{name}.{entry} has no docstring"
        if inspect.isclass(value):
            for member, function in vars(value).items():
                if not member.startswith("_") and inspect.isfunction(function):
                    assert inspect.getdoc(getattr(value, member)), f"{name}.{entry}.{member} has no docstring"


def num_words(docstring: str) -> int:
    """The words of the first sentence; what stands in double backquotes is one."""
    text = re.sub(r"``.*?``", "code", docstring.strip(), flags=re.DOTALL)
    return len(re.split(r"\n\s*\n|(?<=[.!?:])\s", text)[0].split())


def test_the_words_of_a_first_sentence_are_counted() -> None:
    assert num_words("Solve ``A u = b``, or\n    raise. Not counted.") == 4
    assert num_words("Without a full stop\n\n    Args: nothing.") == 4


@pytest.mark.parametrize("name", public_packages())
def test_public_docstrings_begin_with_a_short_sentence(name: str) -> None:
    package = importlib.import_module(name)
    long = {}
    for entry in package.__all__:
        value = getattr(package, entry)
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        members = vars(value) if inspect.isclass(value) else {}
        shown = [member for member in members if not member.startswith("_") and inspect.getdoc(members[member])]
        for title, documented in ((entry, value), *((f"{entry}.{m}", getattr(value, m)) for m in shown)):
            words = num_words(inspect.getdoc(documented) or "")
            if words >= MAX_WORDS:
                long[title] = words
    assert not long, f"first sentences of {name} with {MAX_WORDS} words or more: say less, or say it in two: {long}"


def test_importing_the_package_needs_torch_and_numpy_only() -> None:
    code = (
        "import sys, torch, numpy; before = set(sys.modules); import implicitlayer; new = set(sys.modules) - before;"
        "extras = {'scipy', 'sklearn', 'matplotlib', 'PIL', 'tqdm', 'pooch', 'platformdirs', 'tyro', 'tensorboard'};"
        "extras |= {'hypothesis', 'pytest'};"
        "print(sorted(extras & new))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]", f"importing implicitlayer pulls in optional extras: {result.stdout}"


BARE = """
import sys

class OnlyTorchAndNumPy:
    extras = {"hypothesis", "pytest", "sklearn", "scipy", "PIL", "matplotlib", "tqdm", "pooch", "platformdirs"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.extras:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, OnlyTorchAndNumPy())
"""


def in_a_bare_installation(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", BARE + code], cwd=ROOT, capture_output=True, text=True)


def test_a_star_import_takes_all_that_a_bare_installation_has() -> None:
    result = in_a_bare_installation("from implicitlayer import *\nprint(*(name for name in globals()))")
    assert result.returncode == 0, result.stderr
    assert set(il.__all__) - set(result.stdout.split()) == {"testing", "ImplicitSearchCV"}


@pytest.mark.parametrize(("name", "needs"), [("testing", "[testing]"), ("ImplicitSearchCV", "[sklearn]")])
@pytest.mark.parametrize("code", ["import implicitlayer as il; il.{}", "from implicitlayer import {}"])
def test_a_name_that_needs_an_extra_says_so_in_a_bare_installation(code: str, name: str, needs: str) -> None:
    result = in_a_bare_installation(code.format(name))
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("ImportError:") and f"implicitlayer{needs}" in result.stderr


@pytest.mark.parametrize("path", python_files(), ids=relative)
def test_files_stay_short(path: Path) -> None:
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_LINES, f"{relative(path)} has {num_lines} lines: is it one thing? ({MAX_LINES} at most)"


FORBIDDEN = {
    r"(?<![\w.])/(?:home|root|work|Users|mnt|opt)/\w": "a path of somebody's machine",
    r"\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX)\b": "an open end: make it an issue",
    r"^(?:<{7}|>{7})(?: |$)": "a merge conflict",
    r"\bpdb\.set_trace\(\)|^\s*breakpoint\(\)": "a debugger call",
}


def functions() -> Iterator[tuple[str, ast.FunctionDef, list[str]]]:
    """Every function of the package: its file, itself, and the lines of the file."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                yield relative(path), node, lines


# What users call with keywords, one for each thing that may be asked for.
FACADES = {
    "argmin",
    "root",
    "fixed_point",
    "constrained_argmin",
    "qp",
    "bilevel",
    "check_argmin_gradients",
    "linear",
}
# What stands in for a function of torch, and has its parameters.
AS_TORCH_HAS_IT = {"forward"}


def test_functions_have_few_parameters() -> None:
    many = {}
    for path, node, _ in functions():
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = sum(argument.arg not in ("self", "cls") for argument in given)
        if count > 8 and node.name not in FACADES | AS_TORCH_HAS_IT:
            many[f"{path}: {node.name}"] = count
    assert not many, f"more than 8 parameters, what do they have in common? {many}"


def num_lines_of(function: ast.FunctionDef, lines: list[str]) -> int:
    """The lines of a function, comments among them, without its docstring and blank lines."""
    inside = range(function.lineno, (function.end_lineno or 0) + 1)
    first = function.body[0]
    docstring = range(first.lineno, (first.end_lineno or 0) + 1) if ast.get_docstring(function) else range(0)
    return sum(number not in docstring and bool(lines[number - 1].strip()) for number in inside)


def test_functions_stay_short() -> None:
    long = {}
    for path, node, lines in functions():
        count = num_lines_of(node, lines)
        if count > MAX_FUNCTION_LINES:
            long[f"{path}: {node.name}"] = count
    assert not long, f"more than {MAX_FUNCTION_LINES} lines: which steps have a name of their own? {long}"


def test_lines_of_a_function_are_counted_without_docstring_and_blank_lines() -> None:
    text = 'def f(x):\n    """One.\n\n    Two.\n    """\n    # why\n\n    return (\n        x\n    )\n'
    function = ast.parse(text).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert num_lines_of(function, text.splitlines()) == 5


def test_the_package_does_not_grow(capsys: pytest.CaptureFixture[str]) -> None:
    counts = dict.fromkeys(LAYERS, 0)
    for path in PACKAGE.rglob("*.py"):
        inside = path.relative_to(PACKAGE).parts
        counts[inside[0] if len(inside) > 1 else "base"] += len(path.read_text(encoding="utf-8").splitlines())
    with capsys.disabled():
        print(f"\nlines of the package: {sum(counts.values())}; {counts}")
    assert sum(counts.values()) <= MAX_PACKAGE_LINES, "leave out as much as comes in: the package is large enough"


def test_the_plain_path_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    """Calls and files of the package between a layer's call and its gradient, with five steps of CG."""
    layer = il.argmin(
        lambda x, t, a, b: ((a @ x - b) ** 2).sum() + t * (x**2).sum(),
        lambda f, x, t, a, b: torch.linalg.solve(a.T @ a + t * torch.eye(20, dtype=a.dtype), a.T @ b),
        linear_solver=il.ConjugateGradient(max_steps=5),
    )
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*size, dtype=torch.float64, generator=generator) for size in ((30, 20), (30,)))
    t = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    init = torch.zeros(20, dtype=torch.float64)
    layer(init, t, a, b).sum().backward()  # what is made once is made here
    gc.collect()
    gc.disable()  # what it would call of other tests' layers is no part of this path
    # not by sys.setprofile: for it Python 3.10 copies the variables of a frame, and keeps alive what is deleted
    with cProfile.Profile(builtins=False) as profile:
        layer(init, t, a, b).sum().backward()
    gc.enable()
    calls: Counter[str] = Counter()
    for entry in profile.getstats():
        if isinstance(entry.code, types.CodeType) and entry.code.co_filename.startswith(str(PACKAGE)):
            calls[entry.code.co_filename] += entry.callcount
    with capsys.disabled():
        print(f"\nplain path, forward and backward: {calls.total()} calls in {len(calls)} files of the package")
    assert 0 < calls.total() <= MAX_CALLS
    assert len(calls) <= MAX_FILES


def test_what_the_fast_check_leaves_out_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", "")
    (names,) = re.findall(r"^SLOW := (.*)$", makefile, flags=re.MULTILINE)
    assert names.split()
    for name in names.split():  # pytest passes over a file that it is to ignore and that does not exist
        assert (ROOT / "tests" / name).is_file(), f"Makefile: SLOW names tests/{name}, which is gone"


def test_no_file_mentions_what_it_should_not() -> None:
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        for pattern, reason in FORBIDDEN.items():
            for match in re.finditer(pattern, text, flags=re.MULTILINE):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{relative(path)}:{line}: {match.group()!r} is {reason}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code", ["import implicitlayer as il; il.experiments", "from implicitlayer import experiments"]
)
def test_whoever_looks_for_the_experiments_is_told_where_they_are(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "examples/paper/train.py" in result.stderr.splitlines()[-1]
