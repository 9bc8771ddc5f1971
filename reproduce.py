"""Every run that the paper's tables and figures need, one after another: `python reproduce.py`.

    python reproduce.py                                        VGG-8 on the digits, 12 runs
    python reproduce.py --data cifar10 --suite paper depth --seeds 3
    python reproduce.py --data folder --augment cifar --data-root DIR --width 0.5 --epochs 20 --out results/cifar10-half

Stopped at any moment, the same command goes on where it was and skips what is finished. At the end it prints a table
and draws the figures, all into the folder --out.
"""

import argparse
import json
import os
import sys
import traceback

import torch

import train
import visualize
from model import ARCHS
from support import data, parallel, recipes
from support.fast import keep_memory
from support.runs import Run, holds_run, write_atomically

SUITES = {  # the settings in which the runs differ
    "paper": [  # what its figures compare
        *[dict(kind=kind) for kind in ("ei", "bn", "plain", "dann")],
        *[dict(eps=eps) for eps in (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)],
        *[dict(ste=False), dict(grad_scaling=False), dict(init="kaiming")],
    ],
    "homeostasis": [dict(kind="homeostasis")],
    "rivals": [dict(kind=kind) for kind in ("ei", "bn", "dann")],
    "depth": [dict(arch=arch, kind=kind) for arch in ARCHS if arch not in ("mlp", "vgg8") for kind in ("ei", "bn")],
}
# Top-1 accuracy in % that the authors report on CIFAR-10: 300 epochs, full width.
AUTHORS = {("vgg8", "ei"): 87.03, ("vgg11", "ei"): 88.43, ("vgg16", "ei"): 91.01, ("vgg19", "ei"): 91.36}
AUTHORS |= {("resnet18", "ei"): 92.06, ("resnet18", "bn"): 95.37}
ELSEWHERE = ("width", "seed", "data_root")  # what is not said of a run by its name in the table
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def parse(argv=None):
    p = recipes.Parser(prog="reproduce.py", description="Train all that the paper's figures need.")
    p.add_argument("--suite", nargs="+", choices=SUITES, default=["paper"], help="which runs (paper)")
    p.add_argument("--seeds", type=recipes.count, default=1, help="from 0, of E-I, BN-SNN, DANN, homeostasis (1)")
    p.add_argument("--figures", action=argparse.BooleanOptionalAction, default=True, help="draw them at the end (yes)")
    p.add_argument("--out", type=recipes.folder, default="runs", help="folder of all runs, table and figures (runs)")
    recipes.add_settings(p)
    recipes.add_ways(p)
    return p.parse_args(argv)


def plan(args):
    """The settings of every run, in order, each once.

    Raises:
        ValueError: an option is given that the runs differ in, or that one of them does not have.
    """
    if args.seed is not None and args.seeds > 1:
        raise ValueError("--seeds trains the seeds from 0: leave --seed out")
    chosen = [own for suite in args.suite for own in SUITES[suite]]
    if differing := {key for own in chosen for key in own if getattr(args, key) is not None}:
        name = min(differing).replace("_", "-")
        raise ValueError(f"--suite {' '.join(args.suite)} chooses --{name} itself: leave it out")
    compared = [own for own in chosen if own in SUITES["rivals"] + SUITES["homeostasis"]]
    if args.seeds > 1 and not compared:
        raise ValueError("--seeds is for the suites paper, rivals and homeostasis")
    for seed in range(1, args.seeds):
        chosen += [own | dict(seed=seed) for own in compared]
    given = {k: v for k, v in vars(args).items() if k not in ("suite", "seeds", "figures")}
    if args.plain and args.precision == "bf16":
        raise ValueError("--plain is for float32: leave it or --precision bf16 out")
    configs = []
    for own in chosen:
        without = dict.fromkeys(
            {*recipes.LACKS.get(own.get("kind", args.kind), ())} - {*recipes.ABLATIONS}
        )  # what this kind of network does not have
        try:
            config = recipes.settings(argparse.Namespace(**given | own | without))
        except ValueError as error:
            raise ValueError(f"the run {own}: {error}") from None
        if config not in configs:
            configs.append(config)
    return configs


def results_in(folder):
    """What is in the result.json of each finished run in a folder, by run folder. One that is damaged is left out."""
    found = {}
    for path in sorted(folder.glob("*/result.json")):
        try:
            result = dict(given_up=False) | json.loads(path.read_text(encoding="utf-8"))  # once it was not written
            row_of(result)
            found[path.parent] = result
        except Exception as error:  # a damaged file fails in many ways
            print(f"{path} is damaged ({type(error).__name__}: {error}): left out")
    return found


def check_data(config, results):
    """Refuses data other than those of finished runs, beside which the ones to come would stand in one table."""
    with parallel.first_process_first():
        now = data.identity(data.load(config["data"], config["data_root"], config["image_size"], "cpu", config["T"]))
    for folder, result in results.items():
        then = result["data"]
        if result["config"]["data"] != config["data"] or then["shape"] != now["shape"]:
            continue  # other sizes, or other frames of the same recordings
        if different := data.differences(then, now):
            raise ValueError(
                f"the data in {config['data_root']} are not those of {folder}, which is finished: {different}; give "
                "its own with --data-root, or choose another --out"
            )


def run_all(args, device):
    """Trains every run that is not finished yet.

    Returns:
        The exit status of the first one that is stopped, or 0; and the runs that could not be trained, with the reason.
    """
    configs, results, failed = plan(args), results_in(args.out), []
    check_data(configs[0], results)
    left = sum(config["epochs"] for config in configs)
    for i, config in enumerate(configs, 1):
        folder = args.out / recipes.run_name(config)
        print(f"\nrun {i} of {len(configs)}, with {left} epochs left in all: {folder.name}")
        try:
            run = Run(folder) if holds_run(folder) else None
            if run:
                config = run.settings(config)  # one with other settings is refused
            if run and folder in results:
                print(f"finished before, in {folder}" + ", given up at chance" * results[folder]["given_up"])
            elif status := train.train_run(run, config, args, device, folder):
                return status, failed
        except Exception as error:
            if not isinstance(error, (ValueError, OSError, MemoryError)):
                traceback.print_exc()  # of an edited network, perhaps
            reason = " ".join(str(error).split()) or type(error).__name__
            failed.append(f"{folder.name}: {reason}")
            print(f"not trained: {reason}")
        left -= config["epochs"]
    return 0, failed


def row_of(result):
    """The cells of a run in the table. The first one names the network, and where the run differs from its recipe."""
    config, data_of, epochs = result["config"], result["data"], result.get("epochs", 0)
    asked = {key: config[key] for key in ("data", "arch", "kind", "epochs")}
    usual = recipes.settings(argparse.Namespace(**asked)) | {key: config[key] for key in ELSEWHERE}
    usual["data"] = recipes.WHAT["data"]
    differing = {k: f"{v:g}" if isinstance(v, float) else v for k, v in config.items() if v != usual.get(k)}
    words = dict(ste="no STE", grad_scaling="no scaling", init="Kaiming")
    words |= {key: config[key] for key in ("plan", "precision")}
    names = [config["arch"], config["kind"], *(words.get(k, f"{k}={v}") for k, v in differing.items())]
    cifar10 = data_of["classes"] == CIFAR10 and data_of["train"].startswith("50000 ")
    alike = differing.keys() <= {"data", "augment", "precision"}
    known = AUTHORS.get(tuple(names[:2]), "-") if alike and cifar10 else "-"
    last, best, seconds = "-", "-", 0.0
    if epochs:
        seconds = result["train_seconds"] / epochs
        last = f"{100 * result['test_accuracy']:.2f}"
        best = f"{100 * result['best_test_accuracy']:.2f} ({result['best_epoch']})"
    cells = [" ".join(names), f"{config['width']:g}", config["seed"], f"{epochs}/{config['epochs']}", f"{seconds:.1f}"]
    return [*cells, result["outcome"] + ", given up at chance" * result["given_up"], last, best, known]


def table(folder):
    """A line of Markdown for each finished run in a folder."""
    head = "network | width | seed | epochs | s/epoch | outcome | top-1 %, last epoch | best (epoch)† | authors*"
    rows = [head.split(" | "), ["---"] * 9, *map(row_of, results_in(folder).values())]
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return [*lines, "", "† chosen on the test set. \\* on CIFAR-10, 300 epochs, full width"]


def command(args):
    device = parallel.pick_device(args.device)
    with parallel.joined(device), torch.random.fork_rng():
        status, failed = run_all(args, device)
        if parallel.rank():
            return status
        if status:
            print("the same command goes on with all runs")
            return status
        lines = table(args.out)
        args.out.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out / "table.md", ("\n".join(lines) + "\n").encode())
        print("\n" + "\n".join(lines) + "\n")
    if args.figures:
        config, alike = plan(args)[0], ("data", "data_root", "arch", "plan", "width", "seed", "precision")
        chosen = [f"--{key.replace('_', '-')}={config[key]}" for key in alike]
        status = visualize.main(["all", str(args.out), "--out", str(args.out / "figures"), *chosen])
    for line in failed:
        print(f"not trained: {line}")
    return 2 if failed else status


def main(argv=None):
    """The command line; returns the exit status. Bad input ends in one line and status 2."""
    return recipes.status(lambda: command(parse(argv)), os.environ.get("RANK", "0"))


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
