"""The peer's half of `benchmarks.kronecker` and `benchmarks.lds`: kronfluence in a process of its own.

    python -m benchmarks._kronfluence IN.npz OUT.npz --task mlp --strategy ekfac

IN holds a model's weights, training data, queries and the queries' logits; OUT takes the scores and what
they cost. The model is built anew from torch.nn modules that kronfluence tracks, and the run ends where
its logits are not IN's. `benchmarks/README.md` says how kronfluence's scores relate to influx's.
"""

import argparse
import logging
import math
import os
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import nn
from torch.nn import functional as F

from benchmarks._measure import peak_bytes, shuffles

LOGITS_TOLERANCE = 1e-4


class MLP(nn.Module):
    def __init__(self, weights, activation):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0]) for w in weights[::2])
        self.activation = activation

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 16, 5, padding=2)
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.head = nn.Linear(32 * 49, 10)

    def forward(self, x):
        x = x.reshape(-1, 1, 28, 28)
        for convolution in (self.first, self.second):
            x = F.max_pool2d(F.relu(convolution(x)), 2)
        return self.head(x.flatten(1))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.hidden, self.out = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.heads = heads

    def forward(self, x):
        z = self.norms[0](x)
        split = lambda y: y.reshape(*y.shape[:2], self.heads, -1).transpose(1, 2)
        q, k, v = split(self.query(z)), split(self.key(z)), split(self.value(z))
        weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]), dim=-1)
        x = x + self.output((weights @ v).transpose(1, 2).reshape(x.shape))
        z = self.norms[1](x)
        return x + self.out(F.gelu(self.hidden(z), approximate="tanh"))


class Transformer(nn.Module):
    def __init__(self, width=64, heads=4):
        super().__init__()
        self.embedding = nn.Linear(28, width)
        self.position = nn.Parameter(torch.zeros(28, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(2))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.embedding(x.reshape(-1, 28, 28)) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))


ACTIVATIONS = {
    "digits": lambda x: F.gelu(x, approximate="tanh"),
    "cancer": torch.tanh,
}


def model_of(task: str, weights: list[np.ndarray]) -> nn.Module:
    """The task's model with these parameters, leaf after leaf in the order of the Equinox model."""
    makers = {"cnn": CNN, "transformer": Transformer}
    model = makers[task]() if task in makers else MLP(weights, ACTIVATIONS.get(task, F.relu))
    slots = _slots(model)
    assert len(slots) == len(weights), (len(slots), len(weights))
    with torch.no_grad():
        for slot, weight in zip(slots, weights, strict=True):
            slot.copy_(torch.tensor(weight).reshape(slot.shape))
    return model


def _slots(model: nn.Module) -> list[nn.Parameter]:
    """Parameters in the order of the Equinox model."""
    if not isinstance(model, Transformer):
        return list(model.parameters())
    pair = lambda layer: [layer.weight, layer.bias]
    slots = [*pair(model.embedding), model.position]
    for b in model.blocks:
        parts = (*b.norms, b.query, b.key, b.value, b.output, b.hidden, b.out)
        slots += [p for part in parts for p in pair(part)]
    return slots + pair(model.head)


class Classification(Task):
    def __init__(self, measurement: str):
        super().__init__()
        self.measurement = measurement

    def compute_train_loss(self, batch, model, sample=False):
        X, y = batch
        logits = model(X)
        if sample:
            with torch.no_grad():
                y = torch.multinomial(torch.softmax(logits.detach(), dim=-1), 1).flatten()
        return F.cross_entropy(logits, y, reduction="sum")

    def compute_measurement(self, batch, model):
        X, y = batch
        logits = model(X)
        if self.measurement == "loss":
            return F.cross_entropy(logits, y, reduction="sum")
        rows = torch.arange(len(y))
        own = logits[rows, y]
        others = logits.clone()
        others[rows, y] = -torch.inf
        return (own - others.logsumexp(dim=-1)).sum()


class Regression(Task):
    """Half the squared error, as loss and as measurement."""

    def compute_train_loss(self, batch, model, sample=False):
        X, y = batch
        output = model(X)
        if sample:
            y = torch.normal(output.detach(), 1.0)
        return F.mse_loss(output, y, reduction="sum") / 2

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)


class Rows(torch.utils.data.Dataset):
    """A data set that hands out a batch at once: collating row by row would be charged to the peer."""

    def __init__(self, X, y, order):
        y = torch.tensor(y[order])
        self.X, self.y = torch.tensor(X[order]), y if y.is_floating_point() else y.long()

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.X[i], self.y[i]

    def __getitems__(self, rows):
        return self.X[rows], self.y[rows]


@dataclass(frozen=True)
class Run:
    """Fit, all pairs and self-influence, by the settings of the command line."""

    analyzer: Analyzer
    factors: FactorArguments
    scores: ScoreArguments
    options: argparse.Namespace

    def __call__(self, name: str, train: Rows, queries: Rows) -> tuple[dict, dict]:
        """What it found and the seconds it took."""
        options, found, seconds = self.options, {}, {}
        batch = {"per_device_train_batch_size": options.batch}
        start = time.perf_counter()
        self.analyzer.fit_all_factors(
            name, train, per_device_batch_size=options.batch, factor_args=self.factors
        )
        seconds["fit"] = time.perf_counter() - start
        start = time.perf_counter()
        self.analyzer.compute_pairwise_scores(
            name, name, queries, train, options.query_batch, score_args=self.scores, **batch
        )
        found["scores"] = self.analyzer.load_pairwise_scores(name)["all_modules"].numpy()
        seconds["pairs"] = time.perf_counter() - start
        if not options.no_self:
            start = time.perf_counter()
            self.analyzer.compute_self_scores(name, name, train, score_args=self.scores, **batch)
            found["self"] = self.analyzer.load_self_scores(name)["all_modules"].numpy()
            seconds["self"] = time.perf_counter() - start
        return found, seconds


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--task", required=True)
    parser.add_argument("--started", type=float, default=time.time())
    parser.add_argument("--strategy", choices=("kfac", "ekfac"), default="ekfac")
    parser.add_argument("--fisher", choices=("sampled", "empirical"), default="sampled")
    parser.add_argument("--damping", default="heuristic")
    parser.add_argument("--measurement", choices=("loss", "margin"), default="loss")
    # Of 100, 250, 500 and 1,000 for either: what was fastest on two cores in all three tasks.
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--query-batch", type=int, default=500)
    parser.add_argument("--query-rank", type=int)
    parser.add_argument("--no-self", action="store_true")
    parser.add_argument("--rounds", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    logging.disable(logging.WARNING)
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    given = np.load(options.input)
    weights = [given[f"weight{i}"] for i in range(sum(k.startswith("weight") for k in given))]
    model = model_of(options.task, weights).eval()
    with torch.no_grad():
        logits = model(torch.tensor(given["Xq"])).numpy()
    far = np.max(np.abs(logits - given["logits"]))
    if far > LOGITS_TOLERANCE:
        raise SystemExit(f"The two models' logits differ by {far:.1e}: they are not one model.")
    regression = np.issubdtype(given["y"].dtype, np.floating)
    if regression and options.measurement != "loss":
        raise SystemExit("A regression has no margins: `--measurement loss`.")
    task = Regression() if regression else Classification(options.measurement)
    damping = None if options.damping == "heuristic" else float(options.damping)
    factors = FactorArguments(
        strategy=options.strategy, use_empirical_fisher=options.fisher == "empirical"
    )
    scores = ScoreArguments(damping_factor=damping, query_gradient_low_rank=options.query_rank)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "a", prepare_model(model, task), task, cpu=True, disable_tqdm=True, output_dir=folder
        )
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=lambda batch: batch))
        run = Run(analyzer, factors, scores, options)
        for k in range(options.rounds):
            orders = shuffles(k, len(given["y"]), len(given["yq"]))
            train = Rows(given["X"], given["y"], orders[0])
            queries = Rows(given["Xq"], given["yq"], orders[1])
            answers, seconds = run(str(k), train, queries)
            if k == 0:
                found, process = answers, time.time() - options.started
    times = {f"time_{name}": value for name, value in (seconds | {"process": process}).items()}
    np.savez(options.output, peak=peak_bytes(), logits_error=far, **found, **times)


if __name__ == "__main__":
    main()
