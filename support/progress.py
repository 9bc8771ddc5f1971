"""Where a training is, and what happens beside its equations: the bar, Ctrl-C, saving, numbers that are not finite."""

import math
import signal
import sys
import threading
import time
from contextlib import contextmanager

import torch
from tqdm import tqdm

from support import data, parallel
from support.measure import first_nonfinite, histograms, is_finite
from support.runs import CHECKPOINT, fitting, outcome, restore


@contextmanager
def stop_requests():
    """For a `with` block, Ctrl-C, SIGTERM and a closed terminal add their number to a list; ignored ones stay so."""
    received, before = [], {}
    if threading.current_thread() is threading.main_thread():  # no other thread receives signals
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Progress:
    """The state of a training, whose loop runs over `epochs` and `batches`. Everything is saved to `run`.
    state: of an earlier training, to go on with; None: a new one. give_up: end when it is at chance for a third
    of its epochs. ValueError: `state` is of another network, other data or more epochs; nothing was written then."""

    def __init__(self, run, config, dataset, model, optimizer, state=None, give_up=False):
        self.run, self.config, self.dataset, self.model, self.optimizer = run, config, dataset, model, optimizer
        self.steps_per_epoch = len(dataset.train_y) // config["batch_size"]
        self.step, self.spent, self.history, self.recorded = 0, 0.0, [], []
        self.sample = data.sample(dataset, config["T"], 64)[0]  # for histograms
        self.sums = torch.zeros(4, device=dataset.train_x.device)  # of loss, accuracy, finite steps, requests to stop
        self.stopped = self.broken = None  # the number of the signal; the layer that is not finite
        self.give_up, self.given_up = bool(give_up), False
        self.rates = [group["lr"] for group in optimizer.param_groups]
        run.data = data.identity(dataset)
        if state is None:
            self.recorded.append(histograms(model, self.sample))
            self._save()
            return
        if different := data.differences(state["data"], run.data):
            raise ValueError(f"the data in {config['data_root']} are not those of {run.folder}: {different}")
        if config["epochs"] < max(state["step"] / self.steps_per_epoch, config["warmup_epochs"]):
            behind = f"{len(state['history'])} epochs behind it, and a warm-up of {config['warmup_epochs']:g}"
            raise ValueError(f"--epochs {config['epochs']} is too few: {run.folder} has {behind}")
        restore(model, state["model"], run.folder / CHECKPOINT)
        restore(optimizer, state["optimizer"], run.folder / CHECKPOINT)
        self.step, self.spent, self.history = state["step"], state["seconds"], state["history"]
        self.recorded = state["histograms"]
        self.sums[:3] = torch.tensor(state["sums"])
        print(f"{run.folder} goes on at step {self.step}, with {len(self.history)} epochs behind it")
        run.write_tables(self.history)

    def _save(self, sums=(0.0, 0.0, 0.0), seconds=0.0):
        """sums, seconds: of an epoch that is not at its end."""
        optimizer = self.optimizer.state_dict() | dict(of=fitting(self.optimizer))
        state = dict(model=self.model.state_dict(), optimizer=optimizer, step=self.step)
        state |= dict(sums=list(sums), seconds=seconds, history=self.history, histograms=self.recorded)
        self.run.save(state)

    def _break(self):
        """Ends the training because of a number that is not finite, and finds out in which layer."""
        self.stopped, self.broken = None, first_nonfinite(self.model, self.x, self.y)

    def epochs(self):
        """The epochs that are left, from 0, until the end or until the training has to stop."""
        with stop_requests() as self.signals:
            while self.step < self.config["epochs"] * self.steps_per_epoch:
                if self.stopped or self.broken or self.given_up:
                    return
                yield self.step // self.steps_per_epoch

    def batches(self, epoch):
        """The steps that are left of an epoch: the number of the step, and its input and labels, on the device."""
        read_every = 1 if self.sums.is_cpu else 20  # for a number one waits until a GPU has done its work
        order = data.epoch_order(self.config, self.dataset, epoch)
        first, self.start, self.spent = self.step % len(order), time.perf_counter() - self.spent, 0.0
        self.interrupted = True
        how = dict(desc=f"epoch {epoch + 1}/{self.config['epochs']}", total=len(order), initial=first, leave=False)
        rest = 0.1 if sys.stderr.isatty() else 60  # seconds; in a file or a notebook the bar is not drawn so often
        how |= dict(unit=" images", unit_scale=order.shape[1], delay=rest, mininterval=rest)
        with tqdm(**how, disable=parallel.rank() > 0) as bar:
            for i in range(first, len(order)):
                self.x, self.y = data.training_batch(self.config, self.dataset, order[i], self.step)
                yield self.step, parallel.share(self.x), parallel.share(self.y)
                self.step += 1
                if (i + 1) % read_every and i + 1 < len(order):
                    continue
                self.sums[3] = bool(self.signals)
                loss, accuracy, finite, stopped = (parallel.total(self.sums.clone()) / parallel.world()).tolist()
                if finite < i + 1 or (stopped and not is_finite(self.model)):
                    self._break()
                    return
                bar.set_postfix_str(f"loss {loss / (i + 1):.3f}, acc {accuracy / (i + 1):.3f}", refresh=False)
                bar.update(i + 1 - bar.n)
                if stopped:
                    self.stopped = (self.signals or [signal.SIGTERM])[0]  # or of another process
                    if i + 1 < len(order):
                        self._save((loss, accuracy, finite), time.perf_counter() - self.start)
                        return
        self.interrupted = False
        self.means = loss / len(order), accuracy / len(order)

    def count(self, loss, accuracy, finite):
        """Adds what a step gave to the sums of the epoch. Nothing is read from the device."""
        self.sums[:3] += torch.stack([loss, accuracy, finite.to(loss.dtype)])

    def end_epoch(self, lr, test_loss, test_accuracy, rates):
        """Keeps what came out of an epoch and of the test at its end, and saves it."""
        if not math.isfinite(test_loss) or not is_finite(self.model):
            self._break()
            return
        epoch = len(self.history) + 1
        row = dict(epoch=epoch, lr=lr, train_loss=self.means[0], train_accuracy=self.means[1], test_loss=test_loss)
        row |= dict(test_accuracy=test_accuracy, seconds=round(time.perf_counter() - self.start, 2))
        if all(test_accuracy > before["test_accuracy"] for before in self.history):
            self.run.keep_best(self.model, epoch, test_accuracy)  # before the checkpoint: it is never older than that
        self.history.append(row | {f"rate_{i + 1}": round(r, 5) for i, r in enumerate(rates)})
        self.recorded.append(histograms(self.model, self.sample))
        self.sums.zero_()
        self._save()
        print(f"epoch {epoch:3d}  loss {row['train_loss']:.4f}  test accuracy {test_accuracy:.2%}", end="  ")
        print(f"{row['seconds']:.0f} s  firing rates", " ".join(f"{r:.3f}" for r in rates), flush=True)
        if parallel.world() == 1 and self.signals:
            self.stopped = self.signals[0]
        if self.give_up and 3 * epoch >= self.config["epochs"] > epoch:
            accuracies = [row["test_accuracy"] for row in self.history]
            self.given_up = outcome(accuracies, self.dataset.chance) == "failed to converge"

    def finish(self):
        """Says and writes how the training ended. Returns the number of the signal that stopped it, else None."""
        if not self.stopped:
            self.run.finish(self.history, self.dataset.chance, self.broken, self.given_up)
        return self.stopped
