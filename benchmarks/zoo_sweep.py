#!/usr/bin/env python
"""Swap every classification loss of the zoos' configs at epsilon 0, and compare a training step."""

import argparse
import copy
import hashlib
import importlib.util
import json
import logging
import re
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import zoo_models
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope

from polyfocal import swapping
from polyfocal.errors import UserError

DESCRIPTION = """\
For every config of the installed MMDetection and MMDetection3D and every classification loss in it:
build the model as it is and with the losses' Poly-1 forms at epsilon 0, give both the same weights
and the same generated data, and compare all losses, all gradients and the decoded boxes of one
step. What feeds the heads is made small; configs that are the same model then are run once.
Results are added to the file one by one, and those that are there are not run again.

By default one config of each combination of head, slot and stock loss is run, with --all then all
others."""

PAGE = Path(__file__).resolve().parents[1] / "docs" / "heads.md"
BEGIN, END = "<!-- sweep -->\n\n", "\n<!-- end of the sweep -->"
FRAMEWORKS = {"mmdet": "MMDetection", "mmdet3d": "MMDetection3D"}
LOSSES, GRADIENTS = 1e-5, 1e-4  # shares that may be apart in float32
EXACT = 1e-8  # and in float64
MOST_SECONDS = 300  # of computing, for one config


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every config, not one per combination")
    parser.add_argument("--only", metavar="REGEX", help="configs whose name matches")
    parser.add_argument(
        "--retry", action="store_true", help="run again what failed and what did not run"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", default=Path("work_dirs/zoo_sweep.jsonl"),
        help="where the results are (default work_dirs/zoo_sweep.jsonl)",
    )  # fmt: skip
    parser.add_argument("--page", action="store_true", help="write the table into docs/heads.md")
    return parser.parse_args(argv)


def files() -> dict[str, Path]:
    """The configs of the installed frameworks by name, without what is no model's of its own."""
    found = {}
    for framework in FRAMEWORKS:
        spec = importlib.util.find_spec(framework)
        if spec is None or spec.origin is None:
            continue
        root = Path(spec.origin).parent / ".mim" / "configs"
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if not re.search(r"_base_|^common/|tta|override_category", name):
                found[f"{framework}::{name}"] = path
    return found


def zoo(only: str | None = None) -> Iterator[tuple[str, Any]]:
    """Every config of the installed frameworks that has a model, by name."""
    for name, path in files().items():
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


class Sweep:
    """Compares configs, and remembers the results of the models that it compared.

    Args:
        rows: results that are there already.
    """

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.known = {(r["model"], r["slot"]): r for r in rows if r.get("model")}

    def rows(self, name: str, cfg: Any) -> Iterator[dict[str, Any]]:
        """The results of one config, a row for each of its losses."""
        if isinstance(cfg, Exception):
            reason = f"the config: {type(cfg).__name__}: {str(cfg)[:200]}"
            yield dict(config=name, slot="", status="not run", reason=reason)
            return
        for prefix, model in zoo_models.parts(cfg.model):
            if "type" not in model:
                reason = "the config: it says no type of a model"
                yield dict(config=name, slot="", status="not run", reason=reason)
                continue
            losses = swapping.find_losses(model)
            if not losses:
                yield dict(config=name, slot="", status="none", reason="")
            start = time.monotonic()
            key, checked = self._checked(cfg, model, losses)
            seconds = round(time.monotonic() - start, 1)
            for found in losses:
                head, slot, stock = combination(found)
                status, reason, of = checked[found.where]
                row = dict(
                    config=name, slot=prefix + found.where, head=f"{head}.{slot}", stock=stock,
                    status=status, reason=reason, model=key, same_as=of, seconds=seconds,
                )  # fmt: skip
                self.known.setdefault((key, found.where), row)
                yield row

    def _checked(
        self, cfg: Config, model: ConfigDict, losses: list[swapping.Found]
    ) -> tuple[str, dict[str, tuple[str, str, str]]]:
        scope = cfg.get("default_scope") or "mmdet"
        with DefaultScope.overwrite_default_scope(scope):
            text = json.dumps(zoo_models.small(model).to_dict(), sort_keys=True, default=str)
            key = hashlib.sha256(text.encode()).hexdigest()[:16]
            known = [self.known.get((key, found.where)) for found in losses]
            if losses and all(known):
                same = [(r["status"], r["reason"], r["same_as"] or r["config"]) for r in known if r]
                return key, dict(zip([f.where for f in losses], same, strict=True))
            checked: dict[str, tuple[str, str]] = {}
            # The smallest that the stock losses can train.
            for size in zoo_models.SIZES:
                checked = check(zoo_models.small(model, size), losses)
                if all(status != "not run" for status, _ in checked.values()):
                    break
        return key, {where: (*result, "") for where, result in checked.items()}


def check(model: ConfigDict, losses: list[swapping.Found]) -> dict[str, tuple[str, str]]:
    """Whether losses of a model, swapped, train what the stock ones do; and what not."""
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
    try:
        with _limited():
            reference = zoo_models.build(model)
            state = copy.deepcopy(reference.state_dict())
            expected = zoo_models.step(reference, model)
    except Exception as error:  # of a model that is not ours
        reason = f"the stock model: {type(error).__name__}: {str(error)[:200]}"
        return checked | {found.where: ("not run", reason) for found in swapped}
    del reference

    def of(some: list[swapping.Found]) -> tuple[str, str]:
        try:
            with _limited():
                return _compare(model, _swap(model, some), state, expected)
        except UserError as error:
            return "refused", str(error)
        except Exception as error:
            return "failing", f"{type(error).__name__}: {str(error)[:200]}"

    # All at once; one by one only where that is not the same.
    result = of(swapped)
    for found in swapped:
        alone = result[0] == "identical" or len(swapped) == 1
        checked[found.where] = result if alone else of([found])
    return checked


def _compare(
    stock: ConfigDict, ours: ConfigDict, state: dict[str, torch.Tensor], expected: zoo_models.Step
) -> tuple[str, str]:
    """Compares in float32, and where that differs by more than it should in float64."""
    found = zoo_models.step(zoo_models.build(ours, state), ours)
    apart = zoo_models.difference(expected, found, LOSSES, GRADIENTS)
    if apart is None:
        return "identical", next((k for k in found if k.startswith(zoo_models.NOT_DECODED)), "")
    try:
        with zoo_models.in_float64():
            exact = zoo_models.step(zoo_models.build(stock, state), stock)
            exact_ours = zoo_models.step(zoo_models.build(ours, state), ours)
    except Exception as error:
        return "failing", f"{apart}; not run in float64: {type(error).__name__}: {str(error)[:120]}"
    in_float64 = zoo_models.difference(exact, exact_ours, EXACT, EXACT)
    if in_float64 is not None:
        return "failing", f"{apart}; in float64 {in_float64}"
    own, of_stock = zoo_models.farthest(exact, found), zoo_models.farthest(exact, expected)
    rounding = f"{apart}; from float64 {own:.1g}, the stock model {of_stock:.1g}"
    # What rounding does is no less where the stock loss stands.
    return ("identical" if own <= 3 * of_stock + GRADIENTS else "failing"), f"float64: {rounding}"


class _limited:
    """Ends what computes for too long."""

    def __enter__(self) -> None:
        signal.signal(signal.SIGPROF, self._stop)
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)

    @staticmethod
    def _stop(*_: object) -> None:
        raise TimeoutError(f"more than {MOST_SECONDS} s of computing")


def _swap(model: ConfigDict, losses: list[swapping.Found]) -> ConfigDict:
    slots = [found.where for found in losses]
    return swapping.swap(Config(dict(model=model)), "poly1", slots=slots, epsilon=0.0).model


def chosen(everything: bool, only: str | None) -> Iterator[tuple[str, Any]]:
    """Configs in the order in which they are run."""
    configs = dict(zoo(only))
    best: dict[tuple[str, str, str], str] = {}
    for name, cfg in configs.items():
        if isinstance(cfg, Exception):
            best["", "", name] = name
            continue
        for found in swapping.find_losses(cfg.model):
            key = combination(found)
            if key not in best or _size(name) < _size(best[key]):
                best[key] = name
    first = sorted(set(best.values()), key=_size)
    rest = sorted(configs.keys() - set(first), key=_size) if everything else []
    for name in (*first, *rest):
        yield name, configs.pop(name)


def run(args: argparse.Namespace) -> None:
    """The job."""
    logging.disable(logging.INFO)  # of every weight, how it was initialised
    warnings.simplefilter("ignore")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = results(args.out)
    if args.retry:
        again = {r["config"] for r in rows if r["status"] in ("failing", "not run")}
        rows = [r for r in rows if r["config"] not in again]
        args.out.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    done = {r["config"] for r in rows}
    sweep = Sweep(rows)
    for name, cfg in chosen(args.all, args.only):
        if name in done:
            continue
        found = list(sweep.rows(name, cfg))
        for row in found:
            print(f"{row['status']:9} {name} {row['slot']} {row['reason']}", flush=True)
        _add(args.out, found)


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
    lines = ["| | configs | of |", "|---|---|---|"]
    for framework, title in FRAMEWORKS.items():
        run = {r["config"] for r in found if r["config"].startswith(f"{framework}::")}
        of = sum(name.startswith(f"{framework}::") for name in files())
        lines.append(f"| {title} | {len(run)} | {of} |")
    without = sum(r["status"] == "none" for r in found)
    unread = [r for r in found if not r["slot"] and r["status"] == "not run"]
    lines += [
        "",
        f"{len(slots)} losses in them: {counts['identical']} identical, {counts['refused']} refused"
        f" with a sentence, {counts['failing']} failing, {counts['not run']} whose stock model did"
        f" not run. {without} configs have no classification loss with a config of its own, and"
        f" {len(unread)} cannot be read here.",
        "",
        "| why a stock model or a config did not run | losses or configs |",
        "|---|---|",
    ]
    reasons = Counter(_short(r["reason"]) for r in found if r["status"] == "not run")
    lines += [f"| {reason} | {count} |" for reason, count in reasons.most_common()]
    lines += ["", "| head and slot | stock loss | result |", "|---|---|---|"]
    rows: dict[tuple[str, str], list[str]] = {}
    for r in slots:
        state = r["status"]
        if state == "refused":
            state = f"refused: {_short(r['reason'])}"
        elif state == "identical" and r["reason"].startswith("float64"):
            state = "identical in float64"
        elif state in ("identical", "failing") and r["reason"]:
            state += f" ({_short(r['reason'])})"
        rows.setdefault((r["head"], r["stock"]), []).append(state)
    for (head, stock), states in sorted(rows.items()):
        counted = [
            text if count == 1 else f"{count} {text}" for text, count in Counter(states).items()
        ]
        lines.append(f"| `{head}` | `{stock}` | {'; '.join(counted)} |")
    return "\n".join(lines) + "\n"


def _short(reason: str) -> str:
    """A reason without what it repeats, and without paths of the machine."""
    reason = re.sub(r"^\w+\.\w+ (gives|is) |^the (stock model|config): |: take .*", "", reason)
    reason = re.sub(r"^\w+(Error|Exception): ?", "", reason).strip() or "an assertion"
    reason = re.sub(r'"?/\S+', "...", reason.splitlines()[0])
    return reason[:100].strip().replace("|", "\\|")


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
