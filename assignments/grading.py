"""Grading what was handed in, for `lecturer.py grade`; not part of the handout."""

import ast
import collections
import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from functools import partial
from pathlib import Path

import check
import numpy as np
import torch
from probes import FILES, HERE, Problem
from reference import REFERENCE

STUBS = [f"{file}.py" for file in FILES.values()]
FUNCTIONS = {a: points for a, points in check.POINTS.items() if a != "a5"}
TOO_LARGE = 5_000_000  # bytes of a file


def id_of(path, folder):
    """The student's id: that of the zip file's id.txt, or what its name says."""
    with contextlib.suppress(OSError, UnicodeError):
        found = (folder / "id.txt").read_text(encoding="utf-8").strip()
        if re.fullmatch(check.ID, found):
            return found
    found = re.search(r"submission-([A-Za-z0-9_-]+)", path.name)
    return found[1] if found else path.stem.encode(errors="backslashreplace").decode()


def unpack(path, folder):
    """Puts the files that are asked for, from a zip file or a folder, into a folder, and nothing else.

    Returns sentences on what is left out.

    Raises:
        Problem: it cannot be read, or there is nothing in it.
    """
    archive = None
    try:
        if path.is_dir():
            members = [
                (str(p.relative_to(path)), p.stat().st_size, p.read_bytes) for p in path.rglob("*") if p.is_file()
            ]
        else:
            archive = zipfile.ZipFile(path)
            members = [(i.filename, i.file_size, partial(archive.read, i)) for i in archive.infolist()]
        said, found = [], {}
        for name, size, read in sorted(members, key=lambda member: len(re.split(r"[/\\]", member[0])), reverse=True):
            *folders, name = re.split(r"[/\\]", name)
            if name in (*check.HAND_IN, "id.txt") and not any(f.startswith((".", "__")) for f in folders):
                found[name] = size, read  # of several with the same name, the one that is least deep
        for name, (size, read) in found.items():
            if size > TOO_LARGE:
                said.append(f"{name} is left out: it is larger than {TOO_LARGE} bytes.")
            else:
                (folder / name).write_bytes(read())
    except Exception as error:  # a damaged archive fails in many ways
        raise Problem(f"It cannot be unpacked: {error}") from None
    finally:
        if archive:
            archive.close()
    if not found:
        raise Problem(f"There is none of the files {', '.join(check.HAND_IN)} in it.")
    return said


def run_for(command, folder, seconds):
    """Runs a program, and stops it and what it has started after some time. Returns whether it came to its end."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **quiet)
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        if hasattr(os, "killpg"):
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def execute(folder, seconds):
    """Runs what was handed in. Returns part -> what was found, and the set of the parts that print.

    A process that hangs or dies is replaced by another one, for what is left. Where it is the import of a file that
    does so, the file's other parts are not tried again.
    """
    owner = {name: a for a, points in FUNCTIONS.items() for name in points} | dict(experiment="a5")
    owner |= {f"answers {a}": a for a in FILES}
    left, found, printing = list(owner), {}, set()
    while left:
        end = "It ended the program."
        if not run_for([sys.executable, "worker.py", json.dumps(check.SHORT), *left], folder, seconds):
            end = f"It did not end within {seconds:g} seconds."
        while left and (folder / f"{left[0]}.json").exists():
            part = left.pop(0)
            try:
                found[part], prints = json.loads((folder / f"{part}.json").read_text(encoding="utf-8"))
                if (folder / f"{part}.npz").exists():
                    with np.load(folder / f"{part}.npz") as arrays:
                        for key in arrays.files:
                            case, name = key.split("/", 1)
                            found[part][int(case)] = (found[part][int(case)] or {}) | {name: arrays[key]}
            except Exception:  # what a submission writes into the folder itself
                found[part], prints = "Its output cannot be read.", False
            if prints:
                printing.add(part)
        if left:
            hung = owner[left[0]] if not (folder / f"{owner[left[0]]}.imported").exists() else None
            gone = [part for part in left if owner[part] == hung] or left[:1]
            found |= dict.fromkeys(gone, end)
            left = [part for part in left if part not in gone]
    return found, printing


def answer_of(a, numbers):
    """The right answer to a student's own question."""
    if a == "a1":  # with a constant current I, u[t] = I sum of (1 - 1/tau)^k until the first spike
        return numbers["theta"] / sum((1 - 1 / numbers["tau"]) ** k for k in range(numbers["T"]))
    if a == "a2":  # both I_EE - I_sub and I_div are multiplied by c
        return numbers["v"]
    if a == "a3":
        return REFERENCE.poisson_gain(numbers["lambda"], numbers["d"]).item()
    if a == "a4":
        i_div = torch.tensor([numbers["I_div"]], requires_grad=True)
        (numbers["c"] * REFERENCE.stabilize(i_div, ste=False)).sum().backward()
        return i_div.grad[i_div == i_div[i_div > 0].min()].item()
    return float(np.log(numbers["classes"]))


def answers_in(path):
    """The ANSWERS of a file that does not run, as far as they are written out: a dict."""
    found = {}
    with contextlib.suppress(OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "ANSWERS" for t in node.targets):
                for key, value in zip(node.value.keys, node.value.values, strict=True):
                    with contextlib.suppress(ValueError, TypeError):
                        found[ast.literal_eval(key)] = ast.literal_eval(value)
    return found


def grade_one(folder, student_id, book, questions, seconds):
    """Points by part, remarks, and the mistakes of what is unpacked in a folder. `questions`: see `grade`."""
    points, remarks, mistakes = {}, [], []

    def note(part, possible, right, text, mistake=None):
        points[part] = possible if right else 0
        if not right:
            remarks.append(f"{part}: {text}")
        if mistake:
            mistakes.append((part, mistake))

    for name in ("worker.py", "check.py", "probes.py", "ablation.py", "digits.npz"):
        shutil.copyfile(HERE / name, folder / name)
    shutil.copyfile(questions, folder / "expected.npz")
    found, printing = execute(folder, seconds)
    answers = {}
    for a, file in FILES.items():
        given = found[f"answers {a}"]
        answers[a] = given if isinstance(given, dict) else answers_in(folder / f"{file}.py")
    for parts in FUNCTIONS.values():
        for name, possible in parts.items():
            outcome, inputs = found[name], book[name]["inputs"]
            outcome = [outcome] * len(inputs) if isinstance(outcome, str) else outcome
            note(name, possible, *check.verdict(name, outcome, book[name]))
    of_a5 = [("experiment", *check.judged(found["experiment"], "run", **check.SHORT))]
    for part, *verdict in [*of_a5, *check.of_a5(answers["a5"], folder)]:
        note(part, check.POINTS["a5"][part], *verdict)
    for a, numbers in check.own_numbers(student_id).items():
        given, right = answers[a].get(check.QUESTIONS[a]), answer_of(a, numbers)
        good = check.a_number(given) and abs(given - right) <= 0.01 * abs(right)
        said = "there is no answer" if given is None else f"{given!r:.40} is not right"
        note(check.QUESTIONS[a], 2, good, f"{said}; right is {right:.4g}.")
    remarks += [
        f"{part}: it prints something. Please hand in functions that print nothing." for part in sorted(printing)
    ]
    return points, remarks, mistakes


def grade(folder, seconds, book, questions):
    """Grades what is in a folder. What is done is written at once.

    Args:
        seconds: time limit of a process.
        book: new inputs, what is right, and what the known mistakes do, see `check.read`.
        questions: a file with the inputs alone.
    """
    entries = sorted(p for p in folder.iterdir() if p.name not in ("remarks", "grades.csv", "mistakes.csv"))
    inside = [p for entry in entries if entry.is_dir() for p in sorted(entry.rglob("*"))]
    found = [p for p in (*entries, *inside) if p.is_file() and p.suffix.lower() == ".zip"]
    found += [p for p in entries if p.is_dir() and any(q.name in STUBS for q in p.rglob("*"))]
    if not found:
        raise ValueError(f"{folder} holds no zip file, and no folder with a1_lif.py and so on, of a student")
    for entry in entries:
        if not any(entry == p or entry in p.parents for p in found):
            print(f"not graded, because it is no zip file: {entry.name}")
    print(f"{len(found)} submissions", flush=True)
    counts, seen = collections.Counter(), set()
    columns = ["id", "total", *(part for parts in check.POINTS.values() for part in parts), *check.QUESTIONS.values()]
    shutil.rmtree(folder / "remarks", ignore_errors=True)  # of an earlier grading
    (folder / "remarks").mkdir(exist_ok=True)
    with open(folder / "grades.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval=0)
        writer.writeheader()
        for path in found:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as empty:
                student_id, points, mistakes = id_of(path, Path(empty)), {}, []
                try:
                    remarks = unpack(path, Path(empty))
                    student_id = id_of(path, Path(empty))
                    points, more, mistakes = grade_one(Path(empty), student_id, book, questions, seconds)
                    remarks += more
                except Problem as problem:
                    remarks = [str(problem)]
                except Exception as error:  # one submission shall not end the grading of the others
                    remarks = [f"It could not be graded: {error!r}"]
            if student_id in seen:
                remarks.insert(0, f"There is more than one submission of {student_id}. This is {path.name}.")
            seen.add(student_id)
            total = sum(points.values())
            writer.writerow(dict(id=student_id, total=total) | points)
            file.flush()
            with open(
                folder / "remarks" / f"{student_id}.txt", "a", encoding="utf-8", errors="backslashreplace"
            ) as text:
                text.write("\n".join([f"{student_id}: {total} of 100 points", *remarks, "", ""]))
            print(f"{student_id}: {total} of 100 points" + ("" if points else f" - {remarks[-1]}"), flush=True)
            counts.update(set(mistakes))
            with open(folder / "mistakes.csv", "w", newline="", encoding="utf-8") as table:
                lines = [(*mistake, n) for mistake, n in counts.most_common()]
                csv.writer(table).writerows([("part", "mistake", "submissions"), *lines])
    print(f"wrote grades.csv, mistakes.csv and remarks/ in {folder}; the sentences of A5 are yours to read")
