"""Measures any sentence-transformers model or exported student: STS, retrieval, transfer, MTEB. Or a run's evaluate stage.

    python launcher/evaluate.py --model runs/quickstart/export/ckd --sts data/sts --out ckd.json
    torchrun --nproc-per-node 8 launcher/evaluate.py --model OWNER/NAME --retrieval hub:BeIR/scifact --out big.json
    python launcher/evaluate.py --model M --retrieval data/scifact --precision int8 binary --rescore 4 --out small.json
    python launcher/evaluate.py --model M --mteb "MTEB(eng, v2)" --out mteb.json      needs launcher/install.sh quickstart,mteb
    python launcher/evaluate.py --compare teacher.json student.json
    python launcher/evaluate.py --config configs/quickstart.yaml [key=value ...]

Started by torchrun, srun or the deepspeed launcher, the ranks encode together; rank 0 alone reads, scores and writes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launcher import command
from launcher.rank_log import RankLog
from launcher.rendezvous import exiting_together, rank_from_environment, start_process_group

if TYPE_CHECKING:
    from distill.evaluation.model_encoder import ModelEncoder
    from distill.evaluation.mteb_tasks import MtebTasks
    from distill.evaluation.tasks import Tasks
    from distill.metrics.results import ModelResults
    from distill.metrics.vectors import RoleEncode

TIMEOUT = 3600.0  # seconds that ranks wait for rank 0 to read the sets, which may be a download


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.local_rank is not None:
        command.end_with_parent()
    return command.run(lambda: evaluate(args), show_traceback=args.traceback)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="DIR_OR_NAME", help="a folder, package:NAME/FOLDER or a hub name")
    what.add_argument(
        "--config", metavar="FILE.yaml", help="a run's YAML: its teacher and exported students, into runs/NAME/evaluate"
    )
    what.add_argument(
        "--compare",
        nargs=2,
        metavar=("A.json", "B.json"),
        help="which differences of two results are more than chance; a model of a run's results.json is FILE:MODEL",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="with --config: any key of it")
    parser.add_argument(
        "--sts", type=command.name, metavar="DIR", help="a folder with sts12_test.tsv.gz, ..., sickr_test.tsv.gz; or hub"
    )
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    parser.add_argument(
        "--retrieval",
        type=command.name,
        metavar="DIR",
        help="folders in BEIR's layout (corpus.jsonl.gz, queries.jsonl.gz, qrels.tsv), or hub:OWNER/NAME",
        **several,
    )
    parser.add_argument(
        "--transfer",
        type=command.name,
        metavar="DIR",
        help="folders with train.tsv and test.tsv (label, text), or hub:OWNER/NAME",
        **several,
    )
    parser.add_argument(
        "--mteb",
        type=command.name,
        metavar="TASK",
        help="tasks and benchmarks of mteb by name; folders in BEIR's layout and .tsv files of STS pairs as its tasks. Its own"
        " results go to the folder that --out names with the suffix .mteb; a task on the hub that is there is not run again",
        **several,
    )
    parser.add_argument("--index", choices=["exact", "hnsw"], help="retrieval also through these indices of faiss", **several)
    parser.add_argument(
        "--precision",
        choices=["float32", "float16", "int8", "binary"],
        help="STS and retrieval also with these vectors, retrieval through faiss",
        **several,
    )
    parser.add_argument(
        "--rescore", type=int, metavar="N", help="int8 and binary: also re-rank N times the candidates by larger vectors"
    )
    parser.add_argument(
        "--out", type=command.path, metavar="FILE.json", help="the file of the results, written whole or not at all"
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="texts in a forward pass (default 64)")
    parser.add_argument("--truncate-dim", type=int, metavar="D", help="keep the first D dimensions of every vector")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU where there is one)")
    parser.add_argument(
        "--bootstrap", type=int, default=1000, metavar="N", help="resamples for the 95%% intervals (default 1000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the resamples (default 0)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error was raised")
    args = parser.parse_intermixed_args(argv)
    if args.model and not args.out:
        parser.error("--model needs --out FILE.json")
    return args


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for what can be known to be wrong before the model is loaded; imports nothing heavy."""
    from distill.run.model_folders import resolve_model

    if not (args.sts or args.retrieval or args.transfer or args.mteb):
        raise ValueError("nothing to measure: give --sts DIR, --retrieval DIR, --transfer DIR, --mteb TASK or several of them")
    if (args.index or args.rescore is not None) and not args.retrieval:
        raise ValueError("--index and --rescore are options of --retrieval, which is not given")
    if args.precision and not (args.sts or args.retrieval):
        raise ValueError("--precision is an option of --sts and --retrieval, which are not given")
    for option, least in (("batch_size", 1), ("truncate_dim", 1), ("bootstrap", 0), ("seed", 0), ("rescore", 1)):
        value = getattr(args, option)
        if value is not None and value < least:
            raise ValueError(f"--{option.replace('_', '-')} {value} must be {least} or more")
    if args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder; name a file, e.g. {args.out / 'results.json'}")
    nearest = next(folder for folder in args.out.absolute().parents if folder.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise ValueError(f"cannot write --out {args.out}: {nearest} is not a folder that can be written to")
    resolve_model(args.model)


def read(args: argparse.Namespace) -> tuple[Tasks, MtebTasks | None]:
    from distill.evaluation.tasks import read_tasks

    mteb = None
    if args.mteb:
        from distill.evaluation.mteb_tasks import MtebTasks

        mteb = MtebTasks(args.mteb)
    options = {"searches": args.index, "precisions": args.precision, "rescore": args.rescore, "seed": args.seed}
    return read_tasks(args.sts, args.retrieval, args.transfer, **options), mteb


def measure(args: argparse.Namespace) -> ModelResults | None:
    """The results; None on ranks other than 0, which only encode."""
    from distill.evaluation.model_encoder import encoder_of, work_over_ranks

    options = {"batch_size": args.batch_size, "truncate_dim": args.truncate_dim}
    if not command.is_one_of_many_ranks():
        tasks, mteb = read(args)
        encoder = encoder_of(args.model, device=args.device, progress=sys.stderr.isatty(), **options)
        return measure_tasks(args, tasks, mteb, encoder, encoder)
    from distill.run.collectives import rank

    device, first = start_process_group(TIMEOUT), rank() == 0
    folder = args.out.with_name(f".{args.out.name}.ranks")
    with (
        RankLog(folder / "logs", "evaluate", rank()),
        exiting_together(folder / "heartbeats", device, TIMEOUT, lambda: "the same command begins again"),
    ):
        found = read(args) if first else None
        encoder = encoder_of(args.model, device=args.device or str(device), progress=first and sys.stderr.isatty(), **options)

        def work(encode: RoleEncode) -> ModelResults:
            assert found is not None
            return measure_tasks(args, *found, encoder, encode)

        results = work_over_ranks(encoder, device, work)
    if results is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return results


def measure_tasks(
    args: argparse.Namespace, tasks: Tasks, mteb: MtebTasks | None, encoder: ModelEncoder, encode: RoleEncode
) -> ModelResults:
    """encode: the encoder itself, or that of all ranks."""
    from distill.metrics.results import ModelResults
    from distill.metrics.vectors import EncodedTexts, encode_by_role

    scores: dict[str, Any] = {}
    if texts := tasks.texts:
        vectors = EncodedTexts(texts, encode_by_role(encode, texts))
        scores |= tasks.measure(vectors, bootstrap=args.bootstrap, seed=args.seed)
    if mteb is not None:
        from distill.evaluation.mteb_tasks import MtebModel

        sizes = {"dim": encoder.dim, "params": encoder.params, "truncate_dim": args.truncate_dim}
        scores["mteb"] = mteb.measure(MtebModel(encode, args.model, progress=encoder.progress, **sizes), mteb_folder(args))
    scores |= {"params": encoder.params, "dtype": encoder.dtype}
    return ModelResults(dim=encoder.dim, bytes_per_vector=4 * encoder.dim, **scores)


def mteb_folder(args: argparse.Namespace) -> Path:
    """Where mteb's own results go."""
    return args.out.with_suffix(".mteb")


def compare(first: str, second: str) -> str:
    from distill.evaluation.compare import compare, read_model
    from distill.evaluation.score_tables import format_comparison

    (name, results), (other_name, other_results) = read_model(first), read_model(second)
    return format_comparison(name, other_name, compare(results, other_results, (name, other_name)))


def evaluate(args: argparse.Namespace) -> int:
    rank_from_environment()
    if args.compare:
        print(compare(*args.compare))
        return 0
    if args.config:
        return evaluate_run(args)
    check(args)
    command.set_up_libraries()
    results = measure(args)
    if results is None:
        return 0
    from distill.evaluation.score_tables import format_results
    from distill.metrics.results import write_model_results

    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_model_results(args.out, results)
    print(format_results({args.model: results}))
    for warning in results.sts_warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if args.mteb:
        print(f"results in mteb's format: {mteb_folder(args)}")
    print(f"results: {args.out}")
    return 0


def evaluate_run(args: argparse.Namespace) -> int:
    """The evaluate stage of a run."""
    if command.is_one_of_many_ranks():
        raise ValueError("a run is measured by one process: --config without torchrun or srun")
    import torch

    command.run_stage(args, "evaluate", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return 0


if __name__ == "__main__":
    command.start(main)
