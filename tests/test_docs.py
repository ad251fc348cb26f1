"""The documentation: it builds without a warning, needs no network, and what it names is there."""

import copy
import inspect
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import polyfocal.losses
from polyfocal.demo import DigitScenes
from polyfocal.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
ROWS = (torch.zeros(2, 3), torch.tensor([0, 1]))
PAGES = sorted((ROOT / "docs").rglob("*.md"))
LOSSES = sorted(polyfocal.losses.LOSSES)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; strict, so that links and pictures that lead nowhere fail."""
    for needed in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(needed, reason="needs the extra docs: pip install 'polyfocal[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_in_the_site(site):
    for page in PAGES:
        name = page.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
        assert (site / name.replace("README", "index")).is_file()


def test_the_site_asks_no_other_host_for_anything(site):
    loads = re.compile(
        r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>"
    )
    for page in site.rglob("*.html"):
        assert not loads.findall(page.read_text(encoding="utf-8")), page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//", style.read_text(encoding="utf-8"))


def test_formulas_are_mathml(site):
    page = (site / "losses" / "focal.html").read_text(encoding="utf-8")
    assert page.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">') == 1
    for page in site.rglob("*.html"):
        assert not re.search(r'class="arithmatex"|\$\$', page.read_text(encoding="utf-8")), page


def test_docstrings_are_markdown(site):
    pages = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    assert not re.search(r":(?:class|func|meth|mod|data|math):|\.\. math", pages)
    assert 'id="polyfocal.losses.Poly1FocalLoss"' in pages
    assert 'id="polyfocal.losses.functional.poly1_focal_loss"' in pages


def test_a_file_outside_the_docs_has_a_page(site):
    shown = (site / "source" / "configs" / "retinanet_poly1.py.html").read_text(encoding="utf-8")
    assert "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py" in shown
    assert '"source/configs/retinanet_poly1.py.html"' in (site / "configs.html").read_text("utf-8")


def page_of(loss):
    """The page that the table of docs/losses/README.md gives for a loss."""
    table = (ROOT / "docs" / "losses" / "README.md").read_text(encoding="utf-8")
    pages = re.findall(rf"^\| `{loss}` \|.*\]\((\w+)\.md\) \|$", table, flags=re.MULTILINE)
    assert len(pages) == 1, f"docs/losses/README.md has {len(pages)} pages for {loss}"
    return ROOT / "docs" / "losses" / f"{pages[0]}.md"


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_has_a_page(loss):
    text = page_of(loss).read_text(encoding="utf-8")
    assert "$$" in text, "a formula"
    headings = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert {"Parameters", "When", "What we measured"} <= set(headings), headings
    assert "Source" in text
    assert page_of(loss).name in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_every_setting_of_a_loss_is_on_its_page():
    for loss in LOSSES:
        text = page_of(loss).read_text(encoding="utf-8")
        for name in inspect.signature(polyfocal.losses.LOSSES[loss]).parameters:
            assert f"`{name}`" in text, f"{page_of(loss).name} does not say what {name} is"


def test_quoted_numbers_were_measured():
    pages = [ROOT / "docs" / f"{name}.md" for name in ("results", "performance", "calibration")]
    pages += (ROOT / "docs" / "results").glob("*.md")
    measured = "".join(page.read_text(encoding="utf-8") for page in pages)
    measured = set(re.findall(r"\d+\.\d+", measured))
    for loss in LOSSES:
        text = page_of(loss).read_text(encoding="utf-8")
        section = text.split("## What we measured\n")[1].split("\nSource")[0]
        quoted = set(re.findall(r"\d+\.\d+", section))
        assert quoted <= measured, f"{page_of(loss).name}: {quoted - measured}"


def sides(block):
    """What a diff shows before and after."""
    lines = block.splitlines()
    for sign in "-+":
        yield "\n".join(line[1:] for line in lines if line[:1] in ("", " ", sign)) + "\n"


MIGRATIONS = re.findall(
    r"```diff\n(.*?)```", (ROOT / "docs" / "migrate.md").read_text(encoding="utf-8"), re.DOTALL
)


def test_no_migration_is_left_out():
    assert len(MIGRATIONS) == 7


@pytest.mark.parametrize(
    ("framework", "block", "at", "old", "new"),
    [
        ("mmdet", 0, "bbox_head", "FocalLoss", "Poly1FocalLoss"),
        ("mmdet", 1, "bbox_head", "FocalLoss", "CyclicalFocalLoss"),
        ("mmdet", 2, "roi_head.bbox_head", "CrossEntropyLoss", "Poly1CrossEntropyLoss"),
        ("mmdet3d", 3, "bbox_head", "FocalLoss", "Poly1FocalLoss"),
    ],
)
def test_migrated_configs(framework, block, at, old, new, tmp_path):
    pytest.importorskip(f"{framework}.registry", reason=f"needs {framework}")
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    models = []
    for i, text in enumerate(sides(MIGRATIONS[block])):
        (tmp_path / f"{i}.py").write_text(text, encoding="utf-8")
        config = Config.fromfile(tmp_path / f"{i}.py")
        with DefaultScope.overwrite_default_scope(framework):
            models.append(MODELS.build(config.model))
    before, after = (model.get_submodule(at).loss_cls for model in models)
    assert (type(before).__name__, type(after).__name__) == (old, new)
    assert type(after).__module__.startswith("polyfocal")
    models[1].load_state_dict(models[0].state_dict())  # strict: the same weights


def test_the_shown_loss_is_what_is_printed():
    shown = (ROOT / "docs" / "migrate.md").read_text(encoding="utf-8")
    loss = polyfocal.Poly1FocalLoss(epsilon=1.0, use_sigmoid=True)
    assert f"\n{loss}\n" in shown


def test_migrated_detectron2_lazy_config():
    pytest.importorskip("detectron2.config", reason="needs Detectron2, see docs/detectron2.md")
    from detectron2.config import instantiate

    models = []
    for text in sides(MIGRATIONS[4]):
        names = {}
        exec(text, names)
        models.append(instantiate(names["model"]))
    assert isinstance(models[1].cls_loss, polyfocal.Poly1FocalLoss)
    models[1].load_state_dict(models[0].state_dict())


def test_migrated_detectron2_yaml(tmp_path, monkeypatch):
    pytest.importorskip("detectron2.config", reason="needs Detectron2, see docs/detectron2.md")
    from detectron2 import model_zoo
    from detectron2.modeling import build_model

    base = model_zoo.get_config_file("Base-RetinaNet.yaml")
    models = []
    monkeypatch.chdir(tmp_path)
    for config, script in zip(sides(MIGRATIONS[5]), sides(MIGRATIONS[6]), strict=True):
        Path("retinanet.yaml").write_text(config.replace("Base-RetinaNet.yaml", base))
        names = {}
        exec(script, names)
        names["cfg"].MODEL.DEVICE = "cpu"
        models.append(build_model(names["cfg"]))
    assert isinstance(models[1].cls_loss, polyfocal.Poly1FocalLoss)
    models[1].load_state_dict(models[0].state_dict())


TROUBLE = " ".join((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").split())
QUOTED = [
    quoted.removeprefix("TypeError: ").partition(" ...")[0]
    for quoted in re.findall(r"`([^`]+)`", TROUBLE)
    if len(quoted.split()) > 4
]
SIGMOID = dict(type="polyfocal.FocalLoss", use_sigmoid=True)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: polyfocal.Poly1FocalLoss(use_sigmoid=True),
        lambda: polyfocal.Poly1FocalLoss(epsilon=1.0),
        lambda: polyfocal.CyclicalFocalLoss(use_sigmoid=True, gamma=2.0),
        lambda: polyfocal.CyclicalFocalLoss(use_sigmoid=True)(*ROWS),
        lambda: polyfocal.DebiasedFocalLoss(use_sigmoid=True)(*ROWS),
        lambda: polyfocal.FocalLoss(use_sigmoid=True)(ROWS[0], torch.tensor([0, 4])),
        lambda: polyfocal.FocalLoss(use_sigmoid=True)(ROWS[0], ROWS[1].unsqueeze(1)),
        lambda: polyfocal.FocalLoss(use_sigmoid=True, reduction="sum")(*ROWS, avg_factor=2),
        lambda: polyfocal.FocalLoss(use_sigmoid=True, class_weight="balanced"),
    ],
)
def test_troubleshooting_quotes_what_is_said(mistake):
    with pytest.raises((UserError, TypeError)) as said:
        mistake()
    assert str(said.value).startswith(tuple(QUOTED)), str(said.value)


def test_commands_name_files_and_options_that_exist():
    command_line = ROOT / "plugin" / "polyfocal" / "experiments" / "command_line.py"
    shared = command_line.read_text(encoding="utf-8") + '"--help"'
    # tools/make_demo_data.py has an option for each setting of the pictures.
    shared += "".join(f'"--{field.name.replace("_", "-")}"' for field in fields(DigitScenes))
    commands = 0
    for page in [ROOT / "README.md", *PAGES]:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"^polyfocal (\w+)", r"tools/\1.py", line)
                tool = re.search(r"\b((?:tools|benchmarks)/\w+\.py)([^#]*)", line)
                if tool is None:
                    continue
                commands += 1
                command = ROOT / "plugin" / "polyfocal" / "commands" / Path(tool[1]).name
                files = [file for file in (ROOT / tool[1], command) if file.is_file()]
                assert files, f"{page.name}: {line}"
                source = "".join(file.read_text(encoding="utf-8") for file in files) + shared
                options = re.sub(r'"[^"]*"', "", tool[2])  # without those of another program
                for option in re.findall(r"(?<!\S)--[\w-]+", options):
                    assert f'"{option}"' in source, f"{page.name}: {line}"
        for config in re.findall(r"\bconfigs/[\w/]+\.(?:py|yaml)", text):
            assert (ROOT / config.replace("CONFIG", "retinanet_poly1")).is_file(), config
    assert commands > 40


@pytest.mark.parametrize(
    "head",
    [
        dict(type="mmdet.Shared2FCBBoxHead", num_classes=3, loss_cls=SIGMOID),
        dict(type="mmdet.FCNMaskHead", num_classes=3, loss_mask=SIGMOID),
        dict(type="mmdet.GFLHead", num_classes=3, in_channels=8, loss_cls=SIGMOID),
        dict(
            type="mmdet3d.Anchor3DHead",
            num_classes=3,
            in_channels=8,
            anchor_generator=dict(type="Anchor3DRangeGenerator", ranges=[[0, -40, -1, 70, 40, -1]]),
            loss_cls=SIGMOID,
        ),
    ],
    ids=lambda head: head["type"],
)
def test_troubleshooting_quotes_what_heads_say(head):
    framework = head["type"].partition(".")[0]
    pytest.importorskip(f"{framework}.models", reason=f"needs {framework}")
    from mmengine.registry import MODELS, DefaultScope

    scope = DefaultScope.overwrite_default_scope(framework)
    with scope, pytest.raises(UserError) as said:
        MODELS.build(copy.deepcopy(head))
    assert str(said.value).startswith(tuple(QUOTED)), str(said.value)
