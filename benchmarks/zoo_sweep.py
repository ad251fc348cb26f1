#!/usr/bin/env python
"""Swap every classification loss of a zoo's configs at epsilon 0, and compare one training step."""

import argparse
import copy
import json
import logging
import random
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mmdet
import numpy as np
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config, ConfigDict
from mmengine.logging import MessageHub
from mmengine.registry import DefaultScope

from polyfocal import swapping
from polyfocal.errors import UserError

DESCRIPTION = """\
For every config of the installed MMDetection and every classification loss in it: build the model
as it is and with the losses' Poly-1 forms at epsilon 0, give both the same weights and the same
generated pictures, and compare all losses, all gradients and the decoded boxes of one step. Results
are added to the file one by one, and those that are there are not run again.

By default one config of each combination of head, slot and stock loss is run, the smallest."""

PAGE = Path(__file__).resolve().parents[1] / "docs" / "heads.md"
BEGIN, END = "<!-- sweep -->\n\n", "\n<!-- end of the sweep -->"
SIDE = 128


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every config, not one per combination")
    parser.add_argument("--only", metavar="REGEX", help="configs whose name matches")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", default=Path("work_dirs/zoo_sweep.jsonl"),
        help="where the results are (default work_dirs/zoo_sweep.jsonl)",
    )  # fmt: skip
    parser.add_argument("--page", action="store_true", help="write the table into docs/heads.md")
    return parser.parse_args(argv)


def zoo(only: str | None = None) -> Iterator[tuple[str, Any]]:
    """Every config of the installed MMDetection that is one of a model, by name."""
    root = Path(mmdet.__file__).parent / ".mim" / "configs"
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "_base_" in name or "/common/" in f"/{name}" or "tta" in path.stem:
            continue
        if only and not re.search(only, name):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                cfg = Config.fromfile(path)
        except Exception as error:
            yield name, error
            continue
        if "model" in cfg:
            yield name, cfg


def combination(found: swapping.Found) -> tuple[str, str, str]:
    """Head, slot and stock loss, with its form."""
    form = next((k for k in ("use_sigmoid", "use_mask") if found.loss.get(k)), "")
    return found.head, found.name, f"{swapping.name_of(found.loss['type'])} {form}".strip()


def _size(name: str) -> tuple[bool, int, int]:
    """Orders configs by how much they compute, as their names tell."""
    big = re.search(r"r101|x101|swin|hourglass|s101|r2-101|v3det|objects365|dcn|_l_|_x_", name)
    return big is not None, "r18" not in name and "_s_" not in name, len(name)


def small(cfg: Config) -> ConfigDict:
    """The model of a config without pretrained weights, for small pictures."""
    model = copy.deepcopy(cfg.model.get("detector", cfg.model))
    for node in _walk(model):
        for key, value in list(node.items()):
            if key == "pretrained" or (
                isinstance(value, dict) and value.get("type") == "Pretrained"
            ):
                node[key] = None
            elif key == "type" and value in ("SyncBN", "MMSyncBN", "NaiveSyncBN"):
                node[key] = "BN"
            elif key == "score_thr":
                node[key] = 0.0
            elif key in ("nms_pre", "max_per_img") and isinstance(value, int):
                node[key] = min(value, 200)
            elif key == "num_queries":
                node[key] = min(value, 100)  # chosen among the cells of a small picture
    preprocessor = model.get("data_preprocessor") or {}
    preprocessor.pop("batch_augments", None)
    return model


def _walk(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        yield node
        for value in list(node.values()):
            yield from _walk(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _walk(value)


def _classes(model: ConfigDict) -> int:
    counts = [
        node["num_classes"] for node in _walk(model) if isinstance(node.get("num_classes"), int)
    ]
    return min([count for count in counts if count > 1] or [1])


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def build(model: ConfigDict, state: dict[str, torch.Tensor] | None = None) -> torch.nn.Module:
    """The model, with random weights or those of another."""
    _seed(0)
    built = MODELS.build(copy.deepcopy(model))
    if state is not None:
        built.load_state_dict(state)
    return built


def step(built: Any, classes: int) -> dict[str, torch.Tensor]:
    """Every loss, every gradient and the decoded boxes of two generated pictures."""
    found = _step(built, classes, 0)
    # TOOD has one loss for the first epochs and one for the rest.
    if hasattr(getattr(built, "bbox_head", None), "initial_epoch"):
        built.zero_grad()
        later = _step(built, classes, built.bbox_head.initial_epoch)
        found |= {f"{name}, later": value for name, value in later.items()}
    return found


def _step(built: Any, classes: int, epoch: int) -> dict[str, torch.Tensor]:
    MessageHub.get_current_instance().update_info("epoch", epoch)
    masks = any("mask" in name for name, _ in built.named_modules())
    _seed(1)
    data = demo_mm_inputs(
        2, [[3, SIDE, SIDE]] * 2, num_classes=classes, num_items=[4, 2], with_mask=masks,
        with_semantic=masks,
    )  # fmt: skip
    built.train()
    with torch.no_grad():
        train = built.data_preprocessor(copy.deepcopy(data), training=True)
        for sample in train["data_samples"]:
            boxes = sample.gt_instances.bboxes
            sample.gt_instances.bboxes = boxes.to(next(built.parameters()).dtype)
    _seed(2)
    losses = built.loss(train["inputs"], train["data_samples"])
    found = {}
    total: Any = 0.0
    for name, value in losses.items():
        value = sum(v.sum() for v in value) if isinstance(value, list | tuple) else value.sum()
        found[f"loss {name}"] = value.detach()
        if "loss" in name and value.requires_grad:
            total = total + value
    total.backward()
    for name, weight in built.named_parameters():
        if weight.grad is not None:
            found[f"gradient {name}"] = weight.grad.clone()
    built.eval()
    with torch.no_grad():
        test = built.data_preprocessor(copy.deepcopy(data), training=False)
        _seed(3)
        for index, sample in enumerate(built.predict(test["inputs"], test["data_samples"])):
            instances = sample.get("pred_instances")
            for key in ("bboxes", "scores", "labels"):
                if instances is not None and key in instances:
                    found[f"predicted {key} {index}"] = instances[key]
    return found


def difference(stock: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> str | None:
    """What differs, if anything does."""
    if stock.keys() != ours.keys():
        return f"only in one of them: {', '.join(sorted(stock.keys() ^ ours.keys())[:3])}"
    for name, expected in stock.items():
        found = ours[name]
        if found.shape != expected.shape:
            return f"{name}: shape {tuple(found.shape)} for {tuple(expected.shape)}"
        if not expected.is_floating_point():
            if not torch.equal(found, expected):
                return f"{name} differs"
            continue
        share = 1e-4 if name.startswith("gradient") else 1e-5
        finite = expected.isfinite()
        if not torch.equal(found.isfinite(), finite):
            return f"{name}: not finite in one of them"
        scale = expected[finite].abs().max().item() if finite.any() else 0.0
        apart = (found - expected)[finite].abs().max().item() if finite.any() else 0.0
        if not apart <= share * scale + 1e-7:
            return f"{name}: {apart:.2g} apart at {scale:.2g}"
    return None


def check(cfg: Config, losses: list[swapping.Found]) -> dict[str, tuple[str, str]]:
    """Whether losses of a config, swapped, train what the stock ones do; and what not."""
    model = small(cfg)
    checked: dict[str, tuple[str, str]] = {}
    swapped = []
    for found in losses:
        try:
            _swap(model, [found])
            swapped.append(found)
        except UserError as error:
            checked[found.where] = "refused", str(error)
    if not swapped:
        return checked
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmdet"):
        classes = _classes(model)
        try:
            reference = build(model)
            state = copy.deepcopy(reference.state_dict())
            expected = step(reference, classes)
        except Exception as error:  # of a model that is not ours
            reason = f"the stock model: {type(error).__name__}: {str(error)[:120]}"
            return checked | {found.where: ("not run", reason) for found in swapped}
        del reference

        def of(some: list[swapping.Found]) -> tuple[str, str]:
            try:
                apart = difference(expected, step(build(_swap(model, some), state), classes))
            except UserError as error:
                return "refused", str(error)
            except Exception as error:
                return "failing", f"{type(error).__name__}: {str(error)[:200]}"
            return ("identical", "") if apart is None else ("failing", apart)

        # All at once; one by one only where that is not the same.
        result = of(swapped)
        for found in swapped:
            alone = result[0] == "identical" or len(swapped) == 1
            checked[found.where] = result if alone else of([found])
    return checked


def _swap(model: ConfigDict, losses: list[swapping.Found]) -> ConfigDict:
    slots = [found.where.removeprefix("detector.") for found in losses]
    return swapping.swap(Config(dict(model=model)), "poly1", slots=slots, epsilon=0.0).model


def chosen(everything: bool, only: str | None) -> Iterator[tuple[str, Any, list[swapping.Found]]]:
    """Configs and the losses of theirs to run."""
    if everything:
        for name, cfg in zoo(only):
            broken = isinstance(cfg, Exception)
            yield name, cfg, [] if broken else swapping.find_losses(cfg.model)
        return
    best: dict[tuple[str, str, str], str] = {}
    for name, cfg in zoo(only):
        if isinstance(cfg, Exception):
            yield name, cfg, []
            continue
        for found in swapping.find_losses(cfg.model):
            key = combination(found)
            if key not in best or _size(name) < _size(best[key]):
                best[key] = name
    for name in sorted(set(best.values()), key=_size):
        ((_, cfg),) = zoo(f"^{re.escape(name)}$")
        yield name, cfg, swapping.find_losses(cfg.model)


def run(args: argparse.Namespace) -> None:
    """The job."""
    logging.disable(logging.INFO)  # of every weight, how it was initialised
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = {r["config"] for r in results(args.out)}
    for name, cfg, losses in chosen(args.all, args.only):
        if name in done:
            continue
        common = {"config": name, "seconds": 0.0}
        if isinstance(cfg, Exception):
            reason = f"the config: {type(cfg).__name__}: {str(cfg)[:120]}"
            _add(args.out, [common | dict(slot="", status="not run", reason=reason)])
            continue
        start = time.monotonic()
        checked = check(cfg, losses)
        common["seconds"] = round(time.monotonic() - start, 1)
        rows = []
        for found in losses:
            head, slot, stock = combination(found)
            status, reason = checked[found.where]
            row = dict(slot=found.where, head=f"{head}.{slot}", stock=stock, status=status)
            rows.append(common | row | dict(reason=reason))
            print(f"{status:9} {name} {found.where} {reason}", flush=True)
        _add(args.out, rows)


def _add(out: Path, rows: list[dict[str, Any]]) -> None:
    # In one piece, so that a config is there with all its losses or not at all.
    with out.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def results(out: Path) -> list[dict[str, Any]]:
    """What a file of results holds; a line that was cut off is run again."""
    found = []
    for line in out.read_text(encoding="utf-8").splitlines() if out.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The results as docs/heads.md shows them."""
    slots = [r for r in found if r["slot"]]
    counts = Counter(r["status"] for r in slots)
    lines = [
        f"{len({r['config'] for r in slots})} configs, {len(slots)} losses in them:"
        f" {counts['identical']} identical, {counts['refused']} refused, {counts['failing']}"
        f" failing, {counts['not run']} whose stock model did not run.",
        "",
        "| head and slot | stock loss | result |",
        "|---|---|---|",
    ]
    rows: dict[tuple[str, str], list[str]] = {}
    for r in slots:
        shown = r["status"] if r["status"] == "identical" else f"{r['status']}: {r['reason']}"
        rows.setdefault((r["head"], r["stock"]), []).append(shown.replace("|", "\\|"))
    for (head, stock), states in sorted(rows.items()):
        counted = [
            text if count == 1 else f"{text} ({count})" for text, count in Counter(states).items()
        ]
        lines.append(f"| `{head}` | `{stock}` | {'; '.join(counted)} |")
    return "\n".join(lines) + "\n"


def write_page(out: Path) -> None:
    """Puts the table into docs/heads.md."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + BEGIN + table(results(out)) + END + rest.split(END)[1], "utf-8")


def main(argv: list[str] | None = None) -> int:
    """The command."""
    args = parse_args(argv)
    if args.page:
        write_page(args.out)
    else:
        run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
