"""Model folders with Python code of their own, which writes a file when it runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

PLACES = ("config", "model", "tokenizer", "processor", "first module", "pooling")


def edit(path: Path, **changes: object) -> None:
    path.write_text(
        json.dumps((json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}) | changes), encoding="utf-8"
    )


def add_foreign_code(folder: Path, where: str, ran: Path) -> None:
    """Makes a class of the model folder one of a file in it, which writes the file `ran` as soon as it is imported."""
    (folder / "foreign.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nConfig = Model = Tokenizer = Processor = Module = None\n"
    )
    if where == "config":
        edit(folder / "config.json", auto_map={"AutoConfig": "foreign.Config"}, model_type="foreign")
    elif where == "model":
        edit(folder / "config.json", auto_map={"AutoConfig": "foreign.Config", "AutoModel": "foreign.Model"})
    elif where == "tokenizer":
        edit(
            folder / "tokenizer_config.json", tokenizer_class="Foreign", auto_map={"AutoTokenizer": ["foreign.Tokenizer", None]}
        )
    elif where == "processor":
        for name in ("processor_config.json", "preprocessor_config.json"):
            edit(folder / name, processor_class="Foreign", auto_map={"AutoProcessor": "foreign.Processor"})
    else:
        write_modules(folder, **{where.replace(" ", "_"): "foreign.Module"})


def write_modules(
    folder: Path,
    first_module: str = "sentence_transformers.models.Transformer",
    pooling: str = "sentence_transformers.models.Pooling",
) -> None:
    """Makes the folder one of sentence-transformers, with mean pooling."""
    modules = [{"idx": 0, "name": "0", "path": "", "type": first_module}, {"idx": 1, "name": "1", "path": "1", "type": pooling}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1").mkdir(exist_ok=True)
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    (folder / "1/config.json").write_text(json.dumps({"embedding_dimension": width, "pooling_mode": "mean"}))


def foreign_folder(encoder: Path, folder: Path, where: str, ran: Path) -> Path:
    """A copy of `encoder` as a sentence-transformers folder with code of its own."""
    shutil.copytree(encoder, folder)
    write_modules(folder)
    add_foreign_code(folder, where, ran)
    return folder
