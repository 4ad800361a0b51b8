#!/usr/bin/env python3
"""Answers questions from a run's own text, with the compact student and the teacher side by side.

    python launcher/search.py --run runs/quickstart "how do I gather a tensor from all ranks"

Without a question, and after the first, questions are read from standard input, one a line, until an empty one.
--asymmetric: the student answers too from the vectors that the teacher stored, in the teacher's space, so that text embedded
once by the teacher needs no index of the student's.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import command
import numpy as np


def main() -> int:
    if not (arguments.run / "config.yaml").is_file():
        raise ValueError(f"no run at {arguments.run}: it has no config.yaml")
    config = command.load_config(
        arguments.run / "config.yaml", [f"runs_dir={arguments.run.parent}", f"name={arguments.run.name}"]
    )
    from distill.search import open_indices

    student_index, teacher_index = open_indices(config)
    import torch

    from distill.evaluation.encode import encoder_of
    from distill.stages import read_json
    from distill.student.student import TeacherSpace
    from distill.teacher.encoder import Teacher

    command.quiet_libraries()
    done = read_json(config.run_dir / "evaluate" / "DONE.json") or {}
    student: Callable[[Sequence[str]], np.ndarray]
    if arguments.asymmetric:
        student_index = teacher_index
        student = TeacherSpace(config.run_dir / "ckd" / "student").encode
        title = f"student's question, teacher's {teacher_index.vectors.shape[1]} dimensions"
    else:
        encoder = encoder_of(config.run_dir / "export" / done["results"]["index"], device="cpu")
        student = encoder
        title = f"student, {encoder.dim} dimensions, {encoder.params / 1e6:.1f}M parameters"
    loads_here = config.teacher.model is not None and config.teacher.placement != "zero3"
    teacher = Teacher(config.teacher, torch.device("cpu"), None) if loads_here else None
    titles = (
        title,
        f"teacher, {teacher.dim} dimensions, {teacher.params / 1e6:.1f}M parameters" if teacher else "teacher: no weights here",
    )
    from distill.search import side_by_side

    def answer(question: str) -> None:
        started = time.perf_counter()
        ours = student_index.search(student([question])[0], arguments.count)
        student_ms = (time.perf_counter() - started) * 1e3
        theirs = teacher_index.search(teacher([question])[0], arguments.count) if teacher else []
        total_ms = (time.perf_counter() - started) * 1e3
        width = shutil.get_terminal_size((160, 24)).columns
        print(f"\n{question}\n{side_by_side(ours, theirs, titles=titles, width=width)}")
        print(f"{student_ms:.0f} ms with the student, {total_ms:.0f} ms with both", flush=True)

    if arguments.question:
        answer(arguments.question)
    prompt = "\nnext question (empty line to end): " if sys.stdin.isatty() else ""
    while question := _read(prompt):
        answer(question)
    return 0


def _read(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="a finished run, e.g. runs/quickstart")
    parser.add_argument("--count", type=int, default=5, metavar="N", help="answers a question (default 5)")
    parser.add_argument("--asymmetric", action="store_true", help="search the teacher's vectors with the student's questions")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error was raised")
    parser.add_argument("question", nargs="?", help="what you want to know")
    arguments = parser.parse_args()
    command.run(main, show_traceback=arguments.traceback)
