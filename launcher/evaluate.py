"""Measures any sentence-transformers model or exported student: STS, retrieval, size. Or the evaluate stage of a run.

python launcher/evaluate.py --model runs/quickstart/export/ckd --sts data/sts --out ckd.json
python launcher/evaluate.py --config configs/quickstart.yaml [key=value ...]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="DIR_OR_NAME", help="a folder, package:NAME/FOLDER or a hub name")
    what.add_argument("--config", help="a run's YAML: its teacher and exported students, into runs/NAME/evaluate")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="with --config: any key of it")
    parser.add_argument("--sts", metavar="DIR", help="a folder with sts12_test.tsv.gz, ..., sickr_test.tsv.gz; or hub")
    parser.add_argument(
        "--retrieval",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        help="folders in BEIR's layout: corpus.jsonl.gz, queries.jsonl.gz, qrels.tsv",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where the results go, whole or not at all")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="sentences in a forward pass (default 64)")
    parser.add_argument("--truncate-dim", type=int, metavar="D", help="keep the first D dimensions of every vector")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU where there is one)")
    parser.add_argument(
        "--bootstrap", type=int, default=1000, metavar="N", help="resamples for the 95%% intervals (default 1000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the resamples (default 0)")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error was raised")
    args = parser.parse_intermixed_args(argv)
    if args.model and not args.out:
        parser.error("--model needs --out FILE.json")
    return args


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for what can be known to be wrong before the model is loaded; imports nothing heavy."""
    from distill.models import resolve_model

    if args.sts is None and not args.retrieval:
        raise ValueError("nothing to measure: give --sts DIR, --retrieval DIR or both")
    for option, least in (("batch_size", 1), ("truncate_dim", 1), ("bootstrap", 0), ("seed", 0)):
        value = getattr(args, option)
        if value is not None and value < least:
            raise ValueError(f"--{option.replace('_', '-')} {value} must be {least} or more")
    names = [folder.resolve().name for folder in args.retrieval]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two --retrieval folders are called {name}; results are kept by the folder's name")
    if args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder; name a file, e.g. {args.out / 'results.json'}")
    nearest = next(folder for folder in args.out.absolute().parents if folder.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise ValueError(f"cannot write --out {args.out}: {nearest} is not a folder that can be written to")
    resolve_model(args.model)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    from distill.evaluation.encode import encoder_of
    from distill.evaluation.retrieval import retrieval_files, retrieval_scores
    from distill.evaluation.sts import read_sets, sts_scores

    sts = {} if args.sts is None else read_sets(args.sts)
    for folder in args.retrieval:
        retrieval_files(folder)
    encoder = encoder_of(
        args.model,
        batch_size=args.batch_size,
        device=args.device,
        truncate_dim=args.truncate_dim,
        progress=sys.stderr.isatty(),
    )
    results: dict[str, Any] = {"dim": encoder.dim, "params": encoder.params, "bytes_per_vector": 4 * encoder.dim}
    if sts:
        results |= sts_scores(encoder, sts, bootstrap=args.bootstrap, seed=args.seed)
    if args.retrieval:
        results["retrieval"] = {folder.resolve().name: retrieval_scores(encoder, folder) for folder in args.retrieval}
    return results


def report(model: str, results: dict[str, Any]) -> str:
    from distill.evaluation.report import figure, table

    parts = [table([{"model": model, **results}])]
    if "sts" in results:
        intervals = results["sts_ci"]
        rows = [
            {"set": name, "score": score, "ci": "{:.2f} .. {:.2f}".format(*intervals[name]) if name in intervals else None}
            for name, score in results["sts"].items()
            if name != "AVG_OF"
        ]
        columns = {"STS": figure("set"), "Spearman x 100": figure("score", form="{:.2f}"), "95% interval": figure("ci")}
        parts.append(table(rows, columns))
    if "retrieval" in results:
        rows = [{"set": name, **scores} for name, scores in results["retrieval"].items()]
        measures = ("ndcg@10", "recall@10", "recall@100", "mrr@10")
        parts.append(table(rows, {"retrieval": figure("set")} | {name: figure(name, form="{:.4f}") for name in measures}))
    return "\n\n".join(parts)


def main() -> int:
    if args.config:
        config = command.config_of(args)
        from distill.evaluation.stage import evaluate_run

        command.quiet_libraries()
        evaluate_run(config)
        return 0
    check(args)
    command.quiet_libraries()
    results = evaluate(args)
    from distill.files import write_json

    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, results)
    print(report(args.model, results))
    for warning in results.get("sts_warnings", []):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"results: {args.out}")
    return 0


if __name__ == "__main__":
    args = parse_args()
    command.run(main, show_traceback=args.traceback)
