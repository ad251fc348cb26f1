"""Compare losses over seeds: on a long tail, or where a shortcut misleads.

Every finished run keeps its numbers in the study's folder, so that a study which was interrupted
goes on where it was; the table is printed and written to table.md there.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from polyfocal.coco import load_split
from polyfocal.demo import DigitScenes, write_digit_scenes
from polyfocal.errors import UserError
from polyfocal.experiments.study import Run, run_study, study_table, write_markdown
from polyfocal.mmdet.command_line import run_tool
from polyfocal.mmdet.studies import train_and_measure

EXAMPLES = """\
examples:
  # digits whose colour gives the class away in training; minutes on a CPU
  python tools/study.py shortcut --seeds 0 1 2 3 4

  # the same question to a detector; hours on a CPU
  python tools/study.py shortcut --detection --seeds 0 1 2

  # ten losses on CIFAR-10 with an imbalance of 100
  python tools/study.py long-tail --data ~/cifar-10-batches-py --seeds 0 1 2 --epochs 20

  # two of them only
  python tools/study.py long-tail --data ~/cifar-10-batches-py --only focal ldam
"""

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CLASSIFIER = CONFIGS / "classification" / "cross_entropy.py"
DETECTOR = CONFIGS / "retinanet_focal.py"

# Of RetinaNet's cross-entropy and focal loss the best alpha for each gamma: Lin et al., table 1.
ALPHAS = {0.0: 0.75, 0.5: 0.5, 1.0: 0.25, 2.0: 0.25, 5.0: 0.25}
# CIFAR-10 at imbalance 100 has 50 to 5,000 pictures of a class: 3 few, 3 medium, 4 many.
SHOTS = (200, 1000)

Methods = dict[str, dict[str, Any]]
"""Options of the config, by the name of a method."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    studies = parser.add_subparsers(dest="study", required=True)
    for name, epochs, text in (
        ("long-tail", "12", "top-1, top-K and accuracy by class frequency of ten losses"),
        (
            "shortcut",
            "30; 12 of a detector",
            "accuracy or AP where a colour predicts the class, and where it does not",
        ),
    ):
        study = studies.add_parser(name, help=text, description=text.capitalize() + ".")
        study.add_argument("--data", metavar="DIR", help="a folder of CIFAR instead of the digits")
        study.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
        study.add_argument(
            "--epochs", type=int, metavar="N", help=f"of every run (default: {epochs})"
        )
        study.add_argument(
            "--only", nargs="+", metavar="NAME", help="these rows of the table, not all"
        )
        study.add_argument("--work-dir", metavar="DIR", help=f"default: work_dirs/{name}")
    long_tail = studies.choices["long-tail"]
    long_tail.add_argument("--imbalance", type=float, default=100.0, help="default: 100")
    long_tail.add_argument("--topk", type=int, default=2, metavar="K", help="default: 2")
    long_tail.add_argument("--depth", type=int, default=8, help="of the ResNet (default: 8)")
    shortcut = studies.choices["shortcut"]
    shortcut.add_argument("--detection", action="store_true", help="in RetinaNet, on digit scenes")
    shortcut.add_argument(
        "--strength",
        type=float,
        default=0.95,
        metavar="P",
        help="probability that the colour is that of the class (default: 0.95)",
    )
    shortcut.add_argument(
        "--pictures",
        type=int,
        default=600,
        help="digit scenes to train on, a quarter as many in val and in ood (default: 600)",
    )
    return parser.parse_args(argv)


def long_tail_methods(topk: int) -> Methods:
    """Cross-entropy, the losses of the papers with their settings, and LDAM."""

    def loss(name: str, **settings: Any) -> dict[str, Any]:
        return {"model.loss": {"_delete_": True, "type": f"polyfocal.{name}", **settings}}

    def balanced(k: int) -> dict[str, Any]:
        return loss("NoisedTopKLoss", k=k, epsilon=0.2, num_samples=10)

    def imbalanced(k: int) -> dict[str, Any]:
        settings = {"epsilon": 0.01, "max_margin": 0.2, "scale": 60.0, "class_counts": None}
        return {"model.normalized": True, **loss("ImbalancedNoisedTopKLoss", k=k, **settings)}

    methods = {"cross_entropy": {}, "focal": {"model.loss.gamma": 2.0}}
    for factor in (2, 4):
        methods[f"cyclical_factor_{factor}"] = loss(
            "CyclicalFocalLoss", use_sigmoid=False, factor=float(factor)
        )
    for epsilon in (-1, 1, 2):
        methods[f"poly1_epsilon_{epsilon}"] = loss(
            "Poly1CrossEntropyLoss", use_sigmoid=False, epsilon=float(epsilon)
        )
    # A loss of the K best ranks leaves the order within them open, top-1 too: K = 1 stands beside.
    for k in dict.fromkeys((1, topk)):
        methods[f"noised_top{k}"] = balanced(k)
        methods[f"imbalanced_noised_top{k}"] = imbalanced(k)
    methods["ldam"] = {"model.normalized": True, **loss("LDAMLoss", class_counts=None)}
    return methods


def shortcut_methods(bias: dict[str, Any], teacher: dict[str, Any], *, sigmoid: bool) -> Methods:
    """The settings of the loss with which a bias model's scores are used."""
    common = {"use_sigmoid": sigmoid, "bias": bias}
    alpha = {"alpha": 0.25} if sigmoid else {}
    return {
        "debiased_focal": dict(type="polyfocal.DebiasedFocalLoss", **common, **alpha),
        "product_of_experts": dict(type="polyfocal.ProductOfExpertsLoss", **common),
        "reweighting": dict(type="polyfocal.ReweightedCrossEntropyLoss", **common),
        "confidence_regularization": dict(
            type="polyfocal.ConfidenceRegularizationLoss", **common, teacher=teacher
        ),
    }


def study_long_tail(args: argparse.Namespace, folder: Path) -> None:
    """Ten losses and one budget."""
    base = {
        "topk": args.topk,
        "variant": {"long_tail": args.imbalance},
        "val_evaluator.shots": SHOTS,
        "model.backbone.depth": args.depth,
        **_schedule(args.epochs),
    }
    methods = _chosen({n: {**base, **m} for n, m in long_tail_methods(args.topk).items()}, args)

    def measure(run: Run, place: Path) -> dict[str, float]:
        return train_and_measure(
            CLASSIFIER,
            place,
            seed=run.seed,
            data=args.data,
            demo=args.data is None,
            options=methods[run.name],
        )

    columns = ["top1", "macro_top1", f"top{args.topk}", f"macro_top{args.topk}"]
    columns += ["many", "medium", "few", "ece"]
    _report(_runs(methods, args, {"data": args.data}), measure, folder, columns)


def study_shortcut(args: argparse.Namespace, folder: Path) -> None:
    """Classifiers on digits, or on CIFAR, whose colour misleads."""
    base = {"variant": {"spurious": args.strength}, **_schedule(args.epochs or 30)}
    gammas: Methods = {"cross_entropy": {}}
    for gamma in (0.5, 1, 2, 5, 10):
        gammas[f"focal_gamma_{gamma:g}"] = {"model.loss.gamma": float(gamma)}
    # The shallow model sees few pictures for few epochs: enough for the easy cue, not for digits.
    shallow = {**_schedule(10), "variant.num_samples": 100}
    colour = {"type": "polyfocal.BiasHead", "num_classes": None, "sees": "colour"}

    def stored(name: str) -> dict[str, Any]:
        # Filled in for each seed: the scores that the run of that name stores.
        return {"type": "polyfocal.StoredScores", "file": name}

    methods: Methods = {"shallow": shallow, **gammas}
    for prefix, bias in (("", colour), ("self_", stored("shallow"))):
        losses = shortcut_methods(bias, stored("cross_entropy"), sigmoid=False)
        for name, loss in losses.items():
            methods[prefix + name] = {"model.loss": {"_delete_": True, **loss}}
    methods = _chosen({n: {**base, **m} for n, m in methods.items()}, args)

    def measure(run: Run, place: Path) -> dict[str, float]:
        options = {**methods[run.name], "variant.seed": run.seed}
        scores = {n: folder / n / f"seed_{run.seed}" / "scores.npz" for n in _TEACHERS}
        loss = options.get("model.loss")
        if loss is not None:
            loss = dict(loss)
            for key in ("bias", "teacher"):
                source = loss.get(key, {})
                if source.get("file") in scores:
                    file = scores[source["file"]]
                    if not file.is_file():
                        raise UserError(
                            f"{run.name} needs the scores of {source['file']}, and there is no "
                            f"{file}: name both with --only."
                        )
                    loss[key] = {**source, "file": str(file)}
            options["model.loss"] = loss
        return train_and_measure(
            CLASSIFIER,
            place,
            seed=run.seed,
            data=args.data,
            demo=args.data is None,
            options=options,
            scores_to=scores.get(run.name),
            elsewhere={"ood": {"test_dataloader.dataset.split": "ood"}},
        )

    columns = ["top1", "ood_top1", "ece", "ood_ece"]
    _report(_runs(methods, args, {"data": args.data}), measure, folder, columns)


_TEACHERS = ("shallow", "cross_entropy")


def study_detection(args: argparse.Namespace, folder: Path) -> None:
    """RetinaNet on digit scenes whose colour misleads."""
    if args.data is not None:
        raise UserError("--detection makes its own pictures: leave --data out.")
    head = {"type": "polyfocal.BiasHead", "num_classes": 10, "num_anchors": 9}
    colour = {**head, "sees": "colour"}
    shallow = {**head, "sees": "features", "in_channels": 64}
    losses: dict[str, dict[str, Any]] = {}
    for gamma, alpha in ALPHAS.items():
        name = f"focal_gamma_{gamma:g}" if gamma else "cross_entropy"
        losses[name] = dict(type="polyfocal.FocalLoss", use_sigmoid=True, gamma=gamma, alpha=alpha)
    losses |= shortcut_methods(colour, shallow, sigmoid=True)
    for name, loss in shortcut_methods(shallow, shallow, sigmoid=True).items():
        if name != "confidence_regularization":  # its teacher is the shallow model already
            losses[f"self_{name}"] = loss
    hooks = [{"type": "polyfocal.BiasHeadHook"}]
    methods = {
        name: {
            "model.bbox_head.loss_cls": {"_delete_": True, **loss},
            **({"custom_hooks": hooks} if "bias" in loss else {}),
            **_schedule(args.epochs),
        }
        for name, loss in losses.items()
    }
    methods = _chosen(methods, args)

    def measure(run: Run, place: Path) -> dict[str, float]:
        others = max(1, args.pictures // 4)
        scenes = DigitScenes(
            seed=run.seed,
            num_train=args.pictures,
            num_val=others,
            num_ood=others,
            spurious=args.strength,
        )
        data = write_digit_scenes(folder / "data" / f"seed_{run.seed}", scenes)
        ood = load_split(data, "ood")
        annotations = str(ood.annotation_file.resolve())
        return train_and_measure(
            DETECTOR,
            place,
            seed=run.seed,
            data=data,
            options=methods[run.name]
            | {  # a mirrored digit is another sign or none
                "train_dataloader.dataset.pipeline.3.prob": 0.0
            },
            elsewhere={
                "ood": {
                    "test_dataloader.dataset.ann_file": annotations,
                    "test_dataloader.dataset.data_prefix.img": f"{ood.image_dir.resolve()}/",
                    "test_evaluator.ann_file": annotations,
                }
            },
        )

    columns = ["bbox_mAP", "ood_bbox_mAP", "bbox_AR@100", "ood_bbox_AR@100"]
    more = {"strength": args.strength, "pictures": args.pictures}
    _report(_runs(methods, args, more), measure, folder, columns)


def _schedule(epochs: int | None) -> dict[str, Any]:
    if epochs is None:
        return {}
    return {"train_cfg.max_epochs": epochs, "train_cfg.val_interval": epochs}


def _chosen(methods: Methods, args: argparse.Namespace) -> Methods:
    unknown = [name for name in args.only or () if name not in methods]
    if unknown:
        raise UserError(f"--only {unknown[0]}: the study has {', '.join(methods)}.")
    return {name: m for name, m in methods.items() if not args.only or name in args.only}


def _runs(methods: Methods, args: argparse.Namespace, more: dict[str, Any]) -> list[Run]:
    return [Run(n, seed, {**more, **m}) for seed in args.seeds for n, m in methods.items()]


def _report(
    runs: Sequence[Run],
    measure: Callable[[Run, Path], dict[str, float]],
    folder: Path,
    columns: Sequence[str],
) -> None:
    outcomes = run_study(runs, measure, folder, partial(print, flush=True))
    write_markdown(outcomes, columns, folder / "table.md")
    console = Console()
    console.print(study_table(outcomes, columns))
    console.print(f"in per cent, mean ± deviation over the seeds; also in {folder / 'table.md'}")


def run(args: argparse.Namespace) -> None:
    """Do the study of the command line."""
    detection = getattr(args, "detection", False)
    name = f"{args.study}-detection" if detection else args.study
    folder = Path(args.work_dir or Path("work_dirs") / name)
    job = study_long_tail if args.study == "long-tail" else study_shortcut
    (study_detection if detection else job)(args, folder)


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    return run_tool(run, parse_args(argv), goes_on_with="the same command")


if __name__ == "__main__":
    sys.exit(main())
