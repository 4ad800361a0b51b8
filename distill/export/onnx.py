"""A student as one ONNX graph: pooling, head and normalisation are inside, so that it needs a tokenizer alone besides.

    input_ids, attention_mask    int64 [batch, length], both dynamic; padded on the right
    sentence_embedding           float32 [batch, dim], L2-normalised
    last_hidden_state            float32 [batch, length, d], which optimum and transformers.js's pipeline take; they then pool

Token types are no input: a student has only one. torch's dynamo exporter keeps both dimensions symbolic or fails. The older
exporter traces the example: its graphs of RoBERTa, MPNet, DistilBERT and T5 students gave wrong vectors on shapes other than
the example's (cosines below 0.7).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from distill.student import Student
from distill.student.encoder import keep_layers
from distill.student.student import PooledVectors

OPSET = 18
OUTPUTS = ["sentence_embedding", "last_hidden_state"]
TESTED = {  # model types of which the tests compare a graph's vectors with the student's
    "bert", "deberta-v2", "distilbert", "electra", "eurobert", "gemma3_text", "gpt2", "llama", "mistral", "modernbert", "mpnet",
    "nomic_bert", "qwen3", "roberta", "t5", "umt5", "xlm-roberta",
}  # fmt: skip
TRIAL_LAYERS = 4  # the poolings need no more
LARGEST = 2**31 - 2**26  # bytes of weights: a protobuf file is at most 2 GiB, of which the graph needs some


class _Graph(nn.Module):
    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        lookup = self.student.encoder.get_input_embeddings() if self.student.embeds_tokens_first else nn.Identity()
        output = self.student.encoder_output(lookup(input_ids), attention_mask)
        vectors_bd = self.student(PooledVectors(self.student.pooled(output, attention_mask)))
        return nn.functional.normalize(vectors_bd.float(), dim=-1), output.last_hidden_state


def onnx_graph(student: Student) -> Any:
    """The student, float32, as an onnx.ModelProto of opset 18 whose bytes depend on the student alone.

    Raises ValueError if the weights are too large for one file, if torch cannot convert the encoder, or if the pooling leaves
    out prompts, of which a graph does not know where they end.
    """
    _check_prompts(student)
    _check_size(student)
    return _convert(student)


def _convert(student: Student) -> Any:
    example = torch.ones(2, 3, dtype=torch.int64)  # neither a batch nor a length of 1, which would be taken for constants
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with _eager_attention(student.encoder), _quiet():
        try:
            program = torch.onnx.export(
                _Graph(student).eval(),
                (example, example.clone()),  # one tensor would become one input
                input_names=["input_ids", "attention_mask"],
                output_names=OUTPUTS,
                dynamic_shapes={"input_ids": shape, "attention_mask": shape},
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            cause = error.__cause__ or error  # the error itself says how to report it
            family = student.encoder.config.model_type
            raise ValueError(
                f"export.formats: torch {torch.__version__} cannot write a student of type {family} as ONNX"
                f" ({type(cause).__name__}: {str(cause).splitlines()[0]}); leave export.formats empty"
            ) from error
    assert program is not None
    return _bare(program.model_proto)


def check_convertible(student: Student, *, has_all_tokens: bool) -> None:
    """Raises ValueError for a student of which no graph can be written. A type that is not in TESTED is tried: some seconds.

    student: on the meta device; of no further use, since the trial takes layers out. has_all_tokens: False for one whose
    vocabulary will be cut.
    """
    _check_prompts(student)
    if has_all_tokens:
        _check_size(student)
    if student.encoder.config.model_type not in TESTED:
        with suppress(ValueError, NotImplementedError):  # layers that cannot be taken out: all are tried
            keep_layers(student.encoder, list(range(min(TRIAL_LAYERS, student.encoder.config.num_hidden_layers))))
        _convert(student.to_empty(device="cpu"))


def _check_prompts(student: Student) -> None:
    if not student.settings.include_prompt and any(student.settings.prompts.values()):
        raise ValueError(
            "export.formats: this student's pooling leaves out its prompts (include_prompt is false), which a graph of tokens"
            " cannot; leave export.formats empty"
        )


def _check_size(student: Student) -> None:
    num_bytes = 4 * sum(parameter.numel() for parameter in student.parameters())
    if num_bytes > LARGEST:
        raise ValueError(
            f"export.formats: {num_bytes / 2**30:.1f} GiB of weights do not fit an ONNX file, which has at most 2 GiB"
        )


@contextmanager
def _eager_attention(encoder: Any) -> Iterator[None]:
    """T5 needs it: it views the result of torch's fused attention with strides that the exported one does not have."""
    before = encoder.config._attn_implementation
    encoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        encoder.set_attn_implementation(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings about its internals and torchvision's operators."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _bare(model: Any) -> Any:
    """The model without the exporter's metadata, which quotes source lines and paths of this machine in every node."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return model
