"""The precompute stage: text chunks to shards. Tasks communicate through the directory alone, by the shards missing from it.

    <run>/precompute/text/000007.txt  ->  <run>/shards/000007.tar        and held_out.txt -> <run>/shards/held_out/000000.tar

`prepare` cuts the text, once, and looks it up in the runs of shards.reuse. Any number of tasks then call `encode_missing`,
which claims missing shards (claims.py) and overlaps reading and tokenizing the next chunk, encoding this one and writing the
one before. The ranks of a sharded teacher (ZeRO-3) are one task: rank 0 claims and writes. A task that finds nothing missing
finishes the set.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from distill.corpus import TextChunk, can_resume, prepare_text
from distill.corpus.chunks import chunk_fingerprint, read_listed_chunk
from distill.corpus.prepare import source_names, text_identity
from distill.corpus.sources import pinned, source_fingerprints
from distill.corpus.text_config import TextConfig
from distill.run.collectives import from_rank_0, rank
from distill.run.config import Effect
from distill.run.files import DigestCache, append_line, fingerprint, read_json, set_aside, sha256_of, write_json
from distill.run.model_folders import model_fingerprint
from distill.run.precision import autocast_dtype, describe_precision
from distill.run.session_log import session
from distill.run.stage import Stage, StopRequested, differences, run_directory
from distill.run.throughput import Timing, matmul_peak
from distill.shards import HELD_OUT, Manifest, finish, verify_all
from distill.teacher.claims import claim_of
from distill.teacher.dev_score import lacks_dev_score, write_dev_score
from distill.teacher.encode_missing import ShardSet, Source, all_missing, encode_missing
from distill.teacher.endpoint import GIVEN, EndpointTeacher
from distill.teacher.identity import check_teacher, named_settings, teacher_identity
from distill.teacher.imported import ImportedVectors, vector_files
from distill.teacher.reused_rows import ReusedRows, look_up
from distill.teacher.reused_run import Prompting, ReusedRun, open_reused
from distill.teacher.teacher_config import ShardsConfig, TeacherConfig
from distill.teacher.token_log import FOLDER, TokenLog
from distill.teacher.truncation import recorded_truncation

if TYPE_CHECKING:
    from distill.teacher.long_text import LongTexts

logger = logging.getLogger(__name__)
VERIFIED = "shards_verified.json"  # in the run's directory: which shards of an earlier version were verified


class PrecomputeStage(Stage):
    """Embeds a run's text with its teacher, or takes the shards that another run made of it."""

    name = "precompute"
    reads = ("text", "teacher", "shards")
    covered_by_inputs = ("evaluate.sts",)
    effects: ClassVar[dict[str, Effect]] = {"text.sources.weight": "speed"}  # of training alone
    _reuse: tuple[list[ReusedRun], ReusedRows] | None = None  # from `prepare`

    @property
    def directory(self) -> Path:
        return self.context.precompute_dir

    @property
    def shards_dir(self) -> Path:
        return self.context.shards_dir

    @property
    def teacher(self) -> TeacherConfig:
        return self.context.section(TeacherConfig)

    def inputs(self) -> dict[str, str]:
        """Digests of the text files and of the teacher's folders, or of its vectors; commits of hub datasets.

        A commit that was recorded stays: text that moves on after it was read is no other input. A hub model is not among
        them: `identify` records its commit in teacher.json.
        """
        found = source_fingerprints(self.context.section(TextConfig), self.digests, self.recorded_inputs())
        for model in self.teacher.models:
            if digest := model_fingerprint(model.model, self.digests):
                found[str(model.model)] = digest
        for path in vector_files(self.teacher):
            found[path] = self.digest(Path(path))
        return found

    def progress(self) -> list[Path]:
        """The text that was prepared from these sources with these settings."""
        text, config = self.directory / "text", pinned(self.context.section(TextConfig), self.recorded_inputs())
        manifest = read_json(text / "manifest.json") or {}
        rows, has_rows = self.context.section(ShardsConfig).rows, self.teacher.vectors is not None
        if not manifest or manifest.get("made_from") != text_identity(config, rows, has_rows, self.digests, self.limit()):
            return []
        return [text]

    def limit(self) -> LongTexts | None:
        """What becomes of texts that are longer than the teacher reads; None where it truncates them."""
        text = self.context.section(TextConfig)
        if text.long == "truncate":
            return None
        from distill.teacher.long_text import LongTexts

        return LongTexts(text.long, self.teacher, text.sources)

    def is_product_missing(self) -> str | None:
        results = (read_json(self.directory / "DONE.json") or {}).get("results", {})
        folders = [self.shards_dir, *([self.shards_dir / HELD_OUT] if results.get("held_out") else [])]
        manifests = (folder / "manifest.json" for folder in folders)
        # taken out by `python -m distill.shards repair`, or by hand
        return next((f"{manifest} is missing" for manifest in manifests if not manifest.exists()), None)

    def reason_to_run(self) -> str | None:
        manifest = self.shards_dir / "manifest.json"
        if not self._is_of_earlier_version or not manifest.is_file():
            return super().reason_to_run()
        verified = read_json(self.context.run_dir / VERIFIED) or {}
        return (
            None if verified.get("manifest") == sha256_of(manifest) else "its shards are of an earlier version: to be verified"
        )

    @property
    def _is_of_earlier_version(self) -> bool:
        """Whether another run's shards were made by a version of this program whose DONE.json has other keys."""
        done = read_json(self.directory / "DONE.json")
        return done is not None and "settings" not in done and self.directory.parent != self.context.run_dir

    def run(self, device: torch.device, stop_requested: StopRequested = lambda step: False) -> bool:
        """Prepares the text, makes the shards that this task claims and finishes the set if it is complete; True if it is."""
        if self._is_of_earlier_version:
            self.prepare()
            return True
        amp, endpoint = autocast_dtype(self.teacher.precision, device), self.endpoint
        if rank() == 0 and self.teacher.model is not None:
            logger.info("precompute: precision: %s", describe_precision(self.teacher.precision, device))
        text, identity = self.prepare(_precision(amp)), self.identify(amp)
        timing = Timing()
        source = cache(lambda: self.open_source(device, amp, text))  # loads the teacher when it is needed

        def encode(texts: Sequence[str]) -> np.ndarray:
            return source().encode(source().read(TextChunk(list(texts), None, None)), lambda rows: None)

        has_missing, lacks_score = from_rank_0((bool(all_missing(self.shard_sets(text))), self.lacks_dev_score), device)
        if has_missing or lacks_score:
            with session(self.directory, "embed", device):
                if has_missing:
                    if endpoint is not None:
                        self._report_truncation(endpoint, text)
                    timing = encode_missing(
                        self.shard_sets(text),
                        self.directory / "text",
                        source(),
                        teacher_fingerprint=fingerprint(identity),
                        block_rows=self.context.section(ShardsConfig).block_rows,
                        numbers_sources=bool(self.source_entries),
                        peak=matmul_peak(device, amp) if endpoint is None else None,
                    )
                if lacks_score:
                    write_dev_score(self.directory, self.context.value("evaluate.sts"), encode, device)
            if (timing.texts or timing.reused) and rank() == 0:
                self.log_task(timing)
                logger.info("precompute: %s", timing)
                if timing.at_limit and self.context.section(TextConfig).long == "truncate":
                    words = "precompute: %d of %d texts reach the longest input; longer ones are truncated (teacher.max_length)"
                    logger.info(words, timing.at_limit, timing.texts)
            if endpoint is not None:
                retries = endpoint.client.num_retries
                logger.info("precompute: %s, %d retries; the run: %s", endpoint.log.own, retries, endpoint.log.total)
        return bool(from_rank_0(self._finish(text, identity, timing) if rank() == 0 else None, device))

    @cached_property
    def endpoint(self) -> EndpointTeacher | None:
        """The teacher behind an endpoint, if it is one. Raises ValueError without its API key in the environment."""
        config = self.teacher.endpoint
        if config is None:
            return None
        log = TokenLog(self.directory / FOLDER, config.max_tokens)
        return EndpointTeacher(self.teacher, sources=self.context.section(TextConfig).sources, log=log)

    def _report_truncation(self, endpoint: EndpointTeacher, text: dict[str, Any]) -> None:
        """Warns of texts that the server does not read to their end. What one task has found holds for all."""
        entries = [entry for shards in self.shard_sets(text) for entry in shards.entries]
        chunks = (endpoint.read(read_listed_chunk(self.directory / "text", entry)) for entry in entries)
        with self._locked():
            found = recorded_truncation(self.directory / "truncation.json", endpoint, chunks, text["fingerprint"])
        if found.num_longer:
            logger.warning("precompute: %s", found)

    def _finish(self, text: dict[str, Any], identity: dict[str, Any], timing: Timing) -> bool:
        with self._locked():  # tasks that find nothing missing at the same time finish one after the other
            return self.reason_to_run() is None or self.finish_set(text, identity, timing)

    @property
    def lacks_dev_score(self) -> bool:
        """Whether the teacher's score on the dev set of evaluate.sts is still to be computed.

        Precomputed vectors have none, and nothing is added to another run's finished precompute.
        """
        is_finished_elsewhere = self.directory.parent != self.context.run_dir and (self.directory / "DONE.json").exists()
        has_score = self.teacher.vectors is None and not is_finished_elsewhere
        return has_score and lacks_dev_score(self.directory, self.context.value("evaluate.sts"))

    def _verify_shards(self) -> None:
        """Raises ValueError unless the shards are intact and made by this teacher; records that they were verified.

        Another text is a warning: an earlier version's sources may have no equivalent.
        """
        done = read_json(self.directory / "DONE.json") or {}
        text = {"text": done.get("config", {}).get("text")}
        if changes := differences(text, {"text": self.settings("result")["text"]}):
            logger.warning("precompute: %s was made with other settings of the text: %s", self.shards_dir, "; ".join(changes))
        sets = [self.shards_dir, *([held_out] if (held_out := self.shards_dir / HELD_OUT).is_dir() else [])]
        manifest = Manifest.load(self.shards_dir)
        check_teacher(self.teacher, self.shards_dir, manifest)
        for folder in sets:
            if damage := list(verify_all(folder)):
                raise ValueError(f"{self.shards_dir} cannot be used: {damage[0]}")
        self.context.run_dir.mkdir(parents=True, exist_ok=True)
        write_json(self.context.run_dir / VERIFIED, {"manifest": sha256_of(self.shards_dir / "manifest.json")})

    def prepare(self, precision: str | None = None) -> dict[str, Any]:
        """Checks that the run's shards, if any, are of this config, cuts the text into chunks and looks them up in the runs of
        shards.reuse. Returns the text's manifest. precision: that the teacher runs in, 'fp32' or 'bf16', if it is known.

        If the shards are another run's, made by an earlier version, they are verified instead, and its text is left as it is.
        Raises ValueError if the run directory was begun with another text or teacher: vectors are never overwritten.
        """
        if self._is_of_earlier_version:
            self._verify_shards()
            return read_json(self.directory / "text" / "manifest.json") or {}
        with self._locked():
            runs = self.reused_runs(precision or self.teacher.precision, self.digests)
            text = self._prepare()
            self._reuse = (runs, ReusedRows(self._look_up(runs, text))) if runs else None
            self._at_work = self.lock_file.open("w")
            fcntl.flock(self._at_work, fcntl.LOCK_SH)
            return text

    @property
    def lock_file(self) -> Path:
        """Locked, shared, by every task that has prepared its work, as long as it lives."""
        return self.directory.with_name(".precompute.tasks")

    def missing_shards(self) -> list[Path]:
        """The claim of each missing shard, which a task that makes it holds; the text has been cut."""
        text = read_json(self.directory / "text" / "manifest.json")
        return [] if text is None else [claim_of(*shard) for shard in all_missing(self.shard_sets(text))]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the run's lock, which the system releases when a task is killed."""
        run_dir = self.directory.parent
        run_dir.mkdir(parents=True, exist_ok=True)
        with (run_dir / ".precompute.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _prepare(self) -> dict[str, Any]:
        if refusal := self.refusal():
            raise ValueError(refusal)
        begun = read_json(self.directory / "BEGUN.json")
        changes = self.changes_since(begun) if begun is not None else []
        if changes or begun is None:
            self._check_nobody_works(changes)
            self.begin()
        text = self.directory / "text"
        if read_json(text / "manifest.json") is None:
            part = self.directory / "text.part"
            keep_row_numbers = self.teacher.vectors is not None
            try:
                with session(self.directory, "text", torch.device("cpu"), alone=True):
                    config = pinned(self.context.section(TextConfig), self.recorded_inputs())
                    rows = self.context.section(ShardsConfig).rows
                    prepare_text(
                        config,
                        part,
                        rows_per_chunk=rows,
                        keep_row_numbers=keep_row_numbers,
                        digests=self.digests,
                        limit=self.limit(),
                    )
            except BaseException:
                if not can_resume(part):
                    shutil.rmtree(part, ignore_errors=True)
                raise
            if text.exists():
                set_aside(text, "it has no manifest.json")
            part.rename(text)
        manifest = read_json(text / "manifest.json")
        assert manifest is not None
        return manifest

    def refusal(self) -> str | None:
        """Vectors are never overwritten: shards of another text or teacher are a reason."""
        begun = read_json(self.directory / "BEGUN.json")
        changes = self.changes_since(begun) if begun is not None else []
        if self._is_of_earlier_version:
            return None
        if not changes or not any(self.shards_dir.rglob("*.tar")):
            try:
                self.reused_runs(self.teacher.precision)
            except ValueError as error:
                return str(error)
            return None
        fix = "put the config back to continue, use another name="
        if begun is not None and "settings" not in begun:
            fix = f"use its shards, if they are finished, under another name= with shards_from={self.directory.parent.name}"
        return (
            f"{self.directory.parent} was begun with another text or teacher ({'; '.join(changes)}): {fix}, or delete"
            f" {self.directory} and {self.shards_dir}"
        )

    def _check_nobody_works(self, changes: list[str]) -> None:
        """Raises ValueError if tasks of another config have begun and live; they have no shard yet."""
        with self.lock_file.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                what = "; ".join(changes) or "BEGUN.json was deleted"
                raise ValueError(
                    f"{self.directory.parent}: precompute tasks of another config are at work ({what}):"
                    " use another name=, or end them"
                ) from None

    def reused_runs(self, precision: str, digests: DigestCache | None = None) -> list[ReusedRun]:
        """The runs of shards.reuse, those of most encoders first; none once no shard is missing, when they are not needed.

        precision: that the teacher runs in, 'auto' if it is not known. The teacher's files are compared if there are `digests`.
        Raises ValueError for a run that cannot be reused.
        """
        names = self.context.section(ShardsConfig).reuse
        text = read_json(self.directory / "text" / "manifest.json") if names else None
        if not names or (text is not None and not all_missing(self.shard_sets(text))):
            return []
        try:
            identity = self._compared(precision, digests)
            runs = [open_reused(run_directory(self.context.run_dir.parent, name), identity) for name in names]
            if digests is not None and (endpoint := self.endpoint) is not None:
                for run in runs:
                    endpoint.check(run.readers[0].manifest.teacher, run.directory)
        except ValueError as error:
            raise ValueError(f"shards.reuse: {error}; or leave it out, and its texts are embedded again") from None
        return sorted(runs, key=lambda run: -len(run.encoders))

    def _compared(self, precision: str, digests: DigestCache | None) -> dict[str, Any]:
        """What a reused run's teacher is compared with: this one's identity, as far as it is known without a request."""
        if self.teacher.endpoint is not None:
            return named_settings(self.teacher) | {"precision": GIVEN}
        if digests is None:
            return named_settings(self.teacher) | {"precision": precision}
        return teacher_identity(self.teacher, precision, digests)

    def _look_up(self, runs: list[ReusedRun], text: dict[str, Any]) -> Path:
        """The folder of the rows of this text in the runs."""
        entries = [entry for shards in self.shard_sets(text) for entry in shards.entries]
        prompting = [Prompting.of(source.model_dump()) for source in self.context.section(TextConfig).sources]
        return look_up(runs, self.directory / "text", entries, prompting, len(self.teacher.models), self.directory / "reused")

    def identify(self, amp: torch.dtype | None) -> dict[str, Any]:
        """The teacher's identity, written to precompute/teacher.json by the first task.

        Raises ValueError if it has changed since then, or if this processor would run it in another precision.
        """
        path = self.directory / "teacher.json"
        if self.endpoint is not None:
            return self._identify_endpoint(self.endpoint, path)
        with self._locked():
            identity = teacher_identity(self.teacher, _precision(amp), self.digests)
            begun_as = read_json(path) or identity
            if begun_as["precision"] != identity["precision"]:
                raise ValueError(
                    f"{self.shards_dir} was begun in {begun_as['precision']}, and this processor would run the teacher in"
                    f" {identity['precision']}: set teacher.precision={begun_as['precision']}, or use processors of one kind"
                )
            if begun_as != identity:
                raise ValueError(
                    f"the teacher's files have changed since {self.shards_dir} was begun; put them back, use another"
                    f" name=, or delete {self.shards_dir} and {path.parent}"
                )
            if not path.exists():
                write_json(path, identity)
        return identity

    def _identify_endpoint(self, endpoint: EndpointTeacher, path: Path) -> dict[str, Any]:
        """The identity as it was recorded: a server's vectors vary in their last bits."""
        with self._locked():
            recorded = read_json(path)
            if recorded is None:
                recorded = endpoint.identity()
                write_json(path, recorded)
            else:
                endpoint.check(recorded, self.shards_dir)
        for line in endpoint.describe():
            logger.info("precompute: %s", line)
        return recorded

    def open_source(self, device: torch.device, amp: torch.dtype | None, text: dict[str, Any]) -> Source:
        """The teacher, or its precomputed vectors."""
        if self.teacher.vectors is not None:
            imported = ImportedVectors(self.teacher)
            if len(imported) != text["counts"]["read"]:
                raise ValueError(
                    f"teacher.vectors: {imported} has {len(imported):,} rows, the text {text['counts']['read']:,}"
                    " raw texts; there must be one vector for each, in order"
                )
            return imported
        from distill.teacher.encoder import Teacher, describe_prompts
        from distill.teacher.reuse import ReusingTeacher

        sources = self.context.section(TextConfig).sources

        def load(only: int | None) -> Teacher | EndpointTeacher:
            if self.endpoint is not None:
                return self.endpoint
            teacher = Teacher(self.teacher, device, amp, sources=sources, offload=self.directory / "offload", only=only)
            if rank() == 0:
                for line in describe_prompts(teacher, sources):
                    logger.info("precompute: %s", line)
            return teacher

        if self._reuse is None:
            return load(None)
        runs, rows = self._reuse
        source = ReusingTeacher(load, len(self.teacher.models), runs, rows)
        entries_of = {shards.folder: shards.entries for shards in self.shard_sets(text)}
        left = [entries_of[folder][number] for folder, number in all_missing(self.shard_sets(text))]
        num_texts, names = sum(entry["rows"] for entry in left), [entry["name"] for entry in left]
        for number, (name, count) in enumerate(zip(self.teacher.names, rows.num_missing(names).tolist(), strict=True)):
            if rank() == 0:
                words = f"{num_texts - count:,} vectors are reused, {count:,} texts are to be embedded"
                logger.info("precompute: %s: %s", name, words)
            if count:
                source.part_of(number)  # loads it before the work is timed
        return source

    @property
    def source_entries(self) -> list[dict[str, Any]]:
        """The sources in the shards' manifest; none where there is one, without role and columns, which every text is of."""
        sources = self.context.section(TextConfig).sources
        if len(sources) == 1 and sources[0].role is None and sources[0].columns is None:
            return []
        names = source_names([source.model_dump() for source in sources])
        pairs = zip(names, sources, strict=True)
        return [{"name": name, "role": source.role, "columns": source.columns or []} for name, source in pairs]

    def finish_set(self, text: dict[str, Any], identity: dict[str, Any], timing: Timing) -> bool:
        """Writes the manifests and DONE.json once no shard is missing; False if some are."""
        sets = self.shard_sets(text)
        if all_missing(sets):
            return False
        config, manifests = self.context.section(ShardsConfig), []
        for folder, entries in sets:
            manifests.append(
                finish(
                    folder,
                    teacher=identity,
                    teacher_fingerprint=fingerprint(identity),
                    text_fingerprint=text["fingerprint"],
                    text_fingerprints=[chunk_fingerprint(entry) for entry in entries],
                    rows=max(config.rows, max(entry["rows"] for entry in entries)),  # the held-out set is one shard
                    block_rows=config.block_rows,
                    sources=self.source_entries,
                )
            )
            for claim in folder.glob(".*.claim"):  # of killed tasks; one that lives has nothing left to claim
                claim.unlink(missing_ok=True)
        main = manifests[-1]
        results = {
            "texts": main.count,
            "held_out": manifests[0].count if len(manifests) > 1 else 0,
            "dim": main.dim,
            "bytes": sum(entry.bytes for entry in main.shards),
            "text": text["counts"],
            "last_task": timing.metrics(),
        }
        self.finish(results, fingerprint({"shards": [entry.sha256 for manifest in manifests for entry in manifest.shards]}))
        return True

    def shard_sets(self, text: dict[str, Any]) -> list[ShardSet]:
        """The held-out set, if there is one, and the training set; the smaller first, so that encoding begins at once."""
        held_out = ShardSet(self.shards_dir / HELD_OUT, [text["held_out"]])
        return [*([held_out] if text["held_out"]["rows"] else []), ShardSet(self.shards_dir, text["chunks"])]

    def log_task(self, timing: Timing) -> None:
        """Appends this task's work and durations to precompute/tasks.jsonl."""
        line = {"host": socket.gethostname(), "pid": os.getpid(), "ended": round(time.time()), **timing.metrics()}
        append_line(self.directory / "tasks.jsonl", line)


def _precision(amp: torch.dtype | None) -> str:
    return "fp32" if amp is None else "bf16"
