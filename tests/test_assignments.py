"""The course: what is right in the handout, and that a submission is graded. Slower than the rest: -m course."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lif

pytestmark = pytest.mark.course
ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "assignments" / "lecturer.py"


def run(*words, folder=ROOT):
    """A command's output; in the students' folder nothing of the repository is at hand."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    words = [sys.executable, *map(str, words)]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course") / "solved"
    assert run(PROGRAM, "solve", folder).returncode == 0
    return folder


def test_the_solutions_are_right_and_the_stubs_are_not_done(solved, tmp_path):
    said = run("check.py", "all", folder=solved).stdout
    assert said.count(": right") == said.count("/") - 3 and "experiment: right" in said  # all but files and sentences
    assert run(PROGRAM, "handout", tmp_path / "h").returncode == 0
    assert ": right" not in run("check.py", "all", folder=tmp_path / "h").stdout
    assert not {path.name for path in (tmp_path / "h").iterdir()} & {path.name for path in ROOT.glob("*.py")}


def test_the_solution_of_lif_is_that_of_the_repository(solved):
    code = "import torch, a1_lif; torch.manual_seed(0); _, s = a1_lif.simulate(torch.randn(6, 9), 2.0, 1.0, 4.0); "
    said = run("-c", code + "print(s.int().tolist())", folder=solved)
    torch.manual_seed(0)
    assert said.stdout.strip() == str(lif.lif(torch.randn(6, 9)).int().tolist()), said.stderr


def test_a_usual_mistake_is_named(solved, tmp_path):
    assert run(PROGRAM, "solve", tmp_path / "h").returncode == 0
    file = tmp_path / "h" / "a1_lif.py"
    text = file.read_text(encoding="utf-8")
    assert "u >= threshold" in text
    file.write_text(text.replace("u >= threshold", "u > threshold"), encoding="utf-8")
    said = run("check.py", "a1", folder=tmp_path / "h").stdout
    assert "exactly at the threshold fires" in said


def test_every_submission_is_graded_or_gets_its_remark(solved, tmp_path):
    assert run("check.py", "submit", "--id", "ada", folder=solved).returncode == 0
    (tmp_path / "submission-ada.zip").write_bytes((solved / "submission-ada.zip").read_bytes())
    (tmp_path / "submission-bob.zip").write_bytes(b"no zip file")
    result = run(PROGRAM, "grade", tmp_path)
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "grades.csv", encoding="utf-8") as file:
        rows = {row[0]: row for row in csv.reader(file)}
    assert {"ada", "bob"} <= rows.keys()
    assert (tmp_path / "remarks" / "bob.txt").exists()
