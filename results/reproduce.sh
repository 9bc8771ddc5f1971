#!/bin/sh
# The paper's numbers: VGG-8 on CIFAR-10 against BN-SNN and DANN, the table on epsilon, deeper networks, speed.
#
#     results/reproduce.sh                                      CIFAR-10 as torchvision downloads it, 300 epochs
#     DATA=folder ROOT=DIR EPOCHS=30 results/reproduce.sh       images in DIR/train/<class>/, a shorter schedule
#     DATA=digits SEEDS=1 DEPTH= EPOCHS=1 results/reproduce.sh  a try, on a CPU
#
# Stopped at any moment, the same command goes on where it was. All is then in results/$DATA/: runs, figures, table.
set -eu
cd "$(dirname "$0")/.."
DATA=${DATA:-cifar10} ROOT=${ROOT:-./data} SEEDS=${SEEDS-1 2} DEPTH=${DEPTH-yes} PYTHON=${PYTHON:-python}
OUT=${OUT:-results/$DATA}
set -- --data "$DATA" --data-root "$ROOT" ${EPOCHS:+--epochs "$EPOCHS"} --out "$OUT/runs"

"$PYTHON" train.py --suite paper "$@" # seed 0
for seed in $SEEDS; do
    "$PYTHON" train.py --suite rivals --seed "$seed" "$@"
done
[ -z "$DEPTH" ] || "$PYTHON" train.py --suite depth "$@"
"$PYTHON" visualize.py all "$OUT/runs" --data "$DATA" --data-root "$ROOT" --out "$OUT"
[ -s "$OUT/bench.json" ] || "$PYTHON" bench.py --json "$OUT/bench.json"

"$PYTHON" - "$OUT" <<'END' > "$OUT/table.md"
import json, pathlib, sys

AUTHORS = {("vgg8", "ei"): 87.03, ("vgg11", "ei"): 88.43, ("vgg16", "ei"): 91.01, ("vgg19", "ei"): 91.36,
           ("resnet18", "ei"): 92.06, ("resnet18", "bn"): 95.37}
print("| network | seed | epochs | s/epoch | outcome | best top-1 % | authors, on CIFAR-10 | difference |")
print("| --- | --- | --- | --- | --- | --- | --- | --- |")
for path in sorted(pathlib.Path(sys.argv[1]).glob("runs/*/result.json")):
    result = json.loads(path.read_text())
    config, top1 = result["config"], 100 * result.get("best_test_accuracy", 0)
    asked = [config["arch"], config["model"]]
    asked += [f"eps={config['eps']}"] * (config["eps"] != "adaptive") + ["no STE"] * (not config["ste"])
    asked += ["no scaling"] * (not config["grad_scaling"]) + ["Kaiming"] * (config["init"] != "ei")
    authors = AUTHORS.get(tuple(asked)) if config["data"] in ("cifar10", "folder") else None
    compared = f"{authors:.2f} | {top1 - authors:+.2f}" if authors else "- | -"
    seconds = result.get("train_seconds", 0) / max(1, result.get("epochs", 0))
    print(f"| {' '.join(asked)} | {config['seed']} | {result.get('epochs', 0)} | {seconds:.1f} | {result['outcome']} "
          f"| {top1:.2f} | {compared} |")
END
cat "$OUT/table.md"
