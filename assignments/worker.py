"""Runs the functions that a student handed in, in a folder and a process of their own, for `grading.py`.

The first line of the standard input holds the questions. Each other line is a job, which gets a line as an answer.
"""

import contextlib
import ctypes
import json
import os
import sys
from glob import glob

import check
import torch
from probes import Problem, observe


def limit():
    """Limits what a submission can take from the machine, where the system allows it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG: this process ends when the grader ends
    limits = dict(RLIMIT_DATA=4_000_000_000, RLIMIT_FSIZE=100_000_000, RLIMIT_CPU=1200, RLIMIT_CORE=0)
    limits["RLIMIT_NPROC"] = len(glob("/proc/[0-9]*/task/*")) + 300  # this user's processes and threads; not for root
    for name, most in limits.items():  # bytes of memory, bytes of a file, seconds of a processor
        with contextlib.suppress(ImportError, OSError, ValueError):
            import resource

            resource.setrlimit(getattr(resource, name), (most, most))


def main():
    jobs, out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # a submission neither reads the questions there nor prints between the answers
        os.dup2(nothing, stream)
    given = json.loads(jobs.readline())
    limit()
    torch.set_num_threads(1)
    check.BROKEN.update(given["broken"])
    answer = "ready"
    while True:
        out.write(json.dumps(answer, default=lambda array: array.tolist()) + "\n")
        out.flush()
        line = jobs.readline()
        if not line:
            os._exit(0)
        a, part, replaced = json.loads(line)
        try:
            module = check.load(a)
            if part == "answers":
                found = check.answers_of(getattr(module, "ANSWERS", None), a)
                value = found["text"] if found["value"] is None else found["value"]
                answer = {check.QUESTIONS[a]: value, "sentences": found["sentences"]}
            elif part == "experiment":
                answer = check.experiment(module, *replaced)
            else:
                answer = observe(part, module, given["questions"][part], replaced)
        except Problem as problem:
            answer = str(problem)


if __name__ == "__main__":
    main()
