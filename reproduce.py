"""Every run that the paper's tables and figures need, one after another: `python reproduce.py`.

    python reproduce.py                                        VGG-8 on the digits, 12 runs
    python reproduce.py --data cifar10 --suite paper depth --seeds 3
    python reproduce.py --data folder --data-root DIR --width 0.5 --epochs 20 --out results/cifar10-half

Stopped at any moment, the same command goes on where it was and skips what is finished. At the end it prints a table
and draws the figures, all into the folder --out.
"""

import argparse
import json

import torch

import train
import visualize
from model import ARCHS
from support import console, data, parallel, recipes
from support.console import first_line
from support.fast import keep_memory
from support.runs import DATA, Run, bad_part, holds_run, saved, write_atomically

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
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# What a result.json must hold, see `bad_part`.
CONFIG = dict(arch=str, model=str, data=str, init=str, ste=bool, grad_scaling=bool, width=float, seed=int, epochs=int)
RESULT = {"outcome": str, "config": CONFIG, "data": DATA}
# And that of a run with an epoch behind it.
OF_EPOCHS = dict(epochs=int, train_seconds=float, test_accuracy=float, best_test_accuracy=float, best_epoch=int)


def parse(argv=None):
    p = recipes.Parser(prog="reproduce.py", description="Train all that the paper's figures need.", allow_abbrev=False)
    p.add_argument("--suite", nargs="+", choices=SUITES, default=["paper"], help="which runs (paper)")
    p.add_argument("--seeds", type=recipes.count, default=1, help="E-I, BN-SNN and DANN with so many seeds from 0 (1)")
    p.add_argument("--figures", action=argparse.BooleanOptionalAction, default=True, help="draw them at the end (yes)")
    p.add_argument(
        "--out", type=recipes.folder, default="runs", help="folder of all run folders, the table and the figures (runs)"
    )
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
        try:
            config = recipes.settings(argparse.Namespace(**given | own))
        except ValueError as error:
            raise ValueError(f"the run {' '.join(options)}: {error}") from None
        if config not in configs:
            configs.append(config)
    return configs


def read_result(path):
    """What is in a result.json.

    Raises:
        ValueError: it is damaged, or cannot be read.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        part = bad_part(result, RESULT)
        if part is None and "epochs" in result:
            part = bad_part(result, OF_EPOCHS)
        if part is None:
            return result
        reason = f"{part} is missing in it or not what it should be"
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        reason = first_line(error)
    advice = "delete it, and it is written again from the checkpoint"
    if not saved(path.parent):
        advice = "there is no checkpoint from which it could be written again, so mend it or move its folder away"
    raise ValueError(f"{path} is damaged ({reason}): {advice}")


def same_data(config, results):
    """Refuses data other than those of finished runs, beside which the ones to come would stand in one table.

    Args:
        config: settings of a run that is still to be trained.
        results: by folder, what is in the result.json of each finished run.
    """
    known = {folder: r["data"] for folder, r in results.items() if r["config"]["data"] == config["data"]}
    if not known:
        return
    with parallel.first_process_first():
        now = data.identity(data.load(config["data"], config["data_root"], config["image_size"], "cpu", config["T"]))
    for folder, then in known.items():
        # Other sizes, or other frames of the same recordings, have other contents in any case.
        but = () if then["shape"] == now["shape"] else ("train", "test", "shape")
        if different := data.differences(then, now, but):
            raise ValueError(
                f"the data in {config['data_root']} are not those of {folder}, which is finished: {different}; give "
                "its own with --data-root, or choose another --out"
            )


def run_all(args, device):
    """Trains every run that is not finished yet. Returns the exit status of the first one that is stopped, or 0."""
    configs = plan(args)
    left = sum(config["epochs"] for config in configs)
    results = {path.parent: read_result(path) for path in sorted(args.out.glob("*/result.json"))}
    told, compared = set(), False
    for i, config in enumerate(configs, 1):
        folder = args.out / recipes.run_name(config)
        print(f"\nrun {i} of {len(configs)}: {folder.name}")
        run = Run(folder) if holds_run(folder) else None
        if run:
            config = run.settings(config)  # an older one with other settings is refused
        if run and folder in results:
            cut = ", given up at chance" * results[folder].get("given_up", False)
            cut += f"; the rest of it: python train.py --resume {run.quoted}" * bool(cut and saved(folder))
            print(f"finished before, in {folder}{cut}")
            left -= config["epochs"]
            continue
        if not compared:
            same_data(config, results)
            compared = True

        def tell(history, left=left, folder=folder):
            rest = left - len(history)
            if folder not in told and rest:  # after the first epoch
                told.add(folder)
                seconds = history[-1]["seconds"]
                hours = seconds * rest / 3600
                time = f"{hours:.1f} hours" if hours > 1 else f"{60 * hours:.0f} minutes"
                print(f"{seconds:.1f} s an epoch; epochs left in all runs: {rest}, about {time} at this pace")

        status = train.train_run(run, config, args, device, folder, tell)
        if status:
            return status
        left -= config["epochs"]
    return 0


def table(folder):
    """A line of Markdown for each finished run in a folder."""
    lines = ["| network | width | seed | epochs | s/epoch | outcome | top-1 %, last epoch | best (epoch) | authors* |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for path in sorted(folder.glob("*/result.json")):
        result = read_result(path)
        config = result["config"]
        names = [config["arch"], config["model"]]
        data_of = result["data"]
        cifar10 = data_of["classes"] == CIFAR10 and data_of["train"].startswith("50000 ")
        full = config == config | recipes.FULL | dict(model=config["model"]) and cifar10
        plan = config.get("plan", "")
        known = AUTHORS.get(tuple(names)) if full and not plan else None
        names += [plan] * bool(plan)
        eps = config.get("eps")  # a name or a number
        names += [f"eps={eps}"] * (eps != "adaptive") + ["no STE"] * (not config["ste"])
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
        write_atomically(args.out / "table.md", ("\n".join(lines) + "\n").encode())
        print("\n" + "\n".join(lines) + "\n")
    if not args.figures:
        return 0
    config = plan(args)[0]
    chosen = [recipes.option(key, config[key]) for key in ("data", "arch", "width", "seed", "data_root")]
    return visualize.main(["all", str(args.out), "--out", str(args.out / "figures"), *chosen])


def main(argv=None):
    """The command line; returns the exit status. Bad input ends in one line and status 2."""
    return console.status(lambda: command(parse(argv)), parallel.rank_asked())


if __name__ == "__main__":
    keep_memory()
    console.leave(main())
