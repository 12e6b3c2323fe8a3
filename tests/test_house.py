"""The rules that keep the house: its sizes, its arrows, its words. import-linter keeps the arrows between rooms."""

import ast
import importlib
import re
from pathlib import Path

import click
import grimp
import pytest

import kizu
from kizu.cli.main import cli

SOURCE = Path(kizu.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))
ROOMS = [SOURCE, *(path for path in SOURCE.rglob("*") if path.is_dir() and path.name != "__pycache__")]
MAX_LINES, MAX_FUNCTION, MAX_ENTRIES = 500, 60, 14


def name_of(path):
    return path.relative_to(SOURCE).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION, f"{node.name} is long"


@pytest.mark.parametrize("room", ROOMS, ids=name_of)
def test_rooms_are_small(room):
    """Python's own __init__.py and __main__.py tell nobody where something is."""
    entries = {path.name for path in room.iterdir()} - {"__pycache__", "__init__.py", "__main__.py"}
    most = MAX_ENTRIES + (room == SOURCE)  # the house itself has the room of the cluster too
    assert len(entries) <= most, sorted(entries)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_what_disappears_when_nobody_holds_it_is_made_in_one_place(path):
    """Every command sweeps away what `files.UNFINISHED` begins with and no process holds."""
    if name_of(path) != "data/files.py":
        assert not re.search(r"prefix=(files\.)?UNFINISHED", path.read_text()), "use files.scratch_folder or new_folder"


@pytest.mark.parametrize("path", [path for path in MODULES if "cli" not in path.parts], ids=name_of)
def test_only_the_command_line_speaks_of_flags(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not re.search(r"(^|[ (`\"'])--[a-z]", node.value), f"line {node.lineno}: {node.value[:80]}"


def options(command=cli, parent=None):
    """The names of all options of all commands, as Python spells them."""
    context = click.Context(command, parent=parent)
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option):
            yield from (name.lstrip("-").replace("-", "_") for name in parameter.opts)
    for name in command.list_commands(context) if isinstance(command, click.Group) else ():
        yield from options(command.get_command(context, name), context)


def test_every_setting_that_a_sentence_names_is_an_option():
    """The command line makes flags of them, and a flag that does not exist helps nobody."""
    known = set(options())
    for path in MODULES:
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                for name in re.findall(r"`([a-z]\w*)[`=]", node.value):
                    assert name in known, f"{name_of(path)}, line {node.lineno}: {node.value[:80]}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_exports_are_what_is_there_and_what_others_import(path):
    """`__all__` names things that exist, and whatever another module imports stands in it."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kizu."):
            source = SOURCE.parent.joinpath(*node.module.split("."))
            source = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
            for alias in node.names:
                if source.name == "__init__.py" and alias.name not in exported(source):
                    continue  # a module of the room
                assert alias.name in exported(source), f"{node.module} does not export {alias.name}"


def exported(path):
    names = []
    for node in ast.parse(path.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            names += ast.literal_eval(node.value)
    return names


def test_public_names_can_be_imported():
    for name in kizu.__all__:
        assert getattr(kizu, name) is not None


@pytest.mark.parametrize(
    "module",
    [".".join(["kizu", *path.relative_to(SOURCE).with_suffix("").parts]) for path in MODULES if "__" not in path.name],
)
def test_every_export_exists(module):
    loaded = importlib.import_module(module)
    for name in getattr(loaded, "__all__", ()):
        assert hasattr(loaded, name), name


def test_no_module_needs_itself():
    """No circle of imports anywhere, whether at the top of a file or inside a function."""
    graph = grimp.build_graph("kizu", exclude_type_checking_imports=True, cache_dir=None)
    for module in graph.modules - {"kizu"}:
        for imported in graph.find_modules_directly_imported_by(module) - {"kizu"}:
            chain = graph.find_shortest_chain(imported, module)
            assert chain is None or "kizu" in chain, " → ".join([module, *chain])
