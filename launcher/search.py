#!/usr/bin/env python3
"""Answers questions from a run's own text, by the compact student and the teacher side by side.

    python launcher/search.py --run runs/quickstart "how do I gather a tensor from all ranks"

Without a question, and after the first, questions are read from standard input, one a line, until an empty one.
--asymmetric: the student's questions search the teacher's stored vectors, in the teacher's space, so that text embedded by
the teacher needs no index of the student's.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launcher import command

if TYPE_CHECKING:
    import numpy as np

    from distill.evaluation.model_encoder import TextEncoder
    from distill.evaluation.passage_index import Hit


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=command.path, required=True, metavar="DIR", help="a finished run, e.g. runs/quickstart")
    parser.add_argument("--count", type=int, default=5, metavar="N", help="answers per question (default 5)")
    parser.add_argument("--asymmetric", action="store_true", help="search the teacher's vectors with the student's questions")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error was raised")
    parser.add_argument("question", nargs="?", help="what you want to know")
    arguments = parser.parse_args(argv)
    return command.run(lambda: search(arguments), show_traceback=arguments.traceback)


def search(arguments: argparse.Namespace) -> int:
    if arguments.count < 1:
        raise ValueError(f"--count is {arguments.count}: it must be at least 1")
    from distill.config import load_run

    config = load_run(arguments.run)
    from distill.evaluation.passage_index import open_indices

    student_index, teacher_index = open_indices(config.run_dir, config.shards_dir)
    import torch

    from distill.evaluation.model_encoder import encoder_of
    from distill.export.folder import exports_digests
    from distill.run.files import DigestCache, read_json
    from distill.student.fingerprint import check_recorded, check_student
    from distill.student.student import student_in_teacher_space
    from distill.teacher.encoder import Teacher, evaluation_dtype
    from distill.teacher.identity import check_weights, pinned

    command.set_up_libraries()
    done = read_json(config.run_dir / "evaluate" / "DONE.json") or {}
    student: Callable[[list[str]], np.ndarray]
    if arguments.asymmetric:
        student_index = teacher_index
        check_student(config.run_dir / "ckd")
        found = student_in_teacher_space(config.run_dir / "ckd" / "student")
        if found is None:
            raise ValueError("--asymmetric needs a student that was trained in the teacher's space: run the stage ckd")
        student = partial(found.encode, roles=["query"])
        title = f"student's question, teacher's {teacher_index.vectors.shape[1]} dimensions"
    else:
        export = config.run_dir / "export"
        check_recorded(export, export, exports_digests(export))
        encoder = encoder_of(export / done["results"]["index"], device="cpu")
        student = partial(encoder, role="query")
        title = described("student", encoder)
    loads_here = config.teacher.model is not None and config.teacher.placement != "zero3"
    cpu = torch.device("cpu")
    if loads_here:
        digests = DigestCache(config.run_dir / "input_digests.json")
        check_weights(config.teacher, config.shards_dir, teacher_index.reader.manifest, digests)
    section = pinned(config.teacher, teacher_index.reader.manifest)
    teacher = Teacher(section, cpu, evaluation_dtype(section, cpu)) if loads_here else None
    titles = (title, described("teacher", teacher) if teacher else "teacher: no weights here")

    def answer(question: str) -> None:
        started = time.perf_counter()
        by_student = student_index.search(student([question])[0], arguments.count)
        student_ms = (time.perf_counter() - started) * 1e3
        by_teacher = teacher_index.search(teacher([question], "query")[0], arguments.count) if teacher else []
        total_ms = (time.perf_counter() - started) * 1e3
        width = shutil.get_terminal_size((160, 24)).columns
        print(f"\n{question}\n{side_by_side(by_student, by_teacher, titles=titles, width=width)}")
        print(f"{student_ms:.0f} ms with the student, {total_ms:.0f} ms with both", flush=True)

    if arguments.question:
        answer(arguments.question)
    prompt = "\nnext question (empty line to end): " if sys.stdin.isatty() else ""
    while question := _read(prompt):
        answer(question)
    return 0


def described(name: str, encoder: TextEncoder) -> str:
    return f"{name}, {encoder.dim} dimensions, {encoder.params / 1e6:.1f}M parameters, {encoder.dtype}"


def side_by_side(left: Sequence[Hit], right: Sequence[Hit], *, titles: tuple[str, str], width: int) -> str:
    """Two columns of answers; texts that are in both are marked with =."""
    column = max(20, (width - 3) // 2)
    shared = {hit.row for hit in left} & {hit.row for hit in right}

    def cell(hit: Hit | None) -> str:
        if hit is None:
            return " " * column
        line = f"{'=' if hit.row in shared else ' '} {hit.score:.2f} {hit.text}"
        return (line if len(line) <= column else line[: column - 1] + "…").ljust(column)

    rows = [f"{titles[0]:<{column}} | {titles[1]}", "-" * (2 * column + 3)]
    rows += [f"{cell(one)} | {cell(other)}".rstrip() for one, other in zip_longest(left, right)]
    return "\n".join(rows)


def _read(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    command.start(main)
