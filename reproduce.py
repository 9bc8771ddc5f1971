"""Every run that the paper's tables and figures need, one after another: `python reproduce.py`.

    python reproduce.py                                        VGG-8 on the digits, 12 runs
    python reproduce.py --data cifar10 --suite paper depth --seeds 3
    python reproduce.py --data folder --data-root DIR --width 0.5 --epochs 20 --out results/cifar10-half

Stopped at any moment, the same command goes on where it was and skips what is finished. At the end it prints a table
and draws the figures, all into the folder --out.
"""

import argparse
import json
from pathlib import Path

import torch

import train
import visualize
from model import ARCHS
from support import console, parallel, recipes
from support.fast import keep_memory
from support.runs import Run, holds_run, write_atomically

SUITES = {  # the options of each run
    "paper": [  # what its figures compare
        *[["--model", model] for model in ("ei", "bn", "plain", "dann")],
        *[["--eps", eps] for eps in ("1e-8", "1e-7", "1e-6", "1e-5", "1e-4")],
        *[["--no-ste"], ["--no-grad-scaling"], ["--init", "kaiming"]],
    ],
    "rivals": [["--model", model] for model in ("ei", "bn", "dann")],
    "depth": [
        ["--arch", arch, "--model", model] for arch in ARCHS if arch not in ("mlp", "vgg8") for model in ("ei", "bn")
    ],
}
# Top-1 accuracy in % that the authors report on CIFAR-10: 300 epochs, full width.
AUTHORS = {("vgg8", "ei"): 87.03, ("vgg11", "ei"): 88.43, ("vgg16", "ei"): 91.01, ("vgg19", "ei"): 91.36}
AUTHORS |= {("resnet18", "ei"): 92.06, ("resnet18", "bn"): 95.37}


def parse(argv=None):
    p = recipes.Parser(prog="reproduce.py", description="Train all that the paper's figures need.", allow_abbrev=False)
    p.add_argument("--suite", nargs="+", choices=SUITES, default=["paper"], help="which runs (paper)")
    p.add_argument("--seeds", type=recipes.count, default=1, help="E-I, BN-SNN and DANN with so many seeds from 0 (1)")
    p.add_argument("--figures", action=argparse.BooleanOptionalAction, default=True, help="draw them at the end (yes)")
    p.add_argument("--out", default="runs", help="folder of all run folders, the table and the figures (runs)")
    recipes.add_settings(p)
    recipes.add_ways(p)
    return p.parse_args(argv)


def plan(args):
    """The settings of every run, in order, each once.

    Raises:
        ValueError: an option is given that the runs differ in.
    """
    if args.seed is not None and args.seeds > 1:
        raise ValueError("--seeds trains the seeds from 0: leave --seed out")
    chosen = [(options, None) for suite in args.suite for options in SUITES[suite]]
    chosen += [(options, seed) for seed in range(1, args.seeds) for options in SUITES["rivals"]]
    differ = {suite: [vars(recipes.parse(options)) for options in SUITES[suite]] for suite in args.suite}
    for suite, runs in differ.items():
        for key in vars(recipes.parse([])):
            if getattr(args, key, None) is not None and any(run[key] is not None for run in runs):
                raise ValueError(f"--suite {suite} chooses --{key.replace('_', '-')} itself: leave it out")
    given = {k: v for k, v in vars(args).items() if k not in ("suite", "seeds", "figures")}
    configs = []
    for options, seed in chosen:
        own = {k: v for k, v in vars(recipes.parse(options)).items() if v is not None}
        if seed is not None:
            own["seed"] = seed
        lacks = {"dann": ("tau", "threshold", "alpha", "T"), "bn": ("ei_ratio",), "plain": ("ei_ratio",)}
        own |= dict.fromkeys(lacks.get(own.get("model", args.model), ()))  # what this kind of network does not have
        config = recipes.settings(argparse.Namespace(**given | own))
        if config not in configs:
            configs.append(config)
    return configs


def run_all(args, device):
    """Trains every run that is not finished yet. Returns the exit status of the first one that is stopped, or 0."""
    configs = plan(args)
    left = sum(config["epochs"] for config in configs)
    for i, config in enumerate(configs, 1):
        name = recipes.run_name(config)
        folder = Path(args.out) / name
        print(f"\nrun {i} of {len(configs)}: {name}")
        run = Run(folder) if holds_run(folder) else None
        if run:
            config = run.settings(config)  # an older one with other settings is refused
        if run and (folder / "result.json").exists():
            print(f"finished before, in {folder}")
            left -= config["epochs"]
            continue

        def tell(history, left=left):
            if len(history) == 1:
                seconds = history[0]["seconds"]
                hours = seconds * left / 3600
                time = f"{hours:.1f} hours" if hours > 1 else f"{60 * hours:.0f} minutes"
                print(f"{seconds:.1f} s an epoch; {left} epochs in all are left: about {time} at this pace")

        status = train.work(run, config, args, device, folder, tell)
        if status:
            return status
        left -= config["epochs"]
    return 0


def table(folder):
    """A line of Markdown for each finished run below a folder."""
    lines = ["| network | width | seed | epochs | s/epoch | outcome | top-1 %, last epoch | best (epoch) | authors* |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for path in sorted(Path(folder).glob("*/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        config = result["config"]
        names = [config["arch"], config["model"]]
        full = config == config | recipes.FULL | dict(model=config["model"]) and config["data"] in ("cifar10", "folder")
        plan = config.get("plan", "")
        known = AUTHORS.get(tuple(names)) if full and not plan else None
        names += [plan] * bool(plan)
        names += [f"eps={config['eps']}"] * (config["eps"] != "adaptive") + ["no STE"] * (not config["ste"])
        names += ["no scaling"] * (not config["grad_scaling"]) + ["Kaiming"] * (config["init"] != "ei")
        epochs = result.get("epochs", 0)
        seconds = result.get("train_seconds", 0) / max(1, epochs)
        outcome = result["outcome"] + ", given up at chance" * result.get("given_up", False)
        last, best = "-", "-"
        if epochs:
            last = f"{100 * result['test_accuracy']:.2f}"
            best = f"{100 * result['best_test_accuracy']:.2f} ({result['best_epoch']})"
        cells = [" ".join(names), f"{config['width']:g}", str(config["seed"]), f"{epochs}/{config['epochs']}"]
        cells += [f"{seconds:.1f}", outcome, last, best, f"{known:.2f}" if known else "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", "\\* on CIFAR-10, 300 epochs, full width"]


def command(args):
    device = parallel.pick_device(args.device)
    with parallel.joined(device), torch.random.fork_rng():
        if status := run_all(args, device):
            return status
        if parallel.rank():
            return 0
        lines = table(args.out)
        write_atomically(Path(args.out) / "table.md", ("\n".join(lines) + "\n").encode())
        print("\n" + "\n".join(lines) + "\n")
    if not args.figures:
        return 0
    config = plan(args)[0]
    chosen = [recipes.option(key, config[key]) for key in ("data", "arch", "width", "seed", "data_root")]
    return visualize.main(["all", args.out, "--out", str(Path(args.out) / "figures"), *chosen])


def main(argv=None):
    """The command line; returns the exit status. Bad input ends in one line and status 2."""
    return console.status(lambda: command(parse(argv)), parallel.rank_asked())


if __name__ == "__main__":
    keep_memory()
    console.leave(main())
