"Names of others reach no terminal, spreadsheet or formula; a program that cannot print says so in a sentence."

import errno
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress

import numpy as np
import pandas as pd
import psutil
import pytest
import typer
from disks import run_child
from program import PROGRAM, run_here

from vermouth.app import cli
from vermouth.app.docs import results_table
from vermouth.app.run import gather, read_parameters
from vermouth.app.search import Hit, hits_page
from vermouth.core import VermouthError, printable
from vermouth.experiments.tables import ROW, append_rows, escape_formula, measured_rows, unescape_formula
from vermouth.visualize import grid, overlay, scatter

ESCAPES = [
    "\x1b[2Jcat",
    "\x1b]0;title\x07",
    "\x9b31m",
    "a\rb",
    "a\nb",
    "\x08\x7f",
    "\u202egnp.exe",
    "\u2066\u2069",
    "\u2028",
    "caf\udce9",
    "\U000e0041",
    "\ufeff",
]
TOYBOX = ["--model", "toybox"]
ORDER = ["\x1b", "\x9b", "\r", "\x08", "\x7f", "\x07", "\u202e", "\u2066", "\u2028", "\udce9", "\U000e0041"]
FORMULAS = ["=1+1", "=cmd|' /C calc'!A0", "+1-1", "-x", "@sum(1)", "\t=1", "\r=1", "'=1", "''", "＝1"]


def harmless(text):
    return not [c for c in ORDER if c in text]


# Terminals


@pytest.mark.parametrize("text", ESCAPES)
def test_text_of_others_is_printable(text):
    assert printable(text).isprintable() and printable(printable(text)) == printable(text)
    assert str(VermouthError(text)) == printable(text)


def test_usual_names_stay_as_they_are():
    for text in ("naïve café", "猫", "👩\u200d🚀", "C:\\new", "a b", "<b>", ""):
        assert printable(text) == text


@pytest.fixture
def command():
    "Run a command of the program that does what it is told."

    def run(action, *words):
        app = typer.Typer(pretty_exceptions_enable=False)
        app.command(cls=cli._Command)(action)
        app.command("other")(lambda: None)
        from typer.testing import CliRunner

        return CliRunner().invoke(app, ["action", *words])

    return run


@pytest.mark.parametrize("text", ESCAPES)
def test_no_command_prints_them(command, text):
    def action(as_json: bool = False, fail: bool = False):
        typer.echo(warnings.formatwarning(text, UserWarning, "a file", 1), err=True, nl=False)
        if fail:
            raise VermouthError(f"names={text}: unknown.")
        cli._finish({"name": text}, [f"{text}\t1.0", *cli._table(["name"], [[text]])], as_json)

    for words in ([], ["--as-json"], ["--fail"]):
        result = command(action, *words)
        assert harmless(result.stdout + result.stderr), result.output
        if "--as-json" in words:
            assert json.loads(result.stdout) == {"name": text}
        else:
            assert not words or result.exit_code == 2 and len(result.stderr.splitlines()) == 2


def test_cells_of_a_table_are_no_markup(command):
    assert "[red]cat[/red]" in cli._table(["name"], [["[red]cat[/red]"]])[1]


def test_a_page_of_hits_holds_none(tmp_path):
    for text in ESCAPES:
        page = hits_page([Hit(text, 0.5)], tmp_path / "hits.html", query=text).read_text(encoding="utf-8")
        assert harmless(page.replace("\r\n", "\n"))


def test_a_photo_with_such_a_name_is_found(program, photos):
    "From the file system to the terminal: index, search, classify and their JSON."
    os.mkdir("photos")
    names = [f"{i}{name}.png" for i, name in enumerate(ESCAPES)]
    for name in names:
        with open(f"photos/{name}", "wb") as f:
            photos[0].save(f, "PNG")
    assert run_here("index", "photos", "--out", "idx", *TOYBOX).exit_code == 0
    found = run_here("search", "idx", "a fish", "-k", "99", *TOYBOX)
    assert harmless(found.stdout + found.stderr) and len(found.stdout.splitlines()) == len(names)
    told = json.loads(run_here("search", "idx", "a fish", "-k", "99", "--json", *TOYBOX).stdout)
    assert sorted(hit["path"] for hit in told["hits"]) == sorted(names)
    named = run_here("classify", "photos", "--names", "cat\x1b[2J,fish\u202e", *TOYBOX)
    assert named.exit_code == 0 and harmless(named.stdout) and len(named.stdout.splitlines()) == len(names)


# Spreadsheets


@pytest.mark.parametrize("cell", [*FORMULAS, "-0.5", "+3", "-inf", "1e-4", "", "a=b", -0.5, 7, None])
def test_cells_come_back_as_they_were(cell):
    escaped = escape_formula(cell)
    assert unescape_formula(escaped) == cell
    if cell in FORMULAS:
        assert escaped == f"'{cell}" or cell == "''"
    else:
        assert escaped == cell


def test_tables_of_results_hold_no_formula(tmp_path):
    row = dict(zip(ROW, ["sbir", "toybox", "", "k=1", "mAP", -0.25, 0, 12], strict=True))
    file = tmp_path / "results" / "10_sbir.csv"
    append_rows(file, [row | {"method": formula} for formula in FORMULAS])
    gather(tmp_path / "results", tmp_path / "all.csv")
    for path in (file, tmp_path / "all.csv"):
        table = pd.read_csv(path, keep_default_na=False)
        assert not [m for m in table.method if m[:1] in ("=", "+", "-", "@", "\t", "\r", "＝")]
        assert table.value.tolist() == [-0.25] * len(FORMULAS), "numbers stay numbers"
    assert measured_rows(tmp_path / "results").method.tolist() == FORMULAS
    assert "| =1+1 | -0.250 |" in results_table(file)


def test_a_row_that_a_kill_has_cut_does_not_swallow_the_next(tmp_path):
    row = dict(zip(ROW, ["sbir", "toybox", "cut", "", "mAP", 0.5, 0, 12], strict=True))
    append_rows(tmp_path / "t.csv", [row, row])
    (tmp_path / "t.csv").write_bytes((tmp_path / "t.csv").read_bytes()[:-60])
    append_rows(tmp_path / "t.csv", [row | {"method": "next"}])
    assert measured_rows(tmp_path).iloc[-1].method == "next"


# Formulas of matplotlib


@pytest.mark.parametrize("name", ["$\\foo$", "$x$ and $", "$", "\\$a$", "_hidden", "$" * 50])
def test_pictures_show_names_as_they_are(photos, name):
    labels = np.zeros((64, 64), int)
    labels[32:] = 1
    assert overlay(photos[0], labels, [name, "cat"]).width > 300
    figure = grid([[(photos[0], name)]], top=[name], left=[name])
    scatter(figure.add_subplot(), np.zeros((2, 2)), [name, "cat"], ["photo", name], name)
    figure.canvas.draw()


# Parameters


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}", "a: &a [1]\nb: *a", "&a [*a]"])
def test_yaml_that_refers_to_itself_is_refused(tmp_path, text):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(VermouthError, match="refers to values elsewhere"):
        read_parameters(file=tmp_path / "p.yaml")


# Standard streams


AGAIN = " What is finished is kept: give the same command again."
SEARCH = ["search", "idx", "fish_000.png", "--count", "99", "--model", "efficientnet_lite0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with an index of photos that are called alike, by the model that is loaded soonest."
    from vermouth.app.index import build_index
    from vermouth.data.toybox import Toybox
    from vermouth.model import open_model

    folder = tmp_path_factory.mktemp("streams")
    (folder / "photos").mkdir()
    image = Toybox("photo", n=1, seed=3)[0].image
    for i in range(20):
        image.putpixel((i, 0), (i, 0, 0))
        image.save(folder / "photos" / f"{'long' * 40}_{i:03}.png")
    build_index(folder / "photos", folder / "idx", open_model(SEARCH[-1], "cpu"), quiet=True)
    image.save(folder / "fish_000.png")
    return folder


@pytest.mark.slow
def test_what_no_longer_reads_ends_the_program_silently(place):
    "As `vermouth search … | head -1`: the pipe is closed before the program prints."
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run([PROGRAM, *SEARCH], cwd=place, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert run.returncode == 141 and run.stderr == "20 photos, all compared\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a device that is always full")
def test_a_full_disk_is_one_sentence(place):
    run = run_child(SEARCH, lambda: os.chdir(place), stdout="/dev/full")
    assert run.exit_code == 2
    how, sentence = run.stderr.splitlines()
    assert sentence == "output: No space left on device. Free some space, or give a place that is yours."


@pytest.mark.slow
def test_closed_streams_and_an_old_encoding_are_no_error(place):
    words = "exec <&- >&- 2>&-; exec " + " ".join(map(str, [PROGRAM, *SEARCH]))
    assert subprocess.run(["sh", "-c", words], cwd=place).returncode == 0
    old = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    run = subprocess.run([PROGRAM, "search", "idx", "猫.png"], cwd=place, env=old, capture_output=True, text=True)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1 and "no such file" in run.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="sees what a process has loaded")
def test_an_interruption_says_how_to_go_on(place):
    "While torch is loaded, which cannot be loaded twice."
    words = [PROGRAM, "index", "photos", "--out", "interrupted"]
    run = subprocess.Popen(words, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with suppress(psutil.NoSuchProcess):
        while not any("libtorch" in part.path for part in psutil.Process(run.pid).memory_maps()):
            time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=60) == ("", f"index: interrupted.{AGAIN}\n") and run.returncode == 130


def test_an_interruption_within_a_command(command):
    def action():
        raise KeyboardInterrupt

    result = command(action)
    assert result.exit_code == 130 and result.stderr == "action: interrupted. Give the same command again.\n"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_disk_that_fails_is_one_sentence(command, code):
    def action():
        raise OSError(code, os.strerror(code), "out/\x1b[2J.png")

    result = command(action)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1 and harmless(result.stderr)
    assert os.strerror(code) in result.stderr and "\\x1b[2J.png" in result.stderr


def test_a_bug_keeps_its_traceback(command):
    def action():
        raise ValueError("a bug")

    assert isinstance(command(action).exception, ValueError)
