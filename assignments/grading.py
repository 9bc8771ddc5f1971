"""Grading what was handed in, for `lecturer.py grade`; not part of the handout. First everything is read into memory.
Then each submission runs in processes of its own (`worker.py`), which get the questions by their standard input. What
is right, and the grades, stay in the memory of this process."""

import ast
import collections
import contextlib
import csv
import ctypes
import hashlib
import io
import json
import math
import os
import queue
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import types
import zipfile
import zlib
from pathlib import Path

import check
import numpy as np
from ablation import near
from probes import FILES, HERE

LARGEST = 2_000_000  # bytes of a file
STARTED = b"Its grading was begun, and stopped before its end.\n"
COLUMNS = ["id", "total", *(part for parts in check.POINTS.values() for part in parts), *check.QUESTIONS.values()]
COLUMNS += ["mistakes", "fingerprint"]
PROGRAM = ("worker.py", "check.py", "probes.py", "ablation.py", "digits.npz")
PROGRAM = {name: (HERE / name).read_bytes() for name in PROGRAM}  # in memory: a submission may rewrite the files


def members(path):
    """(name, date, whether it is a regular file, a function that opens it) of what is in a zip file or a folder."""
    mode = path.lstat().st_mode
    if stat.S_ISDIR(mode):
        for file in (Path(root, name) for root, _, names in os.walk(path) for name in names):
            date, regular = time.localtime(file.lstat().st_mtime)[:6], stat.S_ISREG(file.lstat().st_mode)
            yield file.relative_to(path).as_posix(), date, regular, lambda file=file: open(file, "rb")
    elif stat.S_ISREG(mode) and path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            for i in archive.infolist():
                yield i.filename, i.date_time, not stat.S_ISLNK(i.external_attr >> 16), lambda i=i: archive.open(i)
    else:
        raise ValueError("it is no zip file and no folder; hand in the file that `check.py submit` makes")


def submission(path, folder):
    """What stands in a file or a folder: id, name, remarks, fingerprint; files, name -> bytes, of those that are asked
    for; and when, which is greater for what was handed in later."""
    files, remarks, dates, depths = {}, [], [], {}
    try:
        for place, date, regular, opened in members(path):
            *folders, name = re.split(r"[/\\]", place)
            hidden = any(part.startswith((".", "__")) for part in folders)
            if name not in (*check.HAND_IN, "id.txt") or hidden or depths.get(name, 99) <= len(folders):
                continue
            depths[name] = len(folders)  # of several with the same name, the one that is least deep
            try:
                if not regular:
                    raise ValueError("it is a link, or no file at all")
                with opened() as file:
                    data = file.read(LARGEST + 1)
                if len(data) > LARGEST:
                    raise ValueError(f"it is larger than {LARGEST} bytes")
                files[name] = data
                dates.append(tuple(date))
            except Exception as error:  # a damaged archive fails in many ways, here and below
                remarks.append(f"{name} is left out: {error}.")
        if not files:
            remarks.append(f"There is none of the files {', '.join(check.HAND_IN)} in it.")
    except Exception as error:
        remarks.append(f"It cannot be read: {error}")
    place = path.relative_to(folder).as_posix()
    own = re.sub(r"\.zip$", "", place, flags=re.I)
    named = re.search(f"submission-({check.ID})", path.stem) or re.fullmatch(f"({check.ID})", own)
    student = files.get("id.txt", b"").decode("utf-8-sig", "replace").strip()
    if not re.fullmatch(check.ID, student):  # else a name that is no id is made into one, which is no other's
        made = re.sub(r"[^A-Za-z0-9]+", "_", own)[:30] + f"-{zlib.crc32(os.fsencode(place)):08x}"
        student = named[1] if named else made
    data = repr((student, sorted(files.items()), remarks)).encode(errors="backslashreplace")
    found = dict(id=student, name=ascii(place)[1:-1], files=files, remarks=remarks)
    found["when"] = bool(files), max(dates, default=()), path.lstat().st_mtime, place
    return types.SimpleNamespace(**found, fingerprint="x" + hashlib.sha256(data).hexdigest()[:12])


def collect(folder):
    """All that was handed in, one submission of each student. Remarks say which one counts, if there are several."""
    by_id = collections.defaultdict(list)
    for entry in sorted(folder.iterdir()):
        if re.fullmatch(r"\..*|remarks|grades\.csv|mistakes\.csv", entry.name, re.S):  # not handed in
            continue
        inside = [Path(root, name) for root, _, names in os.walk(entry) if not entry.is_symlink() for name in names]
        zips = [path for path in inside if path.suffix.lower() == ".zip" and not path.name.startswith(".")]
        for found in (submission(path, folder) for path in zips or [entry]):
            by_id[found.id.lower()].append(found)
    if not by_id:
        raise ValueError(f"{folder} holds nothing that was handed in")
    for several in by_id.values():
        several.sort(key=lambda found: found.when)
        if len(several) > 1:
            names, last = ", ".join(found.name for found in several), several[-1]
            last.remarks.insert(0, f"Handed in {len(several)} times: {names}. The later one, {last.name}, counts.")
    return [several[-1] for several in by_id.values()]


def children():
    """The processes that this one has started or inherited, on Linux."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):  # it has ended in the meantime
            if int(path.read_text(errors="replace").rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(path.parent.name))
    return found


class Trial:
    """Runs a submission, as a user of the system, in one process as long as it answers, then in another one.

    A part may take `seconds`. In a file in which one did not end, each of the others may take 10 seconds, and the whole
    file 2 `seconds`. A submission may take 10 `seconds`. A part that ends its process is run again, as the first in it.
    """

    def __init__(self, files, questions, seconds, user):
        self.files, self.seconds, self.user, self.process = files, seconds, user, None
        self.questions = dict(questions=questions, broken={})
        self.used, self.failed, self.loaded = collections.Counter(), set(), []

    def start(self):
        self.folder, self.others = tempfile.TemporaryDirectory(ignore_cleanup_errors=True), children()
        for name, data in (self.files | PROGRAM).items():
            Path(self.folder.name, name).write_bytes(data)
        options = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if self.user:
            try:
                import pwd

                shutil.chown(self.folder.name, self.user)
                options |= dict(user=self.user, group=pwd.getpwnam(self.user).pw_gid, extra_groups=[])
            except (ImportError, LookupError, OSError) as error:
                raise OSError(f"--user {self.user} needs the rights of root, and such a user: {error}") from None
        options |= dict(cwd=self.folder.name, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
        self.process = subprocess.Popen([sys.executable, "worker.py"], start_new_session=True, **options)
        self.answers = queue.Queue(10)

        def read(lines, answers):
            with contextlib.suppress(OSError, ValueError):
                for line in iter(lambda: lines.readline(20_000_000), b""):
                    answers.put(line)
            answers.put(b"")

        threading.Thread(target=read, args=(self.process.stdout, self.answers), daemon=True).start()
        ready = self.ask(self.questions, 120)
        if isinstance(ready, Exception):
            self.end()
            raise OSError(f"{sys.executable} cannot run worker.py: {ready}")

    def ask(self, line, seconds):
        """The answer to a line, or an exception, which says why there is none."""
        try:
            self.process.stdin.write(json.dumps(line).encode() + b"\n")
            self.process.stdin.flush()
            return json.loads(self.answers.get(timeout=seconds))
        except queue.Empty:
            return TimeoutError(f"It did not end within {seconds:.3g} seconds.")
        except (OSError, ValueError, RecursionError):
            return EOFError("It ended the program.")

    def look(self, a, part, replaced=()):
        """What `worker.py` finds, or text that says why there is nothing."""
        while True:
            limit = min(self.seconds, 10 * self.seconds - self.used.total())
            if a in self.failed:
                limit = min(limit, 10, 2 * self.seconds - self.used[a])
            if limit <= 0:
                return "It was not run, because there was no time left for it."
            if self.process is None:
                self.start()
            begin = time.monotonic()
            self.loaded.append(a)
            found = self.ask([a, part, replaced], limit)
            self.used[a] += time.monotonic() - begin
            if not isinstance(found, Exception):
                return found
            again = isinstance(found, EOFError) and len(self.loaded) > 1
            self.end()
            if not again:
                self.failed.add(a)
                return str(found)

    def end(self):
        """Ends the process, and all that it has started."""
        if self.process is None:
            return
        if os.name == "nt":
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(self.process.pid)], capture_output=True, check=False)
        else:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        for _ in range(1000):  # what has a session of its own: `grade` has let us inherit it; then its children, too
            for pid in children() - self.others:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
            if not children() - self.others:
                break
        with contextlib.suppress(OSError, queue.Empty):
            self.process.stdin.close()
            while self.answers.get(timeout=1):  # until the thread that reads has ended
                pass
        self.folder.cleanup()
        self.process, self.loaded = None, []


ANSWERS = dict(  # the right answers to a student's own questions
    a1=lambda tau, theta, T: theta / sum((1 - 1 / tau) ** k for k in range(T)),  # u[t] = I sum of (1 - 1/tau)^k
    a2=lambda v, c: v,  # both I_EE - I_sub and I_div are multiplied by c
    a3=lambda d, **rate: ((2 + rate["lambda"]) / (d * rate["lambda"])) ** 0.5,  # E[x^2] + Var[x] = 2 lambda + lambda^2
    a4=lambda I_div, c: c * (1 + sum(row.count(0) for row in I_div)),  # its own gradient, and that of each zero
    a5=lambda classes: math.log(classes),
)


def answers_in(data):
    """The ANSWERS of a file that does not run, as far as they are written out, {...} or dict(...): a dict."""
    found = {}
    with contextlib.suppress(Exception):  # whatever a student writes there
        nodes = [node for node in ast.parse(data).body if isinstance(node, ast.Assign)]
        for value in (node.value for node in nodes if any(getattr(t, "id", "") == "ANSWERS" for t in node.targets)):
            pairs = [(ast.Constant(k.arg), k.value) for k in getattr(value, "keywords", ())]
            for pair in (*pairs, *zip(getattr(value, "keys", ()), getattr(value, "values", ()), strict=True)):
                with contextlib.suppress(Exception):
                    found[ast.literal_eval(pair[0])] = ast.literal_eval(pair[1])
    return found


def readable(found, right):
    """What a worker sends, as `check.verdict` expects it, or text in its place."""
    found = [found] * len(right) if isinstance(found, str) else found
    try:
        for f, r in zip(found, right, strict=True):
            if not isinstance(f, str) and any(np.asarray(f[k], np.float64).shape != np.shape(r[k]) for k in r):
                raise ValueError
        return [f[:500] if isinstance(f, str) else f for f in found]
    except Exception:  # a submission may send anything
        return ["Its output cannot be read."] * len(right)


def of_experiment(found, values):
    """(right?, text, name of the mistake or None) of A5, for what a worker sends; values: those of each run."""
    if isinstance(found, str):
        return False, found[:500], None
    try:
        right, text, name, seen = found
        if right and not all(near(seen[run][k], v) for run, row in values.items() for k, v in row.items()):
            right, text = False, "wrong: the values of a run are others"
        return right is True, str(text)[:500], name and str(name)[:100]
    except Exception:  # a submission may send anything
        return False, "Its output cannot be read.", None


def grade_one(files, student, book, seconds, user):
    """(points by part, remarks, [part: mistake]) of a submission."""
    points, remarks, mistakes, answers = {}, {}, [], {}
    trial = Trial(files, {name: entry["inputs"] for name, entry in book.items()}, seconds, user)

    def results(a):
        file, broken = f"{FILES[a]}.py", None
        trial.questions["broken"].pop(a, None)
        given = trial.look(a, "answers") if file in files else f"There is no {file}."
        if not isinstance(given, dict):
            broken = trial.questions["broken"][a] = str(given)[:500]
            given = answers_in(files.get(file, b""))

        def look(part, group):
            if part == "experiment":
                return of_experiment(broken or trial.look(a, part, book[part]["inputs"]), book[part]["right"])
            return readable(broken or trial.look(a, part, group), book[part]["right"])

        answers = check.answers_of(given, a)
        return answers, list(check.results(a, book, look, answers, files, all(points.values())))

    def note(part, possible, right, text, mistake=None):
        points[part] = possible if right else 0
        if text != "right":
            remarks.setdefault(text, []).append(part)
        if mistake:
            mistakes.append(f"{part}: {mistake}")

    try:
        for a in check.POINTS:
            answers[a], verdicts = results(a)
            if {a} < set(trial.loaded) and not all(right for part, _, right, *_ in verdicts if part in book):
                trial.end()  # another file may have changed what all use: once more, in a process without it
                answers[a], verdicts = results(a)
            for verdict in verdicts:
                note(*verdict)
    finally:
        trial.end()
    for a, numbers in check.own_numbers(student).items():
        right, value, text = ANSWERS[a](**numbers), answers[a]["value"], answers[a]["text"]
        good = value is not None and abs(value - right) <= 0.01 * abs(right)
        said = f"{text} is not right" if text else "there is no answer"
        note(check.QUESTIONS[a], 2, good, "right" if good else f"{said}; right is {right:.4g}.")
    return points, [f"{', '.join(parts)}: {text}" for text, parts in remarks.items()], mistakes


def put(path, data):
    """Writes a file whole, or not at all. What stands in its place is replaced; a link is not followed."""
    handle, new = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    with open(handle, "wb") as file:
        file.write(data)
    os.chmod(new, 0o644)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    os.replace(new, path)


def save(folder, rows, remarks):
    """Writes all grades, and all remarks that are not there as they should be."""
    where = folder / "remarks"
    if where.is_symlink() or not where.is_dir():
        where.unlink(missing_ok=True)
        where.mkdir()
    for student, data in remarks.items():
        path = where / f"{student}.txt"
        if path.is_symlink() or not path.is_file() or path.read_bytes() != data:
            put(path, data)
    counts = collections.Counter(name for row in rows.values() for name in row["mistakes"].split("; ") if name)
    tables = {"grades.csv": [COLUMNS, *([row.get(c, 0) for c in COLUMNS] for _, row in sorted(rows.items()))]}
    tables["mistakes.csv"] = [("mistake", "submissions"), *counts.most_common()]
    for name, lines in tables.items():
        text = io.StringIO()
        csv.writer(text).writerows(lines)
        put(folder / name, text.getvalue().encode(errors="backslashreplace"))


def graded_before(folder):
    """(rows by id, remarks by id, as bytes: a lecturer may have written into them) of an earlier grading."""
    path, rows = folder / "grades.csv", []
    if path.exists():
        rows = list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig", "replace"), newline="")))
        if any(list(row) != COLUMNS or None in row.values() for row in rows):
            raise ValueError(f"{path} is not as `grade` writes it: move it away")
    paths = [p for p in (folder / "remarks").glob("*.txt") if p.is_file() and not p.is_symlink()]
    return {row["id"].lower(): row for row in rows}, {path.stem: path.read_bytes() for path in paths}


def grade(folder, make_book, seconds=30, user=None):
    """Grades what is in a folder, and goes on where an earlier grading was stopped. What is done is written at once.
    make_book: makes new inputs, and what is right, see `check.read`. seconds, user: see `Trial`."""
    found, (rows, remarks) = collect(folder), graded_before(folder)
    left = [f for f in found if rows.get(f.id.lower(), {}).get("fingerprint") != f.fingerprint]
    stops = {f.id: remarks.get(f.id, b"").count(STARTED) for f in left}
    left.sort(key=lambda f: (stops[f.id], f.id))  # what may have stopped an earlier grading comes last
    print(f"{len(found)} submissions, of which {len(found) - len(left)} are graded already", flush=True)
    book = make_book() if left else {}
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: inherits what a submission leaves running
    for f in left:
        points, said, mistakes, remarks[f.id] = {}, [], [], STARTED * (1 + stops[f.id])
        save(folder, rows, remarks)
        try:
            if f.files:
                points, said, mistakes = grade_one(f.files, f.id, book, seconds, user)
        except (OSError, MemoryError):  # of this program, not of the submission
            raise
        except Exception as error:  # one submission shall not end the grading of the others
            said = [f"It could not be graded: {error!r}"]
        total, mistakes = sum(points.values()), "; ".join(mistakes)
        rows[f.id.lower()] = dict(id=f.id, total=total, **points, mistakes=mistakes, fingerprint=f.fingerprint)
        text = "\n".join([f"{f.id}: {total} of 100 points", *f.remarks, *said, ""])
        remarks[f.id] = text.encode(errors="backslashreplace")
        save(folder, rows, remarks)
        print(f"{f.id}: {total} of 100 points" + "".join(f" - {line}" for line in f.remarks), flush=True)
    print(f"grades.csv, mistakes.csv and remarks/ are in {folder}; the sentences of A5 are yours to read")
