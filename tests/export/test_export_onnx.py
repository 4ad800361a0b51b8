"""A student of every family, in every format: the student's vectors for every batch and length, from the files alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from encoders import FAMILIES, save_family
from sentence_transformers import SentenceTransformer
from students import TEXTS, export, make_student

from distill.export.check import Agreement, agreement, onnx_vectors
from distill.export.formats import FORMATS
from distill.export.int8 import int8_graph
from distill.export.onnx import LARGEST, onnx_graph
from distill.student import Student

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
FLOAT32, INT8 = FORMATS["onnx"].file, FORMATS["onnx-int8"].file
POOLINGS = dict(zip(FAMILIES, ["mean", "max", "pooler", "cls", "last2_mean"], strict=True))


class Exported(NamedTuple):
    student: Student
    folder: Path
    agreements: dict[str, Agreement]


@pytest.fixture(
    scope="module", params=[each if each in ("bert", "t5") else pytest.param(each, marks=pytest.mark.soak) for each in FAMILIES]
)
def family(request, tmp_path_factory, tiny_encoder) -> Exported:
    """In all formats; T5's first layer is not the one that its bias was kept in."""
    work = tmp_path_factory.mktemp(request.param)
    encoder = save_family(request.param, tiny_encoder, work / "base")
    student = make_student(work / "student", encoder, pooling=POOLINGS[request.param], layers=[2, 0], head="tanh")
    return Exported(student, work / "export", export(work / "student", work / "export", "onnx", "onnx-int8"))


def session_of(folder: Path) -> Any:
    return onnxruntime.InferenceSession(str(folder / FLOAT32), providers=["CPUExecutionProvider"])


def test_every_format_gives_the_students_vectors(family):
    assert set(family.agreements) == set(FORMATS)
    expected = family.student.encode(TEXTS)
    loaded = SentenceTransformer(str(family.folder), device="cpu", trust_remote_code=False)
    assert np.allclose(loaded.encode(TEXTS), expected, atol=1e-5)
    assert np.allclose(onnx_vectors(family.folder, FLOAT32, TEXTS, 5), expected, atol=2e-5)
    assert agreement(onnx_vectors(family.folder, INT8, TEXTS, 5), expected).worst >= 0.99


def test_the_graph_takes_every_batch_and_length(family):
    session = session_of(family.folder)
    inputs = {each.name: each.shape for each in session.get_inputs()}
    assert inputs == {"input_ids": ["batch", "length"], "attention_mask": ["batch", "length"]}
    outputs = [(each.name, each.shape) for each in session.get_outputs()]  # in this order: clients take the first or by name
    assert outputs == [("sentence_embedding", ["batch", 8]), ("last_hidden_state", ["batch", "length", 16])]
    for batch, length in ((1, 1), (1, 30), (2, 3), (7, 2), (32, 29)):
        ids = torch.randint(5, 100, (batch, length), generator=torch.Generator().manual_seed(batch))
        mask = (torch.arange(length) < (1 + torch.arange(batch) * 5 % length)[:, None]).long()
        with torch.no_grad():
            expected = family.student({"input_ids": ids, "attention_mask": mask})
            states = family.student.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        found, found_states = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        assert np.allclose((found_states - states.numpy())[mask.numpy() > 0], 0, atol=2e-4)
        assert np.allclose(found, torch.nn.functional.normalize(expected, dim=-1).numpy(), atol=2e-5), (batch, length)


def test_what_is_under_padding_does_not_count(family):
    session = session_of(family.folder)
    ids, mask = np.arange(5, 17).reshape(2, 6), np.array([[1] * 6, [1] * 3 + [0] * 3])
    found, _ = session.run(None, {"input_ids": ids, "attention_mask": mask})
    alone, _ = session.run(None, {"input_ids": ids[1:, :3], "attention_mask": mask[1:, :3]})
    assert np.allclose(found[1:], alone, atol=1e-5) and not np.allclose(found[0], found[1], atol=1e-2)


def test_in_8_bits_no_float_matrix_is_left_and_nothing_is_kept_twice(family):
    graph = onnx.load(str(family.folder / INT8)).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    assert not [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == 2 * 6
    for node in products:
        settings = {each.name: each.i for each in node.attribute}
        assert (settings["bits"], settings["block_size"], settings["accuracy_level"]) == (8, 32, 4)
    tables = [each for each in weights.values() if tuple(each.dims) == (120, 16)]
    assert [each.data_type for each in tables] == [onnx.TensorProto.INT8]
    assert set(weights) <= {name for node in graph.node for name in node.input}


def test_in_8_bits_a_vector_does_not_depend_on_the_batch_it_is_in(family):
    alone = onnx_vectors(family.folder, INT8, TEXTS, 1)
    for batch_size in (2, len(TEXTS)):
        assert agreement(onnx_vectors(family.folder, INT8, TEXTS, batch_size), alone).worst > 1 - 1e-6


def test_the_graphs_are_plain_opset_18_and_quote_no_path_or_source(family):
    float32 = onnx.load(str(family.folder / FLOAT32))
    onnx.checker.check_model(float32, full_check=True)
    assert {each.domain: each.version for each in float32.opset_import} == {"": 18}
    for file in (FLOAT32, INT8):
        content = (family.folder / file).read_bytes()
        for quoted in (str(Path(__file__).parents[2]), "stack_trace", "def forward", "student.py"):
            assert quoted.encode() not in content, quoted


@pytest.mark.parametrize("family", ["bert"], indirect=True)
def test_the_same_student_gives_the_same_bytes_and_is_left_as_it_was(family):
    student = Student.load(family.folder.with_name("student")).eval()
    before, vectors = student.encoder.config._attn_implementation, student.encode(TEXTS)
    graph = onnx_graph(student)
    assert student.encoder.config._attn_implementation == before != "eager"
    assert np.array_equal(student.encode(TEXTS), vectors)
    content = (family.folder / FLOAT32).read_bytes()
    assert graph.SerializeToString(deterministic=True) == content
    assert int8_graph(graph).SerializeToString(deterministic=True) == (family.folder / INT8).read_bytes()
    assert graph.SerializeToString(deterministic=True) == content  # int8_graph made another


def test_weights_that_no_onnx_file_holds_are_refused(tiny_encoder, tmp_path):
    student = make_student(tmp_path / "student", tiny_encoder)
    student.register_parameter("huge", torch.nn.Parameter(torch.empty(LARGEST // 4, device="meta")))
    with pytest.raises(ValueError, match=r"GiB of weights do not fit an ONNX file"):
        onnx_graph(student)


@pytest.mark.slow
@pytest.mark.parametrize("name, layers", [("bert-tiny", None), ("minilm-l6", [0, 5]), ("mpnet-base", [0])])
def test_a_real_encoder_exports_in_all_formats_and_8_bits_are_a_quarter_of_32(tmp_path, name, layers):
    if not os.environ.get("DISTILL_MODELS"):
        pytest.skip("DISTILL_MODELS is not set: no real models here")
    student = make_student(tmp_path / "student", Path(os.environ["DISTILL_MODELS"]) / name, layers=layers, max_length=48)
    texts = [*TEXTS, "Émile Zola's “J'accuse…!” (1898): 漢字, ❤ and 3.14159."]
    agreements = export(tmp_path / "student", tmp_path / "export", "onnx", "onnx-int8", texts=texts)
    assert agreements["onnx"].worst > 0.99999 and agreements["onnx-int8"].worst > 0.995
    assert np.allclose(onnx_vectors(tmp_path / "export", FLOAT32, texts, 5), student.encode(texts), atol=1e-5)
    float32, int8 = ((tmp_path / "export" / file).stat().st_size for file in (FLOAT32, INT8))
    assert int8 < 0.3 * float32
