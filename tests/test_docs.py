"""The documentation holds: Python blocks run, commands parse, links lead somewhere, public things are described."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from gdpd.cli.app import app
from gdpd.config import RunConfig
from gdpd.data.files import find_files
from gdpd.experiments import read_grid

ROOT = Path(__file__).resolve().parents[1]
_SPEC = importlib.util.spec_from_file_location("docs_check", ROOT / "docs" / "check.py")
check = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(check)

PAGES = check.documents(ROOT)
# Commands of `gdpd` that are run as they stand on a page, with these options after them: last wins, and a page's 300
# epochs take minutes.
QUICK = ["--epochs", "2", "--teacher-epochs", "2", "--teacher-candidates", "1", "--teacher-retries", "0"]
QUICK += ["--teacher-model", "lstm2-32", "--weak-teacher", "warn", "--resample-to", "16", "--batch-size", "50"]
RUN = {"datasets": [], "info": [], "version": [], "evaluate": [], "report": [], "distill": QUICK}
# Those that are only parsed here, and where they are run.
PARSED = {
    "bench": "tests/gdpd/test_cli.py",
    "demo": "tests/gdpd/test_experiments.py",
    "grid": "tests/gdpd/test_grid.py",
    "profile": "tests/gdpd/test_profile.py",
}
# Pages whose commands want more than the page: a finished grid, hours, a GPU, a module of the reader's own.
PARSED_PAGES = {
    "docs/gpu.md": "tests/gdpd_kernels/test_benchmark.py",
    "docs/grids.md": "tests/gdpd/test_grid.py",
    "docs/method.md": "tests/gdpd/test_methods.py",
    "docs/report.md": "tests/gdpd/test_report.py",
    "docs/results.md": "tests/gdpd/test_grid.py",
}
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    return [body for found, body in _BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def pages_with(language):
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if blocks(page, language)]


def run_in_page(page, folder):
    """Execute the page's Python blocks in order, in one namespace, as a reader would paste them."""
    namespace = {"__name__": f"page_{page.stem}"}
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        if match.group(1) == "python":
            line = text.count("\n", 0, match.start(2))
            exec(compile("\n" * line + match.group(2), str(page), "exec"), namespace)  # tracebacks name the page's line


def test_the_pages_are_found():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "architecture.md", "method.md", "getting-started.md"} <= {
        page.name for page in PAGES
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_names_its_language(page):
    known = {"python", "console", "yaml", "text", "make", "json", "toml"}
    assert {language for language, _ in _BLOCK.findall(page.read_text(encoding="utf-8"))} <= known


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_in_page(page, tmp_path)


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_yaml_blocks_are_configurations_or_grids(page, tmp_path):
    for body in blocks(page, "yaml"):
        read = yaml.safe_load(body)
        if "datasets" in read:
            (tmp_path / "grid.yaml").write_text(body)
            read_grid(tmp_path / "grid.yaml")
        else:
            RunConfig.from_dict(read)


@pytest.mark.parametrize("page", pages_with("console"))
def test_commands_parse(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for body in blocks(page, "console"):
        for line in body.splitlines():
            if not line.startswith("$ "):
                continue  # output
            command, *arguments = shlex.split(line[2:], comments=True)
            if command == "gdpd":
                parse(arguments)
            elif command == "make":
                assert {a for a in arguments if "=" not in a} <= targets, line
            elif command == "python" and arguments[0] == "-m":
                assert importlib.util.find_spec(arguments[1]) is not None, line
            else:
                others = {"pip", "git", "cd", "asv", "bash", "python", "pytest", "nsys", "nsys-ui", ".ci/run"}
                assert command in others, line


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in pages_with("console") if page.id not in PARSED_PAGES])
def test_commands_of_gdpd_run(page, tmp_path, monkeypatch):
    """In order, in one folder, as a reader would type them; a YAML block is the file that commands call run.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("path/to/NAME").mkdir(parents=True)
    bundled = find_files("ItalyPowerDemand")
    for split, file in (("TRAIN", bundled.train), ("TEST", bundled.test)):
        shutil.copy(file, f"path/to/NAME/NAME_{split}{file.suffix}")
    for language, body in _BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "yaml":
            Path("run.yaml").write_text(body, encoding="utf-8")
        for line in body.splitlines() if language == "console" else ():
            if line.startswith("$ gdpd ") and (arguments := shlex.split(line[2:], comments=True)[1:])[0] in RUN:
                further = [] if "--help" in arguments else RUN[arguments[0]]
                done = CliRunner().invoke(app, [*arguments, *further])
                assert done.exit_code == 0, (line, done.output, done.exception)


def test_what_is_only_parsed_here_is_run_elsewhere():
    for place in {**PARSED, **PARSED_PAGES}.values():
        assert (ROOT / place).exists(), place


def parse(arguments):
    """Parse a gdpd command line without running it; an unknown command or option raises."""
    name, *rest = arguments
    assert name in {**RUN, **PARSED}, f"gdpd {name}: say in RUN or PARSED how it is tested"
    command = typer.main.get_command(app).commands[name]
    if "--help" not in rest:
        with command.make_context(name, list(rest)):
            pass


def test_links_resolve():
    assert [problem for page in PAGES for problem in check.broken_links(page)] == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A heading, here\n[a](#a-heading-here) [b](absent.md) [c](#absent) [d](https://example.org)\n")
    assert list(check.broken_links(page)) == ["page.md: absent.md leads nowhere", "page.md: #absent names no heading"]


def test_every_page_is_in_the_navigation(tmp_path):
    assert list(check.unlisted()) == []
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "new.md").write_text("# New")
    (tmp_path / "mkdocs.yml").write_text("nav:\n  - Other: other.md\n")
    assert list(check.unlisted(tmp_path)) == ["new.md: not in the nav of mkdocs.yml"]


def messages():
    """Every text in the sources of the two packages, with … for what is filled in."""
    for package in check.PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_every_quoted_message_is_one_of_the_librarys():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### (.*)$", page, re.MULTILINE)
    assert len(quoted) > 30
    assert all(heading.startswith("`") and heading.endswith("`") for heading in quoted)
    known = [re.sub("…+", "…", message) for message in messages()]
    assert [heading for heading in quoted if not any(heading.strip("`") in message for message in known)] == []


def test_public_things_are_described():
    missing = [name for package in check.PACKAGES for path in (ROOT / package).rglob("*.py") for name in
               check.undocumented(path)]  # fmt: skip
    assert missing == []


def test_an_undescribed_function_is_found(tmp_path):
    module = tmp_path / "module.py"
    module.write_text("def shown():\n    pass\n\n\ndef _hidden():\n    pass\n")
    assert list(check.undocumented(module)) == ["module.py: the module", "module.py: shown"]


def test_the_check_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    (tmp_path / "page.md").write_text("[a](absent.md)\n")
    (tmp_path / "gdpd").mkdir()
    (tmp_path / "gdpd" / "module.py").write_text("x = 1\n")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "documents", lambda: [tmp_path / "page.md"])
    assert check.main() == 1
    err = capsys.readouterr().err
    assert "absent.md" in err
    assert "module.py" in err
    assert sys.modules.get("docs.check") is None


def test_pages_name_no_machine():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w.])/(home|root|Users|work|opt|tmp)/\w", text), page
