"""The teacher's encoder on a GPU: tokens per second and model FLOP utilisation, with random weights of real architectures.

    python tests/bench/teacher_gpu.py            Sentence-T5-XXL's encoder at lengths 64 and 256; MiniLM and BERT-base
                                                 compared with sentence-transformers at its best
    python tests/bench/teacher_gpu.py --tiny     the same code on small models, to see that it runs

MFU is relative to a large bf16 matrix product on the same device in the same run. Nothing is downloaded; the tokenizer has a
vocabulary of made-up words.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from distill.corpus import TextChunk
from distill.run.precision import autocast_dtype
from distill.run.throughput import matmul_peak
from distill.teacher.encoder import Teacher, Work
from distill.teacher.teacher_config import TeacherConfig

WORDS = [f"w{number}" for number in range(20_000)]
T5_XXL = {"d_model": 1024, "d_kv": 128, "d_ff": 65536, "num_heads": 128, "num_layers": 24}
BERT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
TINY_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 256, "num_heads": 4, "num_layers": 2}
TINY_BERT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", model_max_length=512)


def save_encoder(folder: Path, encoder: PreTrainedModel) -> Path:
    """A transformers folder: one copy of weights that may be 10 GB."""
    encoder.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_model(folder: Path, encoder: PreTrainedModel) -> Path:
    """A sentence-transformers folder."""
    inner = Transformer(str(save_encoder(folder / "inner", encoder)), model_kwargs={"dtype": torch.bfloat16})
    pooling = Pooling(encoder.config.hidden_size, "mean")
    SentenceTransformer(modules=[inner, pooling, Normalize()], device="cpu").save(str(folder / "model"))
    return folder / "model"


def random_texts(count: int, tokens: int, spread: bool) -> list[str]:
    """Texts of `tokens` tokens, or of about half of that with the spread of real text."""
    rng = np.random.default_rng(0)
    lengths = (
        np.clip(rng.lognormal(np.log(tokens / 2), 0.45, count), 4, tokens).astype(int) if spread else np.full(count, tokens)
    )
    return [" ".join(f"w{word}" for word in rng.integers(0, len(WORDS), length - 1)) for length in lengths]


def timed(encode: Any, texts: list[str], device: torch.device) -> float:
    encode(texts[: len(texts) // 4])
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    encode(texts)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(
    model: Path, texts: list[str], max_length: int, tokens_per_batch: int, device: torch.device, peak: float
) -> dict[str, Any]:
    pooling = None if (model / "modules.json").exists() else "mean"
    config = TeacherConfig(model=str(model), pooling=pooling, max_length=max_length, tokens_per_batch=tokens_per_batch)
    teacher = Teacher(config, device, autocast_dtype("bf16", device))
    read = teacher.read(TextChunk(texts, None, None))
    teacher.encode(read)
    teacher.work = Work()
    started = time.perf_counter()
    teacher.encode(read)
    seconds = time.perf_counter() - started
    work = teacher.work
    tokens, padded, flops = work.tokens, work.padded, work.flops
    return {
        "texts_per_second": round(len(texts) / seconds, 1),
        "tokens_per_second": round(tokens / seconds),
        "padding_efficiency": round(tokens / padded, 4),
        "tflops": round(flops * tokens / padded / seconds / 1e12, 2),
        "mfu": round(flops * tokens / padded / seconds / peak, 3),
    }


def best_of_sentence_transformers(model: Path, texts: list[str], device: torch.device) -> dict[str, Any]:
    rates = {}
    for dtype in (torch.bfloat16, torch.float16):
        peer = SentenceTransformer(str(model), device=str(device), model_kwargs={"dtype": dtype})
        for batch_size in (32, 128, 512, 1024):
            seconds = timed(partial(peer.encode, batch_size=batch_size), texts, device)
            rates[f"{dtype}, batch {batch_size}"] = round(len(texts) / seconds, 1)
    name = max(rates, key=rates.__getitem__)
    return {"best": name, "texts_per_second": rates[name], "all": rates}


def keep(result: dict[str, Any], path: Path | None) -> None:
    if path:
        path.write_text(json.dumps(result, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--tokens-per-batch", type=int, nargs="+", default=[16384, 65536, 131072])
    parser.add_argument(
        "--sentences", dest="num_texts", type=int, default=60_000, help="number of texts for MiniLM and BERT-base"
    )
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        raise SystemExit("there is no GPU here; --tiny runs the same code on small models")
    peak = matmul_peak(device, torch.bfloat16, seconds=2.0)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "matmul_peak_tflops": round(peak / 1e12, 2),
    }
    vocabulary = len(WORDS) + 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.set_default_dtype(torch.bfloat16)
        with device:
            t5 = T5EncoderModel(
                T5Config(vocab_size=vocabulary, feed_forward_proj="relu", **(TINY_T5 if options.tiny else T5_XXL))
            )
        torch.set_default_dtype(torch.float32)
        model = save_encoder(folder / "t5", t5)
        del t5
        for length in (64, 256):
            count = 64 if options.tiny else 2**19 // length
            for budget in options.tokens_per_batch:
                metrics = measure(model, random_texts(count, length, False), length, budget, device, peak)
                result[f"sentence-t5-xxl, length {length}, {budget} tokens per batch"] = metrics
                print(length, budget, metrics, flush=True)
                keep(result, options.out)
        shutil.rmtree(model)
        for label, shape in (("all-MiniLM", MINILM), ("BERT-base", BERT_BASE)):
            bert = BertModel(BertConfig(vocab_size=vocabulary, pad_token_id=0, **(TINY_BERT if options.tiny else shape)))
            model = save_model(folder / label, bert)
            texts = random_texts(200 if options.tiny else options.num_texts, 64, True)
            ours = max(
                (measure(model, texts, 64, budget, device, peak) for budget in options.tokens_per_batch),
                key=lambda metrics: metrics["texts_per_second"],
            )
            peer = best_of_sentence_transformers(model, texts, device)
            ratio = round(ours["texts_per_second"] / peer["texts_per_second"], 2)
            result[label] = {"ours": ours, "sentence-transformers": peer, "ratio": ratio}
            print(label, result[label], flush=True)
            keep(result, options.out)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
