"""An exported folder: written and verified under a temporary name, then renamed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from distill.export.check import Agreement, check_format
from distill.export.formats import FORMATS, require_packages
from distill.export.int8 import int8_graph
from distill.export.onnx import onnx_graph
from distill.export.sentence_transformers import check_pooling, save_sentence_transformers
from distill.run.files import flush, naming
from distill.run.model_folders import apply_umask
from distill.student import Student
from distill.student.fingerprint import digests_of


def export_student(
    student_dir: Path,
    out: Path,
    *,
    card: Callable[[Path], str],
    check_on: Sequence[str],
    formats: Collection[str] = (),
    student: Student | None = None,
) -> dict[str, Agreement]:
    """Writes the student in `student_dir` to the folder `out`, whole or not at all; returns each format's agreement with it.

    student: that student with another head, if it is to be exported with one.

    A sentence-transformers folder, with the ONNX files that `formats` names ("onnx", "onnx-int8"), export.json (dim,
    parameters, longest input, agreements) and, as its README.md, the result of `card` for the folder. Every format is loaded
    again from its files, and its vectors of the texts `check_on` must reach the lowest cosine of formats.py. Raises ValueError
    if one does not, and before anything is written if a package or a module for the pooling is missing.
    """
    require_packages(formats)
    student = student or Student.load(student_dir).eval()
    check_pooling(student.pooling)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        with naming(part):
            save_sentence_transformers(student, student_dir, part)
            _save_onnx(student, part, formats)
            expected = student.encode(check_on)
            agreements = {
                name: check_format(part, name, str(student_dir), check_on, expected)
                for name in FORMATS
                if name == "sentence-transformers" or name in formats
            }
            description = json.dumps(_description(student, len(check_on), agreements), indent=1)
            (part / "export.json").write_text(description + "\n", encoding="utf-8")
            (part / "README.md").write_text(card(part), encoding="utf-8")
            apply_umask(part)
            for path in part.rglob("*"):
                flush(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)
    flush(out.parent)
    return agreements


def exports_digests(directory: Path) -> dict[str, str]:
    """The sha256 of all files of the exported folders of a run but for model cards, which the stage records in DONE.json."""
    return digests_of(directory, [path for path in directory.glob("*/**/*") if path.is_file() and path.name != "README.md"])


def _save_onnx(student: Student, folder: Path, formats: Collection[str]) -> None:
    if not formats:
        return
    graph = onnx_graph(student)
    (folder / "onnx").mkdir()
    if "onnx" in formats:
        (folder / FORMATS["onnx"].file).write_bytes(graph.SerializeToString(deterministic=True))
    if "onnx-int8" in formats:
        (folder / FORMATS["onnx-int8"].file).write_bytes(int8_graph(graph).SerializeToString(deterministic=True))


def _description(student: Student, num_texts: int, agreements: dict[str, Agreement]) -> dict[str, Any]:
    return {
        "dim": student.dim,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "max_length": student.max_length,
        "checked_on": num_texts,
        "cosines": {
            name: {"worst": round(found.worst, 7), "mean": round(found.mean, 7), "text": found.text}
            for name, found in agreements.items()
        },
    }
