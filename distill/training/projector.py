"""Held-out sentences in the student's and in the teacher's space, for TensorBoard's projector.

<record>/projector_config.pbtxt     names the files; written last
<record>/projector/student.tsv      a vector a line, the same sentences in the same order as
<record>/projector/teacher.tsv
<record>/projector/sentences.tsv    text, source, length: what points may be coloured by
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from google.protobuf import text_format
from tensorboard.plugins.projector.projector_config_pb2 import EmbeddingInfo, ProjectorConfig

from distill.run.files import publish
from distill.shards import ShardReader
from distill.student import Student

MOST_ROWS = 2000
MOST_COLUMNS = 200  # the projector would cut wider ones at random; the first principal directions keep most of their cosines
LENGTHS = (40, 80, 160, 320)  # characters


def write_projector(record: Path, student: Student, held_out: ShardReader, sources: list[str] | None) -> None:
    """Encodes at most 2,000 held-out sentences and writes at most 8 MB. sources: of each held-out sentence, where known."""
    count = min(len(held_out), MOST_ROWS)
    rows = np.arange(count)
    sentences = held_out.texts(rows)
    folder = record / "projector"
    folder.mkdir(parents=True, exist_ok=True)
    encoded = student.encode(sentences, roles=held_out.roles(rows))
    spaces = {"student": encoded, "teacher": held_out.vectors(rows).astype(np.float32)}
    config = ProjectorConfig()
    for name, vectors in spaces.items():
        narrow = _narrowed(vectors)
        with publish(folder / f"{name}.tsv") as file:
            np.savetxt(file, narrow, fmt="%.3f", delimiter="\t")
        info = EmbeddingInfo(tensor_name=name, tensor_path=f"projector/{name}.tsv", metadata_path="projector/sentences.tsv")
        config.embeddings.append(info)
    lines = ["text\tsource\tlength"]
    for number, sentence in enumerate(sentences):
        plain = " ".join(sentence.split())
        lines.append(f"{plain}\t{' '.join(sources[number].split()) if sources else 'not known'}\t{_length(sentence)}")
    with publish(folder / "sentences.tsv") as file:
        file.write(("\n".join(lines) + "\n").encode())
    with publish(record / "projector_config.pbtxt") as file:
        file.write(text_format.MessageToString(config).encode())


def _narrowed(vectors: np.ndarray) -> np.ndarray:
    if vectors.shape[1] <= MOST_COLUMNS:
        return vectors
    _, directions = np.linalg.eigh(vectors.T @ vectors)  # ascending
    return vectors @ directions[:, : -MOST_COLUMNS - 1 : -1]


def _length(sentence: str) -> str:
    above = next((limit for limit in LENGTHS if len(sentence) <= limit), None)
    return f"over {LENGTHS[-1]} characters" if above is None else f"up to {above} characters"
