"""The README cannot rot: its commands are commands, its names are names, its files are there. What it promises of whole runs, `.ci/run` does."""
import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import mvlt

HERE = Path(__file__).resolve().parent
README = (HERE / "README.md").read_text()
BOTH = README + (HERE / "EXPERIMENTS.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines() if ".py" in line]
NAMES = sorted(set(re.findall(r"`((?:mvlt|data|train|eval|predict|MVLT)\.\w+)", BOTH)))


class Parsed(Exception):
    """The flags were understood; nothing was run."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_is_understood_by_its_script(command, monkeypatch):
    words = shlex.split(command.split("&&")[-1])
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, arguments=None, namespace=None):
        parse(self, arguments, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", words[script:])
    with pytest.raises(Parsed):
        runpy.run_path(str(HERE / words[script]), run_name="__main__")


def test_the_commands_were_found():
    assert len(COMMANDS) >= 15
    assert {word for command in COMMANDS for word in command.split() if word.endswith(".py")} >= {"train.py", "eval.py", "predict.py", "data.py", "bench.py"}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_that_the_readme_or_the_experiments_point_to_exists(name):
    module, attribute = name.split(".")
    if attribute == "py":
        assert (HERE / name).is_file()
    elif module == "MVLT":
        assert hasattr(mvlt.MVLT, attribute)
    else:
        assert hasattr(__import__(module), attribute)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)]+)\)", BOTH)) | set(re.findall(r"`([A-Z]+(?:\.\w+)?)`", README)) & {"LICENSE", "CITATION.bib", "CONTRIBUTING.md"}))
def test_every_file_that_the_readme_or_the_experiments_link_is_there_and_small(path):
    assert 0 < (HERE / path).stat().st_size < 1_000_000
