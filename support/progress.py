"""Where a training is, and what happens beside its equations: the bar, Ctrl-C, saving, numbers that are not finite. A
reader of the paper may skip this file.
"""

import math
import signal
import threading
import time

import torch
from tqdm import tqdm

from support import data, parallel
from support.measure import first_nonfinite, histograms
from support.runs import CHECKPOINT, restore

SAY_EVERY = 60.0  # seconds


class StopRequest:
    """While it is open, Ctrl-C and SIGTERM only set `signal`, so that the training can save its state and end.

    with StopRequest() as stop: ... if stop.signal: save and leave
    """

    def __enter__(self):
        self.signal, self._before = None, {}
        if threading.current_thread() is threading.main_thread():  # no other thread receives signals
            self._before = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _receive(self, number, _):
        self.signal = number

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


def longer(run, config, state, epochs):
    """The settings of a run that goes on, for more epochs if asked for.

    The learning rate then follows the longer cosine from here on, with the same warm-up.
    """
    epochs = epochs or run.config["epochs"]
    if epochs < len(state["history"]):
        raise ValueError(f"{run.folder} has {len(state['history'])} epochs behind it: --epochs {epochs} is too few")
    if epochs != run.config["epochs"]:
        run.extend(epochs)
    return config | dict(epochs=epochs)


def check_data(run, known, dataset, other_frames=False, other_data=False):
    """Refuses to test a network on other data than those of its training, unless that is asked for.

    Args:
        known: what the run remembers of its data, see `data.identity`.
        other_frames: the data are recordings in another number of frames, so that the samples differ in any case.
        other_data: it is asked for; then a line says what differs.
    """
    if len(known["classes"]) != dataset.n_classes:
        raise ValueError(
            f"the network of {run.folder} tells {len(known['classes'])} classes apart, but these data have "
            f"{dataset.n_classes}"
        )
    but = ("train", "test", "shape") if other_frames else ("train",)
    different = data.differences(known, data.identity(dataset), but)
    if different and not other_data:
        raise ValueError(f"these data are not those of {run.folder}: {different}; to test on them, add --other-data")
    if different:
        print(f"other data than those of the training: {different}")


class Progress:
    """The state of a training. `epochs` and `batches` are what its loop runs over.

    Args:
        run: the `Run` to which everything is saved.
        config: its settings.
        dataset, model, optimizer: what is trained, and with what. The model is initialised, if the training is new.
        state: of an earlier training, to go on with; None: it is new.
        give_up: end the training when the network is at chance for a third of its epochs.

    Raises:
        ValueError: `state` is of another network or of other data.
    """

    def __init__(self, run, config, dataset, model, optimizer, state=None, give_up=False):
        self.run, self.config, self.dataset, self.model, self.optimizer = run, config, dataset, model, optimizer
        self.steps_per_epoch = len(dataset.train_y) // config["batch_size"]
        self.device = dataset.train_x.device
        self.step, self.spent, self.history, self.recorded = 0, 0.0, [], []
        self.sample = data.sample(dataset, config["T"], 64)[0]  # for histograms
        run.data = data.identity(dataset)
        self.sums = torch.zeros(4, device=self.device)  # of loss, accuracy, requests to stop, steps that are not finite
        self.stopped = self.broken = None  # the number of the signal; the layer that is not finite
        self.give_up, self.given_up = give_up, False
        if state is None:
            self.recorded.append(histograms(model, self.sample))
            self._save([0.0, 0.0], 0.0)
            return
        if different := data.differences(state["data"], run.data):
            where = f"the data in {config['data_root']}"
            raise ValueError(f"{where} are not those with which {run.folder} was begun: {different}")
        restore(model, state["model"], run.folder / CHECKPOINT)
        restore(optimizer, state["optimizer"], run.folder / CHECKPOINT)
        self.step, self.spent, self.history = state["step"], state["epoch_seconds"], state["history"]
        self.recorded = state["histograms"]
        self.sums[:2] = torch.tensor(state["epoch_sums"], device=self.device)
        if self.step // self.steps_per_epoch != len(self.history):
            raise ValueError(
                f"{run.folder / CHECKPOINT} is damaged: step {self.step} is not in epoch {len(self.history)}"
            )
        if run.unwritten:  # it has another number of epochs now
            self._save(state["epoch_sums"], state["epoch_seconds"])

    def _save(self, sums, seconds):
        state = dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict(), step=self.step)
        state |= dict(epoch_sums=sums, epoch_seconds=seconds, history=self.history, histograms=self.recorded)
        self.run.save(state | dict(data=self.run.data))

    def _is_finite(self):
        """Whether all that would be saved of the network is finite; if not, the layer that is not ends the training."""
        finite = all(value.isfinite().all() for value in self.model.state_dict().values())
        if not finite:
            self._break()
        return finite

    def _break(self):
        """Ends the training because of a number that is not finite, and finds out in which layer."""
        self.stopped, self.broken = None, first_nonfinite(self.model, self.x, self.y)

    @property
    def over(self):
        return self.stopped or self.broken or self.given_up

    def epochs(self):
        """The epochs that are left, from 0, until the end or until the training has to stop."""
        with StopRequest() as self.stop:
            while self.step < self.config["epochs"] * self.steps_per_epoch and not self.over:
                yield self.step // self.steps_per_epoch

    def batches(self, epoch):
        """The steps that are left of an epoch: the number of the step, and its input and labels, on the device.

        Reading a number waits for a GPU, so it happens once in 20 steps there.
        """
        read_every = 1 if self.device.type == "cpu" else 20
        order = data.epoch_order(self.config, self.dataset, epoch)
        first, self.start, self.spent = self.step % len(order), time.perf_counter() - self.spent, 0.0
        self.interrupted = True
        bar = tqdm(total=len(order), initial=first, leave=False, disable=bool(parallel.rank()) or None)
        bar.set_description(f"epoch {epoch + 1}/{self.config['epochs']}")
        said = time.perf_counter()
        with bar:
            for i in range(first, len(order)):
                self.x, self.y = data.training_batch(self.config, self.dataset, order[i], self.step)
                yield self.step, parallel.share(self.x), parallel.share(self.y)
                self.step += 1
                last = i + 1 == len(order)
                if (i + 1) % read_every and not last:
                    continue
                self.sums[2] = self.stop.signal is not None
                loss, accuracy, stopped, bad = (parallel.total(self.sums.clone()) / parallel.world()).tolist()
                if bad:
                    self._break()
                    return
                bar.update(i + 1 - bar.n)
                rate = (i + 1) * len(self.y) / (time.perf_counter() - self.start)
                how_far = f"loss {loss / (i + 1):.3f}, acc {accuracy / (i + 1):.3f}, {rate:.0f} images/s"
                bar.set_postfix_str(how_far)
                if bar.disable and not last and time.perf_counter() - said > SAY_EVERY:  # no terminal shows the bar
                    print(f"epoch {epoch + 1}, step {i + 1}/{len(order)}: {how_far}", flush=True)
                    said = time.perf_counter()
                if stopped:
                    self.stopped = self.stop.signal or signal.SIGTERM  # of another process
                    if not last:
                        if self._is_finite():
                            self._save([loss, accuracy], time.perf_counter() - self.start)
                        return
        self.interrupted = False
        self.means = loss / len(order), accuracy / len(order)

    def add(self, loss, logits, y):
        """Counts a step: its loss and its accuracy. Nothing is read from the device.

        If the loss or a gradient is not finite, the gradients become 0, so that the parameters stay finite; the
        training ends when that is read.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        extremes = torch.stack([torch.stack(torch.aminmax(gradient)) for gradient in gradients])  # NaN passes through
        finite = loss.detach().isfinite() & extremes.isfinite().all()
        accuracy = (logits.detach().argmax(1) == y).float().mean()
        self.sums += torch.stack([loss.detach(), accuracy, torch.zeros_like(loss), (~finite).to(loss.dtype)])
        if self.device.type != "cpu" or not finite:
            for gradient in gradients:
                gradient.copy_(torch.where(finite, gradient, 0))

    def end_epoch(self, lr, test_loss, test_accuracy, rates):
        """Keeps what came out of an epoch and of the test at its end, and saves it."""
        if not math.isfinite(test_loss):
            self._break()
        if self.broken or not self._is_finite():
            return
        epoch = len(self.history) + 1
        row = dict(epoch=epoch, lr=lr, train_loss=self.means[0], train_accuracy=self.means[1])
        row |= dict(test_loss=test_loss, test_accuracy=test_accuracy)
        row |= dict(seconds=round(time.perf_counter() - self.start, 2))
        self.history.append(row | {f"rate_{i + 1}": round(r, 5) for i, r in enumerate(rates)})
        self.recorded.append(histograms(self.model, self.sample))
        self.run.keep_best(self.model, row)
        self.sums.zero_()
        self._save([0.0, 0.0], 0.0)
        print(f"epoch {epoch:3d}  loss {row['train_loss']:.4f}  test accuracy {test_accuracy:.2%}", end="  ")
        print(f"{row['seconds']:.0f} s  firing rates", " ".join(f"{r:.3f}" for r in rates), flush=True)
        if parallel.world() == 1:
            self.stopped = self.stopped or self.stop.signal
        chance = all(row["test_accuracy"] <= 1.5 / self.dataset.n_classes for row in self.history)
        self.given_up = self.give_up and chance and 3 * epoch >= self.config["epochs"] > epoch
        if self.run.after_epoch:
            self.run.after_epoch(self.history)

    def finish(self):
        """Says and writes how the training ended. Returns the number of the signal that stopped it, else None."""
        if self.stopped:
            return self.stopped
        if self.broken:
            place = f"epoch {self.step // self.steps_per_epoch + 1}"
            print(f"{place}: a number is not finite; first layer with such values: {self.broken}")
        return self.run.finish(self.history, self.dataset.n_classes, self.broken, self.given_up)
