"""Many small trainings on one GPU, or on a CPU, in the order of their importance, until a deadline.

    python -m scripts.study jobs --data data --examples examples --output jobs.json         # what is to be trained
    python -m scripts.study run --jobs jobs.json --output results --seconds 1200 --processes 8
    python -m scripts.study page --results results --data data                              # tables in docs/quality.md

A small model's step costs the host more than the device, so several processes share one GPU; with ``--mps`` NVIDIA's
multi-process service lets their kernels run beside each other, where it can be had. Settings are tried and chosen on
the way (:mod:`.queue`). Everything that has ended is in the folder at once; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looking for a GPU must not spoil later forks
for _name, _value in (("OMP_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false"), ("HF_HUB_OFFLINE", "1")):
    os.environ.setdefault(_name, _value)


def _run(args: argparse.Namespace) -> None:
    started = time.monotonic() - args.used
    from .job import Shared
    from .pool import Pool, service
    from .queue import Plan, Results

    lists = [json.loads(path.read_text()) for path in args.jobs]
    results = Results(args.output)
    plan = Plan(lists, results, args.seconds, args.tune_share * args.seconds, args.memory)
    folders = sorted({folder for one in lists for folder in one.get("data", [])})
    mixed = {job["argv"][job["argv"].index("--data") + 1] for job in plan.waiting if job.get("beside")}
    shared = Shared(folders, mixed)
    with tempfile.TemporaryDirectory(prefix="flr-study-") as work, service(args.mps, Path(work), args.device) as note:
        print(f"{time.monotonic() - started:.1f} s: {len(plan.waiting)} jobs to do, {note}", flush=True)
        Pool(plan, shared, Path(work), args.output, args.processes, started, args.device).run()
    print(f"{time.monotonic() - started:.1f} s: {len(results.done)} of {len(plan.jobs)} jobs are done", flush=True)


def _jobs(args: argparse.Namespace) -> None:
    from .jobs import by_recipe, study

    about = (args.data, args.examples, args.extra)
    made = study(*about) if args.part is None else by_recipe(args.part, *about, args.seeds)
    args.output.write_text(json.dumps(made, indent=1) + "\n")
    print(f"{len(made['jobs'])} jobs")


def _page(args: argparse.Namespace) -> None:
    from .page import take_over, take_over_part, write_page

    if args.results is not None and args.part is not None:
        take_over_part(args.results, args.data, args.part)
    elif args.results is not None:
        take_over(args.results, args.data)
    write_page()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    run = kinds.add_parser("run", help="Train and evaluate.")
    run.add_argument("--jobs", type=Path, nargs="+", required=True, help="Lists of jobs, see scripts/study/queue.py.")
    run.add_argument("--output", type=Path, required=True, help="Folder of results.")
    run.add_argument("--seconds", type=float, required=True, help="What has not ended by then is given up.")
    run.add_argument("--used", type=float, default=0.0, help="Seconds that are over already.")
    run.add_argument("--tune_share", type=float, default=0.5, help="Trials that have not begun by then are left out.")
    run.add_argument("--processes", type=int, default=2, help="Jobs at a time.")
    run.add_argument("--memory", type=float, default=70.0, help="GB of the device that jobs may ask for together.")
    run.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu where jobs say --use_cpu true.")
    run.add_argument("--mps", action="store_true", help="Try NVIDIA's multi-process service.")
    run.set_defaults(do=_run)
    jobs = kinds.add_parser("jobs", help="Write this study's list of jobs.")
    jobs.add_argument("--data", required=True, help="Folder of prepared data: instruments, amazon-cds, amazon-office.")
    jobs.add_argument("--examples", default="examples", help="Folder of the recipes.")
    jobs.add_argument("--extra", default="", help="Options for every training, e.g. '--use_cpu true'.")
    parts = ("repeats", "reversed", "taught", "changes", "others")
    jobs.add_argument("--part", choices=parts, help="By the recipes alone a part of it, see scripts/study/jobs.py.")
    jobs.add_argument("--seeds", type=int, nargs="+", default=[0], help="Seeds of that part.")
    jobs.add_argument("--output", type=Path, required=True)
    jobs.set_defaults(do=_jobs)
    page = kinds.add_parser("page", help="Write the tables of docs/quality.md.")
    page.add_argument(
        "--results", type=Path, nargs="+", help="Folders of results to take over; without, the page alone."
    )
    page.add_argument("--data", type=Path, help="Folder of prepared data, for groups of users.")
    page.add_argument(
        "--part", choices=("taught", "others"), help="Take over that part alone, beside what is kept of it."
    )
    page.set_defaults(do=_page)
    args = parser.parse_args(argv)
    args.do(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
