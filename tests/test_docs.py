"""The documentation: what it shows happens, what it names exists, and where it points something is."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from importlib import util
from pathlib import Path

import manual
import pytest
import typer
from manual import CHECKOUT, PAGES, Block, Desk, blocks, printed_as, prose, protected_api, sit_down

from hsm_signer import config, errors, pin, url
from hsm_signer.cli import exits, program
from hsm_signer.rehearsal import RehearsalServer

DOCS = CHECKOUT / "docs"
ALL = [block for page in PAGES for block in blocks(page)]


def of(language: str, *, run: bool | None = None) -> list[Block]:
    return [block for block in ALL if block.language == language and run in (None, block.runs)]


@pytest.fixture
def desk(tmp_path: Path, softhsm_module: str) -> Desk:
    return sit_down(tmp_path, softhsm_module)


CONSOLES = sorted({block.page for block in of("console", run=True)})


@pytest.mark.parametrize("page", CONSOLES, ids=lambda page: page.name)
def test_consoles_print_what_the_page_shows(page: Path, desk: Desk) -> None:
    shown = [
        (f"{block}: {command}", command, expected)
        for block in blocks(page)
        if block.runs and block.language == "console"
        for command, expected in block.steps
    ]
    printed = desk.type([command for _, command, _ in shown])
    for (where, _, expected), found in zip(shown, printed, strict=True):
        assert printed_as(expected, found), f"{where}\nprinted:\n{found}"


@pytest.mark.parametrize(
    "block", [each for each in of("python", run=True) if each.page.parent == DOCS], ids=str
)
def test_python_examples_run(block: Block, desk: Desk) -> None:
    options = f"--module {manual.MODULE} --token office --pin-source file:{manual.PIN_FILE}"
    label = re.search(r"pkcs11:object=([\w-]+)", block.text)
    desk.type(
        [
            f"hsm-token key generate {label[1] if label else 'das-2026'} {options}",
            f"hsm-token cert self-signed {options} --key {label[1] if label else 'das-2026'} "
            "--client-id das-api-auth --out cert.pem",
        ]
    )
    certificate = desk.home / "cert.pem"
    with RehearsalServer({"das-api-auth": certificate}) as server, protected_api() as (api, _):
        names = {
            "MODULE": desk.module,
            "ENDPOINT": server.token_endpoint,
            "ISSUER": server.issuer,
            "API": api,
        }
        done = desk.run_python(block.text, **names)
    assert (done.returncode, done.stderr) == (0, "")


# Names


def command_tree() -> dict[tuple[str, ...], set[str]]:
    """The words of every command and group, and its options."""

    def walk(
        command: typer.core.TyperCommand, words: tuple[str, ...]
    ) -> Iterator[tuple[tuple[str, ...], set[str]]]:
        yield (
            words,
            {text for each in command.params for text in (*each.opts, *each.secondary_opts)}
            | {"-h", "--help"},
        )
        for name, each in getattr(command, "commands", {}).items():
            yield from walk(each, (*words, name))

    return dict(walk(typer.main.get_command(program.application()), ()))


COMMANDS = command_tree()
OPTIONS = set().union(*COMMANDS.values())
OF_OTHERS = {"--dkek-shares", "--name", "--preload", "--upgrade"}  # options of other programs
CODE = re.compile(r"`([^`\n]+)`")
INDENTED = re.compile(r"^(?: {4}|\t)(.+)$", re.MULTILINE)


def lines_of_code(page: Path) -> list[str]:
    fenced = [line for block in blocks(page) for line in block.text.replace("\\\n>", " ").splitlines()]
    return [*fenced, *INDENTED.findall(prose(page)), *CODE.findall(prose(page))]


def calls(line: str) -> Iterator[list[str]]:
    """The words of each call of hsm-token in a line."""
    for found in re.finditer(r"(?:^|[\s(/])hsm-token (?=[a-z-])([^|;&<>)#]*)", line):
        before = line[: found.start()].rstrip()
        if not before or before.endswith(("$", "|", "(", ";", "gateway", "bin")) or before[-1].isdigit():
            yield re.split(r"\s+", found[1].strip())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(CHECKOUT).as_posix())
def test_commands_and_options_that_a_page_names_exist(page: Path) -> None:
    if page.name == "reference.md":
        return  # compared with the commands themselves
    unknown = []
    for line in lines_of_code(page):
        for words in calls(line):
            depth = next(
                (n for n, word in enumerate(words) if not re.fullmatch(r"[a-z-]+", word)), len(words)
            )
            known = next((tuple(words[:n]) for n in range(depth, -1, -1) if tuple(words[:n]) in COMMANDS), ())
            given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
            if not known and words[0] and not words[0].startswith("-"):
                unknown.append(f"hsm-token {words[0]}")
            unknown += [
                f"hsm-token {' '.join(known)} {option}" for option in given - COMMANDS[known] - {"-vv"}
            ]
    bare = {
        word
        for code in CODE.findall(prose(page))
        if code.startswith("--")
        for word in [code.split()[0].partition("=")[0]]
    }
    unknown += sorted(bare - OPTIONS - OF_OTHERS)
    assert unknown == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(CHECKOUT).as_posix())
def test_a_page_installs_into_an_environment_where_pip_may(page: Path) -> None:
    lines = [line for line in lines_of_code(page) if re.search(r"pip install '?\.", line)]
    assert [line for line in lines if "/bin/pip install" not in line] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(CHECKOUT).as_posix())
def test_variables_that_a_page_names_exist(page: Path) -> None:
    settings = [name for name, each in config.SETTINGS.items() if each.metadata["option"]]
    known = {config.variable(name) for name in (*settings, "profile", "config")} | {pin.PIN_VARIABLE}
    named = set(re.findall(r"\bHSM_TOKEN_[A-Z_]+\b", page.read_text(encoding="utf-8")))
    assert named <= known


@pytest.mark.parametrize("block", of("toml"), ids=str)
def test_profiles_load(block: Block, tmp_path: Path) -> None:
    is_whole = re.match(r"(?:\s*#.*\n|\s*\n)*\[", block.text)
    text = block.text if is_whole else f"[profiles.das]\n{block.text}"
    file = tmp_path / "config.toml"
    file.touch(mode=0o600)
    file.write_text(text)
    for profile in re.findall(r"^\[profiles\.([\w-]+)\]", text, re.MULTILINE):
        settings = config.load({"config": str(file), "profile": profile}, {})
        assert settings.profile == profile


def test_the_table_of_exit_statuses_is_the_one_of_the_program() -> None:
    section = (DOCS / "operating.md").read_text(encoding="utf-8").partition("\n## Exit statuses\n")[2]
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", section.partition("\n## ")[0], re.MULTILINE)
    told = {int(status): set(re.findall(r"`(\w+Error)`", text)) for status, text in rows}
    kinds: dict[int, set[str]] = {
        status: set() for status in (0, exits.UNEXPECTED, exits.INTERRUPTED, exits.CLOSED_PIPE)
    }
    for kind, status in exits.STATUSES:
        kinds.setdefault(status, set()).add(kind.__name__)
    assert told == kinds


# The reference


@pytest.fixture(scope="session")
def generator():
    spec = util.spec_from_file_location("reference", CHECKOUT / "scripts/reference.py")
    assert spec
    assert spec.loader
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_code_says(generator) -> None:
    assert generator.PAGE.read_text(encoding="utf-8") == generator.reference(), (
        "write it anew: .venv/bin/python scripts/reference.py"
    )


def test_help_in_the_reference_is_what_the_program_prints() -> None:
    page = (DOCS / "reference.md").read_text(encoding="utf-8")
    told = dict(
        re.findall(r"^### hsm-token ?([\w -]*)\n\n```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    )
    assert set(told) == {" ".join(words) for words in COMMANDS}

    def printed(words: str) -> str:
        command = [sys.executable, "-m", "hsm_signer.cli", *words.split(), "--help"]
        return subprocess.run(
            command, env=os.environ | {"COLUMNS": "80"}, capture_output=True, text=True
        ).stdout

    with ThreadPoolExecutor(2) as pool:
        assert dict(zip(told, pool.map(printed, told), strict=True)) == told


# Links


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(CHECKOUT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", prose(page))):
        path, _, anchor = target.partition("#")
        if re.match(r"(?:https|mailto):", target):
            continue
        file = (page.parent / path).resolve() if path else page
        if file == CHECKOUT / "benchmarks/README.md" and not file.exists():
            continue
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(CHECKOUT).as_posix())
def test_rows_of_a_table_have_as_many_cells_as_its_head(page: Path) -> None:
    for table in re.findall(r"(?:^\|.*\n)+", prose(page), re.MULTILINE):
        rows = table.splitlines()
        assert [row for row in rows if row.count("|") - row.count(r"\|") != rows[0].count("|")] == []


class _Loads(HTMLParser):
    """What a browser loads with a page, unasked."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "link") and given.get("rel") != "canonical":
            self.found += [value for name in ("src", "href") if (value := given.get(name))]


def test_the_site_builds_strictly_and_loads_nothing_from_other_hosts(tmp_path: Path) -> None:
    built = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--site-dir",
            str(tmp_path / "site"),
        ],
        cwd=CHECKOUT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    pages = [*(tmp_path / "site").rglob("*.html")]
    assert len(pages) > len([*DOCS.glob("*.md")])
    for page in pages:
        loads = _Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        assert [each for each in loads.found if "//" in each] == [], page
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"@import|url\([\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


# Troubleshooting: each error text that there is, and none that there is not


# Where the text that a person reads is put together: which argument is a piece of it, and what stands around it
WRAPPED = {
    "_reject": (0, "the answer of the token endpoint {}"),
    "failure": (1, "{}: …"),
    "_unexpected": (2, "…: {}, …"),
    "_cannot": (0, "token … did not {} (tried: …): …"),
    "not_changed": (0, "{}"),
    "fail": (0, "…: {}"),
    "_ClosedError": (0, "{}"),
    "NotCheckedError": (0, "{}"),
    "_RefusedError": (0, "refused: …: {}: …"),
}
TOGETHER = {  # texts that are put together from more than one place; a piece of each stands in the code
    "unexpected …": "unexpected {",
    "no … given": "no {hyphened} given",
    "… (…) must be one of …": "one of {",
    "… is …, found …": "{kind} is {what}, found",
    "The key can leave its token (…; …).": "The key {found} (",
    "the authorization server refused with …: …": "the authorization server refused with {status}: {said}",
    "the server answered …": "the server answered {status}",
    "tried … times in … s: …": "tried {len(attempts)} times in ",
    "the cache is not used: …": "the cache is not used: {exc}",
    "the certificate … ends on …, in … days": "ends on {end}, in {left} days",
    "the certificate … ended on …": "ended on {end}",
    "…: expected …, …": "expected {self.issuer!r}",
    "…: … is missing, …": " is missing",
    "audit log …: …": "audit log {log.path}: ",
    "audit log …: line … is none of ours": "is none of ours",
    "the … is no JSON": '"is no JSON"',
    "the … is no UTF-8": '"is no UTF-8"',
    "the … is JSON, but no object": '"is JSON, but no object"',
    "the … has a member twice, so nobody can tell which one is meant": '"has a member twice, so nobody can tell',
    "… is no TOML: …": "is no TOML: {",
}
IN_FILE = {"config.py": {"ValueError": (0, "… (…) must be {}")}}
RETURNED = {"_explained": "…: {}", "_fault": "assertion: {}"}  # by these functions, alone or first of a tuple
SHORT = 8  # letters; what is shorter consists of other texts


def messages() -> dict[str, str]:
    """Every error text in the code, what varies as ``…``, and where it stands."""
    found = {}
    for file in sorted((CHECKOUT / "hsm_signer").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            pieces = [*raised(node, IN_FILE.get(file.name, {})), *returned(node)]
            for text in (re.sub(r"…(?:\s*…)+", "…", each) for each in pieces):
                if len(re.sub(r"[^a-z]", "", text)) >= SHORT:
                    found[text] = f"{file.relative_to(CHECKOUT)}:{node.lineno}"
    faults = {f"…: {fault}; found …": "hsm_signer/url.py" for _, fault in url._FAULTS}
    return found | faults


def raised(node: ast.AST, in_file: Mapping[str, tuple[int, str]]) -> Iterator[str]:
    """The texts of an error that is made here, or of a warning."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
        return
    name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
    if ast.unparse(node.func) == "super().__init__":
        yield from (text for argument in node.args[:1] for text in templates(argument))
    if ast.unparse(node.func) == "findings.append":
        yield from (f"audit log …: {text}" for text in templates(node.args[0]))
    is_warning = re.fullmatch(r"_?log\.warning", ast.unparse(node.func))
    wrapped = WRAPPED | in_file
    if name in vars(errors) or name in wrapped or is_warning:
        position, form = wrapped.get(name, (0, "{}"))
        yield from (
            form.format(text)
            for argument in node.args[position : position + 1]
            for text in templates(argument)
        )


def returned(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef) and node.name in RETURNED:
        for each in ast.walk(node):
            if isinstance(each, ast.Return) and each.value:
                value = each.value.elts[0] if isinstance(each.value, ast.Tuple) else each.value
                yield from (RETURNED[node.name].format(text) for text in templates(value))


def templates(node: ast.expr) -> list[str]:
    match node:
        case ast.Constant(value=str(text)):
            return [re.sub(r"%[rsd]", "…", text)]
        case ast.Constant():
            return []
        case ast.JoinedStr():
            return [
                "".join(str(each.value) if isinstance(each, ast.Constant) else "…" for each in node.values)
            ]
        case ast.IfExp():
            return [*templates(node.body), *templates(node.orelse)]
    return ["…"]


def test_each_error_text_is_explained_and_no_other() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE))
    known = messages()
    code = "".join(file.read_text(encoding="utf-8") for file in (CHECKOUT / "hsm_signer").rglob("*.py"))
    assert [piece for piece in TOGETHER.values() if piece not in code] == []
    missing = {text: where for text, where in known.items() if text not in explained}
    assert missing == {}, "each needs a row in docs/troubleshooting.md"
    assert explained - known.keys() - TOGETHER.keys() == set(), "no code says that any more"
