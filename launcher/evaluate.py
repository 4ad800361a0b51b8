"""Measures any sentence-transformers model or exported student: STS, retrieval, transfer, size. Or the evaluate stage of a run.

    python launcher/evaluate.py --model runs/quickstart/export/ckd --sts data/sts --out ckd.json
    torchrun --nproc-per-node 8 launcher/evaluate.py --model OWNER/NAME --retrieval hub:BeIR/scifact --out big.json
    python launcher/evaluate.py --model M --retrieval data/scifact --precision int8 binary --rescore 4 --out small.json
    python launcher/evaluate.py --compare teacher.json student.json
    python launcher/evaluate.py --config configs/quickstart.yaml [key=value ...]

Started by torchrun, srun or the deepspeed launcher, the ranks encode together; rank 0 alone reads, scores and writes.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import command

if TYPE_CHECKING:
    from distill.evaluation import Tasks

TIMEOUT = 3600.0  # seconds that ranks wait for rank 0 to read the sets, which may be a download


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
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
        help="which differences of two results are more than chance; of a run's results.json, FILE:MODEL",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="with --config: any key of it")
    parser.add_argument("--sts", metavar="DIR", help="a folder with sts12_test.tsv.gz, ..., sickr_test.tsv.gz; or hub")
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    parser.add_argument(
        "--retrieval",
        metavar="DIR",
        help="folders in BEIR's layout (corpus.jsonl.gz, queries.jsonl.gz, qrels.tsv), or hub:OWNER/NAME",
        **several,
    )
    parser.add_argument(
        "--transfer", metavar="DIR", help="folders with train.tsv and test.tsv (label, text), or hub:OWNER/NAME", **several
    )
    parser.add_argument("--index", choices=["exact", "hnsw"], help="retrieval also through these indices of faiss", **several)
    parser.add_argument(
        "--precision",
        choices=["float32", "float16", "int8", "binary"],
        help="retrieval also with these vectors, through faiss",
        **several,
    )
    parser.add_argument(
        "--rescore", type=int, metavar="N", help="int8 and binary: also find N times as many, and order them by larger vectors"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where the results go, whole or not at all")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="sentences in a forward pass (default 64)")
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
    from distill.models import resolve_model

    if not (args.sts or args.retrieval or args.transfer):
        raise ValueError("nothing to measure: give --sts DIR, --retrieval DIR, --transfer DIR or several of them")
    if (args.index or args.precision or args.rescore is not None) and not args.retrieval:
        raise ValueError("--index, --precision and --rescore are of --retrieval, which is not given")
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


def read(args: argparse.Namespace) -> Tasks:
    from distill.evaluation import read_tasks
    from distill.evaluation.index import forms_of

    return read_tasks(args.sts, args.retrieval, args.transfer, forms_of(args.index, args.precision, args.rescore))


def measure(args: argparse.Namespace) -> dict[str, Any] | None:
    """The results; None on ranks other than 0, which only encode."""
    from distill.evaluation import Encoded, encoder_of

    options = {"batch_size": args.batch_size, "truncate_dim": args.truncate_dim}
    tasks: Tasks | None
    if not command.rank_is_one_of_many():
        tasks = read(args)
        encoder = encoder_of(args.model, device=args.device, progress=sys.stderr.isatty(), **options)
        sentences = tasks.sentences
        vectors = encoder(sentences)
    else:
        import torch.distributed
        from ranks import ending_together, start_process_group

        from distill.evaluation.over_ranks import encode_over_ranks

        device = start_process_group(TIMEOUT)
        heartbeats = args.out.with_name(f".{args.out.name}.ranks")
        with ending_together(heartbeats, device, TIMEOUT, lambda: "the same command begins again"):
            tasks = read(args) if rank == 0 else None
            progress = rank == 0 and sys.stderr.isatty()
            encoder = encoder_of(args.model, device=args.device or str(device), progress=progress, **options)
            sentences = tasks.sentences if tasks is not None else []
            gathered = encode_over_ranks(encoder, sentences, device)
        torch.distributed.destroy_process_group()
        if tasks is None or gathered is None:
            return None
        vectors = gathered
    size = {"dim": encoder.dim, "params": encoder.params, "bytes_per_vector": 4 * encoder.dim}
    return size | tasks.measure(Encoded(sentences, vectors), bootstrap=args.bootstrap, seed=args.seed)


def compare(first: str, second: str) -> str:
    from distill.evaluation.compare import compare, read_results
    from distill.evaluation.report import comparison

    (name, results), (other_name, other_results) = read_results(first), read_results(second)
    return comparison(name, other_name, compare(results, other_results, (name, other_name)))


def main() -> int:
    if args.compare:
        print(compare(*args.compare))
        return 0
    if args.config:
        if command.rank_is_one_of_many():
            raise ValueError("a run is measured by one process: --config without torchrun or srun")
        config = command.config_of(args)
        from distill.evaluation.stage import evaluate_run

        command.quiet_libraries()
        evaluate_run(config)
        return 0
    check(args)
    command.quiet_libraries()
    results = measure(args)
    if results is None:
        return 0
    from distill.evaluation.report import tables
    from distill.files import write_json

    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, results)
    print(tables([{"model": args.model, **results}]))
    for warning in results.get("sts_warnings", []):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"results: {args.out}")
    return 0


def this_rank() -> int:
    """0 without other ranks. Slurm's names count in a step of several tasks alone: a batch script has them too."""
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return 0
    from ranks import rank_from_environment

    return rank_from_environment()


if __name__ == "__main__":
    args = parse_args()
    if args.local_rank is not None:
        command.end_with_parent()
    rank = this_rank()
    command.run(main, rank=rank, show_traceback=args.traceback)
