"""Write docs/reference.md anew from the code: .venv/bin/python scripts/reference.py

What the page says is what ``--help`` says, and what stands in the docstrings; tests/test_docs.py fails where
the page is another one.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from textwrap import dedent

import typer
from typer.testing import CliRunner

from hsm_signer import config, errors, pin
from hsm_signer.cli import exits, program

PAGE = Path(__file__).parents[1] / "docs/reference.md"

WIDTH = 78  # what a terminal of 80 columns gets

PUBLIC = {  # what programs may rely on, of a class with () its constructor; the rest is ours to change
    "hsm_signer.hsm.token": ("open_token", "Token"),
    "hsm_signer.hsm.signer": ("HsmSigner",),
    "hsm_signer.hsm.keys": ("KeyInfo",),
    "hsm_signer.hsm.proof": ("Proof", "Probe"),
    "hsm_signer.hsm.module": ("slots", "SlotInfo", "TokenInfo", "module_info", "ModuleInfo"),
    "hsm_signer.pin": ("from_source", "PIN_PAD"),
    "hsm_signer.assertion": ("ClientAssertion",),
    "hsm_signer.oauth.client": ("TokenClient",),
    "hsm_signer.oauth.response": ("TokenResponse", "parse"),
    "hsm_signer.oauth.cache": ("TokenCache()",),
    "hsm_signer.oauth.auth": ("BearerAuth",),
    "hsm_signer.oauth.httpx_auth": ("HttpxBearerAuth()",),
    "hsm_signer.oauth.transport": ("Transport()",),
    "hsm_signer.audit": ("AuditLog", "Head", "Verdict"),
    "hsm_signer.verify": ("AccessTokenVerifier", "VerifiedToken", "issuer_keys", "jwks_url", "jwks_file"),
    "hsm_signer.x509": ("self_signed", "request", "read_certificate", "read_certificates", "Certificate"),
    "hsm_signer.jose": ("Signer", "sign_compact", "thumbprint", "jwk_set", "b64url"),
    "hsm_signer.ecdsa": ("raw_from_der", "der_from_raw"),
    "hsm_signer.rehearsal": ("RehearsalServer",),
}
SHORT = import_module("hsm_signer").__all__


def commands(group: typer.core.TyperGroup, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command, the program itself first."""
    yield words
    for name, command in group.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name)


def help_of(words: tuple[str, ...]) -> str:
    """What ``hsm-token … --help`` prints."""
    app = program.application(words[0] if words else None)
    return CliRunner().invoke(app, [*words, "--help"], prog_name=program.PROGRAM, terminal_width=WIDTH).stdout


def _commands() -> Iterator[str]:
    yield "## Commands\n"
    for words in commands(typer.main.get_group(program.application())):
        yield f"### {' '.join((program.PROGRAM, *words))}\n"
        yield f"```text\n{help_of(words)}```\n"


def _settings() -> Iterator[str]:
    yield "## Settings\n"
    yield (
        "By their names in a profile. Those with a variable are options too, under the same name: `--module`. An "
        "option goes before the environment, the environment before the profile, the profile before its preset. "
        f"Besides, `--config` or `{config.variable('config')}` names the file, `--profile` or "
        f"`{config.variable('profile')}` the profile in it, and `{pin.PIN_VARIABLE}` holds a PIN where no source "
        "is set.\n"
    )
    yield "| setting | variable | default | is |\n|---|---|---|---|"
    for name, setting in config.SETTINGS.items():
        variable = f"`{config.variable(name)}`" if setting.metadata["option"] else ""
        default = "" if setting.default is None else f"`{_toml(setting.default)}`"
        yield f"| `{name.replace('_', '-')}` | {variable} | {default} | {setting.metadata['about']} |"
    yield ""
    yield f"`pin-source` is one of {', '.join(f'`{kind}`' for kind in pin.KINDS.split(', '))}.\n"
    yield "### Presets\n"
    yield "| preset | setting | value |\n|---|---|---|"
    for preset, values in config.PRESETS.items():
        for name, value in values.items():
            yield f"| `{preset}` | `{name}` | `{value}` |"
    yield ""
    yield "With `fapi2` the audience is the issuer, which has to be set.\n"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str([*value])
    return f'"{value}"' if isinstance(value, str) else str(value)


def _statuses() -> Iterator[str]:
    yield "## Exit statuses\n"
    yield "| status | error |\n|---|---|\n| 0 | |"
    yield f"| {exits.UNEXPECTED} | what is in no other line: a bug |"
    for status in sorted({status for _, status in exits.STATUSES}):
        kinds = [kind.__name__ for kind, its in exits.STATUSES if its == status]
        yield f"| {status} | {', '.join(f'`{kind}`' for kind in kinds)} |"
    yield f"| {exits.INTERRUPTED} | Ctrl-C |\n| {exits.CLOSED_PIPE} | the reader of our output went away |\n"
    yield "[Operating it](operating.md#exit-statuses) says what to do about each.\n"


def _errors() -> Iterator[str]:
    yield "## Errors\n"
    yield from _paragraphs(errors.__doc__ or "")


def _library() -> Iterator[str]:
    yield "## Library\n"
    short = ", ".join(f"`{name}`" for name in SHORT)
    yield f"{short} come from `hsm_signer` itself; the others from where they live.\n"
    for home, names in PUBLIC.items():
        yield f"### {home}\n"
        yield from _paragraphs(import_module(home).__doc__ or "")
        body = ast.parse(Path(inspect.getfile(import_module(home))).read_text()).body
        for name in names:
            yield from _public(name, body)


def _public(name: str, body: list[ast.stmt]) -> Iterator[str]:
    """One name of a module: how it is written, and its docstring."""
    is_constructor, name = name.endswith("()"), name.removesuffix("()")
    for number, node in enumerate(body):
        match node:
            case ast.FunctionDef() if node.name == name:
                yield f"#### {name}\n"
                yield from _described(_head(node), node)
            case ast.ClassDef() if node.name == name:
                yield f"#### {name}\n"
                yield from _described(_class(node), node)
                for method in node.body if not is_constructor else ():
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                        yield from _described(_head(method), method)
            case ast.AnnAssign(target=ast.Name(id=found)) if found == name:
                yield f"#### {name}\n"
                yield from _paragraphs(body[number + 1].value.value)  # type: ignore[attr-defined]  # its docstring


def _class(node: ast.ClassDef) -> str:
    """``class`` line, fields, and the parameters of the constructor."""
    bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
    lines = [f"class {node.name}{bases}:"]
    for each in node.body:
        if isinstance(each, ast.AnnAssign) and not ast.unparse(each.target).startswith("_"):
            lines.append(
                f"    {ast.unparse(each.target)}: {ast.unparse(each.annotation)}{_default(each.value)}"
            )
        if isinstance(each, ast.FunctionDef) and each.name == "__init__" and not _is_internal(node):
            lines.append("    " + _head(each).replace("\n", "\n    "))
    return "\n".join(lines)


def _is_internal(node: ast.ClassDef) -> bool:
    return node.name in ("Token", "HsmSigner")  # made by open_token and Token.signer only


def _default(value: ast.expr | None) -> str:
    if value is None:
        return ""
    if isinstance(value, ast.Call):  # dataclasses.field
        default = next((each.value for each in value.keywords if each.arg == "default"), None)
        return "" if default is None else f" = {ast.unparse(default)}"
    return f" = {ast.unparse(value)}"


def _head(node: ast.FunctionDef) -> str:
    """A function without its body, one parameter a line where it is long."""
    decorators = [f"@{ast.unparse(each)}\n" for each in node.decorator_list]
    given = [each for each in _parameters(node.args) if each not in ("self", "cls")]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"def {node.name}({', '.join(given)}){returns}"
    if len(line) > 88:
        line = f"def {node.name}(\n" + "".join(f"    {each},\n" for each in given) + f"){returns}"
    return "".join(decorators) + line


def _parameters(arguments: ast.arguments) -> Iterator[str]:
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + [*arguments.defaults]
    for each, default in zip(plain, defaults, strict=True):
        yield _parameter(each, default)
    if arguments.kwonlyargs:
        yield "*"
    for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _parameter(each, default)
    if arguments.kwarg:
        yield f"**{_parameter(arguments.kwarg, None)}"


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    annotation = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    return f"{argument.arg}{annotation}{_default(default)}"


def _described(head: str, node: ast.FunctionDef | ast.ClassDef) -> Iterator[str]:
    yield f"```python\n{head}\n```\n"
    yield from _paragraphs(ast.get_docstring(node) or "")


def _paragraphs(docstring: str) -> Iterator[str]:
    """reStructuredText as we use it, in Markdown: roles and literals as code, ``::`` before a block of it."""
    for paragraph in re.split(r"\n\n(?!    )|(?<=::)\n\n", inspect.cleandoc(docstring)):
        if paragraph.startswith("    "):
            yield f"```text\n{dedent(paragraph)}\n```\n"
            continue
        text = re.sub(r":(?:class|func|meth|data|mod):`~?([^`]+)`", r"`\1`", paragraph)
        text = re.sub(r"``([^`]+)``", r"`\1`", text).removesuffix("::").rstrip()
        text = re.sub(r"(?<=\w)$", ":", text) if paragraph.endswith("::") else text
        if text:
            yield f"{' '.join(text.split())}\n"


def reference() -> str:
    """The whole page."""
    parts = [
        "# Reference\n",
        "<!-- written by scripts/reference.py: change the code, not this page -->\n",
        *_commands(),
        *_settings(),
        *_statuses(),
        *_errors(),
        *_library(),
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
