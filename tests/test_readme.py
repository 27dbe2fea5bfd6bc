"""
The documents cannot rot: their commands are commands, their flags are flags, their names are names, their links lead
somewhere. Commands of older versions stand in EXPERIMENTS.md between ```text and are not checked.
"""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parent.parent
DOCUMENTS = {name: (HOUSE / f"{name}.md").read_text() for name in ("README", "PAPER", "EXPERIMENTS", "CONTRIBUTING")}
CURRENT = "\n".join(text for name, text in DOCUMENTS.items() if name != "EXPERIMENTS")  # spans there may be older
SCRIPTS = ("train", "eval", "predict", "data")
MODULES = {
    name: name for name in ("mvlt", "kaleido", "vlmo", *SCRIPTS)
} | {name: f"extras.{name}" for name in ("weights", "foreign", "runtime", "bench", "toy")}
CLASSES = {"MVLT": "mvlt", "Kaleido": "kaleido", "VLMo": "vlmo"}


def outside_fences(text):
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def find_commands():
    """Every line of a ```sh block, and every `inline command`, that calls one of our scripts."""
    lines = []
    for text in DOCUMENTS.values():
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
            lines += block.splitlines()
    spans = re.findall(r"`([^`]+)`", outside_fences(CURRENT))
    lines += [span for span in spans if " " in span]  # a script's name alone is no command
    scripts = "|".join(SCRIPTS)
    return sorted({line for line in lines if re.search(rf"\b({scripts})\.py\b|-m extras\.", line)})


COMMANDS = find_commands()
NAMES = re.findall(rf"`((?:{'|'.join([*MODULES, *CLASSES])})\.\w+(?:\[\"\w+\"\])?)", "\n".join(DOCUMENTS.values()))
LINKS = [(name, link) for name, text in DOCUMENTS.items() for link in re.findall(r"\]\((?!http)([^)]+)\)", text)]


class Parsed(Exception):
    """The flags were understood; nothing was run."""


def split_command(command):
    """The module and the arguments of "pip install ... && torchrun ... train.py --data DIR"."""
    words = shlex.split(command.split("&&")[-1])
    for place, word in enumerate(words):
        if word.endswith(".py") or word.startswith("extras."):
            return importlib.import_module(word.removesuffix(".py")), words[place + 1 :]


def understand(module, arguments, monkeypatch):
    """Let the script's own parser read the arguments, and run nothing."""
    if hasattr(module, "parse"):
        return module.parse(arguments)

    def parse_only(self, given=None, namespace=None):
        parse_args(self, given, namespace)
        raise Parsed

    parse_args = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    with pytest.raises(Parsed):
        module.main(arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_documents_is_understood_by_its_script(command, monkeypatch):
    module, arguments = split_command(command)
    understand(module, arguments, monkeypatch)


def test_an_unknown_flag_would_be_noticed(monkeypatch):
    for command in ("train.py --weight 3", "eval.py RUN --weight 3", "data.py check DIR --weight 3"):
        with pytest.raises(SystemExit):
            understand(*split_command(command), monkeypatch)


def test_the_commands_of_every_script_were_found():
    called = {split_command(command)[0].__name__ for command in COMMANDS}
    assert called >= {*SCRIPTS, "extras.bench"}
    assert len(COMMANDS) >= 15


def value_of(arguments, flag, default):
    return arguments[arguments.index(flag) + 1] if flag in arguments else default


@pytest.mark.parametrize("command", [command for command in COMMANDS if "train.py" in command])
def test_every_size_preset_and_objective_that_a_command_names_exists(command):
    _, arguments = split_command(command)
    model = importlib.import_module(value_of(arguments, "--model", "mvlt"))
    if "--from" not in arguments:
        model.Config.preset(value_of(arguments, "--size", "nano"))
    preset = model.RECIPES[value_of(arguments, "--preset", "demo")]
    recipe = {name: value for name, value in preset.items() if hasattr(model.Recipe, name)}
    if "--objectives" in arguments:
        recipe["objectives"] = value_of(arguments, "--objectives", "")
    assert model.Recipe(**recipe).weights


def known_flags(capsys):
    """What --help of every script, model and predict.py's commands lists."""
    calls = [("train", ["--model", model, "--help"]) for model in CLASSES.values()]
    calls += [("eval", ["--help"]), ("extras.bench", ["--help"])]
    calls += [("predict", ["RUN", command, "--help"]) for command in ("rebuild", "search")]
    for module, arguments in calls:
        with pytest.raises(SystemExit):
            importlib.import_module(module).parse(arguments)
    return set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))


def test_every_flag_that_the_documents_name_is_a_flag_of_a_script(capsys):
    spans = [span for span in re.findall(r"`([^`]+)`", outside_fences(CURRENT)) if span.startswith("--")]
    named = {flag for span in spans if "http" not in span for flag in re.findall(r"--[a-z][\w-]*", span)}
    assert len(named) >= 10
    assert named - known_flags(capsys) == set()


@pytest.mark.parametrize("name", sorted(set(NAMES)))
def test_every_name_that_the_documents_point_to_exists(name):
    module, attribute, key = re.fullmatch(r'(\w+)\.(\w+)(?:\["(\w+)"\])?', name).groups()
    if attribute == "py":
        assert (HOUSE / name).is_file()
        return
    if module in CLASSES:
        owner = getattr(importlib.import_module(CLASSES[module]), module)
    else:
        owner = importlib.import_module(MODULES[module])
    assert hasattr(owner, attribute)
    assert key is None or key in getattr(owner, attribute)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:extras/|tests/|test_|figures/)[\w./]*)`", CURRENT))))
def test_every_path_that_the_documents_point_to_exists(path):
    assert (HOUSE / path).exists()


def anchors(text):
    """GitHub's names of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", outside_fences(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document, link", sorted(set(LINKS)))
def test_every_link_leads_to_a_small_file_and_to_a_heading_in_it(document, link):
    file, _, anchor = link.partition("#")
    path = HOUSE / (file or f"{document}.md")
    assert 0 < path.stat().st_size < 1_000_000
    assert not anchor or anchor in anchors(path.read_text())
