"""The JSON files of an exported folder as sentence-transformers 3 to 6, transformers 4 and 5, and other clients read them.

modules.json                   sentence_transformers.models.*: the classes of versions 3 to 5, aliases in version 6
sentence_bert_config.json      max_seq_length and do_lower_case
N_WeightedLayerPooling, N_Pooling
                               word_embedding_dimension; a boolean for each way to pool, which vLLM and
                               text-embeddings-inference read as well
N_Dense                        in_features, out_features, bias, activation_function
tokenizer_config.json          the class that takes tokenizer.json as it is; no token types, which no student was trained with
special_tokens_map.json        for fastembed
config.json                    the padding token, and rotary positions by their names in transformers 4
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill.student import Student

MODULES = "sentence_transformers.models."
POOLING_MODES = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
MODERNBERT_THETAS = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}


def rewrite_for_clients(folder: Path, student: Student) -> None:
    """Rewrites the files of `folder`, which sentence-transformers wrote of the modules of `student`."""
    modules = _read(folder / "modules.json")
    for module in modules:
        kind = module["type"].rpartition(".")[2]
        module["type"] = MODULES + kind
        if kind in _REWRITTEN:
            path = folder / module["path"] / "config.json"
            _write(path, _REWRITTEN[kind](_read(path)))
    _write(folder / "modules.json", modules)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": student.max_length, "do_lower_case": False})
    _write_tokenizer_configs(folder, student)
    _write(folder / "config.json", _config(_read(folder / "config.json"), student))


def _pooling(config: dict[str, Any]) -> dict[str, Any]:
    modes = config["pooling_mode"]
    modes = [modes] if isinstance(modes, str) else modes
    return {
        "word_embedding_dimension": config["embedding_dimension"],
        **{key: mode in modes for mode, key in POOLING_MODES.items()},
        "include_prompt": config["include_prompt"],
    }


def _weighted_layer_pooling(config: dict[str, Any]) -> dict[str, Any]:
    return {"word_embedding_dimension": config.pop("embedding_dimension"), **config}


def _dense(config: dict[str, Any]) -> dict[str, Any]:
    known = ("in_features", "out_features", "bias", "activation_function", "use_residual")
    return {key: config[key] for key in known if key in config}


_REWRITTEN = {"Pooling": _pooling, "WeightedLayerPooling": _weighted_layer_pooling, "Dense": _dense}


def _write_tokenizer_configs(folder: Path, student: Student) -> None:
    """Everything that decides the tokens is in tokenizer.json; the model's own class may build some of it again."""
    tokenizer = student.tokenizer
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    extra = [str(token) for token in tokenizer.extra_special_tokens]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": student.max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "clean_up_tokenization_spaces": False,
        **special,
        **({"additional_special_tokens": extra} if extra else {}),
    }
    _write(folder / "tokenizer_config.json", config)
    _write(folder / "special_tokens_map.json", special)


def _config(config: dict[str, Any], student: Student) -> dict[str, Any]:
    if config.get("pad_token_id") is None:
        config["pad_token_id"] = student.tokenizer.pad_token_id
    rope = config.get("rope_parameters") or {}
    if config["model_type"] == "modernbert":
        config |= {old: rope[kind]["rope_theta"] for kind, old in MODERNBERT_THETAS.items() if kind in rope}
    elif "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return config


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
