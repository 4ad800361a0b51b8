"""Teachers of every kind and size: Sentence-T5, several at once, and weights that do not fit where they run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import deepspeed
import numpy as np
import pytest
import torch
from commands import ROOT, environment, launch
from conftest import make_encoder, sentences, write_config
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from distributed_ranks import free_port, on_ranks
from encoders import save_family
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from torch.nn import Linear
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, BertTokenizerFast

from distill.config import load_config
from distill.run.precision import autocast_dtype
from distill.shards import ShardReader
from distill.teacher.encoder import PACKED_FLOPS, Teacher
from distill.teacher.load import PackedLinear, pack_linears
from distill.teacher.teacher_config import TeacherConfig

CPU = torch.device("cpu")
AMP = autocast_dtype("auto", CPU)  # bf16, or None where this processor lacks it: these tests then hold fp32 to fp32's limits
LEAST_COSINE = 0.999 if AMP else 0.99999
BYTES = 2 if AMP else 4
TEXTS = sentences(60)


def vectors_of(config, amp=None):
    return Teacher(TeacherConfig(**config), CPU, amp)(TEXTS)


def worst_cosine(a, b):
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


@pytest.fixture(scope="module")
def sentence_t5(tmp_path_factory, tiny_encoder):
    """Transformer (T5 encoder), mean pooling, a dense layer without bias, normalised: as the public checkpoints are stored."""
    folder = tmp_path_factory.mktemp("t5")
    transformer = Transformer(str(save_family("t5", tiny_encoder, folder / "inner")))
    torch.manual_seed(0)
    dense = Dense(16, 24, bias=False, activation_function=torch.nn.Identity())
    SentenceTransformer(modules=[transformer, Pooling(16, "mean"), dense, Normalize()], device="cpu").save(
        str(folder / "model")
    )
    return folder / "model"


@pytest.mark.parametrize("amp", list(dict.fromkeys([None, AMP])))
def test_sentence_t5_encodes_as_sentence_transformers_does(sentence_t5, amp):
    expected = SentenceTransformer(str(sentence_t5), device="cpu").encode(TEXTS)
    found = vectors_of({"model": str(sentence_t5)}, amp)
    assert found.shape == (60, 24)
    assert worst_cosine(found, expected) > (0.99999 if amp is None else LEAST_COSINE)
    assert worst_cosine(expected[:1], expected[1:2]) < 0.99, "the sentences are too alike for an error to show"


def test_a_checkpoint_in_fp16_is_run_in_bf16_or_fp32_which_do_not_overflow(sentence_t5, tmp_path):
    SentenceTransformer(str(sentence_t5), device="cpu", model_kwargs={"dtype": torch.float16}).save(str(tmp_path / "half"))
    teacher = Teacher(TeacherConfig(model=str(tmp_path / "half")), CPU, AMP)
    linear = [module for module in teacher.encoders[0].model.modules() if isinstance(module, PackedLinear if AMP else Linear)]
    kinds = {parameter.dtype for module in linear for parameter in module.parameters()}
    assert kinds == {AMP or torch.float32}
    assert worst_cosine(teacher(TEXTS), vectors_of({"model": str(sentence_t5)})) > 0.999


def test_without_bf16_instructions_a_bf16_model_keeps_plain_matrices(sentence_t5, monkeypatch):
    monkeypatch.setattr("distill.teacher.load.has_bf16", lambda device: False)
    teacher = Teacher(TeacherConfig(model=str(sentence_t5)), CPU, torch.bfloat16)
    assert not any(isinstance(module, PackedLinear) for module in teacher.encoders[0].model.modules())
    assert worst_cosine(teacher(TEXTS), vectors_of({"model": str(sentence_t5)})) > 0.999


def test_packed_matrices_give_what_plain_ones_give_and_count_alike():
    dtype = AMP or torch.float32
    plain = torch.nn.Linear(48, 32).to(dtype)
    model = torch.nn.Sequential(torch.nn.Sequential(plain), torch.nn.LayerNorm(32))
    inputs = torch.randn(5, 7, 48)
    with torch.inference_mode():
        expected = torch.nn.functional.linear(inputs.double(), plain.weight.double(), plain.bias.double())
        pack_linears(model)
        with FlopCounterMode(display=False, custom_mapping=PACKED_FLOPS) as counter:
            found = model[0](inputs)
    assert isinstance(model[0][0], PackedLinear) and found.dtype == dtype
    assert (found.double() - expected).abs().max() < 10 * torch.finfo(dtype).eps
    assert counter.get_total_flops() == 2 * 5 * 7 * 48 * 32
    assert sum(parameter.numel() for parameter in model[0].parameters()) == 48 * 32 + 32


def test_of_several_encoders_the_cosine_is_the_mean_of_theirs(sentence_t5, tiny_encoder):
    bert = {"model": str(tiny_encoder), "pooling": "mean"}
    both = vectors_of(bert | {"concat": [{"model": str(sentence_t5)}]})
    one, two = vectors_of(bert), vectors_of({"model": str(sentence_t5)})
    assert both.shape == (60, 32 + 24) and np.allclose(np.linalg.norm(both, axis=1), 1, atol=1e-3)
    assert np.allclose(both @ both.T, (one @ one.T + two @ two.T) / 2, atol=4e-3)


def test_with_weights_the_cosine_is_the_weighted_mean_of_the_encoders(sentence_t5, tiny_encoder):
    bert, t5 = {"model": str(tiny_encoder), "pooling": "mean"}, {"model": str(sentence_t5)}
    both = vectors_of(bert | {"weight": 3, "concat": [t5]})
    one, two = vectors_of(bert), vectors_of(t5)
    assert np.allclose(np.linalg.norm(both, axis=1), 1, atol=1e-3)
    assert np.allclose(both @ both.T, 0.75 * one @ one.T + 0.25 * two @ two.T, atol=4e-3)
    assert np.abs(0.75 * one @ one.T + 0.25 * two @ two.T - (one @ one.T + two @ two.T) / 2).max() > 0.1


def test_equal_weights_give_the_bits_of_none(sentence_t5, tiny_encoder):
    bert, t5 = {"model": str(tiny_encoder), "pooling": "mean"}, {"model": str(sentence_t5)}
    plain = Teacher(TeacherConfig(**bert, concat=[t5]), CPU, None)
    weighted = Teacher(TeacherConfig(**bert, weight=0.3, concat=[t5 | {"weight": 0.3}]), CPU, None)
    assert plain(TEXTS).tobytes() == weighted(TEXTS).tobytes()
    expected = np.concatenate([vectors_of(bert), vectors_of(t5)], axis=1) / 2**0.5
    assert np.abs(plain(TEXTS) - expected).max() < 1e-3


def test_one_of_several_encoders_gives_its_part_of_the_vectors(sentence_t5, tiny_encoder):
    config = TeacherConfig(model=str(tiny_encoder), pooling="mean", weight=2, concat=[{"model": str(sentence_t5), "weight": 5}])
    whole, parts = Teacher(config, CPU, None), [Teacher(config, CPU, None, only=number) for number in range(2)]
    assert np.array_equal(whole(TEXTS), np.concatenate([part(TEXTS) for part in parts], axis=1))


def test_the_models_own_prompts_are_used_by_name_and_by_default(sentence_t5, tmp_path):
    model = SentenceTransformer(str(sentence_t5), device="cpu", prompts={"query": "the query is ", "document": "the text is "})
    model.default_prompt_name = "query"
    model.save(str(tmp_path / "prompted"))
    name = str(tmp_path / "prompted")
    plain = SentenceTransformer(str(sentence_t5), device="cpu")
    for config, prompt in (({}, "the query is "), ({"prompt_name": "document"}, "the text is "), ({"prompt": ""}, "")):
        expected = plain.encode([prompt + text for text in TEXTS])
        assert worst_cosine(vectors_of({"model": name, **config}), expected) > 0.99999
    with pytest.raises(ValueError, match=r"'passage'.*\['document', 'query'\]"):
        vectors_of({"model": name, "prompt_name": "passage"})


def test_tokens_of_a_prompt_that_the_model_does_not_pool_are_left_out(tiny_encoder, tmp_path):
    pooling = Pooling(32, "mean", include_prompt=False)
    SentenceTransformer(modules=[Transformer(str(tiny_encoder)), pooling], device="cpu").save(str(tmp_path / "instructor"))
    model = SentenceTransformer(str(tmp_path / "instructor"), device="cpu")
    found = vectors_of({"model": str(tmp_path / "instructor"), "prompt": "the query is "})
    assert worst_cosine(found, model.encode(TEXTS, prompt="the query is ")) > 0.99999
    assert worst_cosine(found, model.encode(["the query is " + text for text in TEXTS])) < 0.9999


def test_a_model_without_a_transformer_encodes_too(tmp_path):
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    folder = make_encoder(tmp_path / "words")
    static = StaticEmbedding(BertTokenizerFast.from_pretrained(folder).backend_tokenizer, embedding_dim=20)
    SentenceTransformer(modules=[static], device="cpu").save(str(tmp_path / "static"))
    expected = SentenceTransformer(str(tmp_path / "static"), device="cpu").encode(TEXTS)
    assert worst_cosine(vectors_of({"model": str(tmp_path / "static")}), expected) > 0.99999


FREED_AT_ONCE = {f"MALLOC_{name}_THRESHOLD_": "65536" for name in ("MMAP", "TRIM")}  # glibc keeps none of what is freed
MEMORY = """
import json, os, sys, threading, time
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from distill.run.precision import autocast_dtype
from distill.teacher.encoder import Teacher
from distill.teacher.teacher_config import TeacherConfig

def held():
    "Bytes of this process that cannot be read from a file again."
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

def watch():
    while held() < limit:
        time.sleep(0.002)
    print("over the memory limit", file=sys.stderr, flush=True)
    os._exit(9)

options = json.loads(sys.argv[1])
Teacher(TeacherConfig(model=options["tiny"]), torch.device("cpu"), None)(["all that is imported is imported now"])
limit = held() + options["megabytes"] * 2**20
threading.Thread(target=watch, daemon=True).start()
amp = autocast_dtype("auto", torch.device("cpu"))
teacher = Teacher(TeacherConfig(**options["teacher"]), torch.device("cpu"), amp, offload=Path(options["offload"]))
np.save(options["out"], teacher(options["texts"]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory, tiny_encoder):
    """A BERT of 63 million parameters, as sentence-transformers stores it; not in the precision that it runs in, since weights
    that need no conversion stay in their file and take no memory."""
    folder = tmp_path_factory.mktemp("large")
    words = BertTokenizerFast.from_pretrained(tiny_encoder)
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "num_hidden_layers": 20, "num_attention_heads": 8, "intermediate_size": 2048}
    model = BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=64, initializer_range=0.08, **shape))
    model.to(torch.float32 if AMP else torch.float16)
    model.save_pretrained(folder / "inner")
    words.save_pretrained(folder / "inner")
    modules = [Transformer(str(folder / "inner")), Pooling(512, "mean")]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "model"))
    (folder / "model/model.safetensors").unlink()
    model.save_pretrained(folder / "model", max_shard_size="40MB")  # in several files, as large models are
    assert sum(p.numel() for p in model.parameters()) > 60 * 2**20
    return folder / "model"


def in_fp32(folder):
    return SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})


def encode_within(megabytes, large, tmp_path, tiny, **teacher):
    options = {
        "megabytes": megabytes,
        "teacher": {"model": str(large), "tokens_per_batch": 256, **teacher},
        "tiny": str(tiny),
        "offload": str(tmp_path / "offload"),
        "texts": TEXTS,
        "out": str(tmp_path / "found.npy"),
    }
    script = [sys.executable, "-c", MEMORY, json.dumps(options)]
    return subprocess.run(script, capture_output=True, text=True, env=environment() | FREED_AT_ONCE, cwd=ROOT)


@pytest.mark.slow
def test_a_teacher_larger_than_memory_is_run_from_disk_by_accelerate(large, sentence_t5, tmp_path):
    limit = 45 * BYTES  # megabytes, of 63 million parameters
    plain = encode_within(limit, large, tmp_path, sentence_t5)
    assert plain.returncode == 9 and "over the memory limit" in plain.stderr, "the limit does not bind: the test shows nothing"
    memory = {"cpu": f"{15 * BYTES}MB"}
    spread = encode_within(limit, large, tmp_path, sentence_t5, placement="auto", max_memory=memory)
    assert spread.returncode == 0, spread.stderr[-3000:]
    expected = in_fp32(large).encode(TEXTS)
    assert worst_cosine(np.load(tmp_path / "found.npy"), expected) > LEAST_COSINE


@pytest.mark.soak
def test_a_teacher_spread_over_ranks_by_zero3_makes_the_shards_that_one_process_makes(tmp_path, sentence_t5):
    teacher, split = f"{{model: {sentence_t5}, precision: fp32}}", "teacher.placement=zero3"
    configs = {}
    for name in ("one", "deepspeed", "pipeline"):
        (tmp_path / name).mkdir()
        configs[name] = write_config(tmp_path / name, sentence_t5, teacher=teacher)
    assert launch("precompute.py", "--config", configs["one"]).returncode == 0
    program = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        "--quiet",
    ]
    arguments = [*program, str(ROOT / "launcher/precompute.py"), "--config", str(configs["deepspeed"]), split]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    done = launch("pipeline.py", "--config", configs["pipeline"], split, "stages=[precompute]", "engine.num_ranks=2")
    assert done.returncode == 0, done.stdout
    one = ShardReader(load_config(configs["one"]).run_dir / "shards")
    rows = np.arange(len(one))
    for name in ("deepspeed", "pipeline"):
        run = load_config(configs[name]).run_dir
        two = ShardReader(run / "shards")
        assert two.texts(rows) == one.texts(rows)
        assert worst_cosine(two.vectors(rows).astype(np.float32), one.vectors(rows).astype(np.float32)) > 0.99999
        task = json.loads((run / "precompute/tasks.jsonl").read_text())  # one task, of two ranks
        assert task["texts"] == 600 and (run / "logs").is_dir()


@pytest.mark.soak
def test_the_ranks_of_a_zero3_teacher_embed_what_no_reused_run_has(tmp_path, sentence_t5):
    teacher = f"{{model: {sentence_t5}, precision: fp32}}"
    configs = {}
    for name, texts in (("old", sentences(600)), ("whole", sentences(700)), ("new", sentences(700))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text("\n".join(texts) + "\n")
        configs[name] = write_config(tmp_path / name, sentence_t5, teacher=teacher)
    for name in ("old", "whole"):
        assert launch("precompute.py", "--config", configs[name]).returncode == 0
    reuse = f"shards.reuse=[{tmp_path / 'old/runs/tiny'}]"
    split = ["teacher.placement=zero3", "stages=[precompute]", "engine.num_ranks=2"]
    done = launch("pipeline.py", "--config", configs["new"], *split, reuse)
    assert done.returncode == 0, done.stdout
    assert "600 vectors are reused, 100 texts are to be embedded" in done.stdout
    new, whole = (load_config(configs[name]).run_dir for name in ("new", "whole"))
    task = json.loads((new / "precompute/tasks.jsonl").read_text())
    assert (task["texts"], task["reused"]) == (100, 600)
    for folder in ("shards", "shards/held_out"):
        one, two = ShardReader(whole / folder), ShardReader(new / folder)
        rows = np.arange(len(one))
        assert two.texts(rows) == one.texts(rows)
        assert worst_cosine(two.vectors(rows).astype(np.float32), one.vectors(rows).astype(np.float32)) > 0.99999


def _weights_held(model, texts):
    """On each rank: bytes of weights held at rest, the most held at any moment of a forward pass, and of all weights."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    teacher = Teacher(TeacherConfig(model=model, placement="zero3", tokens_per_batch=256), CPU, AMP)
    parameters = list(teacher.encoders[0].model.parameters())

    def held():
        return sum(
            BYTES * (p.ds_tensor.numel() + (p.data.numel() if p.ds_status == ZeroParamStatus.AVAILABLE else 0))
            for p in parameters
        )

    rest, moments = held(), []
    for module in teacher.encoders[0].model.modules():
        module.register_forward_hook(lambda *_: moments.append(held()))
    vectors = teacher(texts)
    return rest, max(moments), sum(BYTES * p.ds_numel for p in parameters), vectors


def test_with_zero3_no_rank_ever_holds_all_weights(large):
    expected = in_fp32(large).encode(TEXTS)
    for rest, most, everything, vectors in on_ranks(2, _weights_held, str(large), TEXTS):
        assert rest < 0.52 * everything
        assert most < 0.8 * everything
        assert worst_cosine(vectors, expected) > LEAST_COSINE
