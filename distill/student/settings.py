"""What a sentence-transformers folder says of a model besides its transformer: pooling, dense layers, prompts, lengths."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.run.model_folders import modules_of
from distill.student.pooling import NEEDS_HIDDEN_STATES, SLICES

PACKAGE = "sentence_transformers."


@dataclass(frozen=True)
class ModelSettings:
    """The settings of a model folder. A plain encoder has none: `pooling` is None.

    pooling: a name of pooling.py. include_prompt: whether a prompt's tokens are pooled. dense: sentence-transformers' Dense and
    Normalize modules between the pooling and the last Normalize, in their order. max_length: in tokens. truncate_dim: the first
    dimensions of the vectors that are kept.
    """

    pooling: str | None = None
    include_prompt: bool = True
    dense: tuple[nn.Module, ...] = ()
    max_length: int | None = None
    lowercases: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    truncate_dim: int | None = None

    def width(self, pooled: int) -> int:
        """The width of the vectors, from that of what is pooled."""
        width = self.full_width(pooled)
        return min(width, self.truncate_dim or width)

    def full_width(self, pooled: int) -> int:
        """The same before vectors are cut to truncate_dim. Raises ValueError if the first Dense takes another."""
        for module in self.dense:
            if hasattr(module, "linear"):
                if module.in_features != pooled:
                    raise ValueError(
                        f"the pooling gives {pooled} dimensions, but the model's Dense takes {module.in_features}: leave out"
                        " student.pooling, or name one of that width"
                    )
                pooled = int(module.out_features)  # type: ignore[arg-type]
        return pooled


def read_settings(folder: Path, *, has_weights: bool = True) -> ModelSettings:
    """The settings of a model's folder. has_weights: False leaves the dense layers uninitialised and reads JSON alone.

    Raises ValueError for a module that a student cannot have.
    """
    modules = modules_of(folder)
    if not modules:
        return ModelSettings()
    from sentence_transformers.sentence_transformer.modules import Transformer  # takes a second, and most starts read none

    about = _json(folder / "config_sentence_transformers.json")
    transformer = Transformer.load_config(str(folder / modules[0]["path"]))
    pooling, include_prompt, dense = None, True, []
    selected = None  # by a WeightedLayerPooling
    for module in modules[1:]:
        kind, place = module["type"].rpartition(".")[2], folder / module["path"]
        if not module["type"].startswith(PACKAGE):
            raise ValueError(f"{folder}: its module {module['type']} is code, which is not run; name another model")
        if kind == "WeightedLayerPooling" and pooling is None:
            selected = place
        elif kind == "Pooling" and pooling is None:
            pooling, include_prompt = _pooling(place)
            if selected is not None:
                pooling = _of_layers(folder, selected, pooling)
        elif kind in ("Dense", "Normalize") and pooling is not None:
            dense.append(_read_module(kind, place, has_weights))
        elif kind != "Dropout":
            raise ValueError(
                f"{folder}: a student cannot have its module {kind}, but Transformer, WeightedLayerPooling, Pooling, Dense, and"
                " Normalize, in this order; name another model"
            )
    while dense and not list(dense[-1].parameters()):
        dense.pop()  # students are normalised last in any case
    return ModelSettings(
        pooling=pooling,
        include_prompt=include_prompt,
        dense=tuple(dense),
        max_length=transformer.get("max_seq_length"),
        lowercases=bool(transformer.get("do_lower_case")),
        prompts={name: prompt or "" for name, prompt in (about.get("prompts") or {}).items()},
        default_prompt_name=about.get("default_prompt_name"),
        truncate_dim=about.get("truncate_dim"),
    )


def _pooling(place: Path) -> tuple[str, bool]:
    from sentence_transformers.sentence_transformer.modules import Pooling

    config = Pooling.load_config(str(place))
    mode = config.get("pooling_mode", "mean")
    return mode if isinstance(mode, str) else "+".join(mode), bool(config.get("include_prompt", True))


def _of_layers(folder: Path, place: Path, mode: str) -> str:
    """The pooling of several layers whose export these modules are. Raises ValueError for weights that no pooling has."""
    from safetensors.torch import load_file

    weights = load_file(place / "model.safetensors")["layer_weights"]
    for pooling in sorted(NEEDS_HIDDEN_STATES - {"concat_last4_mean"}):
        if pooling.endswith(mode) and torch.equal(weights, layer_weights(pooling, len(weights))):
            return pooling
    raise ValueError(f"{folder}: its weights of layers are those of no student.pooling; name one instead")


def layer_weights(pooling: str, depth: int) -> torch.Tensor:
    """The weight of each of `depth` layers in a pooling of several layers, [depth]; they need not sum to 1."""
    weights = torch.zeros(depth)
    for layer in SLICES[pooling](list(range(depth))):
        weights[layer] = 1.0
    return weights


def _read_module(kind: str, place: Path, has_weights: bool) -> nn.Module:
    from sentence_transformers.sentence_transformer.modules import Dense

    if kind == "Normalize":
        return new_module({})
    config = Dense.load_config(str(place))
    if {config.get("module_input_name"), config.get("module_output_name")} - {None, "sentence_embedding"}:
        raise ValueError(f"{place}: its layer is of tokens, not of texts, as in a multi-vector model; name another model")
    layer = new_module(config)
    return layer.load_torch_weights(str(place), model=layer).float() if has_weights else layer


def module_config(module: Any) -> dict[str, Any]:
    """What `new_module` makes such a module of."""
    return module.get_config_dict() if hasattr(module, "linear") else {}


def new_module(config: Mapping[str, Any]) -> Any:
    """A Dense module with new weights from its config.json, a Normalize from {}.

    Raises ValueError for an activation that torch.nn does not have.
    """
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize

    if not config:
        return Normalize()
    where, _, name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")
    activation = getattr(nn, name, None) if where.startswith("torch.nn.modules.") else None
    if not (isinstance(activation, type) and issubclass(activation, nn.Module)):
        raise ValueError(f"a Dense module has the activation {where}.{name}, which is none of torch.nn: name another model")
    known = ("in_features", "out_features", "bias", "use_residual")
    return Dense(**{key: config[key] for key in known if key in config}, activation_function=activation())


def without_weights(settings: ModelSettings) -> ModelSettings:
    """The settings with new dense layers, where new tensors take no memory: on the device meta or as fake ones."""
    return replace(settings, dense=tuple(new_module(module_config(module)) for module in settings.dense))


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
