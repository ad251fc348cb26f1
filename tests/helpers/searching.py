"""An experiment to search in, whose training is a function."""

from polyfocal import losses
from polyfocal.experiments.request import Setting

SETTINGS = {"epsilon": Setting(1.0, losses.Range(-1.0, 5.0))}


class Fake:
    """An experiment whose training is ``train(epsilon, watcher)``; it holds one number."""

    notes, quality, per_cent, epochs = (), ["top1"], 100.0, 12

    def __init__(self, train):
        self.train, self.epsilon, self.length = train, 1.0, None

    def settings(self):
        return SETTINGS

    def hold_out(self, folder):
        self.folder = folder

    def use_epochs(self, epochs):
        self.length = epochs

    def use_values(self, values):
        self.epsilon = values["epsilon"]

    def measure(self, place, *, seed, watchers):
        assert (self.length, seed, self.folder.name) == (4, 0, "split")
        return {"top1": self.train(self.epsilon, *watchers)}
