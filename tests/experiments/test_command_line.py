"""KEY=VALUE options mean what they mean to MMEngine; packages' news stay off the console."""

import argparse
import importlib
import subprocess
import sys
import warnings

import numpy as np
import pytest

from polyfocal.__main__ import main
from polyfocal.errors import UserError
from polyfocal.experiments.command_line import add_experiment_options, run_tool, seed, value_of

TEXTS = (
    "1", "-3", "0.5", "1e-3", "true", "False", "None", "none", "adam", "a,b", "1,2.5,x", "[a,b]",
    "(1, 2)", "[(1,2),(3,4)]", "[[1,2],[3]]", "'quoted'", '"[1, 2]"', "[]", "()", "1,", "a,,b",
    "data/x y", "http://a/b", "1_000", "nan", "inf", "[(a,b),c,(1,)]",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_values_are_mmengines(text):
    config = pytest.importorskip("mmengine.config")
    right = config.DictAction._parse_iterable(text)
    found = value_of(text)
    assert repr(found) == repr(right)


@pytest.mark.parametrize("text", ["[1,2", "1,2)", "[(1,2]", "a,(b", "novalue"])
def test_a_mistake_is_a_usage_error(text, capsys):
    parser = argparse.ArgumentParser()
    add_experiment_options(parser)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--cfg-options", text if text == "novalue" else f"key={text}"])
    assert stopped.value.code == 2
    assert "--cfg-options takes KEY=VALUE, got" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["-1", str(2**32), "1.5", "one"])
def test_a_seed_is_one_that_numpy_takes(text, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=seed)
    largest = parser.parse_args(["--seed", str(2**32 - 1)]).seed
    np.random.RandomState(largest)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--seed={text}"])
    error = f"argument --seed: '{text}': expected a whole number from 0 to 4294967295"
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("train", "work_dirs/CONFIG's name"),
        ("tune", "work_dirs/tune/CONFIG's name"),
        ("reproduce", "work_dirs/reproduce/STUDY's name"),
    ],
)
def test_help_says_where_the_results_go(command, place, capsys):
    pytest.importorskip("mmengine")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"(default: {place})" in " ".join(capsys.readouterr().out.split())


def test_exit_status_and_sentence(capsys):
    def job(error):
        raise error

    for error, status, said in (
        (UserError("no such thing."), 2, "error: no such thing.\n"),
        (FileNotFoundError(2, "No such file", "away"), 2, "error: away: No such file.\n"),
        (KeyboardInterrupt(), 130, "interrupted; go on with --resume\n"),
    ):
        assert run_tool(job, error, goes_on_with="--resume") == status
        assert capsys.readouterr().err == said
    assert run_tool(job, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(AssertionError):
        run_tool(job, AssertionError("a mistake of the program"))


@pytest.mark.parametrize(
    ("goes_on_with", "then"),
    [("--resume", "go on with --resume"), (None, "give the same command again")],
)
def test_a_damaged_picture(capsys, goes_on_with, then):
    def job(_):
        raise AssertionError("failed to load image: a.png")

    assert run_tool(job, None, goes_on_with=goes_on_with) == 2
    said = f"error: a.png cannot be read as a picture: put it right, then {then}.\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("name", ["compare", "test", "curvature", "train", "tune", "reproduce"])
def test_what_to_go_on_with_is_an_option_of_the_tool(name, capsys, monkeypatch):
    """Or the same command."""
    pytest.importorskip("mmdet", reason="needs MMDetection: pip install 'polyfocal[mmdet]'")
    tool = importlib.import_module(f"polyfocal.commands.{name}")
    known = []

    def parse(parser, *_):
        known.append(parser.format_help())
        return argparse.Namespace(config="", seeds=None)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(tool, "run", stop)
    assert tool.main([]) == 130
    said = capsys.readouterr().err
    assert ("--resume" in said) == ("--resume" in known[0])


def test_news_of_packages_are_not_shown(recwarn):
    def job(_):
        for kind, text in (
            (FutureWarning, "`torch.jit.script` is deprecated. Please switch to `torch.compile`"),
            (UserWarning, "pkg_resources is deprecated as an API."),
            (UserWarning, "Warning: The text is out of bounds, the drawn text may not be in it"),
            (FutureWarning, "`isinstance(treespec, LeafSpec)` is deprecated, use `isinstance(t"),
            (UserWarning, "the learning rate is 0"),
        ):
            warnings.warn(text, kind, stacklevel=1)

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert run_tool(job, None) == 0
    assert [str(one.message) for one in shown] == ["the learning rate is 0"]


def test_help_needs_no_framework():
    """The options are there before a framework is imported, which takes seconds."""
    program = (
        "import sys\n"
        "from polyfocal.experiments import command_line, request\n"
        "import polyfocal.adapters\n"
        "print([name for name in ('mmengine', 'mmcv', 'mmdet') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout == "[]\n", found.stderr
