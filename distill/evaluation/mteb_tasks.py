"""Tasks of MTEB, run by the mteb library on a model that this package encodes.

    NAME              a task or a benchmark of mteb, from the hub: SciFact, NanoBEIR, "MTEB(eng, v2)"
    FOLDER            a retrieval set in BEIR's layout as a task with the folder's name
    FILE.tsv(.gz)     an STS set with the columns score, sentence1, sentence2

Queries and documents get the model's prompts for them, other texts its default prompt, as everywhere here; prompts that a model
has for single tasks of mteb are not used. mteb writes its own format, which its leaderboard takes, under
RESULTS/results/MODEL/REVISION/TASK.json, and does not run again what is there; the revision of a folder is the digest of its
files, so that no two models share results.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from sentence_transformers.util import cos_sim, pairwise_cos_sim

from distill.corpus.evaluation_sets import read_pairs, read_retrieval
from distill.metrics.sts import Pairs
from distill.metrics.vectors import RoleEncode, RoleText, encode_by_role
from distill.run.files import fingerprint, sha256_of
from distill.run.hub import model_commit
from distill.run.model_folders import model_files, resolve_model
from distill.run.prompts import Role
from distill.run.temporary import hub_error

INSTALL = "bash launcher/install.sh quickstart,mteb"
LANGUAGES = ["eng-Latn"]  # mteb wants some; nothing depends on them


def import_mteb() -> Any:
    """Raises ValueError that says what to install where mteb is missing."""
    try:
        return importlib.import_module("mteb")
    except ImportError as error:
        raise ValueError(f"--mteb needs the package mteb ({error}): {INSTALL}") from None


class MtebTasks:
    """Tasks by mteb's names, and from files. Raises ValueError for a name that is neither, and for what `read_*` do."""

    def __init__(self, names: Sequence[str]) -> None:
        mteb = import_mteb()
        self.public: list[Any] = []
        self.own: list[Any] = []
        for name in names:
            if Path(name).exists():
                self.own.append(own_task(Path(name)))
            else:
                self.public += _public_tasks(mteb, name)
        tasks = [task.metadata.name for task in (*self.public, *self.own)]
        if repeated := next((name for name in tasks if tasks.count(name) > 1), None):
            raise ValueError(f"two tasks of --mteb are called {repeated}; results are kept by the task's name")

    def measure(self, model: MtebModel, folder: Path) -> dict[str, float]:
        """Task -> its main score as mteb has it, mostly 0..1. Results in mteb's format go to `folder`.

        What `folder` has of a task on the hub is not measured again; tasks from files always are, since files change.
        """
        mteb = import_mteb()
        options = {"cache": mteb.ResultCache(folder), "co2_tracker": False, "show_progress_bar": model.progress}
        if not model.progress:
            datasets.disable_progress_bars()
        found = []
        if self.public:
            try:
                found += mteb.evaluate(model, self.public, overwrite_strategy="only-missing", **options).task_results
            except ConnectionError as error:
                raise hub_error(f"--mteb: {str(error).splitlines()[0]}", error) from None
        if self.own:
            found += mteb.evaluate(model, self.own, overwrite_strategy="always", **options).task_results
        return {result.task_name: float(result.get_score()) for result in found}


class MtebModel:
    """A RoleEncode as mteb's EncoderProtocol. encode: texts [n] of a role to vectors float32 [n, d].

    A text is encoded once a task for each role, a document once for each part of the corpus that mteb takes at a time.
    """

    def __init__(
        self, encode: RoleEncode, model: str, *, dim: int, params: int, truncate_dim: int | None, progress: bool
    ) -> None:
        self._encode = encode
        self._task = ""
        self._known: dict[RoleText, np.ndarray] = {}
        self.progress = progress
        name, revision = name_and_revision(model)
        known = {"name": name, "revision": revision, "n_parameters": params, "embed_dim": dim, "similarity_fn_name": "cosine"}
        known["framework"] = ["Sentence Transformers"]
        known["experiment_kwargs"] = None if truncate_dim is None else {"truncate_dim": truncate_dim}
        self.mteb_model_meta = import_mteb().models.ModelMeta.create_empty(overwrites=known)

    def encode(
        self, inputs: Iterable[Mapping[str, Any]], *, task_metadata: Any, prompt_type: Any = None, **options: Any
    ) -> np.ndarray:
        """Vectors float32 [n, d] of the texts of all batches, in their order. prompt_type: query, document or None."""
        role: Role | None = None if prompt_type is None else prompt_type.value
        texts = [text for batch in inputs for text in batch["text"]]
        if task_metadata.name != self._task:
            self._task, self._known = task_metadata.name, {}
        known = self._known if role != "document" else {}  # mteb gives large corpora in parts, to hold one at a time
        missing = [(role, text) for text in dict.fromkeys(texts) if (role, text) not in known]
        if missing:
            known.update(zip(missing, encode_by_role(self._encode, missing), strict=True))
        return np.stack([known[role, text] for text in texts])

    def similarity(self, first: Any, second: Any) -> Any:
        return cos_sim(first, second)

    def similarity_pairwise(self, first: Any, second: Any) -> Any:
        return pairwise_cos_sim(first, second)


def name_and_revision(model: str) -> tuple[str, str]:
    """mteb's name of a model, OWNER/NAME, and its revision: a hub model's commit, or the digest of a folder's files."""
    folder = Path(resolve_model(model))
    if not folder.is_dir():
        if not (commit := model_commit(model)):
            raise ValueError(
                f"--mteb: the commit of {model} is not known, by which mteb keeps its results: the hub cannot be reached"
            )
        return model, commit
    return f"local/{folder.resolve().name}", fingerprint(
        {str(file.relative_to(folder)): sha256_of(file) for file in model_files(folder)}
    )


def own_task(path: Path) -> Any:
    """A folder in BEIR's layout, or a .tsv(.gz) of STS pairs, as a task of mteb with the name of the folder or file."""
    import_mteb()
    if path.is_dir():
        return _retrieval_task(path)
    return _sts_task(path.resolve().name.split(".")[0], read_pairs(path))


def _public_tasks(mteb: Any, name: str) -> list[Any]:
    """The tasks of a benchmark, or the one of that name."""
    try:
        return list(mteb.get_benchmark(name).tasks)
    except KeyError:
        pass
    try:
        return [mteb.get_task(name)]
    except KeyError as error:
        raise ValueError(
            f"--mteb {name}: no such file or folder, and mteb has no task or benchmark of this name: {error}"
        ) from None


def _metadata(name: str, kind: str, main_score: str) -> Any:
    from mteb.abstasks.task_metadata import TaskMetadata

    dataset = {"path": f"local/{name}", "revision": "local"}
    description = f"{name}, from files"
    return TaskMetadata(
        name=name, description=description, dataset=dataset, type=kind, main_score=main_score, eval_langs=LANGUAGES
    )


def _retrieval_task(folder: Path) -> Any:
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    given, name = read_retrieval(folder), folder.resolve().name

    class OwnRetrieval(AbsTaskRetrieval):
        metadata = _metadata(name, "Retrieval", "ndcg_at_10")
        ignore_identical_ids = bool(given.among_documents)

        def load_data(self, *args: Any, **options: Any) -> None:
            documents = {"id": list(given.documents), "text": list(given.documents.values())}
            split: Any = {
                "corpus": datasets.Dataset.from_dict({**documents, "title": [""] * len(given.documents)}),
                "queries": datasets.Dataset.from_dict({"id": list(given.queries), "text": list(given.queries.values())}),
                "relevant_docs": {query: dict(grades) for query, grades in given.grades.items()},
                "top_ranked": None,
            }
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return OwnRetrieval()


def _sts_task(name: str, pairs: Pairs) -> Any:
    from mteb.abstasks.sts import AbsTaskSTS

    class OwnSts(AbsTaskSTS):
        metadata = _metadata(name, "STS", "cosine_spearman")
        min_score, max_score = math.floor(pairs.gold.min()), math.ceil(pairs.gold.max())

        def load_data(self, *args: Any, **options: Any) -> None:
            columns = {"sentence1": pairs.first, "sentence2": pairs.second, "score": pairs.gold.tolist()}
            self.dataset, self.data_loaded = {"default": {"test": datasets.Dataset.from_dict(columns)}}, True

    return OwnSts()
