"""An ONNX graph with its weights in 8 bits: a quarter of the file.

    y = x W         W int8 [K, N] in blocks of 32 along K, a scale each: onnxruntime's MatMulNBits with accuracy_level 4, which
                    rounds x to 8 bits in the same blocks as it goes, and multiplies integers
    tokens' table   int8 [V, d], a scale for each row

The rest stays float32: positions, norms, biases, the head, and products of two activations.

Lowest and mean cosine to the float32 student over 1,000 texts (Wikipedia, questions, dictionary examples; at most 64 tokens;
batches of 1 and of 32; onnxruntime 1.31) and the file's size, for all-MiniLM-L6-v2, 90.3 MB in float32:

    onnxruntime's quantize_dynamic, per tensor       0.895  0.965  59 MB
    per channel                                      0.975  0.994  59 MB
      and reduce_range                               0.973  0.993  59 MB
      and the token table                            0.974  0.993  23 MB
      without the second matrix of each layer's MLP  0.985  0.996  70 MB
    this, W alone                                    0.9986 0.9997 59.8 MB
    this                                             0.9988 0.9997 24.7 MB
      all-mpnet-base-v2, 435.7 MB                    0.9986 0.9997 121.2 MB

quantize_dynamic loses precision because it rounds activations with one scale per batch: an outlier in one text coarsens all
others, and a vector depends on its neighbours. In blocks it depends on its own text alone. onnxruntime has MatMulNBits in 8
bits on CPUs from 1.22 on: 1.22, 1.23 and 1.31 (200 texts), and 1.31 on an emulated processor with AVX2 alone (24), gave the
same mean to 1e-5.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

BLOCK = 32
DOMAIN = "com.microsoft"


def int8_graph(model: Any) -> Any:
    """A new onnx.ModelProto: that of `onnx_graph` with the weights of its matrix products and its token table in 8 bits."""
    onnx = importlib.import_module("onnx")
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    tables = [node.input[0] for node in graph.node if node.op_type == "Gather" and node.input[0] in weights]
    token_table = max(tables, key=lambda name: int(np.prod(weights[name].dims)))
    added: dict[str, np.ndarray] = {}
    nodes: list[Any] = []
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            nodes.append(_product(onnx, node, weights[node.input[1]], added))
        elif node.op_type == "Gather" and node.input[0] == token_table:
            nodes += _lookup(onnx, node, weights[token_table], added)
        else:
            nodes.append(node)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    kept += [onnx.numpy_helper.from_array(array, name) for name, array in added.items()]
    return onnx.helper.make_model(
        onnx.helper.make_graph(nodes, graph.name, graph.input, graph.output, initializer=kept),
        opset_imports=[*model.opset_import, onnx.helper.make_opsetid(DOMAIN, 1)],
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
    )


def _product(onnx: Any, node: Any, weight: Any, added: dict[str, np.ndarray]) -> Any:
    weight_kn = onnx.numpy_helper.to_array(weight)
    rows, columns = weight_kn.shape
    blocks, scales = in_blocks(weight_kn)
    added |= {f"{weight.name}.int8": blocks, f"{weight.name}.scales": scales}
    return onnx.helper.make_node(
        "MatMulNBits",
        [node.input[0], f"{weight.name}.int8", f"{weight.name}.scales"],
        list(node.output),
        name=node.name,
        domain=DOMAIN,
        K=rows,
        N=columns,
        bits=8,
        block_size=BLOCK,
        accuracy_level=4,
    )


def _lookup(onnx: Any, node: Any, table: Any, added: dict[str, np.ndarray]) -> list[Any]:
    integers, scales = in_rows(onnx.numpy_helper.to_array(table))
    added |= {f"{table.name}.int8": integers, f"{table.name}.scales": scales}
    out, ids, make = node.output[0], node.input[1], onnx.helper.make_node
    return [
        make("Gather", [f"{table.name}.int8", ids], [f"{out}.int8"], name=f"{node.name}.int8", axis=0),
        make("Gather", [f"{table.name}.scales", ids], [f"{out}.scales"], name=f"{node.name}.scales", axis=0),
        make("Cast", [f"{out}.int8"], [f"{out}.float"], name=f"{node.name}.float", to=onnx.TensorProto.FLOAT),
        make("Mul", [f"{out}.float", f"{out}.scales"], [out], name=f"{node.name}.scaled"),
    ]


def in_blocks(weight_kn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [K, N] as MatMulNBits has it: uint8 [N, ceil(K/32), 32], where 128 is zero, and scales [N, ceil(K/32)]."""
    rows, columns = weight_kn.shape
    padded = np.pad(weight_kn, ((0, -rows % BLOCK), (0, 0)))
    integers, scales = in_rows(padded.T.reshape(-1, BLOCK))
    blocks = (integers.astype(np.int16) + 128).astype(np.uint8)
    return blocks.reshape(columns, -1, BLOCK), scales.reshape(columns, -1)


def in_rows(rows_nd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n, d] as int8 [n, d] in -127..127 times float32 [n, 1]; a row of zeros stays one."""
    scales = np.abs(rows_nd).max(axis=1, keepdims=True) / np.float32(127)
    scales[scales == 0] = 1
    return np.rint(rows_nd / scales).astype(np.int8), scales
